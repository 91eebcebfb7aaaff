"""A window and linear attention under one normaliser, against the definition in slow float64."""

import math

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import hybridize.modeling as modeling
from hybridize.data import Batch
from hybridize.distill.align import Align
from hybridize.errors import ConfigError
from hybridize.families import FAMILIES, family_of
from hybridize.mixers import MIXERS
from tests.mixers.test_contract import ATOL, build, in_chunks, logits
from tests.tiny import tiny_base
from tests.tolerances import assert_close, rms_ratio

VARIANTS = [{}, {"affine": False}, {"feature_dim": 3}, {"feature_dim": 12}]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    root = tmp_path_factory.mktemp("bases")
    return {family: tiny_base(family, root) for family in FAMILIES}


def layer(bases, family, **options):
    """Options, a random module, an input [2, 11, 32] and the base's angles."""
    config = AutoConfig.from_pretrained(bases[family])
    chosen = MIXERS.build({"name": "lolcats", "window_tokens": 4, **options})
    torch.manual_seed(2)
    module = chosen.build(config, 1)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.4 + (1.0 if "norm" in name else 0))
    u = torch.randn(2, 11, 32)
    return chosen, module.eval(), config, u, family_of(config).rotary(config)(u, torch.arange(11)[None])


def reference(module, options, config, u, angles, wrong=None):
    """The definition: every weight of every pair of tokens, fp64; `wrong` leaves one thing out."""
    w = {name: t.detach().double() for name, t in module.state_dict().items()}
    u, (cos, sin) = u.double(), (a.double() for a in angles)
    H, G, d = config.num_attention_heads, config.num_key_value_heads, config.head_dim

    def project(name, count):
        out = u @ w[f"{name}_proj.weight"].T + (0 if wrong == "bias" else w.get(f"{name}_proj.bias", 0))
        out = out.view(*u.shape[:2], count, d)
        if f"{name}_norm.weight" in w and wrong != "norm":
            out = out / (out.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps).sqrt() * w[f"{name}_norm.weight"]
        if name != "v":
            half = torch.cat([-out[..., d // 2 :], out[..., : d // 2]], -1)
            out = out * cos[:, :, None] + half * sin[:, :, None]
        return out

    def phi(x, weight):
        e, f = (x @ weight).exp(), (-x @ weight).exp()
        return torch.cat([e / e.sum(), f / f.sum()])

    q, k, v = project("q", H), project("k", G), project("v", G)
    out = torch.zeros(*u.shape[:2], H, d, dtype=torch.float64)
    width = options.window_tokens + (wrong == "window")
    for b in range(2):
        for h in range(H):
            g = h % G if wrong == "pairs" else h // (H // G)
            gamma = 1 / (1 + math.exp(-float(w["window_factors"][h])))
            for t in range(u.shape[1]):
                scores = [float(q[b, t, h] @ k[b, s, g]) / d**0.5 for s in range(t + 1)]
                inside = range(max(0, t - width + 1), t + 1)
                largest = max(scores if wrong == "maximum" else [scores[s] for s in inside])
                weights = []
                for s in range(t + 1):
                    if s in inside:
                        weights.append(gamma * math.exp(scores[s] - largest))
                    else:
                        far = float(phi(q[b, t, h], w["feature_map_q"][h]) @ phi(k[b, s, g], w["feature_map_k"][h]))
                        weights.append(far * (1 - gamma if options.affine else 1))
                out[b, t, h] = sum(x * v[b, s, g] for s, x in enumerate(weights)) / sum(weights)
    return out.flatten(2) @ w["o_proj.weight"].T + w.get("o_proj.bias", 0)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_its_definition(bases, family, variant):
    options, module, config, u, angles = layer(bases, family, **variant)
    with torch.no_grad():
        found = module(u, angles)[0]
    assert_close(found, reference(module, options, config, u, angles), "fp32")


@pytest.mark.parametrize("wrong", ["pairs", "bias", "norm", "window", "maximum"])
def test_a_wrong_layer_would_show(bases, wrong):
    family = {"bias": "qwen2", "norm": "qwen3"}.get(wrong, "llama")
    options, module, config, u, angles = layer(bases, family)
    with torch.no_grad():
        found = module(u, angles)[0]
    assert rms_ratio(found, reference(module, options, config, u, angles, wrong)) > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_a_window_as_long_as_the_text_is_the_base(bases, family):
    ids = torch.randint(3, 64, (2, 20), generator=torch.Generator().manual_seed(3))
    base = AutoModelForCausalLM.from_pretrained(bases[family]).eval()
    for window, equal in ((20, True), (19, False)):
        spec = {"name": "lolcats", "window_tokens": window}
        hybrid = modeling.build_model(modeling.hybrid_config(base.config, [spec] * 3)).eval()
        own = {n: t for n, t in hybrid.state_dict().items() if "feature_map" in n or "window_factors" in n}
        hybrid.load_state_dict({**base.state_dict(), **own}, strict=True)
        assert torch.allclose(logits(hybrid, ids), logits(base, ids), atol=ATOL) is equal


@pytest.mark.parametrize("variant", VARIANTS[1:], ids=str)
def test_every_variant_decodes_what_it_trains(bases, variant):
    model = build(bases, "llama", "lolcats", **variant)
    ids = torch.randint(3, 64, (2, 20), generator=torch.Generator().manual_seed(3))
    whole = logits(model, ids)
    for sizes in ((1,) * 20, (7, 1, 1, 8, 3)):
        assert torch.allclose(in_chunks(model, ids, sizes)[0], whole, atol=ATOL)


def test_long_text_in_blocks_of_queries(bases):
    """Several blocks of queries and chunks of the scan, whole and cut."""
    model = build(bases, "llama", "lolcats", keep=(), window_tokens=70)
    long = torch.randint(3, 64, (1, 600), generator=torch.Generator().manual_seed(4))
    assert torch.allclose(in_chunks(model, long, (256, 100, 1, 243))[0], logits(model, long), atol=5e-5)


def test_scores_of_any_size_stay_finite(bases):
    """exp of a score of 1e4 overflows; of a score less the window's largest it does not."""
    _, module, _, u, angles = layer(bases, "llama")
    with torch.no_grad():
        module.q_proj.weight.mul_(300)
        module.k_proj.weight.mul_(300)
        assert torch.isfinite(module(u, angles)[0]).all()


def test_autocast_reaches_the_projections_alone(bases):
    """Only the projections may be rounded: scores or sums in bf16 would be off by far more than the bound."""
    _, module, _, u, angles = layer(bases, "llama")
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        found = module.context(u, angles)
        q, k, v = module.project(u, angles)
    with torch.no_grad():
        far, _ = module.beyond(q.float(), k.float(), v.float(), None, None, None)
        near = module.inside(q.float(), k.float(), v.float(), None, None)
        exact = module.join(near, far, torch.sigmoid(module.window_factors)).transpose(1, 2).flatten(2)
    assert_close(found, exact, "fp32")


def test_the_start_is_the_identity(bases):
    model = modeling.build_model(
        modeling.hybrid_config(AutoConfig.from_pretrained(bases["llama"]), [{"name": "lolcats", "feature_dim": 6}] * 3)
    )
    mixer = model.model.layers[0].self_attn
    assert torch.equal(mixer.feature_map_q, torch.eye(8, 6).expand(4, 8, 6))
    assert torch.equal(mixer.feature_map_k, torch.eye(8, 6).expand(4, 8, 6))
    assert torch.allclose(torch.sigmoid(mixer.window_factors), torch.full((4,), 0.1))


def test_attention_transfer_trains_feature_maps_and_gamma_alone(bases):
    """The globs of the recipe, in a stage that lowers the layers' error."""
    base = AutoModelForCausalLM.from_pretrained(bases["llama"]).eval()
    student = modeling.build_model(modeling.hybrid_config(base.config, [{"name": "lolcats", "window_tokens": 5}] * 3))
    own = {n: t for n, t in student.state_dict().items() if "feature_map" in n or "window_factors" in n}
    student.load_state_dict({**base.state_dict(), **own}, strict=True)
    stage = Align(
        tokens=4096, seq_tokens=64, rows=4, lr=1e-2, losses=[{"name": "mixer_output"}],
        train=["*.self_attn.feature_map_*", "*.self_attn.window_factors"],
    )  # fmt: skip
    trained = stage.choose(stage.candidates(student), "align")
    assert {name.split(".")[-1] for name in trained} == {"feature_map_q", "feature_map_k", "window_factors"}
    student.requires_grad_(False)
    for parameter in trained.values():
        parameter.requires_grad_(True)
    optimizer = stage.optimizer(trained)
    ids = torch.randint(3, 64, (4, 64), generator=torch.Generator().manual_seed(5))
    step = stage.start(student, base, Batch(ids))
    errors = []
    for _ in range(12):
        errors.append(float(step(Batch(ids), 1.0)["loss"]))
        optimizer.step()
        optimizer.zero_grad()
    assert errors[-1] < 0.8 * errors[0]


def test_bad_options():
    with pytest.raises(ConfigError, match="window_tokens is 0, expected at least 1"):
        MIXERS.build({"name": "lolcats", "window_tokens": 0})
    with pytest.raises(ConfigError, match="feature_dim is 0"):
        MIXERS.build({"name": "lolcats", "feature_dim": 0})
