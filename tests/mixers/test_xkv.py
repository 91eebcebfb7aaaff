"""Keys and values shared by adjacent layers: the mixer against its formula, at full rank the base, and what the cache holds."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

import hybridize.modeling as modeling
from hybridize.cache import LatentLayer, cache_bytes
from hybridize.checkpoint import load_model, open_base
from hybridize.conversions import convert, plan
from hybridize.errors import ConfigError
from hybridize.families import FAMILIES
from hybridize.mixers import MIXERS
from hybridize.mixers.memory import Memories
from tests.mixers.test_low_rank_kv import CASES, ROPES, SHAPE, angles, assert_rolled_back_alike, stepwise
from tests.tiny import SIZES, tiny_base
from tests.tolerances import assert_close, rms_ratio

PURE = {"name": "xkv", "rank": 4, "own_share": 0.0, "group_layers": 3}
MAMBA = {"name": "mamba2"}


def reader(of=0, **options):
    return {**PURE, "reads": of, **options}


THREE = (PURE, reader(), reader())


def hybrid(mixers=THREE):
    """A small hybrid with random weights."""
    base = AutoConfig.for_model("llama", **SIZES)
    torch.manual_seed(1)
    model = modeling.build_model(modeling.hybrid_config(base, list(mixers))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def ids():
    return torch.randint(3, 64, (2, 40), generator=torch.Generator().manual_seed(3))


def slowly(mixer, config, u, positions, latents, pair):
    """The formula by loops over heads and tokens, fp64. `pair` tells the key/value head of a query head."""
    s = {name: tensor.double() for name, tensor in mixer.state_dict().items()}
    heads, d = config.num_attention_heads, 8
    frequencies = 10000.0 ** (-torch.arange(0, d, 2, dtype=torch.float64) / d)

    def turned(x, position):
        half = torch.complex(x[: d // 2], x[d // 2 :])
        half = half * torch.polar(torch.ones(d // 2, dtype=torch.float64), float(position) * frequencies)
        return torch.cat([half.real, half.imag])

    def norm(x, name):
        return x / torch.sqrt(x.pow(2).mean() + config.rms_norm_eps) * s[name] if name in s else x

    def rows(name, x, head):
        part = slice(head * d, head * d + d)
        return s[f"{name}.weight"][part] @ x + (s[f"{name}.bias"][part] if f"{name}.bias" in s else 0)

    out = torch.zeros(len(u), 32, dtype=torch.float64)
    for t in range(len(u)):
        mixed = []
        for h in range(heads):
            q = turned(norm(rows("q_proj", u[t], h), "q_norm.weight"), positions[t])
            keys = [turned(norm(rows("k_up", c, pair(h)), "k_norm.weight"), p) for c, p in zip(latents, positions, strict=True)]
            p = (torch.stack([q @ k for k in keys[: t + 1]]) * d**-0.5).softmax(0)
            mixed.append(sum(p[i] * rows("v_up", latents[i], pair(h)) for i in range(t + 1)))
        out[t] = s["o_proj.weight"] @ torch.cat(mixed) + s.get("o_proj.bias", 0)
    return out


@pytest.mark.parametrize("own_share", [0.0, 0.5])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_its_formula(family, own_share):
    config = modeling.hybrid_config(AutoConfig.for_model(family, **{**SIZES, **SHAPE}), [{"name": "attention"}] * 3)
    options = {"name": "xkv", "rank": 6, "own_share": own_share, "group_layers": 2}
    torch.manual_seed(2)
    owner, above = (MIXERS.build({**options, "reads": reads}).build(config, i) for i, reads in ((0, None), (1, 0)))
    for module in (owner.double().eval(), above.double().eval()):
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
    below, u = torch.randn(2, 7, 32, dtype=torch.float64)
    positions = torch.tensor([[3, 4, 5, 6, 9, 10, 11]])
    shared = below @ owner.down.weight.detach().T
    own = u @ above.down.weight.detach().T if own_share else u[:, :0]
    row = "fp32" if FAMILIES[family].qk_norm else "fp64"
    for mixer, x, latents, wrong in (
        (owner, below, shared, shared.roll(1, 0)),
        (above, u, torch.cat([shared, own], 1), torch.cat([u @ owner.down.weight.detach().T, own], 1)),
    ):
        memories = Memories([0])
        if mixer is above:
            memories.leave(0, shared[None])
        with torch.no_grad():
            found = mixer(x[None], angles(positions), memories=memories)[0][0]
            expected = slowly(mixer, config, x, positions[0], latents, lambda h: h // 2)
            assert_close(found, expected, row)
            if mixer is owner:
                assert torch.equal(memories.take(0)[0], shared)
            assert rms_ratio(found, slowly(mixer, config, x, positions[0], wrong, lambda h: h // 2)) > 0.1
            assert rms_ratio(found, slowly(mixer, config, x, positions[0], latents, lambda h: h % 4)) > 0.1


@pytest.fixture(scope="module", params=[("llama", "default"), ("qwen3", "yarn"), ("qwen2", "llama3")], ids=str)
def twins(request, tmp_path_factory):
    """A base, and its conversion at full rank: an owner and two layers above it."""
    family, rope = request.param
    folder = tmp_path_factory.mktemp("twins")
    extra = {"rope_parameters": ROPES[rope]} if ROPES[rope] else {}
    path = tiny_base(family, folder, **SHAPE, **extra)
    section = {"keep": {"layers": []}, "mixer": {"name": "xkv", "rank": "full"}}
    convert(plan(open_base(path), section, "t", 0), folder / "out", torch.randint(3, 64, (4, 16)))
    return AutoModelForCausalLM.from_pretrained(path).eval(), load_model(folder / "out").eval()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("sizes", [(14, 1, 1, 24), (5, 9, 26)], ids=str)
def test_full_rank_is_the_base_whatever_the_cache_goes_through(twins, ids, sizes, case):
    base, hybrid = twins
    mask, positions = CASES[case]
    found, _ = stepwise(hybrid, ids, sizes, mask, positions)
    expected, _ = stepwise(base, ids, sizes, mask, positions)
    real = torch.ones(2, 40, dtype=torch.bool) if mask is None else mask.bool()
    assert_close(found[real], expected[real], "fp32")
    with torch.no_grad():
        hybrid.model.layers[2].self_attn.v_up.bias.add_(0.1)
        other, _ = stepwise(hybrid, ids, sizes, mask, positions)
        hybrid.model.layers[2].self_attn.v_up.bias.sub_(0.1)
    assert rms_ratio(other[real], expected[real]) > 1e-3


def test_rollback_choice_of_rows_and_any_mask(twins, ids):
    assert_rolled_back_alike(twins, ids)
    base, hybrid = twins
    seen = torch.rand(2, 1, 40, 40, generator=torch.Generator().manual_seed(1)) < 0.6
    with torch.no_grad():
        found, expected = (m(ids, attention_mask=seen.tril() | torch.eye(40, dtype=torch.bool)).logits for m in (hybrid, base))
    assert_close(found, expected, "fp32")


def test_layers_without_latents_of_their_own_cache_positions_alone(ids):
    """And count tokens, crop, and follow their rows by them, also as the first layer that a cache asks."""
    model = hybrid()
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
    found, cache = stepwise(model, ids, (13, 1, 1, 25))
    assert_close(found, whole, "fp32")
    assert [layer.get_seq_length() for layer in cache.layers] == [40] * 3
    assert [sum(t.numel() for t in layer.held()) for layer in cache.layers] == [2 * 40 * (12 + 1), 2 * 40, 2 * 40]
    assert cache_bytes(cache) == 2 * modeling.state_bytes(model.config, 40) == 2 * 40 * (12 * 4 + 3 * 4)
    cache.crop(-10)
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0, 2]))
    assert [layer.get_seq_length() for layer in cache.layers] == [30] * 3
    rows = torch.tensor([1, 0])
    with torch.no_grad():
        again = model(ids[rows, 30:], past_key_values=cache).logits
    assert_close(again, whole[rows, 30:], "fp32")
    assert rms_ratio(again, whole[:, 30:]) > 0.1
    alone = LatentLayer()
    alone.extend(torch.zeros(1, 1, 3, 0), torch.zeros(1, 1, 3, 0), torch.arange(3)[None])
    assert alone.get_seq_length() == 3
    alone.reset()
    assert alone.get_seq_length() == 0


def test_a_plan_that_forgets_nothing_takes_right_padding_with_a_cache(ids):
    model = hybrid()
    mask = torch.ones_like(ids)
    mask[1, 30:] = 0
    with torch.no_grad():
        padded = model(ids, attention_mask=mask, use_cache=True).logits
        alone = model(ids[1:, :30], use_cache=False).logits
    assert_close(padded[1:, :30], alone, "fp32")
    mixed = hybrid(mixers=(MAMBA, {**PURE, "group_layers": 2}, reader(1, group_layers=2)))
    with pytest.raises(ConfigError, match="pad on the left"):
        mixed(ids, attention_mask=mask, use_cache=True)


def test_the_layers_above_train_the_owners_latents(ids):
    """With the owner's own way out closed, and with its checkpointing: the same gradients, or a refusal."""
    model = hybrid().train()
    owner = model.model.layers[0].self_attn
    with torch.no_grad():
        owner.o_proj.weight.zero_()

    def gradients():
        model.zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    assert bool(plain["model.layers.0.self_attn.down.weight"].any())
    assert not bool(plain["model.layers.0.self_attn.k_up.weight"].any())
    newer = hasattr(model, "activation_checkpointing_enable")
    enable = model.activation_checkpointing_enable if newer else model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    again = gradients()
    assert all(torch.equal(plain[name], again[name]) for name in plain)
    enable({"use_reentrant": True})
    with pytest.raises(ConfigError, match="gradient of memories would be lost"):
        model(ids, use_cache=False)


@pytest.mark.parametrize(
    ("options", "sizes"),
    [
        # Keys and values of a layer are 32 wide, as is the stream.
        ({"rank": 8, "own_share": 0.0}, (32, 0)),
        ({"rank": 8, "own_share": 1.0}, (8, 8)),
        ({"rank": 8, "own_share": 0.5}, (20, 4)),
        ({"rank": 0.25, "own_share": 0.5}, (20, 4)),
        ({"rank": 0.5, "own_share": 0.0}, (32, 10)),
        ({"rank": 0.5, "own_share": 0.0, "group_layers": 1}, (16, 0)),
        ({"rank": 0.001}, (1, 1)),
        ({"rank": "full"}, (32, 32)),
        ({}, (20, 4)),
        ({"group_layers": 1}, (8, 4)),
    ],
    ids=str,
)
def test_sizes_and_bytes(options, sizes):
    config = modeling.hybrid_config(AutoConfig.for_model("llama", **SIZES), [{"name": "attention"}] * 3)
    owner, above = (MIXERS.build({"name": "xkv", **options, "reads": reads}) for reads in (None, 0))
    assert owner.sizes(config) == sizes
    assert [mixer.state_bytes(config, 6) for mixer in (owner, above)] == [6 * (4 * size + 4) for size in sizes]


@pytest.mark.parametrize(
    ("mixers", "says"),
    [
        ((PURE, reader(7), PURE), "layer 1: mixer 'xkv' reads layer 7, which is out of range"),
        ((PURE, reader(2), PURE), "layer 1: mixer 'xkv' reads layer 2, expected a layer below it"),
        ((PURE, reader(), reader(1)), "layer 2: mixer 'xkv' reads layer 1, which is 'xkv' and has no memory to read"),
        ((MAMBA, PURE, reader()), "reads layer 0, which is 'mamba2' and leaves its mixture, expected the shared latents .*: xkv"),
        ((PURE, {"name": "gmu", "reads": 0}, MAMBA), "which is 'xkv' and leaves its shared latents, expected the mixture"),
        ((PURE, reader(rank=5), PURE), "layer 1: mixer 'xkv' reads layer 0, which has rank 4, expected this layer's 5"),
        ((PURE, reader(own_share=0.5), PURE), "which has own_share 0.0, expected this layer's 0.5"),
        ((PURE, reader(group_layers=2), PURE), "which has group_layers 3, expected this layer's 2"),
        ((PURE, reader(-1), PURE), "reads is -1, expected the index of a layer"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_configs_that_are_refused(mixers, says):
    with pytest.raises(ConfigError, match=says) as caught:
        hybrid(mixers=mixers)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rank": 0}, "rank is 0, expected an integer >= 1"),
        ({"rank": 1.0}, "rank is 1.0, expected a share between 0 and 1"),
        ({"rank": 33}, "rank is 33, expected at most 32: a layer's keys and values"),
        ({"rank": "half"}, "rank is 'half'"),
        ({"own_share": 1.1}, "own_share is 1.1"),
        ({"own_share": -0.1}, "own_share is -0.1"),
        ({"group_layers": 0}, "group_layers is 0, expected an integer >= 1"),
        ({"group_layers": "4"}, "group_layers is '4'"),
        ({"reads": 1}, "layer 0: mixer 'xkv' reads layer 1, expected a layer below it"),
        ({"method": "svd"}, "method is 'svd'"),
    ],
    ids=str,
)
def test_bad_options_are_refused_when_planned(options, words, tmp_path):
    base = open_base(tiny_base("llama", tmp_path))
    with pytest.raises(ConfigError, match=words) as caught:
        plan(base, {"keep": {"every": 3}, "mixer": {"name": "xkv", **options}}, "t", 0)
    assert "\n" not in str(caught.value)


def test_a_layer_without_the_latents_it_needs_says_so(ids):
    above = hybrid().model.layers[1].self_attn
    u, turn = torch.zeros(1, 4, 32), tuple(a.float() for a in angles(torch.arange(4)[None]))
    with pytest.raises(ConfigError, match="layer 1: got no memories, expected that of layer 0"):
        above(u, turn)
    memories = Memories([0])
    with pytest.raises(ConfigError, match="layer 0 left no memory"):
        above(u, turn, memories=memories)
    memories.leave(0, torch.zeros(1, 3, 12))
    with pytest.raises(ConfigError, match="left latents of 3 tokens, expected 4"):
        above(u, turn, memories=memories)
    with pytest.raises(ConfigError, match="no position_ids"):
        above(u, turn, memories=memories, past_key_values=DynamicCache())
