"""The Mamba2 seeds: heads paired as the base pairs them, biases and norms carried, and the calibrated one worth its name."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from hybridize.checkpoint import load_model, open_base
from hybridize.conversions import convert, plan
from hybridize.conversions.fitting import inverse_softplus
from hybridize.conversions.layer import LayerCalibration, materialised
from hybridize.conversions.mamba2_from_gqa import Mamba2FromGQA, carried
from hybridize.conversions.plan import build_mixer
from hybridize.errors import ConfigError
from hybridize.families import FAMILIES
from hybridize.mixers import MIXERS
from tests.conversions.real import perplexity, stories_rows
from tests.tiny import WHOLE_WAY, tiny_base

HEADS = ("grouped", "expanded")


def parts(family, tmp_path, **options):
    base = open_base(tiny_base(family, tmp_path))
    prefix = "model.layers.1.self_attn."
    source = {n.removeprefix(prefix): base.read(n) for n in base.tensors if n.startswith(prefix)}
    return base, source, build_mixer(MIXERS.build({"name": "mamba2", **options}), base.config, 1)


def linear_attention(source, config, u, norms=True):
    """Causal linear attention of the base's own q, k, v: no decay, gate, convolution or norm. fp64, by definition."""
    heads, groups, d = config.num_attention_heads, config.num_key_value_heads, 8
    s = {name: tensor.double() for name, tensor in source.items()}

    def project(name, count):
        out = u @ s[f"{name}_proj.weight"].T + s.get(f"{name}_proj.bias", 0)
        out = out.view(*u.shape[:2], count, d)
        if f"{name}_norm.weight" in s and norms:
            out = out * torch.rsqrt(out.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps) * s[f"{name}_norm.weight"]
        return out

    q, k, v = project("q", heads), project("k", groups), project("v", groups)
    out = torch.zeros(u.shape[0], u.shape[1], heads, d, dtype=torch.float64)
    for h in range(heads):
        g = h // (heads // groups)
        for t in range(u.shape[1]):
            weights = (k[:, : t + 1, g] * q[:, t, h][:, None]).sum(-1)
            out[:, t, h] = (weights[..., None] * v[:, : t + 1, g]).sum(1)
    return out.flatten(2)


def linear_module(source, config, mixer, pair=None):
    """The mixer with everything but the seeded projections out of the way: y itself, [B, T, H * P], fp64."""
    made = carried(source, mixer, config)
    if pair is not None:
        made = pair(made)
    # Small inputs keep SiLU in its linear range: SiLU(s a) = s a / 2; the factors are divided out below.
    made["conv1d.weight"][:, 0, -1] = 1e-5
    made["dt_bias"] = inverse_softplus(torch.ones(mixer.num_heads))
    made["A_log"] = torch.full((mixer.num_heads,), -60.0)
    module = materialised(mixer, made).double()
    kept = {}
    module.norm.register_forward_pre_hook(lambda m, args: kept.__setitem__("y", args[0]))
    return module, kept


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("family", FAMILIES)
def test_without_its_extras_it_is_linear_attention_of_the_base(family, heads, tmp_path):
    base, source, mixer = parts(family, tmp_path, heads=heads)
    u = torch.randn(2, 9, 32, dtype=torch.float64)
    expected = linear_attention(source, base.config, u)

    def error(pair=None):
        module, kept = linear_module(source, base.config, mixer, pair)
        with torch.no_grad():
            module.context(u)
        # q/k-norms take the size of B and C away; without them it enters three times.
        factor = (1e-5 / 2) ** (1 if FAMILIES[family].qk_norm else 3)
        found = kept["y"] / factor
        if FAMILIES[family].qk_norm:
            # RMSNorm's eps bites at this size, by one known factor for each row; directions are what is compared.
            found, want = (t.unflatten(-1, (-1, 8)) for t in (found, expected))
            return float(1 - torch.cosine_similarity(found[:, 0], want[:, 0], dim=-1).min())
        return float((found - expected).norm() / expected.norm())

    assert error() < 2e-4

    def swapped(made):
        sizes = mixer.split_sizes()
        rows = dict(zip(sizes, made["in_proj.weight"].split(list(sizes.values())), strict=True))
        # Heads taken modulo the groups instead of side by side: the mistake of published converters.
        values = rows["x"].unflatten(0, (-1, 8))
        rows["x"].copy_(values.roll(1, dims=0).flatten(0, 1))
        return made

    assert error(swapped) > 0.1


@pytest.mark.parametrize("heads", HEADS)
def test_biases_and_norms_are_carried(heads, tmp_path):
    base, source, mixer = parts("qwen2", tmp_path, heads=heads)
    sizes = mixer.split_sizes()
    bias = dict(zip(sizes, carried(source, mixer, base.config)["in_proj.bias"].split(list(sizes.values())), strict=True))
    assert torch.equal(bias["C"], source["q_proj.bias"])
    repeat = 2 if heads == "expanded" else 1
    expected = source["k_proj.bias"].view(2, 8).repeat_interleave(repeat, 0).flatten()
    assert torch.equal(bias["B"], expected)
    assert float(bias["z"].abs().sum() + bias["dt"].abs().sum()) == 0
    base, source, mixer = parts("qwen3", tmp_path, heads=heads)
    made = carried(source, mixer, base.config)
    assert torch.equal(made["q_norm.weight"], source["q_norm.weight"])


def test_biases_are_never_dropped(tmp_path):
    base, source, mixer = parts("qwen2", tmp_path, proj_bias=False)
    with pytest.raises(ConfigError, match="would drop"):
        carried(source, mixer, base.config)


@pytest.mark.parametrize("method", ["mamba_in_llama", "mimetic"])
def test_published_starts(method, tmp_path):
    base, source, mixer = parts("llama", tmp_path)
    seed = Mamba2FromGQA(method=method)
    made = seed(source, mixer, base.config, torch.Generator().manual_seed(1), None)
    again = seed(source, mixer, base.config, torch.Generator().manual_seed(1), None)
    other = seed(source, mixer, base.config, torch.Generator().manual_seed(2), None)
    assert all(torch.equal(made[name], again[name]) for name in made)
    assert not torch.equal(made["dt_bias"], other["dt_bias"])
    step = torch.nn.functional.softplus(made["dt_bias"])
    assert bool(((step >= 1e-3 * 0.999) & (step <= 1e-1 * 1.001)).all())
    assert float(made["D"].mean()) == (1.0 if method == "mamba_in_llama" else 0.0)
    if method == "mimetic":
        assert torch.equal(made["conv1d.weight"][:, 0], torch.tensor([0.0, 0, 0, 1]).expand(made["conv1d.weight"].shape[0], 4))


@pytest.mark.parametrize("heads", HEADS)
def test_the_search_finds_a_layer_that_a_seed_can_be(heads, tmp_path):
    """A teacher that is itself decayed linear attention with a look at the token before: the search must find it."""
    base, source, mixer = parts("llama", tmp_path, heads=heads)
    config = base.config
    torch.manual_seed(3)
    u = torch.randn(12, 48, 32)
    q = (u @ source["q_proj.weight"].T).view(12, 48, 4, 8)
    k = (u @ source["k_proj.weight"].T).view(12, 48, 2, 8).repeat_interleave(2, dim=2)
    v = (u @ source["v_proj.weight"].T).view(12, 48, 2, 8).repeat_interleave(2, dim=2)
    late = torch.nn.functional.pad(v, (0, 0, 0, 0, 1, 0))[:, :48]
    feature = lambda x: torch.nn.functional.silu(0.25 * x + 0.5)  # noqa: E731
    scores = torch.einsum("nthp,nshp->nhts", feature(q), feature(k))
    distance = (torch.arange(48)[:, None] - torch.arange(48)).float()
    scores = scores * torch.where(distance >= 0, torch.exp2(-distance / 4), 0.0)
    context = torch.einsum("nhts,nshp->nthp", scores, 0.3 * v + late).flatten(2)
    target = context @ source["o_proj.weight"].T
    still = (torch.ones(1, 48, 8), torch.zeros(1, 48, 8))
    calibration = LayerCalibration(inputs=u, context=context, target=target, angles=still)
    made = Mamba2FromGQA()(source, mixer, config, torch.Generator(), calibration)
    with torch.no_grad():
        out = materialised(mixer, made)(u)[0]
        worse = dict(made)
        worse["A_log"] = made["A_log"] + math.log(16)
        faster = materialised(mixer, worse)(u)[0]
    energy = target.pow(2).sum()
    assert float((out - target).pow(2).sum() / energy) < 0.02
    assert float((faster - target).pow(2).sum() / energy) > 0.1
    step = torch.nn.functional.softplus(made["dt_bias"])
    half_life = math.log(2) / (step * made["A_log"].exp())
    assert torch.allclose(half_life, torch.full((4,), 4.0), rtol=1e-3)


@pytest.mark.parametrize("family", WHOLE_WAY)
def test_calibrated_conversion_of_every_family(family, tmp_path):
    base = open_base(tiny_base(family, tmp_path))
    made = plan(base, {"keep": {"layers": [1]}, "mixer": {"name": "mamba2"}}, "t", 0)
    text = torch.randint(3, 64, (6, 32), generator=torch.Generator().manual_seed(0))
    outs = []
    # The same bytes twice, whatever the family.
    for name in ("a", "b") if family == "llama" else ("a",):
        convert(made, tmp_path / name, text)
        outs.append((tmp_path / name / "model.safetensors").read_bytes())
    assert outs[0] == outs[-1]
    published = plan(base, {"keep": {"layers": [1]}, "mixer": {"name": "mamba2", "method": "mimetic"}}, "t", 0)
    convert(published, tmp_path / "c")
    teacher = AutoModelForCausalLM.from_pretrained(base.path).eval()
    fresh = torch.randint(3, 64, (8, 32), generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        want = teacher(fresh).logits.log_softmax(-1)
        kls = [float((want.exp() * (want - load_model(tmp_path / n).eval()(fresh).logits.log_softmax(-1))).sum(-1).mean())
               for n in ("a", "c")]  # fmt: skip
    assert kls[0] < 0.7 * kls[1]


def test_a_tokenizer_that_is_not_the_bases_is_refused(tmp_path):
    base = open_base(tiny_base("llama", tmp_path))
    made = plan(base, {"keep": {"layers": []}, "mixer": {"name": "mamba2"}}, "t", 0)
    with pytest.raises(ConfigError, match="expected 0 to 63"):
        convert(made, tmp_path / "out", torch.full((1, 8), 64))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.data
def test_real_model_before_any_training(shared_data, tmp_path):
    """stories260K, layers 1 and 3 of 5: the figures that the README quotes, with room for another machine's rounding."""
    path = shared_data / "models" / "stories260K"
    base = open_base(path)
    train, dev = stories_rows(shared_data, "v1_train.txt", 24), stories_rows(shared_data, "v1_dev.txt", 8)
    found = {"base": perplexity(load_model(path), dev)}
    for method in ("calibrated", "mimetic", "mamba_in_llama"):
        made = plan(base, {"keep": {"layers": [0, 2, 4]}, "mixer": {"name": "mamba2", "method": method}}, "t", 0)
        convert(made, tmp_path / method, train)
        found[method] = perplexity(load_model(tmp_path / method), dev)
    assert found["calibrated"] < 1.3 * found["base"]
    assert min(found["mimetic"], found["mamba_in_llama"]) > 20 * found["base"]
