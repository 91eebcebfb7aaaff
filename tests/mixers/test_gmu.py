"""What one layer hands to another: which tensor it is, how far its gradient goes, how long it lives, and who may read whom."""

import weakref

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from hybridize.cache import StatelessLayer, cache_bytes
from hybridize.errors import ConfigError
from hybridize.families import FAMILIES
from hybridize.mixers.mamba2 import Mamba2
from hybridize.mixers.memory import Memories
from hybridize.modeling import build_model, hybrid_config, state_bytes
from tests.tiny import tiny_base
from tests.tolerances import assert_close

KEEP, MAMBA = {"name": "attention"}, {"name": "mamba2"}


def reader(layer):
    return {"name": "gmu", "reads": layer}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    root = tmp_path_factory.mktemp("bases")
    return {
        **{family: AutoModelForCausalLM.from_pretrained(tiny_base(family, root)) for family in FAMILIES},
        "biased": AutoModelForCausalLM.from_pretrained(tiny_base("llama", root, attention_bias=True)),
    }


@pytest.fixture
def ids():
    return torch.randint(3, 64, (2, 20), generator=torch.Generator().manual_seed(3))


ONE, TWO = (MAMBA, reader(0), KEEP), (MAMBA, reader(0), reader(0))


def hybrid(base, mixers=ONE):
    torch.manual_seed(1)
    model = build_model(hybrid_config(base.config, list(mixers))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("name", [*FAMILIES, "biased"])
def test_the_unit_and_its_memory_are_the_formula(bases, ids, name):
    """Token by token and head by head in fp64, against what the model's two layers do."""
    model = hybrid(bases[name]).double()
    recurrent, unit = model.model.layers[0].self_attn, model.model.layers[1].self_attn
    assert ("out_proj.bias" in dict(unit.named_parameters())) == (name == "biased")
    kept = {}
    recurrent.norm.register_forward_pre_hook(lambda m, args: kept.update(y=args[0], z=args[1]))
    unit.register_forward_hook(lambda m, args, kwargs, out: kept.update(u=kwargs["hidden_states"], out=out[0]), with_kwargs=True)
    with torch.no_grad():
        model(ids, use_cache=False)
    s = {key: value.detach() for key, value in unit.state_dict().items()}
    eps, weight = model.config.rms_norm_eps, recurrent.norm.weight.detach()

    def expected(y, gate=lambda a: a / (1 + torch.exp(-a))):
        rows = torch.empty_like(kept["out"])
        for row in range(2):
            for t in range(20):
                heads = [y[row, t, 8 * h : 8 * h + 8] for h in range(4)]
                memory = torch.cat([v / ((v**2).mean() + eps) ** 0.5 for v in heads]) * weight
                a = s["in_proj.weight"] @ kept["u"][row, t] + s["in_proj.bias"]
                rows[row, t] = s["out_proj.weight"] @ (memory * gate(a)) + s.get("out_proj.bias", 0)
        return rows

    assert_close(kept["out"], expected(kept["y"]), "fp64")
    gated = kept["y"] * torch.nn.functional.silu(kept["z"])
    for wrong in (expected(gated), expected(kept["y"], torch.sigmoid), expected(kept["y"].roll(8, -1))):
        with pytest.raises(AssertionError):
            assert_close(kept["out"], wrong, "fp64")


def gradients(model, ids):
    model.zero_grad()
    model(ids, labels=ids, use_cache=False).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("mixers", [ONE, TWO], ids=["one", "two"])
def test_the_gradient_reaches_the_memorys_layer(bases, ids, mixers):
    """With the read layer's own way out closed, its gradient is the readers' alone; finite differences say how large."""
    model = hybrid(bases["llama"], mixers).double()
    read = model.model.layers[0].self_attn
    with torch.no_grad():
        read.out_proj.weight.zero_()
    # Of what the state is made of, the part that the mixer does not take to fp32.
    bias, generator = read.conv1d.bias, torch.Generator().manual_seed(0)
    direction = torch.randn(bias.shape, generator=generator, dtype=bias.dtype)
    weight = torch.randn(2, 20, 64, generator=generator, dtype=bias.dtype)
    model.zero_grad()
    (model(ids, use_cache=False).logits * weight).sum().backward()
    sums = []
    for step in (1e-3, -2e-3):
        with torch.no_grad():
            bias.add_(step * direction)
            sums.append(float((model(ids, use_cache=False).logits * weight).sum()))
    # The base's own norms are fp32 whatever the model's dtype, which bounds what differences can tell.
    assert float((bias.grad * direction).sum()) == pytest.approx((sums[0] - sums[1]) / 2e-3, rel=2e-3)
    assert abs(sums[0] - sums[1]) > 1e-3


@pytest.mark.parametrize("mixers", [ONE, TWO], ids=["one", "two"])
def test_gradient_checkpointing_changes_nothing_or_is_refused(bases, ids, mixers):
    model = hybrid(bases["llama"], mixers).train()
    plain = gradients(model, ids)
    # The newer name appeared in transformers 5.23, which warns about the older one.
    newer = hasattr(model, "activation_checkpointing_enable")
    enable = model.activation_checkpointing_enable if newer else model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    again = gradients(model, ids)
    assert set(plain) == set(again) == {name for name, _ in model.named_parameters()}
    assert all(torch.equal(plain[name], again[name]) for name in plain)
    enable({"use_reentrant": True})
    with pytest.raises(ConfigError, match="gradient of memories would be lost"):
        model(ids, use_cache=False)


def test_what_nobody_reads_is_not_made_and_what_is_read_dies_with_the_pass(bases, ids, monkeypatch):
    left = []
    leave = Memories.leave
    monkeypatch.setattr(Memories, "leave", lambda self, i, m: (left.append((i, weakref.ref(m))), leave(self, i, m))[1])
    alone = hybrid(bases["llama"], (MAMBA, MAMBA, KEEP))
    seen = []
    alone.model.layers[0].self_attn.register_forward_pre_hook(lambda m, a, kwargs: seen.append(kwargs), with_kwargs=True)
    with torch.no_grad():
        alone(ids)
    assert left == []
    assert "memories" not in seen[0]
    model = hybrid(bases["llama"], (MAMBA, MAMBA, reader(1)))
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        for part in (ids[:, :19], ids[:, 19:]):
            model(part, past_key_values=cache, use_cache=True)
    assert [index for index, _ in left] == [1, 1]
    assert all(ref() is None for _, ref in left)
    assert isinstance(cache.layers[2], StatelessLayer)
    assert (cache.layers[2].get_seq_length(), cache.layers[2].held()) == (20, [])
    without = DynamicCache(config=alone.config)
    with torch.no_grad():
        alone(ids, past_key_values=without)
    # Of three layers two are Mamba2 in both; the third one is all that differs.
    keys = 2 * 2 * 2 * 8 * 20 * 4
    assert cache_bytes(cache) == cache_bytes(without) - keys == 2 * state_bytes(model.config, 20)


def test_a_unit_without_its_memory_says_so(bases):
    unit = hybrid(bases["llama"]).model.layers[1].self_attn
    with pytest.raises(ConfigError, match="layer 1: got no memories, expected that of layer 0"):
        unit(torch.zeros(1, 2, 32))
    with pytest.raises(ConfigError, match="layer 0 left no memory"):
        unit(torch.zeros(1, 2, 32), memories=Memories([0]))


@pytest.mark.parametrize(
    ("mixers", "says"),
    [
        ((MAMBA, reader(7), KEEP), "layer 1: mixer 'gmu' reads layer 7, which is out of range: the base has 3 layers, 0 to 2"),
        ((MAMBA, reader(2), MAMBA), "layer 1: mixer 'gmu' reads layer 2, expected a layer below it"),
        ((reader(0), MAMBA, MAMBA), "layer 0: mixer 'gmu' reads layer 0, expected a layer below it"),
        ((KEEP, KEEP, reader(1)), "layer 2: mixer 'gmu' reads layer 1, which is 'attention' and has no memory"),
        ((MAMBA, reader(0), reader(1)), "layer 2: mixer 'gmu' reads layer 1, which is 'gmu' and has no memory .*: .*mamba2"),
        ((MAMBA, reader(-1), KEEP), "reads is -1, expected the index of a layer"),
        ((MAMBA, {"name": "gmu"}, KEEP), "'reads' is missing"),
        ((MAMBA, reader("0"), KEEP), "reads is '0', expected int"),
    ],
)
def test_configs_that_are_refused(bases, mixers, says):
    with pytest.raises(ConfigError, match=says) as caught:
        build_model(hybrid_config(bases["llama"].config, list(mixers)))
    assert "\n" not in str(caught.value)


def test_a_memory_of_another_width_is_refused(bases, monkeypatch):
    monkeypatch.setattr(Mamba2, "memory_width", lambda self, config: 64)
    with pytest.raises(ConfigError, match="layer 1: mixer 'gmu' reads layer 0, whose memory is 64 wide, expected 32"):
        build_model(hybrid_config(bases["llama"].config, [MAMBA, reader(0), KEEP]))
