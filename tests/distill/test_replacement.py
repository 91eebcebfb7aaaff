"""Layers replaced in steps: who is in when, what waits runs the teacher's attention untouched, and a stop changes nothing."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from hybridize.data import Batch
from hybridize.distill import distill
from hybridize.distill.align import own_layers
from hybridize.distill.cost import Machine, run_cost
from hybridize.distill.kl import KLStage
from hybridize.distill.replacement import Replacement
from hybridize.distill.run import build_stages, load_pair
from hybridize.errors import ConfigError
from hybridize.mixers import MIXERS
from tests.distill.pair import KEEP, STREAMING, tiny_pair, tiny_tokens
from tests.distill.test_distill import Stop, hashes, rows_of, stop_after
from tests.distill.test_sharding import run_and_stop
from tests.tolerances import rms_ratio

MAMBA, GMU = {"name": "mamba2"}, {"name": "gmu", "reads": 0}
SMALL = {"tokens": 6 * 64, "seq_tokens": 16, "rows": 4, "save_tokens": 64}
HALVES = {"shares": [0.5, 1.0]}
ALIGN = {"name": "align", **SMALL, "tokens": 128, "lr": 3e-3}
STEPS = {"name": "kl", **SMALL, "lr": 1e-3, "weight_decay": 0.1, "replace": HALVES}
FIRST = {**STEPS, "tokens": 3 * 64, "replace": {**HALVES, "step": 1}}
LATER = "model.layers.2.self_attn."
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return tiny_pair(tmp_path_factory.mktemp("pair"), (MAMBA, KEEP, STREAMING))


@pytest.fixture(scope="module")
def whole(folders, tmp_path_factory):
    torch.set_num_threads(1)
    return distill(folders[1], [ALIGN, STEPS], tiny_tokens(), tmp_path_factory.mktemp("whole") / "out")


def weights_of(folder):
    return load_file(folder / "model.safetensors")


def plan_of(*specs):
    """What a student says of its layers."""
    config = SimpleNamespace(mixers=[dict(spec) for spec in specs])
    return SimpleNamespace(config=config, model=SimpleNamespace(mixer_options=[MIXERS.build(spec) for spec in specs]))


def layers_in(student, order, shares):
    return [Replacement(shares=shares, order=order, step=step).active(student) for step in range(1, len(shares) + 1)]


def test_who_is_in_when():
    student = plan_of(*[STREAMING, KEEP] * 16)
    # mamba2_llama/llama3_0.25_mamba2.yaml and then llama3_0.50_mamba2.yaml of jxiw/MambaInLlama.
    assert layers_in(student, "spread", [0.5, 1.0]) == [list(range(0, 32, 4)), list(range(0, 32, 2))]
    # mamba2_llama_stepwise/llama3_<n>_mamba2.yaml: one more from the bottom each time.
    one_by_one = layers_in(student, "bottom", [n / 16 for n in range(1, 17)])
    assert one_by_one == [list(range(0, 2 * n, 2)) for n in range(1, 17)]
    few = plan_of(KEEP, STREAMING, STREAMING, KEEP, STREAMING, STREAMING, STREAMING)
    assert layers_in(few, "top", [0.1, 0.5, 1.0]) == [[6], [4, 5, 6], [1, 2, 4, 5, 6]]
    assert layers_in(few, "spread", [0.2, 0.4, 0.6, 1.0]) == [[1], [1, 6], [1, 4, 6], [1, 2, 4, 5, 6]]
    assert layers_in(few, [4, 6, 1, 2, 5], [0.2, 0.6, 1.0]) == [[4], [1, 4, 6], [1, 2, 4, 5, 6]]


def test_layers_that_read_each_other_come_together(tmp_path):
    student = plan_of(MAMBA, STREAMING, GMU, STREAMING)
    assert layers_in(student, "bottom", [0.25, 0.75, 1.0]) == [[0, 2], [0, 1, 2], [0, 1, 2, 3]]
    assert layers_in(student, "top", [0.25, 0.5, 1.0]) == [[3], [0, 2, 3], [0, 1, 2, 3]]
    assert layers_in(student, [1, 2, 3, 0], [0.25, 0.5, 1.0]) == [[1], [0, 1, 2], [0, 1, 2, 3]]
    # An owner of shared latents says that it reads nobody; it belongs to its readers all the same.
    xkv = {"name": "xkv", "group_layers": 2, "rank": 8}
    sharing = plan_of({**xkv, "reads": None}, {**xkv, "reads": 0}, {**xkv, "reads": None}, {**xkv, "reads": 2})
    assert layers_in(sharing, "top", [0.5, 1.0]) == [[2, 3], [0, 1, 2, 3]]
    assert [own_layers(sharing, rank, 2) for rank in range(2)] == [[0, 1], [2, 3]]


def test_what_waits_is_the_teachers_attention_bit_for_bit(folders):
    held = {f"{LATER}q_proj.weight": torch.full((32, 32), 7.0)}
    options = build_stages([STEPS])[0][1]
    student, teacher, trained = load_pair(folders[1], folders[0], options, "kl", held, CPU)
    layer, theirs = student.model.layers[2], teacher.model.layers[2].self_attn
    waiting, lent = layer.self_attn, layer.teacher_attention
    assert all(own is other for own, other in zip(lent.parameters(), theirs.parameters(), strict=True))
    # What was learnt of the mixer before is not written into the teacher.
    assert not (theirs.q_proj.weight == 7).any()
    assert (waiting.q_proj.weight == 7).all()
    assert lent.training
    assert not theirs.training
    u = torch.randn(2, 16, 32)
    about = {"position_embeddings": student.model.rotary_emb(u, torch.arange(16)[None]), "attention_mask": None}
    assert torch.equal(waiting(u, **about)[0], theirs(u, **about)[0])
    # Its own mixer would give something else.
    later = build_stages([STEPS])[1][1]
    full, _, _ = load_pair(folders[1], folders[0], later, "kl", {}, CPU)
    assert not torch.allclose(full.model.layers[2].self_attn(u, **about)[0], theirs(u, **about)[0], rtol=0.01)
    assert not any(name.startswith("model.layers.2.") and "attn" in name for name in trained)
    assert not any("teacher_attention" in name for name in trained)
    assert any(name.startswith("model.layers.0.self_attn.") for name in trained)
    assert "model.layers.2.mlp.up_proj.weight" in trained
    step = options.start(student, teacher, Batch(torch.ones(1, 16, dtype=torch.long)))
    step(Batch(torch.from_numpy(tiny_tokens(64).ids.astype("int64")).view(4, 16)), 1.0)
    assert all(p.grad is not None for p in trained.values())
    assert all(p.grad is None for p in teacher.parameters())


def test_a_mixer_that_waits_keeps_its_weights(folders, whole, tmp_path):
    first = weights_of(distill(folders[1], [ALIGN, FIRST], tiny_tokens(), tmp_path / "first"))
    aligned = weights_of(distill(folders[1], [ALIGN], tiny_tokens(), tmp_path / "aligned"))
    student, last = weights_of(folders[1]), weights_of(whole)
    waits = [name for name in student if name.startswith(LATER)]
    assert all(torch.equal(first[name], aligned[name]) for name in waits)
    assert not any(torch.equal(aligned[name], student[name]) for name in waits)
    others = [name for name in student if name not in waits]
    assert not any(torch.equal(first[name], aligned[name]) for name in others if not name.endswith("conv1d.bias"))
    # In the second step they are in.
    assert not any(torch.equal(last[name], first[name]) for name in waits)
    # The published steps have a schedule each.
    rows = [row for row in rows_of(whole) if row["name"] == "kl"]
    assert [(row["stage"], row["step"]) for row in rows] == [(stage, step) for stage in (2, 3) for step in (1, 2, 3)]
    assert [row["lr"] for row in rows[:3]] == [row["lr"] for row in rows[3:]]


def test_all_at_once_is_no_schedule(folders, tmp_path):
    plain = {key: value for key, value in FIRST.items() if key != "replace"}
    found = [
        weights_of(distill(folders[1], [stage], tiny_tokens(), tmp_path / str(number)))
        for number, stage in enumerate([plain, {**plain, "replace": {"shares": [1.0]}}, FIRST])
    ]
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert not all(torch.equal(found[0][name], found[2][name]) for name in found[0])


@pytest.mark.parametrize("steps", [4, 6])
def test_a_stopped_run_resumes_to_the_same_bytes(folders, whole, tmp_path, steps):
    out = tmp_path / "out"
    with pytest.raises(Stop):
        distill(folders[1], [ALIGN, STEPS], tiny_tokens(), out, progress=stop_after(steps))
    distill(folders[1], [ALIGN, STEPS], tiny_tokens(), out, resume=True)
    assert hashes(out) == hashes(whole)


@pytest.mark.slow
def test_costs_are_those_of_each_step(tmp_path):
    base, student = tiny_pair(tmp_path, (MAMBA, KEEP, STREAMING), noise=0.0)
    first, second = run_cost(student, base, build_stages([STEPS]), Machine())
    mixer = sum(tensor.numel() for name, tensor in weights_of(student).items() if name.startswith(LATER))
    assert (first.tokens, second.tokens) == (192, 192)
    assert second.trained_parameters - first.trained_parameters == mixer
    assert second.flops != first.flops
    for cost, (name, options) in zip((first, second), build_stages([STEPS]), strict=True):
        own, teacher, trained = load_pair(student, base, options, name, {}, CPU)
        frozen = {id(p): p for model in (own, teacher) for p in model.parameters() if not p.requires_grad}
        assert cost.memory["frozen"] == 4 * sum(p.numel() for p in frozen.values())
        assert cost.memory["weights"] == 4 * sum(p.numel() for p in trained.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"replace": {"shares": []}}, r"shares is \[\], expected rising"),
        ({"replace": {"shares": [0.5]}}, "of which the last is 1"),
        ({"replace": {"shares": [0.5, 0.5, 1.0]}}, "expected rising"),
        ({"replace": {"shares": [1.0], "step": 2}}, "step is 2, expected 1 to 1"),
        ({"replace": {**HALVES, "order": "middle"}}, "order is 'middle'"),
        ({"replace": {**HALVES, "oder": "top"}}, "Did you mean 'order'"),
        ({"tokens": 64}, "expected one step of 64 for each of the 2 shares"),
        ({"replace": {**HALVES, "order": [2]}}, r"order is \[2\], expected each converted layer of the student once: \[0, 2\]"),
    ],
)
def test_impossible_schedules_are_named(folders, tmp_path, change, message):
    with pytest.raises(ConfigError, match=message):
        distill(folders[1], [{**STEPS, **change}], tiny_tokens(), tmp_path / "out")


def test_a_teacher_that_does_not_fit_is_refused(folders, tmp_path):
    base, student = folders
    other, hybrid = tiny_pair(tmp_path, (KEEP, KEEP, STREAMING), num_key_value_heads=4)
    for teacher, message in (
        (other, "num_key_value_heads is 2 in the student and 4 in the teacher"),
        (student, "layer 2 of the teacher is 'streaming', expected attention"),
    ):
        with pytest.raises(ConfigError, match=message):
            distill(student, [STEPS], tiny_tokens(), tmp_path / "out", teacher=teacher)
    # With no layer waiting the teacher may be any of the same vocabulary.
    load_pair(student, other, KLStage(**SMALL, replace={"shares": [1.0], "step": 1}), "kl", {}, CPU)


@pytest.mark.slow
def test_divided_weights_give_what_whole_ones_give(folders, whole, group, tmp_path):
    """Two processes, stopped in the first step of the schedule and started again."""
    for stop in (4, 0):
        done = group.run(run_and_stop, folders[1], tmp_path / "out", stop, [ALIGN, STEPS], True, processes=2)
        assert (done.returncode == 0) == (stop == 0), done.stderr[-3000:]
    at_once = {key: value for key, value in STEPS.items() if key != "replace"}
    other = distill(folders[1], [ALIGN, at_once], tiny_tokens(), tmp_path / "other")
    start, one, two, wrong = (weights_of(folder) for folder in (folders[1], whole, tmp_path / "out", other))
    for part in ("", LATER):
        changes = [torch.cat([(w[n] - start[n]).flatten() for n in sorted(w) if part in n]) for w in (one, two, wrong)]
        assert rms_ratio(changes[1], changes[0]) <= 1e-3
        assert rms_ratio(changes[2], changes[0]) > 1e-3
