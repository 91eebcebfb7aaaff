"""The rule of who sees what, the cache's slots, and the two sparse mixers against attention by definition."""

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

import hybridize.modeling as modeling
from hybridize.cache import cache_bytes
from hybridize.errors import ConfigError
from hybridize.families import FAMILIES, family_of
from hybridize.mixers import MIXERS
from hybridize.mixers.windowed import EVERYTHING, Reach
from tests.mixers.test_contract import build, in_chunks, logits
from tests.tiny import tiny_base
from tests.tolerances import TOLERANCES, assert_close, rms_ratio

REACHES = [
    Reach(sink=3, window=5),
    Reach(sink=0, window=1),
    Reach(sink=0, window=7, block=2, stride=3),
    Reach(sink=5, window=6, block=4, stride=2),
    Reach(sink=9, window=4, block=1, stride=4),
    Reach(sink=2, window=12, block=3, stride=4),
    Reach(sink=1, window=30, block=2, stride=5),
    EVERYTHING,
]
SPARSE = {"name": "block_sparse", "sink_tokens": 2, "window_tokens": 7, "block_tokens": 4, "stride_blocks": 3}
HEADS = {"name": "streaming_heads", "sink_tokens": 2, "window_tokens": 7, "full_heads": [2, 0]}


def lasting(reach, p):
    return p < reach.sink or (reach.stride > 0 and (p // reach.block) % reach.stride == 0)


@pytest.mark.parametrize("reach", REACHES, ids=str)
def test_slots_are_those_of_a_cache_filled_token_by_token(reach):
    slots: list[int] = []
    for p in range(60):
        assert reach.lasting(p) == sum(lasting(reach, x) for x in range(p))
        leaving = p - reach.window
        if leaving >= 0 and not lasting(reach, leaving):
            assert reach.slot(leaving) == slots.index(leaving)
            slots[slots.index(leaving)] = p
        else:
            slots.append(p)
        assert reach.slots(p + 1) == len(slots)
        # Beside a row that has seen less: its later slots are empty.
        counts = torch.tensor([p + 1, p // 2])
        places = reach.places(counts, len(slots))
        assert places[0].tolist() == slots
        fewer = reach.places(counts[1:], reach.slots(p // 2))[0].tolist()
        assert places[1].tolist() == fewer + [-1] * (len(slots) - len(fewer))
        # What is held is what the next token may see, and the one that leaves with it.
        assert set(slots) == {x for x in range(p + 1) if p + 1 - x <= reach.window or lasting(reach, x)}
    ranks = torch.arange(reach.lasting(60))
    assert reach.nth_lasting(ranks).tolist() == [x for x in range(60) if lasting(reach, x)]


def by_definition(module, config, u, angles, sees):
    """Softmax attention one query at a time, fp64. `sees(g, t, p)`: whether a query of key/value head g at t sees p."""
    batch, tokens, _ = u.shape
    heads, groups, d = config.num_attention_heads, config.num_key_value_heads, 8
    w = {name: tensor.double() for name, tensor in module.state_dict().items()}
    cos, sin = (angle.double()[:, :, None] for angle in angles)

    def project(name, count):
        out = (u @ w[f"{name}_proj.weight"].T + w.get(f"{name}_proj.bias", 0)).view(batch, tokens, count, d)
        if f"{name}_norm.weight" in w:
            out = out * torch.rsqrt(out.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps) * w[f"{name}_norm.weight"]
        return out

    def rotate(x):
        return x * cos + torch.cat([-x[..., d // 2 :], x[..., : d // 2]], -1) * sin

    q, k, v = rotate(project("q", heads)), rotate(project("k", groups)), project("v", groups)
    out = torch.zeros(batch, tokens, heads, d, dtype=torch.float64)
    for h in range(heads):
        g = h // (heads // groups)
        for t in range(tokens):
            seen = [p for p in range(t + 1) if sees(g, t, p)]
            weights = torch.softmax((k[:, seen, g] * q[:, t, h][:, None]).sum(-1) * d**-0.5, -1)
            out[:, t, h] = (weights[..., None] * v[:, seen, g]).sum(1)
    return out.flatten(2) @ w["o_proj.weight"].T + w.get("o_proj.bias", 0)


def near(t, p, sink=2, window=7):
    return p < sink or t - p < window


def strided(t, p, offset=0):
    return near(t, p) or (p // 4 + offset) % 3 == 0


@pytest.mark.parametrize(
    ("spec", "right", "wrong"),
    [
        (
            SPARSE,
            lambda g, t, p: strided(t, p),
            [lambda g, t, p: strided(t, p, 1), lambda g, t, p: near(t, p), lambda g, t, p: strided(t, p) or t - p == 7],
        ),
        (
            HEADS,
            lambda g, t, p: g in (0, 2) or near(t, p),
            # The other heads full; the first ones; all.
            [lambda g, t, p: g in (1, 3) or near(t, p), lambda g, t, p: g < 2 or near(t, p), lambda g, t, p: True],
        ),
    ],
    ids=["block_sparse", "streaming_heads"],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_is_attention_by_definition(family, spec, right, wrong, tmp_path):
    extra = {"attention_bias": True} if family == "llama" else {}
    base = AutoModelForCausalLM.from_pretrained(
        tiny_base(family, tmp_path, num_attention_heads=8, num_key_value_heads=4, **extra)
    )
    options = MIXERS.build(spec)
    module = options.build(base.config, 1)
    own = base.model.layers[1].self_attn.state_dict()
    assert set(module.state_dict()) - set(own) <= {"alpha"}
    module.load_state_dict({**module.state_dict(), **own})
    module.eval()
    u = torch.randn(2, 40, 32, generator=torch.Generator().manual_seed(5))
    angles = family_of(base.config).rotary(base.config)(u, torch.arange(40)[None])
    with torch.no_grad():
        out = module(u, angles)[0]
    assert_close(out, by_definition(module, base.config, u.double(), angles, right), "fp32")
    for sees in wrong:
        assert rms_ratio(out, by_definition(module, base.config, u.double(), angles, sees)) > 1e-2
    # Heads paired modulo the groups, as some converters do.
    heads = own["q_proj.weight"].unflatten(0, (2, 4, 8)).transpose(0, 1).flatten(0, 2)
    module.q_proj.weight.data = heads
    assert rms_ratio(out, by_definition(module, base.config, u.double(), angles, right)) > 1e-2


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    root = tmp_path_factory.mktemp("bases")
    return {family: tiny_base(family, root) for family in FAMILIES}


SEES_ALL = [
    ({**SPARSE, "window_tokens": 30, "sink_tokens": 0}, True),
    ({**SPARSE, "window_tokens": 29, "sink_tokens": 0, "block_tokens": 1, "stride_blocks": 30}, True),
    ({**SPARSE, "window_tokens": 28, "sink_tokens": 0, "block_tokens": 1, "stride_blocks": 30}, False),
    ({**SPARSE, "stride_blocks": 1}, True),
    ({**SPARSE, "stride_blocks": 2}, False),
    ({**HEADS, "full_heads": [0, 1]}, True),
    ({**HEADS, "full_heads": [0]}, False),
    ({**HEADS, "full_heads": [1]}, False),
    ({**HEADS, "full_heads": [1], "window_tokens": 30, "sink_tokens": 0}, True),
    ({**HEADS, "full_heads": [1], "window_tokens": 29, "sink_tokens": 0}, False),
]


@pytest.mark.parametrize("family", FAMILIES)
def test_what_sees_all_is_the_base(bases, family):
    base = AutoModelForCausalLM.from_pretrained(bases[family]).eval()
    ids = torch.randint(3, 64, (2, 30), generator=torch.Generator().manual_seed(3))
    want = logits(base, ids)
    for spec, equal in SEES_ALL:
        hybrid = modeling.build_model(modeling.hybrid_config(base.config, [spec] * 3)).eval()
        hybrid.load_state_dict({**hybrid.state_dict(), **base.state_dict()})
        ratio = rms_ratio(logits(hybrid, ids), want)
        assert (ratio <= TOLERANCES["fp32"][0]) is equal, spec
        assert equal or ratio > 1e-3, spec


@pytest.mark.parametrize("spec", [SPARSE, {**HEADS, "full_heads": [1]}], ids=["block_sparse", "streaming_heads"])
def test_bytes_over_many_blocks(bases, spec):
    """At every length, token by token, and after prefills: what is declared is what is held, and it is less than all."""
    model = build(bases, "llama", spec["name"], keep=(), **{key: value for key, value in spec.items() if key != "name"})
    ids = torch.randint(3, 64, (1, 90), generator=torch.Generator().manual_seed(4))
    cache = DynamicCache(config=model.config)
    plain = logits(model, ids)
    for t in range(90):
        with torch.no_grad():
            out = model(ids[:, t : t + 1], past_key_values=cache, use_cache=True).logits
        assert cache_bytes(cache) == modeling.state_bytes(model.config, t + 1)
        assert torch.allclose(out[:, 0], plain[:, t], atol=2e-5)
    for sizes in ((90,), (33, 57), (50, 1, 1, 38)):
        out, chunked = in_chunks(model, ids, sizes)
        assert cache_bytes(chunked) == cache_bytes(cache)
        assert torch.allclose(out, plain, atol=2e-5)
    everything = 3 * 2 * 2 * 8 * 4 * 90
    # Blocks 0, 3, ... 18 and the last seven tokens; or one head of two with nine.
    assert cache_bytes(cache) == everything * ((7 * 4 + 7) / 90 if spec is SPARSE else (90 + 9) / 180)


def test_held_keys_are_those_that_the_rule_names(bases):
    """A cache that holds the right number of wrong tokens would not pass: each slot's key is that of its position."""
    model = build(bases, "llama", "block_sparse", keep=(), **{k: v for k, v in SPARSE.items() if k != "name"})
    ids = torch.randint(3, 64, (2, 50), generator=torch.Generator().manual_seed(4))
    mask = torch.ones_like(ids)
    mask[1, :11] = 0
    everything, held = DynamicCache(), DynamicCache()
    base = build(bases, "llama", "attention", keep=())
    base.load_state_dict(model.state_dict())
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        # The first layer's keys are the same in both models.
        base(ids, attention_mask=mask, position_ids=positions, past_key_values=everything)
        for part in (slice(0, 30), slice(30, 31), slice(31, 50)):
            seen = mask[:, : part.stop]
            model(ids[:, part], attention_mask=seen, position_ids=positions[:, part], past_key_values=held)
    reach = MIXERS.build(SPARSE).reach
    keys = held.layers[0].keys
    for row, pads in enumerate((0, 11)):
        places = reach.places(torch.tensor([50 - pads]), keys.shape[2])[0]
        assert torch.allclose(keys[row][:, places >= 0], everything.layers[0].keys[row][:, places[places >= 0] + pads], atol=1e-5)
        assert int((places >= 0).sum()) == reach.slots(50 - pads)


@pytest.mark.parametrize("name", ["block_sparse", "streaming_heads"])
def test_long_text_in_blocks_of_queries_is_the_dense_mask(bases, name):
    small = {"sink_tokens": 3, "window_tokens": 70}
    small |= {"block_tokens": 16, "stride_blocks": 5} if name == "block_sparse" else {"full_heads": [1]}
    model = build(bases, "qwen3", name, keep=(), **small)
    attention = model.model.layers[0].self_attn
    hidden = torch.randn(1, 600, 32, generator=torch.Generator().manual_seed(1))
    angles = model.model.rotary_emb(hidden, torch.arange(600)[None])
    with torch.no_grad():
        fast = attention(hidden, angles)[0]
        slow = attention(hidden, angles, segment_ids=torch.zeros(1, 600, dtype=torch.long))[0]
    assert_close(fast, slow, "fp32")


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ({**SPARSE, "window_tokens": 0}, "expected >= 0 and >= 1"),
        ({**SPARSE, "block_tokens": 0}, "block_tokens is 0 and stride_blocks 3, expected both >= 1"),
        ({**SPARSE, "stride_blocks": 0}, "expected both >= 1"),
        ({**HEADS, "sink_tokens": -1}, "sink_tokens is -1"),
        ({**HEADS, "full_share": 0.5}, "full_share together with full_heads"),
        ({**HEADS, "full_heads": [1, 1]}, "expected each head once"),
        ({"name": "streaming_heads", "full_share": 1.5}, "full_share is 1.5, expected 0 to 1"),
    ],
)
def test_bad_options(spec, says):
    with pytest.raises(ConfigError, match=says) as caught:
        MIXERS.build(spec)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("share", "full"), [(0, 0), (0.2, 0), (0.25, 1), (None, 1), (0.75, 2), (1, 2)])
def test_share_of_full_heads_is_the_plans(bases, share, full):
    config = AutoModelForCausalLM.from_pretrained(bases["llama"]).config
    options = MIXERS.build({"name": "streaming_heads", "sink_tokens": 1, "window_tokens": 3, "full_share": share})
    assert options.full_count(config) == full
    assert options.state_bytes(config, 100) == 2 * 8 * 4 * (full * 100 + (2 - full) * 4)
    assert len(options.build(config, 0).parts()) == (1 if full in (0, 2) else 2)
