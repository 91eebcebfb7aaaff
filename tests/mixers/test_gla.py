"""Gated linear attention beside a window, against its definition in slow float64."""

import math

import pytest
import torch
from transformers import AutoConfig

from hybridize.errors import ConfigError
from hybridize.families import FAMILIES, family_of
from hybridize.mixers import MIXERS
from tests.mixers.test_contract import ATOL, build, in_chunks, logits
from tests.tiny import tiny_base
from tests.tolerances import assert_close, rms_ratio

LIGER = {"gate": "key", "mix": "half", "normalise": False}
VARIANTS = [
    {},
    LIGER,
    {"heads": "expanded"},
    {"gate": "key", "heads": "expanded"},
    {"window_tokens": 0, "normalise": False},
    {**LIGER, "window_tokens": 0},
]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    root = tmp_path_factory.mktemp("bases")
    return {family: tiny_base(family, root) for family in FAMILIES}


def layer(bases, family, **options):
    """Options, a random module, an input [2, 11, 32] and the base's angles."""
    config = AutoConfig.from_pretrained(bases[family])
    chosen = MIXERS.build({"name": "gla", "window_tokens": 4, **options})
    torch.manual_seed(2)
    module = chosen.build(config, 1)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn_like(parameter)
            if name == "A_log":
                parameter.copy_(noise - 1)
            else:
                parameter.copy_(noise * (0.3 if parameter.dim() > 1 else 0.2) + (1.0 if "norm" in name or "scale" in name else 0))
    u = torch.randn(2, 11, 32)
    return chosen, module.eval(), config, u, family_of(config).rotary(config)(u, torch.arange(11)[None])


def reference(module, options, config, u, angles, wrong=None):
    """The definition, token by token and head by head, fp64; `wrong` leaves one thing out."""
    w = {name: t.detach().double() for name, t in module.state_dict().items()}
    u, (cos, sin) = u.double(), (a.double()[0] for a in angles)
    H, G, d = config.num_attention_heads, config.num_key_value_heads, config.head_dim

    def project(name, count):
        bias = 0 if wrong == "bias" else w.get(f"{name}_proj.bias", 0)
        out = (u @ w[f"{name}_proj.weight"].T + bias).view(*u.shape[:2], count, d)
        if f"{name}_norm.weight" in w and wrong != "norm":
            out = out / (out.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps).sqrt() * w[f"{name}_norm.weight"]
        return out

    def turn(x, t):
        half = torch.cat([-x[..., d // 2 :], x[..., : d // 2]], -1)
        return x * cos[t] + half * sin[t]

    q, k, v = project("q", H), project("k", G), project("v", G)
    out = torch.zeros(*u.shape[:2], H, d, dtype=torch.float64)
    width = options.window_tokens - (wrong == "window")
    for b in range(2):
        for h in range(H):
            g = h % G if wrong == "pairs" else h // (H // G)
            s = g if options.heads == "grouped" else h
            scale = w["feature_scale"][s] if options.mix == "learned" else 1
            state, total = torch.zeros(d, d, dtype=torch.float64), torch.zeros(d, dtype=torch.float64)
            for t in range(u.shape[1]):
                if options.gate == "key":
                    decay = torch.sigmoid(k[b, t, g]) ** (1 / 16)
                else:
                    step = torch.log1p(torch.exp(w["gate_proj.weight"][s] @ u[b, t] + w["dt_bias"][s]))
                    decay = torch.exp(-step * w["A_log"][s].exp()).expand(d)
                feature = torch.softmax(scale * (turn(k[b, t, g], t) if wrong == "angle" else k[b, t, g]), -1)
                state = decay[:, None] * state + feature[:, None] * v[b, t, g]
                total = decay * total + feature
                read = torch.softmax(scale * (turn(q[b, t, h], t) if wrong == "angle" else q[b, t, h]), -1)
                far = read @ state
                if options.normalise:
                    far = far / (read @ total)
                weights = {}
                for past in range(max(0, t - width + 1), t + 1) if options.window_tokens else ():
                    weights[past] = math.exp(float(turn(q[b, t, h], t) @ turn(k[b, past, g], past)) / d**0.5)
                near = sum(x * v[b, past, g] for past, x in weights.items()) / max(sum(weights.values()), 1e-300)
                if options.mix == "learned":
                    far = far * w["state_scale"][h]
                    near = near * w["window_scale"][h] if options.window_tokens else 0
                elif options.window_tokens:
                    far, near = far / 2, near / 2
                out[b, t, h] = far + near
    return out.flatten(2) @ w["o_proj.weight"].T + w.get("o_proj.bias", 0)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_its_definition(bases, family, variant):
    options, module, config, u, angles = layer(bases, family, **variant)
    with torch.no_grad():
        found = module(u, angles)[0]
    assert_close(found, reference(module, options, config, u, angles), "fp32")


@pytest.mark.parametrize("wrong", ["pairs", "bias", "norm", "window", "angle"])
def test_a_wrong_layer_would_show(bases, wrong):
    family = {"bias": "qwen2", "norm": "qwen3"}.get(wrong, "llama")
    for variant in (LIGER, {}):
        options, module, config, u, angles = layer(bases, family, **variant)
        with torch.no_grad():
            found = module(u, angles)[0]
        assert rms_ratio(found, reference(module, options, config, u, angles, wrong)) > 1e-3


def test_liger_has_no_weights_of_its_own(bases):
    _, module, config, _, _ = layer(bases, "llama", **LIGER)
    base = family_of(config).attention(config, 1)
    assert set(module.state_dict()) == set(base.state_dict())


@pytest.mark.parametrize("variant", VARIANTS[1:], ids=str)
def test_every_variant_decodes_what_it_trains(bases, variant):
    """The contract's checks of the default options, for the others."""
    model = build(bases, "llama", "gla", **{"window_tokens": 5, **variant})
    ids = torch.randint(3, 64, (2, 20), generator=torch.Generator().manual_seed(3))
    whole = logits(model, ids)
    for sizes in ((20,), (1,) * 20, (7, 1, 1, 8, 3)):
        assert torch.allclose(in_chunks(model, ids, sizes)[0], whole, atol=ATOL)
    padded, mask = ids.clone(), torch.ones_like(ids)
    padded[1, 4:], padded[1, :4], mask[1, :4] = ids[1, :16], 0, 0
    out, _ = in_chunks(model, padded, (6, 1, 13), mask)
    assert torch.allclose(out[1:, 4:], logits(model, ids[1:, :16]), atol=ATOL)
    positions = torch.cat([torch.arange(13), torch.arange(7)])[None].expand(2, -1)
    assert torch.allclose(logits(model, ids, position_ids=positions)[:, 13:], logits(model, ids[:, 13:]), atol=ATOL)


def test_hard_features_stay_finite_in_bf16(bases):
    """Softmax features so hard that no key meets a query: nothing to divide by, and no NaN."""
    _, module, _, u, angles = layer(bases, "llama")
    with torch.no_grad():
        module.feature_scale.fill_(1e4)
        assert torch.isfinite(module(u, angles)[0]).all()
        assert torch.isfinite(module.bfloat16()(u.bfloat16(), tuple(a.bfloat16() for a in angles))[0]).all()


def test_bad_options():
    with pytest.raises(ConfigError, match="window_tokens is -1, expected at least 0"):
        MIXERS.build({"name": "gla", "window_tokens": -1})
    with pytest.raises(ConfigError, match="gate is 'input', expected one of 'head', 'key'"):
        MIXERS.build({"name": "gla", "gate": "input"})
