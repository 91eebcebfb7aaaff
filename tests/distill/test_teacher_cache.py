"""A teacher on disk: the run that it would have given, and a line for whatever it is not of."""

import json
import os
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file

from hybridize.checkpoint import load_model, open_checkpoint
from hybridize.core import digest
from hybridize.data import TrainBlocks
from hybridize.distill import distill, plan_lesson, teach, teacher_cache, teaching
from hybridize.distill.cost import Machine, run_cost
from hybridize.distill.loop import seed_of
from hybridize.distill.losses import LOSSES
from hybridize.distill.run import build_stages
from hybridize.distill.signals import Head, Signals
from hybridize.distill.teacher_cache import CachedSignals, open_cache
from hybridize.errors import CheckpointError, ConfigError
from hybridize.lineage import read_lineage
from hybridize.storage import file_sha256, partial_folder
from tests.distill.chats import tiny_tokenizer
from tests.distill.pair import tiny_tokens
from tests.distill.test_distill import Stop, hashes, rows_of
from tests.distill.test_sharding import run_and_stop
from tests.tiny import tiny_base
from tests.tolerances import assert_close

KL = {"name": "kl", "tokens": 5 * 64, "seq_tokens": 16, "rows": 2, "accumulate": 2, "lr": 1e-3, "save_tokens": 64}
ALIGN = {"name": "align", "tokens": 2 * 64, "seq_tokens": 16, "rows": 4}
TOP = {**KL, "losses": [{"name": "top_k_kl", "k": 5}, {"name": "cross_entropy", "weight": 0.1}]}
LONGER = {"tokens": 6 * 64}
CPU = torch.device("cpu")


def stop_at(label, tokens):
    def progress(found, done, total):
        if found == label and done >= tokens:
            raise Stop

    return progress


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch):
    # Six rows of hidden states.
    monkeypatch.setattr(teaching, "SHARD_BYTES", 6 * 16 * 32 * 4 + 100)


@pytest.fixture(scope="module")
def cache(folders, tmp_path_factory):
    """Of a run of two stages, its second a step longer than the runs that read it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(teaching, "SHARD_BYTES", 6 * 16 * 32 * 4 + 100)
        return teach(folders[1], [ALIGN, {**KL, **LONGER}], tiny_tokens(), tmp_path_factory.mktemp("cache") / "cache")


@pytest.mark.parametrize(
    ("stage", "keep"),
    [
        (KL, "hidden"),
        pytest.param({**KL, "dtype": "bf16"}, "hidden", marks=pytest.mark.slow),
        pytest.param({**TOP, "dtype": "bf16", "documents": "reset"}, "top_k", marks=pytest.mark.slow),
    ],
    ids=["fp32", "bf16", "top_k"],
)
def test_a_run_beside_its_teacher_and_a_run_on_the_cache_end_with_the_same_bytes(folders, tmp_path, stage, keep):
    live = distill(folders[1], [stage], tiny_tokens(), tmp_path / "live")
    cache = teach(folders[1], [stage], tiny_tokens(), tmp_path / "cache", keep=keep)
    out, away = tmp_path / "out", tmp_path / "away"
    folders[0].rename(away)
    try:
        # No teacher is loaded: there is none. Stopped once, with rows of a step in two shards and in two micro-batches.
        if keep == "hidden":
            with pytest.raises(Stop):
                distill(folders[1], [stage], tiny_tokens(), out, teacher=cache, progress=stop_at("distill kl", 3 * 64))
            assert len(list((partial_folder(out) / "scratch").glob("state-*"))) == 2
        distill(folders[1], [stage], tiny_tokens(), out, teacher=cache, resume=True)
    finally:
        away.rename(folders[0])
    assert file_sha256(out / "model.safetensors") == file_sha256(live / "model.safetensors")
    assert [row["loss"] for row in rows_of(out)] == [row["loss"] for row in rows_of(live)]
    record = read_lineage(out)["distill"][0]
    assert record["cache"] == open_cache(cache).hash
    assert record["teacher"] == open_cache(cache).manifest["teacher"]["fingerprint"]


@pytest.mark.slow
def test_align_reads_the_base_and_rows_may_be_divided_otherwise(folders, cache, tmp_path):
    live = distill(folders[1], [ALIGN, KL], tiny_tokens(), tmp_path / "live")
    same = distill(folders[1], [ALIGN, KL], tiny_tokens(), tmp_path / "same", teacher=cache)
    assert file_sha256(same / "model.safetensors") == file_sha256(live / "model.safetensors")
    other = {**KL, "rows": 4, "accumulate": 1}
    out = distill(folders[1], [ALIGN, other], tiny_tokens(), tmp_path / "out", teacher=cache)
    one, two = (load_file(folder / "model.safetensors") for folder in (live, out))
    for name in one:
        assert_close(two[name], one[name], "fp32", grad=True)


def test_align_without_the_base_is_refused(folders, cache, tmp_path):
    folders[0].rename(tmp_path / "away")
    try:
        with pytest.raises(ConfigError, match=r"stage 1 \(align\): reads more .* is not there; put it there, or leave the stage"):
            distill(folders[1], [ALIGN, KL], tiny_tokens(), tmp_path / "none", teacher=cache)
    finally:
        (tmp_path / "away").rename(folders[0])


def test_rows_shifted_by_one_are_found_and_are_not_the_teachers(folders, cache, monkeypatch):
    batch = TrainBlocks(tiny_tokens(), 16, 4, seed_of(0, 1), 1).batch(1)
    cached = CachedSignals(open_cache(cache), 2, CPU)
    with torch.no_grad():
        live = torch.cat([load_model(folders[0]).model(part.ids).last_hidden_state for part in batch.split(2)])
    # Rows 4 to 7: two of one shard, two of the next.
    assert torch.equal(cached.signals(batch).hidden, live)
    assert torch.equal(cached.head.weight, load_model(folders[0]).lm_head.weight)
    plain = teacher_cache.read_rows
    monkeypatch.setattr(teacher_cache, "read_rows", lambda info, a, b: plain(info, *((a - 1, b - 1) if a else (a + 1, b + 1))))
    with pytest.raises(CheckpointError, match="row 4 of stage 2 is of other tokens than this run's; write it again"):
        cached.signals(batch)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "equal", lambda a, b: True)
        shifted = cached.signals(batch).hidden
    with pytest.raises(AssertionError):
        assert_close(shifted, live, "fp32")


@pytest.mark.parametrize(
    ("stages", "more", "said"),
    [
        ([ALIGN, KL], {"seed": 1}, "seed is 0 in the cache, expected 1 as in this run"),
        ([ALIGN, KL], {"text": tiny_tokens(seed=1)}, "the text's hash is 'random-0-4000' in the cache, expected 'random-1-4000'"),
        ([ALIGN, {**KL, "seq_tokens": 32}], {}, r"stage 2 \(kl\): seq_tokens is 16 in the cache, expected 32"),
        ([ALIGN, {**KL, "documents": "reset"}], {}, "documents is 'joined' in the cache, expected 'reset'"),
        ([ALIGN, {**KL, "dtype": "bf16"}], {}, "dtype is 'fp32' in the cache, expected 'bf16'"),
        ([ALIGN, {**KL, "tokens": 7 * 64}], {}, "holds 24 rows, expected at least 28 for 448 tokens"),
        ([KL], {}, r"holds rows of stage 2 \(kl\), expected stage 1 \(kl\) too"),
        (
            [ALIGN, {**KL, "losses": [{"name": "features"}]}], {},
            "the loss 'features' needs the teacher's layers, expected .* give the teacher's own directory",
        ),
    ],
    ids=["seed", "text", "seq_tokens", "documents", "dtype", "tokens", "stage", "loss"],
)  # fmt: skip
def test_what_a_cache_is_not_of_is_said_before_any_work(folders, cache, tmp_path, stages, more, said):
    text = more.pop("text", None) or tiny_tokens()
    with pytest.raises(ConfigError, match=said) as error:
        distill(folders[1], stages, text, tmp_path / "out", teacher=cache, **more)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def flip(path):
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def edit(path, **changes):
    manifest = json.loads(path.read_text()) | changes
    manifest.pop("sha256")
    path.write_text(json.dumps({**manifest, "sha256": digest(manifest)}))


def outside(cache):
    files = json.loads((cache / "teacher.json").read_text())["files"]
    return {"files": {"../x": {"bytes": 1, "sha256": ""}} | files}


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda c: flip(c / "stage-02-00003.safetensors"), r"00003.safetensors: is damaged \(sha256 differs"),
        (lambda c: flip(c / "head.safetensors"), "head.safetensors: is damaged"),
        (lambda c: (c / "stage-02-00001.safetensors").write_bytes(b"short"), "is absent or does not have its"),
        (lambda c: (c / "stage-02-00001.safetensors").unlink(), "is absent or does not have its"),
        (lambda c: (c / "teacher.json").unlink(), "has no teacher.json, so that the cache is not complete"),
        (lambda c: (c / "teacher.json").write_text("{}"), "teacher.json: is damaged"),
        (lambda c: edit(c / "teacher.json", format=2), "format is 2, expected 1"),
        (lambda c: edit(c / "teacher.json", stages=[{"stage": 2}]), "a stage has name None, expected as"),
        (lambda c: edit(c / "teacher.json", files={}), "a file has sha256 None, expected as"),
        (lambda c: edit(c / "teacher.json", row_order=0), "row_order is 0 in the cache, expected 1"),
        (lambda c: edit(c / "teacher.json", hidden_size=16), "its tensors are not those that teacher.json speaks of"),
        (lambda c: edit(c / "teacher.json", files={"x": {"bytes": 1, "sha256": ""}}), "has no file stage-02-00000.safetensors"),
        (lambda c: edit(c / "teacher.json", **outside(c)), "expected a plain name inside the folder"),
    ],
    ids=[
        "shard",
        "head",
        "short",
        "absent",
        "manifest",
        "empty",
        "format",
        "stage",
        "none",
        "order",
        "shape",
        "files",
        "outside",
    ],
)
def test_a_damaged_cache_is_one_line(folders, cache, tmp_path, damage, said):
    shutil.copytree(cache, tmp_path / "cache")
    damage(tmp_path / "cache")
    with pytest.raises((CheckpointError, ConfigError), match=said) as error:
        distill(folders[1], [ALIGN, KL], tiny_tokens(), tmp_path / "out", teacher=tmp_path / "cache")
    assert "\n" not in str(error.value)
    assert not partial_folder(tmp_path / "out").exists()


def test_a_resumed_run_keeps_its_cache_and_a_resumed_lesson_its_teacher(folders, tmp_path):
    """Teachers alike in all but their weights."""
    other = tmp_path / "other"
    shutil.copytree(folders[0], other)
    flip(other / "model.safetensors")
    assert open_checkpoint(other).hash == open_checkpoint(folders[0]).hash
    caches = [teach(folders[1], [KL], tiny_tokens(), tmp_path / f"c{i}", teacher=t) for i, t in enumerate((folders[0], other))]
    with pytest.raises(Stop):
        distill(folders[1], [KL], tiny_tokens(), tmp_path / "out", teacher=caches[0], progress=stop_at("distill kl", 3 * 64))
    with pytest.raises(ConfigError, match="was left by another job"):
        distill(folders[1], [KL], tiny_tokens(), tmp_path / "out", teacher=caches[1], resume=True)
    out = tmp_path / "again"
    with pytest.raises(Stop):
        teach(folders[1], [KL], tiny_tokens(), out, progress=stop_at("teach kl", 12 * 16))
    assert not out.exists()
    with pytest.raises(ConfigError, match="was left by another job"):
        teach(folders[1], [KL], tiny_tokens(), out, resume=True, teacher=other)
    calls = []
    teach(folders[1], [KL], tiny_tokens(), out, resume=True, progress=lambda *call: calls.append(call))
    assert calls == [("teach kl", 18 * 16, 20 * 16), ("teach kl", 20 * 16, 20 * 16)]
    assert hashes(out) == hashes(caches[0])
    assert teach(folders[1], [KL], tiny_tokens(), out, resume=True) == out
    with pytest.raises(ConfigError, match="the output is not empty"):
        teach(folders[1], [KL], tiny_tokens(), out)
    with pytest.raises(ConfigError, match="is a teacher's cache, expected the directory of a model"):
        teach(folders[1], [KL], tiny_tokens(), tmp_path / "x", teacher=out)


def test_top_k_against_all_logits_in_fp64(folders, tmp_path):
    cache = open_cache(teach(folders[1], [TOP], tiny_tokens(), tmp_path / "cache", keep="top_k"))
    blocks = TrainBlocks(tiny_tokens(), 16, 4, seed_of(0, 0), 1)
    batch = blocks.batch(1)
    kept = CachedSignals(cache, 1, CPU).signals(batch)
    assert kept.top_k is not None
    with torch.no_grad():
        log_p = load_model(folders[0]).double()(batch.ids).logits.log_softmax(-1)
    best = log_p.argsort(-1, descending=True)
    assert torch.equal(kept.top_k.ids.long(), best[..., :5])
    assert_close(kept.top_k.log_probs, log_p.gather(-1, best[..., :5]), "fp32")
    rest = log_p.gather(-1, best[..., 5:])
    assert_close(kept.top_k.log_rest, rest.exp().sum(-1, keepdim=True).log(), "fp32")
    student = Signals(hidden=torch.randn(4, 16, 8).requires_grad_(), head=Head(weight=torch.randn(64, 8)), ids=batch.ids)
    log_q = (student.hidden.double() @ student.head.weight.double().T).log_softmax(-1)
    classes = [
        torch.cat([x.gather(-1, best[..., :5]), x.gather(-1, best[..., 5:]).logsumexp(-1, True)], -1) for x in (log_p, log_q)
    ]
    expected = (classes[0].exp() * (classes[0] - classes[1])).sum(-1).mean()
    value = LOSSES.build({"name": "top_k_kl", "k": 5})(student, kept, None)
    grads = [torch.autograd.grad(x, student.hidden)[0] for x in (value, expected)]
    assert_close(value, expected, "fp32")
    assert_close(grads[0], grads[1], "fp32", grad=True)
    # Without the class of all others it is another loss, and so it is for the neighbours' rows.
    cut = [x[..., :5].log_softmax(-1) for x in classes]
    others = CachedSignals(cache, 1, CPU).signals(blocks.take(5, 9))
    wrong = (cut[0].exp() * (cut[0] - cut[1])).sum(-1).mean(), LOSSES.build({"name": "top_k_kl", "k": 5})(student, others, None)
    for other in wrong:
        with pytest.raises(AssertionError):
            assert_close(other, expected, "fp32")


@pytest.mark.parametrize(
    ("stages", "options", "said"),
    [
        ([KL], {"keep": "top_k", "k": 5}, r"the loss 'kl' needs the teacher's head and hidden, .* keep hidden states"),
        ([KL], {"keep": "top_k"}, "k is not given, and the stages' losses have no loss that has one"),
        ([TOP], {"keep": "top_k", "k": 4}, "k = 5, expected the 4 tokens that are kept"),
        (
            [{**KL, "losses": [{"name": "top_k_kl", "k": 5, "temperature": 2.0}]}],
            {"keep": "top_k"},
            "temperature 2.0, expected 1",
        ),
        ([KL], {"k": 5}, "k goes with --keep top_k"),
        ([KL], {"keep": "logits"}, "keep is 'logits', expected one of hidden, top_k"),
        ([ALIGN], {}, "no stage of align reads a teacher's logits"),
        ([{**KL, "losses": [{"name": "cross_entropy"}]}], {}, "no stage of kl reads a teacher's logits"),
    ],
)
def test_a_lesson_that_no_run_could_read_is_refused(folders, stages, options, said):
    with pytest.raises(ConfigError, match=said) as error:
        plan_lesson(folders[1], stages, **options)
    assert "\n" not in str(error.value)


def test_a_full_disk_is_said_with_both_figures(folders, tmp_path):
    huge = {**KL, "tokens": 1 << 40, "rows": 1 << 24}
    with pytest.raises(ConfigError, match=r"no space left: .* GB are needed, .* GB are available"):
        teach(folders[1], [huge], tiny_tokens(), tmp_path / "cache")
    assert list(tmp_path.iterdir()) == []


def test_costs_are_those_without_the_teacher(folders, cache, tmp_path):
    built, held = build_stages([KL]), open_cache(cache)
    (live,) = run_cost(folders[1], folders[0], built, Machine())
    (cached,) = run_cost(folders[1], tmp_path / "nowhere", built, Machine(), held)
    numbers = sum(torch.Size(shape).numel() for shape in open_checkpoint(folders[0]).shapes.values())
    head = 64 * 32
    assert live.memory["frozen"] - cached.memory["frozen"] == 4 * (numbers - head)
    # 2 FLOP a weight of the layers, and what attention adds.
    layers = numbers - 2 * head - 7 * 32
    assert 2 * layers < (live.flops - cached.flops) / live.tokens < 2.3 * layers


def lesson(student, out, kill):
    """In another process: a lesson in small files, that kills itself in the middle where it is asked to."""
    teaching.SHARD_BYTES = 6 * 16 * 32 * 4 + 100

    def progress(label, done, total):
        if kill and done > total / 2:
            os.kill(os.getpid(), signal.SIGKILL)

    teach(student, [KL], tiny_tokens(), out, resume=True, progress=progress)


@pytest.mark.slow
def test_a_killed_lesson_and_one_of_two_processes_leave_the_same_bytes(folders, group, tmp_path):
    whole = teach(folders[1], [KL], tiny_tokens(), tmp_path / "whole")
    assert group.run(lesson, folders[1], tmp_path / "out", True).returncode == -9
    assert not (tmp_path / "out").exists()
    assert len(list((partial_folder(tmp_path / "out") / "files").iterdir())) == 3
    done = group.run(lesson, folders[1], tmp_path / "out", False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert hashes(tmp_path / "out") == hashes(whole)
    done = group.run(lesson, folders[1], tmp_path / "two", False, processes=2)
    assert done.returncode == 0, done.stderr[-2000:]
    assert hashes(tmp_path / "two") == hashes(whole)


@pytest.mark.slow
@pytest.mark.parametrize("shard", [False, True], ids=["whole", "shard"])
def test_two_processes_read_their_own_rows(folders, group, tmp_path, shard):
    cache = teach(folders[1], [KL], tiny_tokens(), tmp_path / "cache")
    for out, teacher in (("live", None), ("out", cache)):
        done = group.run(run_and_stop, folders[1], tmp_path / out, 0, [KL], shard, teacher, processes=2)
        assert done.returncode == 0, done.stderr[-2000:]
    assert file_sha256(tmp_path / "out/model.safetensors") == file_sha256(tmp_path / "live/model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "keep"), [(KL, "hidden"), (TOP, "top_k")], ids=["hidden", "top_k"])
def test_a_cache_of_a_larger_teacher_with_a_padded_head(folders, tmp_path, stage, keep):
    sizes = {"hidden_size": 48, "num_attention_heads": 6, "num_hidden_layers": 4, "vocab_size": 80}
    large = tiny_base("llama", tmp_path, **sizes)
    student = shutil.copytree(folders[1], tmp_path / "student")
    for folder in (large, student):
        tiny_tokenizer().save_pretrained(folder)
    live = distill(student, [stage], tiny_tokens(), tmp_path / "live", teacher=large)
    cache = teach(student, [stage], tiny_tokens(), tmp_path / "cache", teacher=large, keep=keep)
    out = distill(student, [stage], tiny_tokens(), tmp_path / "out", teacher=cache)
    assert file_sha256(out / "model.safetensors") == file_sha256(live / "model.safetensors")
    base = distill(student, [stage], tiny_tokens(), tmp_path / "base")
    assert file_sha256(base / "model.safetensors") != file_sha256(live / "model.safetensors")
