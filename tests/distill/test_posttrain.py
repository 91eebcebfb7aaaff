"""What goes with the stages after distillation: whole runs, data that is not there, queries and keys put back, recall watched."""

import json
import logging

import numpy as np
import pytest
import torch
from transformers import AutoConfig

from hybridize import pipeline
from hybridize.checkpoint import load_model, open_checkpoint
from hybridize.distill import check_sources, distill, metrics_path
from hybridize.distill.job import filled
from hybridize.distill.posttrain import query_key_names, restore_qk
from hybridize.errors import ConfigError, DataError
from hybridize.lineage import read_lineage, verify_files
from hybridize.modeling import build_model, hybrid_config
from hybridize.pipeline import recall_of
from hybridize.pipeline import run as run_all
from hybridize.recipe import load_recipe, parse_recipe
from hybridize.storage import file_sha256, partial_folder
from tests.distill.chats import chat_pair, tiny_tokenizer, write_chats, write_lines, write_pairs
from tests.distill.pair import KEEP, STREAMING, tiny_tokens
from tests.distill.test_distill import Stop, stop_after
from tests.tiny import SIZES
from tests.tolerances import rms_ratio

KL = {"name": "kl", "tokens": 3 * 64, "seq_tokens": 16, "rows": 4, "lr": 1e-2, "save_tokens": 64}
SFT = {"name": "sft", "tokens": 4 * 96, "seq_tokens": 48, "rows": 2, "lr": 1e-2, "save_tokens": 96}
DPO = {"name": "dpo", "tokens": 4 * 128, "seq_tokens": 32, "rows": 1, "accumulate": 2, "lr": 1e-2, "save_tokens": 128}


@pytest.fixture(scope="module", autouse=True)
def _few_prompts():
    """What recall is compared on; its value plays no part here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "RECALL_SAMPLES", 4)
        yield


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return chat_pair(tmp_path_factory.mktemp("pair"), max_position_embeddings=512)


@pytest.fixture
def logged(caplog):
    """What the package logs, even after the command line has taken its logger for itself."""
    logger = logging.getLogger("hybridize")
    before = logger.level
    logger.addHandler(caplog.handler)
    logger.setLevel(logging.INFO)
    yield caplog
    logger.removeHandler(caplog.handler)
    logger.setLevel(before)


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    """A stage before, adapters, a way back, and a reference that is no checkpoint: the student after two stages."""
    folder = tmp_path_factory.mktemp("data")
    sft = {**SFT, "data": str(write_chats(folder / "c.jsonl")), "restore_qk": 0.5, "recall_pairs": [1, 2]}
    dpo = {**DPO, "data": str(write_pairs(folder / "p.jsonl")), "lora": {"targets": ["*_proj"], "dropout": 0.1}}
    return [KL, sft, {**dpo, "recall_pairs": [1], "beta": 1.0}]


def run(folders, stages, out, **kwargs):
    return distill(folders[1], stages, tiny_tokens(), out, recall=recall_of(folders[1], 0), **kwargs)


@pytest.fixture(scope="module")
def whole(folders, stages, tmp_path_factory):
    torch.set_num_threads(1)
    return run(folders, stages, tmp_path_factory.mktemp("whole") / "out")


def hashes(folder):
    return {path.name: file_sha256(path) for path in sorted(folder.iterdir())}


def rows_of(out):
    return [json.loads(line) for line in metrics_path(out).read_text().splitlines()]


def test_the_output_is_an_ordinary_directory(folders, whole):
    verify_files(whole)
    before, after = open_checkpoint(folders[1]), open_checkpoint(whole)
    assert set(before.tensors) == set(after.tensors)
    assert before.raw_config == after.raw_config
    lineage = read_lineage(whole)
    assert [stage["name"] for stage in lineage["distill"][0]["stages"]] == ["kl", "sft", "dpo"]
    assert [sha is None for sha in lineage["distill"][0]["examples"]] == [True, False, False]
    assert [(r["stage"], r["name"], set(r["before"])) for r in lineage["recall"]] == [
        (2, "sft", {"recall@1", "recall@2"}), (3, "dpo", {"recall@1"}),
    ]  # fmt: skip


def test_the_losses_fall_and_the_report_is_made(whole):
    rows = [row for row in rows_of(whole) if "loss" in row]
    assert [(r["stage"], r["step"]) for r in rows] == [(1, 1), (1, 2), (1, 3), *((s, i) for s in (2, 3) for i in range(1, 5))]
    assert rows[6]["loss"] < rows[3]["loss"]
    # The reference is the student after two stages, not the checkpoint it began as.
    assert rows[7]["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert rows[7]["margin"] == pytest.approx(0, abs=1e-5)
    assert abs(rows[10]["margin"]) > 1e-3
    assert {row["stage"] for row in rows_of(whole) if "recall" in row} == {2, 3}


@pytest.mark.slow
@pytest.mark.parametrize("steps", [4, 9])
def test_a_stopped_run_resumes_to_the_same_bytes(folders, stages, whole, tmp_path, steps):
    out = tmp_path / "out"
    with pytest.raises(Stop):
        run(folders, stages, out, progress=stop_after(steps))
    run(folders, stages, out, resume=True)
    assert hashes(out) == hashes(whole)
    assert not partial_folder(out).exists()


def test_a_resume_with_another_reference_would_show(folders, stages, whole, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with pytest.raises(Stop):
        run(folders, stages, out, progress=stop_after(9))
    monkeypatch.setattr("hybridize.distill.run.start_weights", lambda scratch, state, *rest: {})
    run(folders, stages, out, resume=True)
    assert hashes(out) != hashes(whole)


def test_text_is_what_sft_falls_back_to(folders, tmp_path):
    """Every token of it is learnt, which is the cross-entropy of stage `kl`."""
    plain = {**SFT, "seq_tokens": 16, "tokens": 2 * 64, "rows": 4, "recall_fall": None}
    other = {**KL, "tokens": 2 * 64, "losses": [{"name": "cross_entropy"}]}
    sft = distill(folders[1], [plain], tiny_tokens(), tmp_path / "sft")
    kl = distill(folders[1], [other], tiny_tokens(), tmp_path / "kl")
    assert [r["loss"] for r in rows_of(sft)] == pytest.approx([r["loss"] for r in rows_of(kl)], rel=1e-5)
    assert "recall" not in read_lineage(sft)
    text = write_chats(tmp_path / "c.jsonl")
    chat = distill(folders[1], [{**plain, "seq_tokens": 48, "tokens": 192}], text, tmp_path / "chat")
    assert read_lineage(chat)["distill"][0]["text"] is None
    assert len(rows_of(chat)) == 1


def test_a_stage_without_data_is_refused_or_left_out(folders, tmp_path, logged):
    out = tmp_path / "out"
    for stages, text, message in (
        ([DPO], tiny_tokens(), r"stage 'dpo': trains on preference pairs and was given none.*--set distill\.N\.data"),
        ([SFT], None, "stage 'sft': trains on chats and was given none"),
        ([KL], None, "stage 'kl': trains on text and was given none. Name it with --data"),
        ([{**DPO, "optional": True}], tiny_tokens(), "all stages are optional and have no data: dpo"),
    ):
        with pytest.raises(ConfigError, match=message) as caught:
            distill(folders[1], stages, text, out)
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="preference pairs"):
        check_sources([KL, DPO])
    with pytest.raises(DataError, match=r"data is .*nothing\.jsonl, and no such file is there"):
        check_sources([KL, {**DPO, "data": str(tmp_path / "nothing.jsonl")}])
    check_sources([KL, SFT, {**DPO, "optional": True}])
    assert not out.exists()
    assert not partial_folder(out).exists()
    distill(folders[1], [KL, {**DPO, "optional": True}], tiny_tokens(), out)
    assert "stage dpo: optional, and was given no data; left out" in logged.text
    assert {row["name"] for row in rows_of(out)} == {"kl"}


def test_tokens_outside_the_vocabulary_are_refused(folders, tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"<extra{i}>" for i in range(40)])
    foreign = tmp_path / "student"
    foreign.mkdir()
    for path in folders[1].iterdir():
        (foreign / path.name).write_bytes(path.read_bytes())
    tokenizer.save_pretrained(foreign)
    data = write_lines(tmp_path / "c.jsonl", [{"text": "ab<extra39>"}])
    with pytest.raises(ConfigError, match="outside the student's vocabulary of 64"):
        distill(foreign, [{**SFT, "data": str(data)}], None, tmp_path / "out")


def test_a_bf16_student_is_measured_and_written_in_its_own_dtypes(tmp_path):
    folders = chat_pair(tmp_path, ({"name": "mamba2"}, KEEP, KEEP), dtype="bfloat16")
    name = "model.layers.1.self_attn.q_proj.weight"
    exact = torch.full((32, 32), 1 + 2**-12)
    model = filled(load_model(folders[1]), {name: exact, "model.layers.0.self_attn.A_log": torch.full((4,), 0.1)})
    assert model.get_parameter(name).dtype == torch.bfloat16
    assert torch.equal(model.get_parameter(name), torch.ones(32, 32, dtype=torch.bfloat16))
    assert model.get_parameter("model.layers.0.self_attn.A_log").dtype == torch.float32
    assert model(torch.arange(3, 9)[None]).logits.dtype == torch.bfloat16


# Queries and keys put back.


def test_only_layers_that_keep_every_key_are_put_back():
    specs = [
        {"name": "attention"}, STREAMING, {"name": "mamba2"}, {"name": "gla"}, {"name": "mla", "kv_rank": 8, "rope_dim": 4},
        {"name": "low_rank_kv"}, {"name": "block_sparse"}, {"name": "streaming_heads"},
    ]  # fmt: skip
    fields = {**SIZES, "num_hidden_layers": len(specs), "dtype": "float32"}
    config = hybrid_config(AutoConfig.for_model("qwen3", **fields), specs)
    names = query_key_names(config, [name for name, _ in build_model(config).named_parameters()])
    assert {int(name.split(".")[2]) for name in names} == {0, 5, 6, 7}
    assert {name.split(".")[4] for name in names if ".layers.0." in name} == {"q_proj", "k_proj", "q_norm", "k_norm"}
    assert {name.split(".")[4] for name in names if ".layers.5." in name} >= {"q_proj", "k_down", "q_norm", "k_norm"}
    assert not any(part in name for name in names for part in ("v_", "o_proj"))
    biased = hybrid_config(AutoConfig.for_model("qwen2", **{**SIZES, "dtype": "float32"}), [KEEP] * 3)
    names = query_key_names(biased, [name for name, _ in build_model(biased).named_parameters()])
    assert "model.layers.0.self_attn.q_proj.bias" in names


@pytest.fixture(scope="module")
def sft_on_chats(folders, tmp_path_factory):
    """(the stage, before it, after it with queries and keys as trained)."""
    folder = tmp_path_factory.mktemp("back")
    sft = {**SFT, "data": str(write_chats(folder / "c.jsonl")), "recall_fall": None}
    return sft, *(distill(folders[1], stages, tiny_tokens(), folder / str(len(stages))) for stages in ([KL], [KL, sft]))


@pytest.mark.parametrize("share", [True, 0.25])
def test_queries_and_keys_go_back_and_nothing_else(folders, sft_on_chats, tmp_path, share):
    sft, first, after = sft_on_chats
    back = distill(folders[1], [KL, {**sft, "restore_qk": share}], tiny_tokens(), tmp_path / "back")
    a, b, c = (open_checkpoint(folder) for folder in (first, after, back))
    for name in a.tensors:
        # Layer 1 has full attention, 0 and 2 a window.
        if name.startswith(("model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.k_proj")):
            wanted = share * a.read(name) + (1 - share) * b.read(name)
            torch.testing.assert_close(c.read(name), wanted, rtol=1e-6, atol=1e-6)
            assert torch.equal(c.read(name), a.read(name)) == (share is True)
            assert not torch.equal(c.read(name), b.read(name))
        else:
            assert torch.equal(c.read(name), b.read(name))
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        before, trained, mixed = (load_model(folder)(ids).logits for folder in (first, after, back))
    assert not torch.equal(mixed, trained)
    assert not torch.equal(mixed, before)


def test_what_was_never_trained_before_comes_from_the_directory(folders):
    student = open_checkpoint(folders[1])
    name = "model.layers.1.self_attn.q_proj.weight"
    found = restore_qk({name: torch.zeros(32, 32), "model.norm.weight": torch.zeros(32)}, {}, student, 1.0, "sft")
    assert torch.equal(found[name], student.read(name))
    assert not found["model.norm.weight"].any()


def test_there_must_be_something_to_put_back(tmp_path):
    folders = chat_pair(tmp_path, (STREAMING, STREAMING, STREAMING))
    with pytest.raises(ConfigError, match="no layer keeps the keys of its whole text"):
        restore_qk({}, {}, open_checkpoint(folders[1]), 1.0, "sft")


# Recall, watched.


def falling(before, after):
    """A measure that gives one thing before the stage and another after it."""
    answers = iter([before, after])
    return lambda model, pairs: next(answers)


@pytest.mark.parametrize(("after", "fallen"), [(0.96, []), (0.94, ["recall@4"])])
def test_a_fall_of_recall_is_a_warning(folders, tmp_path, logged, after, fallen):
    data = str(write_chats(tmp_path / "c.jsonl"))
    measure = falling({"recall@4": 1.0, "recall@16": 0.5}, {"recall@4": after, "recall@16": 0.6})
    out = distill(folders[1], [{**SFT, "data": data}], None, tmp_path / "out", recall=measure)
    (record,) = read_lineage(out)["recall"]
    assert record["fallen"] == fallen
    assert record["before"]["recall@4"] == 1.0
    assert record["after"]["recall@4"] == after
    assert ("recall@4 fell from 1.000 to 0.940, by more than 0.05" in logged.text) == bool(fallen)
    assert "recall@16" not in logged.text


def test_recall_is_measured_on_the_weights_before_and_after(folders, tmp_path):
    seen = []

    def measure(model, pairs):
        seen.append({name: p.detach().clone() for name, p in model.named_parameters()})
        return {f"recall@{n}": 0.0 for n in pairs}

    data = str(write_chats(tmp_path / "c.jsonl"))
    stage = {**SFT, "data": data, "lora": {"targets": ["*.v_proj"]}, "restore_qk": False}
    out = distill(folders[1], [KL, stage], tiny_tokens(), tmp_path / "out", recall=measure)
    first = distill(folders[1], [KL], tiny_tokens(), tmp_path / "first")
    for found, folder in zip(seen, (first, out), strict=True):
        expected = dict(load_model(folder).named_parameters())
        assert set(found) == set(expected)
        assert all(torch.equal(found[name], expected[name]) for name in found)


def test_the_probe_leaves_out_what_there_is_no_room_for(folders, logged):
    found = recall_of(folders[1], 0)(load_model(folders[1], torch.float32), [1, 2, 64])
    assert set(found) == {"recall@1", "recall@2"}
    assert all(0 <= value <= 1 for value in found.values())
    assert "recall with 64 pairs is not watched" in logged.text


def test_a_model_taught_by_preferences_prefers(folders, tmp_path):
    """Forty steps on pairs whose rejected answers all end in a question mark."""
    data = str(write_pairs(tmp_path / "p.jsonl", 64))
    stage = {**DPO, "data": data, "tokens": 40 * 256, "rows": 4, "accumulate": 1, "lr": 3e-3, "beta": 0.5, "recall_fall": None}
    rows = rows_of(distill(folders[1], [stage], None, tmp_path / "out"))
    assert np.mean([row["accuracy"] for row in rows[-10:]]) > 0.9
    assert rows[-1]["loss"] < 0.4 < 0.69 < rows[0]["loss"]


@pytest.mark.slow
def test_a_recipe_runs_them_and_reports(folders, tmp_path):
    """The whole line: text for the plan, chats and pairs for the last stages, a report in which the curves are."""
    text = tmp_path / "text.txt"
    text.write_text("\n<|endoftext|>\n".join(f"abc {number} def " * 40 for number in range(60)))
    sft = {**SFT, "data": str(write_chats(tmp_path / "c.jsonl")), "restore_qk": True}
    recipe = {
        "name": "x", "plan": {"keep": {"every": 2}, "mixer": {"name": "streaming", "sink_tokens": 1, "window_tokens": 4}},
        "distill": [KL, sft, {**DPO, "optional": True}], "evaluate": [{"name": "state_bytes", "contexts": [64]}],
    }  # fmt: skip
    result = run_all(parse_recipe(recipe, "x"), folders[0], str(text), tmp_path / "work")
    (record,) = read_lineage(tmp_path / "work" / "distilled")["recall"]
    assert record["name"] == "sft"
    assert set(record["before"]) == set(record["after"]) == {"recall@4", "recall@16"}
    assert "Distillation" in result.html.read_text()
    recipe["distill"][2] = DPO
    with pytest.raises(ConfigError, match="stage 'dpo': trains on preference pairs and was given none"):
        run_all(parse_recipe(recipe, "x"), folders[0], str(text), tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_built_in_recipes_have_the_published_stages():
    def last(name):
        return load_recipe(name).distill[-1]

    assert last("lolcats")["lora"] == {"targets": ["*.self_attn.[qkvo]_proj"], "rank": 8, "alpha": 16}
    assert (last("liger")["lora"]["targets"], last("liger")["lr"]) == (["*.self_attn.[qkv]_proj"], 1e-3)
    assert (last("mamba-in-llama")["beta"], last("mamba-in-llama")["lr"]) == (0.01, 5e-7)
    assert last("lighttransfer")["name"] == "sft"
    for name in ("lolcats", "liger", "mamba-in-llama", "lighttransfer"):
        check_sources(load_recipe(name).distill)


def run_in_group(student, out, stages):
    """In each process of a group."""
    distill(student, stages, tiny_tokens(), out, recall=lambda model, pairs: {"recall@4": 0.5})


@pytest.mark.slow
def test_two_processes_give_what_one_gives(folders, stages, group, tmp_path):
    # Dropout is drawn by each process for its own rows.
    kl, sft, dpo = stages
    same = [kl, {**sft, "rows": 1, "accumulate": 2}, {**dpo, "lora": {"targets": ["*_proj"]}}]
    one = distill(folders[1], same, tiny_tokens(), tmp_path / "one")
    done = group.run(run_in_group, folders[1], tmp_path / "two", same, processes=2)
    assert done.returncode == 0, done.stderr[-2000:]
    first, a, b = (open_checkpoint(folder) for folder in (folders[1], one, tmp_path / "two"))
    changes = [torch.cat([(c.read(n) - first.read(n)).flatten() for n in sorted(first.tensors)]) for c in (a, b)]
    torch.testing.assert_close(changes[1], changes[0], rtol=0, atol=0.05 * float(changes[0].abs().max()))
    assert rms_ratio(changes[1], changes[0]) < 0.02
    assert [row["loss"] for row in rows_of(tmp_path / "two") if "loss" in row] == pytest.approx(
        [row["loss"] for row in rows_of(one) if "loss" in row], rel=1e-3
    )
