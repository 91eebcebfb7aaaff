"""The two stages: their gradients, what they train, and their options."""

from types import SimpleNamespace

import pytest
import torch

from hybridize.capture import visit_layers
from hybridize.data import Batch
from hybridize.distill.align import Align, own_layers
from hybridize.distill.kl import KLStage
from hybridize.distill.run import load_pair
from hybridize.distill.stages import STAGES
from hybridize.errors import ConfigError
from hybridize.mixers import MIXERS
from tests.distill.pair import BOTH, KEEP, STREAMING, tiny_pair
from tests.tolerances import assert_close, rms_ratio

MAMBA, GMU = {"name": "mamba2"}, {"name": "gmu", "reads": 0}
SMALL = {"tokens": 4096, "seq_tokens": 16, "rows": 4}
CPU = torch.device("cpu")


def pair(folders, options, name="align"):
    base, student = folders
    return load_pair(student, base, options, name, {}, CPU)


def grads_of(trained):
    return torch.cat([p.grad.flatten() for p in trained.values()])


def assert_micro_batches_add_up(step, trained, ids):
    """Parts of a step, by their shares, have the gradient of the whole; a part too many has not."""
    step(Batch(ids), 1.0)
    whole = grads_of(trained)
    for p in trained.values():
        p.grad = None
    step(Batch(ids[:1]), 0.25)
    step(Batch(ids[1:]), 0.75)
    assert_close(grads_of(trained), whole, "fp32", grad=True)
    step(Batch(ids[:1]), 0.25)
    with pytest.raises(AssertionError):
        assert_close(grads_of(trained), whole, "fp32", grad=True)


def test_visiting_hands_over_what_the_model_computes(folders, ids):
    _, teacher, _ = pair(folders, Align(**SMALL))
    seen = []

    def hooks():
        return [len(module._forward_hooks) for module in teacher.modules()]

    before = hooks()
    visit_layers(teacher, ids, [0, 2], seen.append)
    assert hooks() == before
    states = teacher.model(ids, output_hidden_states=True, use_cache=False).hidden_states
    assert [s.index for s in seen] == [0, 2]
    for signals in seen:
        layer = teacher.model.layers[signals.index]
        assert torch.equal(signals.hidden, states[signals.index])
        assert torch.equal(signals.normed, layer.input_layernorm(signals.hidden))
        middle = signals.hidden + signals.mixed
        assert torch.equal(signals.output, middle + layer.mlp(layer.post_attention_layernorm(middle)))
        assert not signals.output.requires_grad
    assert torch.equal(seen[0].output, states[1])
    calls = []
    handle = teacher.model.layers[1].register_forward_hook(lambda *a: calls.append(1))
    visit_layers(teacher, ids, [0], seen.append)
    handle.remove()
    assert not calls


@pytest.mark.parametrize("losses", [["mixer_output"], ["hidden_state"], ["mixer_output", "hidden_state"]])
def test_backward_layer_by_layer_is_backward_of_the_sum(folders, ids, losses):
    options = Align(**SMALL, losses=[{"name": name, "weight": 0.7} for name in losses])
    student, teacher, trained = pair(folders, options)
    step = options.start(student, teacher, Batch(ids))
    parts = step(Batch(ids), 1.0)
    actual = grads_of(trained)
    for p in trained.values():
        p.grad = None

    # The whole graph at once, from full states and the model's own layers.
    with torch.no_grad():
        states = teacher.model(ids, output_hidden_states=True, use_cache=False).hidden_states
    cos_sin = teacher.model.rotary_emb(states[0], torch.arange(16)[None])
    total = 0
    for index in (0, 2):
        signals = []
        visit_layers(teacher, ids, [index], signals.append)
        mixed_scale = signals[0].mixed.pow(2).mean(-1).median()
        update_scale = (signals[0].output - signals[0].hidden).pow(2).mean(-1).median()
        layer, mixed = student.model.layers[index], []
        handle = layer.self_attn.register_forward_hook(lambda m, a, out, mixed=mixed: mixed.append(out[0]))
        output = layer(signals[0].hidden, position_embeddings=cos_sin)
        handle.remove()
        if "mixer_output" in losses:
            total = total + 0.7 * (mixed[0] - signals[0].mixed).pow(2).mean() / mixed_scale
        if "hidden_state" in losses:
            total = total + 0.7 * (output - signals[0].output).pow(2).mean() / update_scale
    total.backward()
    # Each layer's gradient is of its own loss, however many there are; what is shown is their mean.
    assert_close(parts["loss"], total / 2, "fp32")
    assert_close(actual, grads_of(trained), "fp32", grad=True)
    # A step that forgot one layer would not pass.
    wrong = actual.clone()
    wrong[: len(wrong) // 2] = 0
    with pytest.raises(AssertionError):
        assert_close(wrong, grads_of(trained), "fp32", grad=True)


@pytest.mark.parametrize("cls", [Align, KLStage])
def test_micro_batches_add_up(folders, ids, cls):
    options = cls(**SMALL)
    name = "align" if cls is Align else "kl"
    student, teacher, trained = pair(folders, options, name)
    step = options.start(student, teacher, Batch(ids))
    assert_micro_batches_add_up(step, trained, ids)


def test_align_holds_one_model(folders):
    student, teacher, trained = pair(folders, Align(**SMALL))
    shared = {id(p) for p in teacher.parameters()}
    own = {name for name, p in student.named_parameters() if id(p) not in shared}
    assert own == set(trained)
    assert all(".self_attn." in name and ".layers.1." not in name for name in own)
    assert all(not p.requires_grad for p in teacher.parameters())


def test_kl_trains_all_and_the_teacher_keeps_its_own(folders, ids):
    options = KLStage(**SMALL)
    student, teacher, trained = pair(folders, options, "kl")
    shared = {id(p) for p in teacher.parameters()}
    assert not any(id(p) in shared for p in trained.values())
    parts = options.start(student, teacher, Batch(ids))(Batch(ids), 1.0)
    assert parts["loss"] > 0
    assert all(p.grad is not None and bool(p.grad.any()) for p in trained.values())
    with torch.no_grad():
        log_q, log_p = (m(ids).logits.log_softmax(-1) for m in (student, teacher))
    assert_close(parts["kl"], (log_p.exp() * (log_p - log_q)).sum(-1).mean(), "fp32")


def test_align_gives_a_reader_the_students_memory_and_no_way_back(tmp_path, ids):
    """The unit's loss from the student's own lower layer on the teacher's input, whose gradient stays its own."""
    folders = tiny_pair(tmp_path, (MAMBA, KEEP, GMU))
    options = Align(**SMALL, losses=BOTH)
    student, teacher, trained = pair(folders, options)
    parts = options.start(student, teacher, Batch(ids))(Batch(ids), 1.0)
    found = {name: p.grad.clone() for name, p in trained.items()}
    with torch.no_grad():
        for p in trained.values():
            p.grad = None
    seen = []
    visit_layers(teacher, ids, [0, 2], seen.append)
    read, layer = (student.model.layers[index] for index in (0, 2))

    def unit_loss(normed):
        with torch.no_grad():
            kept = {}
            handle = read.self_attn.norm.register_forward_pre_hook(lambda m, args: kept.update(y=args[0]))
            read.self_attn(normed)
            handle.remove()
            memory = read.self_attn.norm.ungated(kept["y"])
        u = layer.input_layernorm(seen[1].hidden)
        mixed = layer.self_attn.out_proj(memory * torch.nn.functional.silu(layer.self_attn.in_proj(u)))
        hidden = seen[1].hidden + mixed
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        loss = (mixed - seen[1].mixed).pow(2).mean() / seen[1].mixed.pow(2).mean(-1).median()
        update = (seen[1].output - seen[1].hidden).pow(2).mean(-1).median()
        return loss + (hidden - seen[1].output).pow(2).mean() / update

    loss = unit_loss(read.input_layernorm(seen[0].hidden))
    assert_close(parts["layer.2"], loss, "fp32")
    with pytest.raises(AssertionError):
        assert_close(parts["layer.2"], unit_loss(read.input_layernorm(seen[1].hidden)), "fp32")
    loss.backward()
    for name in (n for n in trained if ".layers.2." in n):
        assert_close(found[name], trained[name].grad, "fp32", grad=True)
    alone, teacher, below = pair(tiny_pair(tmp_path / "alone", (MAMBA, KEEP, KEEP)), options)
    with torch.no_grad():
        for name, p in below.items():
            p.copy_(trained[name])
    options.start(alone, teacher, Batch(ids))(Batch(ids), 1.0)
    for name, p in below.items():
        assert_close(found[name], p.grad, "fp32", grad=True)


def test_align_lowers_the_loss_of_a_reader(tmp_path, ids):
    options = Align(**SMALL)
    student, teacher, trained = pair(tiny_pair(tmp_path, (MAMBA, KEEP, GMU)), options)
    step, optimizer, losses = options.start(student, teacher, Batch(ids)), torch.optim.Adam(trained.values(), lr=3e-3), []
    for _ in range(40):
        losses.append(step(Batch(ids), 1.0))
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1]["layer.2"] < 0.8 * losses[0]["layer.2"]
    assert losses[-1]["layer.0"] < 0.8 * losses[0]["layer.0"]


def test_gradient_checkpointing_changes_nothing(folders, ids):
    found = []
    for checkpointing in (False, True):
        options = KLStage(**SMALL, gradient_checkpointing=checkpointing)
        student, teacher, trained = pair(folders, options, "kl")
        options.start(student, teacher, Batch(ids))(Batch(ids), 1.0)
        assert student.model.gradient_checkpointing == checkpointing
        found.append(grads_of(trained))
    assert torch.equal(*found)


def test_bf16_trains_fp32_weights(folders, ids):
    for name, cls in (("align", Align), ("kl", KLStage)):
        plain = cls(**SMALL)
        student, teacher, trained = pair(folders, plain, name)
        plain.start(student, teacher, Batch(ids))(Batch(ids), 1.0)
        exact = grads_of(trained)
        options = cls(**SMALL, dtype="bf16")
        student, teacher, trained = pair(folders, options, name)
        options.start(student, teacher, Batch(ids))(Batch(ids), 1.0)
        assert all(p.dtype == p.grad.dtype == torch.float32 for p in trained.values())
        assert 1e-5 < rms_ratio(grads_of(trained), exact) < 0.05


@pytest.mark.parametrize("cls", [Align, KLStage])
@pytest.mark.parametrize("key", ["train", "lr_groups"])
def test_a_glob_that_matches_nothing_is_an_error(folders, cls, key):
    options = cls(**SMALL, **{key: ["*.no_such.*"] if key == "train" else {"*.no_such.*": 1e-3}})
    with pytest.raises(ConfigError, match=r"'\*\.no_such\.\*', which matches none"):
        pair(folders, options, "align" if cls is Align else "kl")


def test_align_trains_converted_mixers_only(folders):
    with pytest.raises(ConfigError, match="matches none"):
        pair(folders, Align(**SMALL, train=["*.mlp.*"]))
    with pytest.raises(ConfigError, match="matches none"):
        pair(folders, Align(**SMALL, train=["model.layers.1.*"]))
    _, _, trained = pair(folders, Align(**SMALL, train=["*.layers.2.*.q_proj.*"]))
    assert list(trained) == ["model.layers.2.self_attn.q_proj.weight"]


def test_who_reads_goes_with_who_is_read():
    """An owner of shared latents says that it reads None; two groups of them are two shares, and a layer alone is a third."""
    xkv = [{"name": "xkv"}, {"name": "xkv", "reads": 0}, {"name": "xkv"}, {"name": "xkv", "reads": 2}, MAMBA]
    options = [MIXERS.build(spec) for spec in xkv]
    student = SimpleNamespace(config=SimpleNamespace(mixers=xkv), model=SimpleNamespace(mixer_options=options))
    assert [own_layers(student, rank, 3) for rank in range(3)] == [[0, 1], [2, 3], [4]]
    assert [own_layers(student, rank, 2) for rank in range(2)] == [[0, 1, 4], [2, 3]]


def test_align_needs_a_converted_layer(tmp_path):
    with pytest.raises(ConfigError, match="every layer of the student is 'attention'"):
        pair(tiny_pair(tmp_path, (KEEP, KEEP, KEEP)), Align(**SMALL))


def test_tied_embeddings_stay_tied(tmp_path, ids):
    folders = tiny_pair(tmp_path, (KEEP, STREAMING, KEEP), tie_word_embeddings=True)
    student, teacher, trained = pair(folders, KLStage(**SMALL), "kl")
    assert student.lm_head.weight is student.model.embed_tokens.weight is trained["model.embed_tokens.weight"]
    student, teacher, trained = pair(folders, KLStage(**SMALL, train=["*.self_attn.*"]), "kl")
    assert student.lm_head.weight is student.model.embed_tokens.weight is teacher.lm_head.weight


def test_decay_and_rates_go_where_they_should(tmp_path):
    folders = tiny_pair(tmp_path, (KEEP, STREAMING, KEEP), attention_bias=True)
    options = KLStage(**SMALL, weight_decay=0.1, lr=1e-4, lr_groups={"*.layers.1.self_attn.*": 1e-3, "*.self_attn.*": 5e-4})
    _, _, trained = pair(folders, options, "kl")
    names = {id(p): name for name, p in trained.items()}
    rates, decays = {}, {}
    for group in options.optimizer(trained).param_groups:
        for p in group["params"]:
            rates[names[id(p)]], decays[names[id(p)]] = group["full_lr"], group["weight_decay"]
    assert set(rates) == set(trained)
    assert rates["model.layers.1.self_attn.q_proj.weight"] == 1e-3
    assert rates["model.layers.0.self_attn.q_proj.weight"] == 5e-4
    assert rates["model.layers.0.mlp.up_proj.weight"] == 1e-4
    assert {name for name, decay in decays.items() if decay == 0} == {
        name for name in trained if "norm" in name or name.endswith("bias")
    }
    convolution = {"x.conv1d.weight": torch.nn.Parameter(torch.ones(4, 1, 4)), "A_log": torch.nn.Parameter(torch.ones(4))}
    assert [group["weight_decay"] for group in options.optimizer(convolution).param_groups if group["params"]] == [0.0]


def test_the_rate_follows_the_step():
    def rates(**options):
        stage = KLStage(tokens=100 * 64, seq_tokens=16, rows=4, **options)
        return [stage.rate(step) for step in range(stage.steps)]

    cosine = rates(warmup=0.1, final_ratio=0.1)
    assert cosine[0] == pytest.approx(0.1)
    assert cosine[9] == cosine[10] == 1.0
    assert cosine[-1] == pytest.approx(0.1)
    assert cosine[10:] == sorted(cosine[10:], reverse=True)
    assert rates(schedule="linear", warmup=0, final_ratio=0)[50] == pytest.approx(1 - 50 / 99)
    assert set(rates(schedule="constant", warmup=0)) == {1.0}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": 63}, "expected at least one step of 64"),
        ({"rows": 0}, "rows is 0"),
        ({"warmup": 1.5}, "warmup is 1.5"),
        ({"betas": [0.9]}, "expected two numbers"),
        ({"lr": 0}, "lr is 0"),
        ({"save_tokens": 0}, "save_tokens is 0"),
        ({"schedule": "wsd"}, "expected one of 'cosine'"),
        ({"learning_rate": 1e-3}, "unknown option 'learning_rate'"),
    ],
)
def test_impossible_options_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        STAGES.build({"name": "kl", **SMALL, **options})


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        ([], "losses is empty"),
        ([{"name": "kl"}], "needs head"),
        ([{"name": "mixer_output"}, {"name": "mixer_output"}], "given twice"),
        ([{"name": "mse"}], "unknown loss 'mse'"),
    ],
)
def test_losses_must_fit_the_stage(folders, ids, losses, message):
    options = Align(**SMALL, losses=losses)
    student, teacher, _ = pair(folders, options)
    with pytest.raises(ConfigError, match=message):
        options.start(student, teacher, Batch(ids))
