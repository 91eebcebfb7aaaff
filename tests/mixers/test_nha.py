"""Native hybrid attention against its definition: token by token, fp64, written from the formulas alone."""

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

import hybridize.modeling as modeling
from hybridize.checkpoint import open_base
from hybridize.errors import ConfigError
from hybridize.families import FAMILIES
from hybridize.mixers import MIXERS
from hybridize.mixers.nha import MUTED, SlotScan
from tests.mixers.test_contract import bases, build, in_chunks, logits  # noqa: F401 (a fixture)
from tests.tiny import tiny_base
from tests.tolerances import assert_close, rms_ratio


def rotate(x, angle):
    half = x.shape[-1] // 2
    turned = torch.cat([-x[..., half:], x[..., :half]], -1)
    return x * torch.cos(angle) + turned * torch.sin(angle)


def oracle(module, config, u, published_decode=False, window_only=False, pair=None):
    """[T, D] of one sequence u [T, D]: the two recurrences and one softmax, a token and a head at a time."""
    p = {name: t.double() for name, t in module.state_dict().items()}
    heads, groups, d, slots = config.num_attention_heads, config.num_key_value_heads, 8, module.slots
    freq = config.rope_parameters["rope_theta"] ** (-torch.arange(0, d, 2, dtype=torch.float64) / d)

    def project(name, count):
        out = (u @ p[f"{name}_proj.weight"].T + p.get(f"{name}_proj.bias", 0)).view(len(u), count, -1)
        if f"{name}_norm.weight" in p:
            out = out * torch.rsqrt(out.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps) * p[f"{name}_norm.weight"]
        return out

    q, k, v = project("q", heads), project("k", groups), project("v", groups)
    angle = (torch.arange(len(u))[:, None] * freq).repeat(1, 2)[:, None]
    q, k = rotate(q, angle), rotate(k, angle)
    alpha = torch.sigmoid(project("gate", groups)) ** (1 / 8)
    slot_k = torch.zeros(groups, slots, d, dtype=torch.float64)
    slot_v = torch.zeros_like(slot_k)
    rows = []
    for t in range(len(u)):
        slot_k = alpha[t][..., None] * slot_k + (1 - alpha[t])[..., None] * k[t][:, None]
        slot_v = alpha[t][..., None] * slot_v + (1 - alpha[t])[..., None] * v[t][:, None]
        near = [s for s in range(t + 1) if t - s < module.reach.window or s < module.reach.sink]
        out = []
        for h in range(heads):
            g = pair(h) if pair else h // (heads // groups)
            slot = slot_k[g] @ q[t, h] / d**0.5 + p["slot_bias"][h]
            ring = k[near, g] @ q[t, h] / d**0.5
            if published_decode:
                out.append(0.5 * slot.softmax(0) @ slot_v[g] + 0.5 * ring.softmax(0) @ v[near, g])
            elif window_only:
                out.append(ring.softmax(0) @ v[near, g])
            else:
                weights = torch.cat([slot, ring]).softmax(0)
                out.append(weights @ torch.cat([slot_v[g], v[near, g]]))
        rows.append(torch.cat(out) @ p["o_proj.weight"].T + p.get("o_proj.bias", 0))
    return torch.stack(rows)


def layer(family, tmp_path, **options):
    """A mixer with random weights, fp64, its config, and angles of 150 positions."""
    config = open_base(tiny_base(family, tmp_path)).config
    module = MIXERS.build({"name": "nha", **options}).build(config, 1).double().eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    freq = config.rope_parameters["rope_theta"] ** (-torch.arange(0, 8, 2, dtype=torch.float64) / 8)
    angle = (torch.arange(150)[:, None] * freq).repeat(1, 2)[None]
    return module, config, (angle.cos(), angle.sin())


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_its_definition(family, tmp_path):
    module, config, angles = layer(family, tmp_path, slots=5, window_tokens=9, sink_tokens=2)
    u = torch.randn(150, 32, dtype=torch.float64)
    with torch.no_grad():
        found = module(u[None], angles)[0][0]
        # The base's q/k-norms compute in fp32 whatever their input is.
        assert_close(found, oracle(module, config, u), "fp32" if FAMILIES[family].qk_norm else "fp64")
        assert rms_ratio(found, oracle(module, config, u, published_decode=True)) > 0.05
        assert rms_ratio(found, oracle(module, config, u, window_only=True)) > 0.05
        assert rms_ratio(found, oracle(module, config, u, pair=lambda h: h % 2)) > 0.05


@pytest.mark.parametrize("sizes", [(1,) * 150, (70, 1, 1, 64, 14)], ids=["steps", "chunks"])
def test_decode_is_the_training_function(sizes, tmp_path):
    module, config, angles = layer("qwen2", tmp_path, window_tokens=9)
    u = torch.randn(150, 32, dtype=torch.float64)
    expected = oracle(module, config, u)
    cache, start, found = DynamicCache(), 0, []
    with torch.no_grad():
        for size in sizes:
            part = slice(start, start + size)
            found.append(module(u[None, part], tuple(a[:, part] for a in angles), past_key_values=cache)[0][0])
            start += size
    assert_close(torch.cat(found), expected, "fp64")


def test_gates_that_forget_at_once_stay_finite():
    """Decays of a chunk may come to exp(-2000): factors that divide by a running product would overflow."""
    generator = torch.Generator().manual_seed(0)
    gates = -40 * torch.rand(1, 2, 150, 5, generator=generator)
    gates[:, :, ::3] *= 1e-4
    gates.requires_grad_()
    q, k = torch.randn(1, 2, 3, 150, 4, generator=generator), torch.randn(1, 2, 150, 4, generator=generator)
    scores, last = SlotScan(gates, None).scores(q, k, torch.zeros(1, 2, 5, 4))
    state, rows = torch.zeros(1, 2, 5, 4, dtype=torch.float64), []
    for t in range(150):
        decay = gates[:, :, t, :, None].detach().double().exp()
        state = decay * state + (1 - decay) * k[:, :, t, None].double()
        rows.append((state @ q[:, :, :, t].double().transpose(-1, -2)).transpose(-1, -2))
    assert_close(scores, torch.stack(rows, 3), "fp32")
    assert_close(last, state, "fp32")
    scores.sum().backward()
    assert torch.isfinite(gates.grad).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_slots_muted_and_a_wide_window_are_the_base(family, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(tiny_base(family, tmp_path)).eval()
    ids = torch.randint(3, 64, (2, 20), generator=torch.Generator().manual_seed(3))
    for window, bias, equal in ((20, MUTED, True), (19, MUTED, False), (20, 0.0, False)):
        spec = {"name": "nha", "window_tokens": window}
        hybrid = modeling.build_model(modeling.hybrid_config(base.config, [spec] * 3)).eval()
        own = {n: torch.full_like(t, bias) if n.endswith("slot_bias") else t for n, t in hybrid.state_dict().items()}
        hybrid.load_state_dict({**own, **base.state_dict()}, strict=True)
        assert torch.allclose(logits(hybrid, ids), logits(base, ids), atol=2e-5) is equal


def test_long_text_padded_packed_and_in_chunks(bases):  # noqa: F811 (the fixture)
    """More than one chunk of the scan and one block of queries; what the contract does with twenty tokens."""
    model = build(bases, "llama", "nha", keep=(), window_tokens=7)
    ids = torch.randint(3, 64, (2, 300), generator=torch.Generator().manual_seed(4))
    plain = logits(model, ids)
    assert torch.allclose(in_chunks(model, ids, (129, 1, 100, 70))[0], plain, atol=5e-5)
    padded, mask = ids.clone(), torch.ones_like(ids)
    padded[1, 90:], padded[1, :90], mask[1, :90] = ids[1, :210], 0, 0
    alone = logits(model, ids[1:, :210])
    for sizes in ((300,), (150, 1, 149)):
        assert torch.allclose(in_chunks(model, padded, sizes, mask)[0][1:, 90:], alone, atol=5e-5)
    positions = torch.cat([torch.arange(100), torch.arange(137), torch.arange(63)])[None].expand(2, -1)
    packed = logits(model, ids, position_ids=positions)
    for start, stop in ((0, 100), (100, 237), (237, 300)):
        assert torch.allclose(packed[:, start:stop], logits(model, ids[:, start:stop]), atol=5e-5)


@pytest.mark.parametrize(("options", "words"), [({"slots": 0}, "slots is 0"), ({"window_tokens": 0}, "window_tokens 0")])
def test_bad_options(options, words):
    with pytest.raises(ConfigError, match=words):
        MIXERS.build({"name": "nha", **options})
