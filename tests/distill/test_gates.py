"""Gates that are learnt: the mixture by definition, its slope, what leaves the stage, and what it refuses."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from hybridize.checkpoint import open_checkpoint
from hybridize.data import Batch
from hybridize.distill import distill, run
from hybridize.distill.gates import Gates
from hybridize.distill.kl import KLStage
from hybridize.distill.run import load_pair
from hybridize.distill.stages import STAGES
from hybridize.errors import ConfigError
from hybridize.modeling import build_model, hybrid_config
from tests.distill.pair import KEEP, STREAMING, tiny_pair, tiny_tokens
from tests.distill.test_distill import Stop, hashes, rows_of, stop_after
from tests.distill.test_sharding import run_and_stop
from tests.mixers.test_windowed import by_definition, near
from tests.tiny import tiny_base
from tests.tolerances import assert_close

HEADS = {"name": "streaming_heads", "sink_tokens": 1, "window_tokens": 4, "full_share": 0.5}
SMALL = {"tokens": 8 * 64, "seq_tokens": 16, "rows": 4, "save_tokens": 128}
LEARN = {"name": "gates", **SMALL, "lr": 0.1}
WIDE = {"num_attention_heads": 8, "num_key_value_heads": 4}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return tiny_pair(tmp_path_factory.mktemp("pair"), (HEADS, KEEP, HEADS), noise=0.0)


def one_mixer(family, spec, tmp_path):
    """(model whose layers are all of `spec`, its first mixer)."""
    config = open_checkpoint(tiny_base(family, tmp_path, **WIDE)).config
    model = build_model(hybrid_config(config, [spec] * 3)).eval()
    return model, model.model.layers[0].self_attn


def alphas(folder):
    return {name: tensor for name, tensor in load_file(folder / "model.safetensors").items() if name.endswith("alpha")}


def test_a_gate_mixes_full_and_streaming_by_definition(tmp_path):
    model, mixer = one_mixer("llama", {**HEADS, "sink_tokens": 2, "window_tokens": 7}, tmp_path)
    mixer.double()
    u = torch.randn(2, 20, 32, dtype=torch.float64)
    angles = model.model.rotary_emb(u, torch.arange(20)[None])
    hard = mixer(u, angles)[0]
    mixer.soften()
    assert mixer.gate.tolist() == [1.0] * 4
    gates = torch.tensor([0.3, 0.9, 0.0, 0.55])

    def run(values):
        mixer.gate.data = torch.as_tensor(values, dtype=torch.float64)
        return mixer(u, angles)[0]

    # The output is a sum over heads, so that one head's change can be told from runs in which it alone is full.
    streaming = by_definition(mixer, model.config, u, angles, lambda g, t, p: near(t, p))
    alone = [by_definition(mixer, model.config, u, angles, lambda g, t, p, own=own: g == own or near(t, p)) for own in range(4)]
    expected = streaming + sum(gate * (one - streaming) for gate, one in zip(gates.double(), alone, strict=True))
    assert_close(run(gates), expected, "fp64")
    with pytest.raises(AssertionError):
        assert_close(run(1 - gates), expected, "fp64")
    with pytest.raises(AssertionError):
        assert_close(run(gates.flip(0)), expected, "fp64")
    # At 1 and 0 it is what leaves the stage.
    assert_close(run([1, 1, 0, 0]), hard, "fp64")
    with pytest.raises(AssertionError):
        assert_close(run([0, 0, 1, 1]), hard, "fp64")


def test_as_many_gates_become_one_as_the_plan_says(tmp_path):
    model, mixer = one_mixer("llama", HEADS, tmp_path)
    mixer.soften()
    for gates, full in (
        ([0.1, 0.9, 0.2, 0.8], [0, 1, 0, 1]),
        ([0.0, 0.0, 0.0, 0.0], [1, 1, 0, 0]),
        # Beyond 1 is 1, and the lower index comes first among equals.
        ([0.5, 1.0, 1.2, 1.1], [0, 1, 1, 0]),
        ([-0.3, -0.1, 0.0, 0.1], [1, 0, 0, 1]),
    ):
        mixer.gate.data = torch.tensor(gates)
        assert mixer.hardened()["alpha"].tolist() == full
    with pytest.raises(ConfigError, match="use_cache=False"):
        model(torch.ones(1, 8, dtype=torch.long), use_cache=True)


@pytest.fixture
def exact_norms(monkeypatch):
    """transformers' norm computes in fp32 whatever its input is."""

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)

    monkeypatch.setattr(LlamaRMSNorm, "forward", forward)


def stage_in_fp64(folders):
    options = Gates(**SMALL)
    student, teacher, trained = load_pair(folders[1], folders[0], options, "gates", {}, CPU)
    ids = torch.from_numpy(tiny_tokens(64).ids.astype("int64")).view(4, 16)
    step = options.start(student.double(), teacher.double(), Batch(ids))
    return step, student, teacher, trained, ids


def test_all_gates_open_are_the_teacher_and_only_sparsity_pulls(folders, exact_norms):
    step, student, _, trained, ids = stage_in_fp64(folders)
    assert list(trained) == ["model.layers.0.self_attn.gate", "model.layers.2.self_attn.gate"]
    assert [name for name, p in student.named_parameters() if p.requires_grad] == list(trained)
    losses = step(Batch(ids), 1.0)
    assert losses["hidden_state"] < 1e-24
    assert losses["gate_sparsity"] == 1.0
    assert_close(losses["loss"], torch.tensor(0.05, dtype=torch.float64), "fp64")
    for gate in trained.values():
        assert_close(gate.grad, torch.full((2,), 0.05 / 4, dtype=torch.float64), "fp64", grad=True)


def test_the_gradient_of_a_gate_is_the_slope_of_the_published_loss(folders, exact_norms):
    step, student, teacher, trained, ids = stage_in_fp64(folders)
    values = [torch.tensor([0.2, 0.7]).double(), torch.tensor([0.6, 0.4]).double()]

    def published(at):
        for gate, value in zip(trained.values(), at, strict=True):
            gate.data = value
        with torch.no_grad():
            own, other = (model.model(ids, use_cache=False).last_hidden_state for model in (student, teacher))
        return (own - other).pow(2).mean(-1).mean() + 0.05 * torch.cat(at).abs().mean()

    loss = published(values)
    # Two micro-batches, as a step of several has them.
    parts = [step(Batch(part), 0.5)["loss"] for part in ids.split(2)]
    assert_close(sum(parts) / 2, loss, "fp64")
    slopes, away = [], 1e-5
    for layer in range(2):
        for head in range(2):
            nudge = [torch.zeros(2).double(), torch.zeros(2).double()]
            nudge[layer][head] = away
            ahead, behind = (published([v + sign * n for v, n in zip(values, nudge, strict=True)]) for sign in (1, -1))
            slopes.append((ahead - behind) / (2 * away))
    found = torch.cat([gate.grad for gate in trained.values()])
    assert found.tolist() == pytest.approx([float(s) for s in slopes], rel=1e-6)
    assert found.flip(0).tolist() != pytest.approx([float(s) for s in slopes], rel=1e-2)


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """A pair whose first head gives nothing, but is the one that the student holds full."""
    folders = tiny_pair(tmp_path_factory.mktemp("planted"), (HEADS, KEEP, HEADS), noise=0.0)
    for folder in folders:
        weights = load_file(folder / "model.safetensors")
        for index in (0, 2):
            weights[f"model.layers.{index}.self_attn.v_proj.weight"][:8] = 0
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert all(alpha.tolist() == [1, 0] for alpha in alphas(folders[1]).values())
    return folders


@pytest.fixture(scope="module")
def learnt(planted, tmp_path_factory):
    torch.set_num_threads(1)
    stages = [LEARN, {"name": "kl", "tokens": 128, "seq_tokens": 16, "rows": 4, "train": ["*.mlp.*"]}]
    return stages, distill(planted[1], stages, tiny_tokens(), tmp_path_factory.mktemp("learnt") / "out")


def test_the_head_that_matters_stays_full_and_nothing_else_changes(planted, learnt, tmp_path):
    out = distill(planted[1], [LEARN], tiny_tokens(), tmp_path / "out")
    before, after = (load_file(folder / "model.safetensors") for folder in (planted[1], out))
    assert set(before) == set(after)
    assert {name for name in before if not torch.equal(before[name], after[name])} == set(alphas(out))
    assert all(alpha.tolist() == [0, 1] for alpha in alphas(out).values())
    assert open_checkpoint(out).raw_config == open_checkpoint(planted[1]).raw_config
    rows = rows_of(out)
    assert rows[0]["gate_sparsity"] == 1.0
    assert [row["gate_sparsity"] for row in rows] == sorted((row["gate_sparsity"] for row in rows), reverse=True)
    # A head that gives nothing is shut, the other one is not: more than half of all is gone only if both fell.
    assert 0.3 < rows[-1]["gate_sparsity"] < 0.8
    # Later stages keep the choice.
    assert all(alpha.tolist() == [0, 1] for alpha in alphas(learnt[1]).values())


@pytest.mark.parametrize("steps", [3, 9])
def test_a_stopped_run_resumes_to_the_same_bytes(planted, learnt, tmp_path, steps):
    stages, whole = learnt
    out = tmp_path / "out"
    with pytest.raises(Stop):
        distill(planted[1], stages, tiny_tokens(), out, progress=stop_after(steps))
    distill(planted[1], stages, tiny_tokens(), out, resume=True)
    assert hashes(out) == hashes(whole)
    # What leaves the stage is 0 and 1, so that every step is compared too.
    assert timeless(out) == timeless(whole)


def timeless(out):
    return [{key: value for key, value in row.items() if key != "tokens_per_s"} for row in rows_of(out)]


def test_a_resume_that_lost_its_gates_would_show(planted, learnt, tmp_path, monkeypatch):
    out, real = tmp_path / "out", run.with_weights
    with pytest.raises(Stop):
        distill(planted[1], learnt[0], tiny_tokens(), out, progress=stop_after(3))

    def without_gates(model, weights):
        return real(model, {name: weight for name, weight in weights.items() if not name.endswith(".gate")})

    monkeypatch.setattr(run, "with_weights", without_gates)
    distill(planted[1], learnt[0], tiny_tokens(), out, resume=True)
    assert timeless(out) != timeless(learnt[1])


def test_a_layer_that_is_not_trained_keeps_its_heads(planted, tmp_path):
    out = distill(planted[1], [{**LEARN, "train": ["model.layers.2.*"]}], tiny_tokens(), tmp_path / "out")
    assert [alpha.tolist() for _, alpha in sorted(alphas(out).items())] == [[1, 0], [0, 1]]


def test_what_cannot_be_learnt_is_refused_in_one_line(folders, tmp_path):
    for mixers in ((STREAMING, KEEP, KEEP), ({**HEADS, "full_share": 1.0}, KEEP, KEEP)):
        _, student = tiny_pair(tmp_path / mixers[0]["name"], mixers)
        with pytest.raises(ConfigError, match="no layer of the student has heads to choose, expected one of streaming_heads"):
            distill(student, [LEARN], tiny_tokens(), tmp_path / "out")
    named = {key: value for key, value in HEADS.items() if key != "full_share"} | {"full_heads": [1]}
    _, student = tiny_pair(tmp_path / "given", (named, KEEP, KEEP))
    with pytest.raises(ConfigError, match="no heads given"):
        distill(student, [LEARN], tiny_tokens(), tmp_path / "out")
    for change, message in (
        ({"train": ["*.q_proj.*"]}, "matches none of the 2 parameters"),
        ({"lora": {"targets": ["*.q_proj"]}}, "matches none of the 0 projections"),
    ):
        with pytest.raises(ConfigError, match=message):
            distill(folders[1], [{**LEARN, **change}], tiny_tokens(), tmp_path / "out")
    with pytest.raises(ConfigError, match="--shard"):
        distill(folders[1], [LEARN], tiny_tokens(), tmp_path / "out", shard=True)
    wider = tiny_base("llama", tmp_path, hidden_size=48)
    with pytest.raises(
        ConfigError, match="hidden_size is 32 in the student and 48 in the teacher; hidden_state needs them equal"
    ):
        distill(folders[1], [LEARN], tiny_tokens(), tmp_path / "out", teacher=wider)
    kl = KLStage(**SMALL, losses=[{"name": "gate_sparsity"}])
    student, teacher, _ = load_pair(folders[1], folders[0], kl, "kl", {}, CPU)
    with pytest.raises(ConfigError, match="'gate_sparsity' needs gates; this stage offers"):
        kl.start(student, teacher, Batch(torch.ones(1, 16, dtype=torch.long)))


@pytest.mark.slow
def test_two_processes_learn_what_one_does(planted, group, tmp_path):
    """Gradients of rows that were shared out are summed: with their mean, Adam's eps aside, the norms would be half as long."""
    whole = rows_of(distill(planted[1], [LEARN], tiny_tokens(), tmp_path / "whole"))
    done = group.run(run_and_stop, planted[1], tmp_path / "out", 0, [LEARN], False, processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [alpha.tolist() for alpha in alphas(tmp_path / "out").values()] == [[0, 1], [0, 1]]
    for one, two in zip(whole, rows_of(tmp_path / "out"), strict=True):
        for key in ("loss", "gate_sparsity", "grad_norm"):
            assert two[key] == pytest.approx(one[key], rel=1e-4)


def test_the_rate_rises_and_falls_over_a_fifth_each():
    stage = STAGES.build({"name": "gates", "tokens": 100 * 64, "seq_tokens": 16, "rows": 4})
    rates = [stage.rate(step) for step in range(100)]
    assert rates[0] == pytest.approx(1 / 20)
    assert rates[19:80] == [1.0] * 61
    assert rates[90] == pytest.approx(1 - 0.9 * 11 / 20)
    assert rates[99] == pytest.approx(0.1)
    with pytest.raises(ConfigError, match="decay is 1.5"):
        STAGES.build({"name": "gates", **SMALL, "decay": 1.5})
