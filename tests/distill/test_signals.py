"""What the stages hand to losses that compare more than outputs: matrices, heads, contexts, inner layers."""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from hybridize.capture import Projection, layer_outputs, visit_layers
from hybridize.data import Batch
from hybridize.distill import distill
from hybridize.distill.align import Align
from hybridize.distill.kl import KLStage
from hybridize.errors import ConfigError
from tests.distill.pair import KEEP, STREAMING, tiny_pair, tiny_tokens
from tests.distill.test_distill import Stop, hashes, stop_after
from tests.distill.test_stages import GMU, MAMBA, SMALL, assert_micro_batches_add_up, pair
from tests.tolerances import assert_close

LOLCATS = {"name": "lolcats", "window_tokens": 4}
LOW_RANK = {"name": "low_rank_kv"}
PARALLEL = {"name": "parallel", "sink_tokens": 1, "window_tokens": 4}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return tiny_pair(tmp_path_factory.mktemp("pair"), (LOLCATS, KEEP, MAMBA))


@pytest.fixture(scope="module")
def windows(tmp_path_factory):
    return tiny_pair(tmp_path_factory.mktemp("windows"))


def teacher_weights(teacher, ids, index):
    """The eager attention's own weights, [B, H, T, T]."""
    before = teacher.config._attn_implementation
    teacher.set_attn_implementation("eager")
    weights = teacher.model(ids, use_cache=False, output_attentions=True).attentions[index]
    teacher.set_attn_implementation(before)
    return weights


def test_matrix_orientation_compares_the_published_matrices(folders, ids):
    options = Align(**SMALL, losses=[{"name": "mixing_matrix"}])
    student, teacher, trained = pair(folders, options)
    parts = options.start(student, teacher, Batch(ids))(Batch(ids), 1.0)
    found = {name: p.grad for name, p in trained.items() if p.grad is not None}
    assert any("feature_map" in name for name in found)
    # Neither values nor the projection of the output has a part in the matrix.
    assert not any(name.endswith(("o_proj.weight", "out_proj.weight", "norm.weight")) for name in found)
    assert parts["loss"] == pytest.approx(sum(parts[f"layer.{i}"].item() for i in (0, 2)) / 2)
    seen = []
    visit_layers(teacher, ids, [0, 2], seen.append)
    for signals in seen:
        layer, weights = student.model.layers[signals.index], teacher_weights(teacher, ids, signals.index)
        with torch.no_grad():
            own = layer.self_attn.mixing_matrix(layer.input_layernorm(signals.hidden), signals.position_embeddings)
        expected = torch.linalg.matrix_norm(own - weights, ord="fro").mean()
        assert parts[f"layer.{signals.index}"].item() == pytest.approx(expected.item(), rel=1e-5)
    # Another layer's attention, or another head's, is another loss (an untrained Mamba2's matrices are too much alike to tell).
    first = seen[0]
    for wrong in (teacher_weights(teacher, ids, 2), teacher_weights(teacher, ids, 0).roll(1, 1)):
        with torch.no_grad():
            layer = student.model.layers[0]
            own = layer.self_attn.mixing_matrix(layer.input_layernorm(first.hidden), first.position_embeddings)
        assert parts["layer.0"].item() != pytest.approx(torch.linalg.matrix_norm(own - wrong).mean().item(), rel=1e-3)


@pytest.mark.parametrize("losses", [["mixing_matrix"], ["relations"], ["mixer_output", "mixing_matrix"]])
def test_a_student_that_is_the_teacher_has_nothing_to_learn(tmp_path, ids, losses):
    wide = {"name": "streaming", "sink_tokens": 1, "window_tokens": 64}
    options = Align(**SMALL, losses=[{"name": name} for name in losses])
    student, teacher, _ = pair(tiny_pair(tmp_path, (wide, KEEP, wide), noise=0), options)
    assert options.start(student, teacher, Batch(ids))(Batch(ids), 1.0)["loss"].item() < 1e-5
    narrow = tiny_pair(tmp_path / "narrow", (STREAMING, KEEP, STREAMING), noise=0)
    student, teacher, _ = pair(narrow, options)
    # Relations are of the projections, which a window has not changed.
    assert (options.start(student, teacher, Batch(ids))(Batch(ids), 1.0)["loss"].item() > 1e-2) == (losses != ["relations"])


def test_relations_are_those_of_the_projections(windows, ids):
    options = Align(**SMALL, losses=[{"name": "relations", "relations": ["query_key"]}])
    student, teacher, trained = pair(windows, options)
    parts = options.start(student, teacher, Batch(ids))(Batch(ids), 1.0)
    assert {name.split(".")[-2] for name, p in trained.items() if p.grad is not None} == {"q_proj", "k_proj"}
    seen = []
    visit_layers(teacher, ids, [0, 2], seen.append)
    for signals in seen:
        p = teacher_weights(teacher, ids, signals.index)
        attention = teacher.model.layers[signals.index].self_attn
        theirs = attention.q_proj.weight, attention.k_proj.weight
        own = student.model.layers[signals.index].self_attn
        # The student's projections in the teacher's place give the student's attention matrix.
        attention.q_proj.weight, attention.k_proj.weight = own.q_proj.weight, own.k_proj.weight
        with torch.no_grad():
            kept = {}
            visit_layers(teacher, ids, [signals.index], lambda s, kept=kept: kept.update({s.index: s}))
            log_q = teacher_weights(teacher, ids, signals.index)
        attention.q_proj.weight, attention.k_proj.weight = theirs
        if signals.index == 0:
            gap = torch.where(p > 0, p.log() - log_q.log(), 0.0)
            assert_close(parts["layer.0"], (p * gap).sum(-1).mean(), "fp32", grad=True)


def test_context_is_what_the_last_projection_reads(folders, ids):
    """LoLCATs' transfer: plain MSE before o_proj, which then has no gradient."""
    options = Align(**SMALL, losses=[{"name": "mixer_output", "at": "context", "relative": False, "weight": 1000}])
    student, teacher, trained = pair(folders, options)
    parts = options.start(student, teacher, Batch(ids))(Batch(ids), 1.0)
    assert {n for n, p in trained.items() if p.grad is None} == {
        "model.layers.0.self_attn.o_proj.weight", "model.layers.2.self_attn.out_proj.weight",
    }  # fmt: skip
    seen = []
    visit_layers(teacher, ids, [0, 2], seen.append)
    for signals in seen:
        layer, theirs = student.model.layers[signals.index], teacher.model.layers[signals.index].self_attn
        assert torch.equal(theirs.o_proj(signals.context), signals.mixed)
        with torch.no_grad(), Projection(layer.self_attn) as projection:
            mixed, _ = layer.self_attn(layer.input_layernorm(signals.hidden), position_embeddings=signals.position_embeddings)
        own = projection.context_of(mixed)
        assert projection.read is None
        assert torch.equal(projection.last(own), mixed)
        assert_close(parts[f"layer.{signals.index}"], 1000 * nn.functional.mse_loss(own, signals.context), "fp32")


def test_a_relative_context_is_measured_against_the_teachers(folders, ids):
    losses = [[{"name": "mixer_output", "at": "context", "relative": relative}] for relative in (True, False)]
    values = []
    for own in losses:
        options = Align(**SMALL, losses=own)
        student, teacher, _ = pair(folders, options)
        values.append(options.start(student, teacher, Batch(ids))(Batch(ids), 1.0)["layer.0"])
    seen = []
    visit_layers(teacher, ids, [0], seen.append)
    assert_close(values[0], values[1] / seen[0].context.pow(2).mean(-1).median(), "fp32")


def test_a_gated_memory_has_a_context_too(tmp_path, ids):
    options = Align(**SMALL, losses=[{"name": "mixer_output", "at": "context"}])
    student, teacher, trained = pair(tiny_pair(tmp_path, (MAMBA, KEEP, GMU)), options)
    assert options.start(student, teacher, Batch(ids))(Batch(ids), 1.0)["layer.2"].item() > 0
    assert trained["model.layers.2.self_attn.in_proj.weight"].grad.any()


@pytest.mark.parametrize(
    ("mixers", "losses", "message"),
    [
        ((MAMBA, KEEP, GMU), [{"name": "mixing_matrix"}], "layer 2, mixer 'gmu': no matrix tells"),
        ((PARALLEL, KEEP, KEEP), [{"name": "mixing_matrix"}], "layer 0, mixer 'parallel': no matrix tells"),
        ((KEEP, MAMBA, KEEP), [{"name": "relations"}], "layer 1, mixer 'mamba2': its queries, keys and values"),
        ((PARALLEL, KEEP, KEEP), [{"name": "mixer_output", "at": "context"}], "nothing of it is like what the base's o_proj"),
        ((LOW_RANK, KEEP, KEEP), [{"name": "mixer_output", "at": "context"}], "use `at: output`"),
        ((STREAMING, KEEP, KEEP), [{"name": "features"}], "needs layers; this stage offers"),
    ],
)  # fmt: skip
def test_mixers_without_what_a_loss_compares_are_refused(tmp_path, ids, mixers, losses, message):
    options = Align(**SMALL, losses=losses)
    student, teacher, _ = pair(tiny_pair(tmp_path, mixers), options)
    with pytest.raises(ConfigError, match=message) as caught:
        options.start(student, teacher, Batch(ids))
    assert "\n" not in str(caught.value)


def test_matrices_over_rows_of_several_documents_are_refused(folders, ids):
    options = Align(**SMALL, documents="reset", losses=[{"name": "mixing_matrix"}])
    student, teacher, _ = pair(folders, options)
    with pytest.raises(ConfigError, match="documents is reset, and a loss compares matrices"):
        options.start(student, teacher, Batch(ids))


def test_micro_batches_of_matrices_add_up(folders, ids):
    options = Align(**SMALL, losses=[{"name": "mixing_matrix"}, {"name": "mixer_output", "at": "context", "norm": "l2"}])
    student, teacher, trained = pair(folders, options)
    trained = {name: p for name, p in trained.items() if "out_proj" not in name and "o_proj" not in name}
    step = options.start(student, teacher, Batch(ids))
    assert_micro_batches_add_up(step, trained, ids)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("layers", "chosen"), [("converted", [0, 2]), ("all", [0, 1, 2]), ([1], [1])])
def test_features_are_the_layers_outputs_end_to_end(folders, ids, layers, chosen, checkpointing):
    options = KLStage(**SMALL, gradient_checkpointing=checkpointing, losses=[{"name": "features", "layers": layers}])
    student, teacher, trained = pair(folders, options, "kl")
    step = options.start(student, teacher, Batch(ids))
    before = [len(m._forward_hooks) for m in (*student.modules(), *teacher.modules())]
    parts = step(Batch(ids), 1.0)
    assert [len(m._forward_hooks) for m in (*student.modules(), *teacher.modules())] == before
    found = {name: p.grad.clone() for name, p in trained.items() if p.grad is not None}
    assert any(".layers.0." in name for name in found)
    assert not any(f".layers.{chosen[-1] + 1}." in name or "lm_head" in name for name in found)
    for p in trained.values():
        p.grad = None
    own, other = (m.model(ids, output_hidden_states=True, use_cache=False) for m in (student, teacher))
    # The last of hidden_states is behind the final norm.
    with layer_outputs(teacher, [2]) as outputs:
        teacher.model(ids, use_cache=False)
    theirs = [*other.hidden_states[1:-1], outputs[2]]
    with layer_outputs(student, [2]) as outputs:
        student.model(ids, use_cache=False)
    ours = [*own.hidden_states[1:-1], outputs[2]]
    losses = [((ours[i] - theirs[i]).pow(2).sum(-1) / theirs[i].pow(2).sum(-1)).mean() for i in chosen]
    total = torch.stack(losses).mean()
    total.backward()
    assert_close(parts["loss"], total, "fp32")
    for name, grad in found.items():
        assert_close(grad, trained[name].grad, "fp32", grad=True)
    with pytest.raises(AssertionError):
        assert_close(parts["loss"], 2 * total, "fp32")


def test_layer_outputs_are_the_models_own_states(folders, ids):
    _, teacher, _ = pair(folders, KLStage(**SMALL), "kl")
    with torch.no_grad(), layer_outputs(teacher, [0, 1]) as outputs:
        states = teacher.model(ids, output_hidden_states=True, use_cache=False).hidden_states
    assert set(outputs) == {0, 1}
    assert all(torch.equal(outputs[i], states[i + 1]) for i in outputs)


def test_features_want_models_of_one_shape(folders, tmp_path, ids):
    options = KLStage(**SMALL, losses=[{"name": "features"}])
    student, teacher, _ = pair(folders, options, "kl")
    teacher.config.hidden_size = 48
    with pytest.raises(ConfigError, match="hidden_size is 32 in the student and 48 in the teacher"):
        options.start(student, teacher, Batch(ids))


@pytest.mark.parametrize("name", ["jsd", "top_k_kl", "sampled_kl", "features"])
def test_every_loss_of_the_kl_stage_is_lowered_by_it(folders, ids, name):
    options = KLStage(**SMALL, losses=[{"name": name}])
    student, teacher, trained = pair(folders, options, "kl")
    step, optimizer, losses = options.start(student, teacher, Batch(ids)), torch.optim.Adam(trained.values(), lr=3e-3), []
    for _ in range(15):
        losses.append(step(Batch(ids), 1.0)["loss"].item())
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.slow
def test_a_run_with_parameters_that_no_gradient_reaches_resumes_to_the_same_bytes(folders, tmp_path):
    """Matrix orientation leaves values and projections alone; the optimizer then has no moments of them."""
    common = {"seq_tokens": 16, "rows": 4, "tokens": 4 * 64, "save_tokens": 64}
    stages = [
        {"name": "align", **common, "losses": [{"name": "mixing_matrix"}]},
        {"name": "kl", **common, "losses": [{"name": "sampled_kl", "samples": 4}, {"name": "features"}]},
    ]
    whole = distill(folders[1], stages, tiny_tokens(), tmp_path / "whole")
    weights = load_file(whole / "model.safetensors")
    assert not torch.equal(
        weights["model.layers.0.self_attn.q_proj.weight"],
        load_file(folders[1] / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"],
    )
    for steps in (2, 6):
        out = tmp_path / f"out-{steps}"
        with pytest.raises(Stop):
            distill(folders[1], stages, tiny_tokens(), out, progress=stop_after(steps))
        distill(folders[1], stages, tiny_tokens(), out, resume=True)
        assert hashes(out)["model.safetensors"] == hashes(whole)["model.safetensors"]
