"""The seeds of gla and lolcats: the base's tensors carried whole, published starts, and searches that find what is there."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from hybridize.checkpoint import load_model, open_base
from hybridize.conversions import convert, plan
from hybridize.conversions.gla_from_attention import GLAFromAttention
from hybridize.conversions.layer import LayerCalibration, materialised
from hybridize.conversions.lolcats_from_attention import LoLCATsFromAttention
from hybridize.conversions.plan import build_mixer
from hybridize.errors import ConfigError
from hybridize.families import FAMILIES, family_of
from hybridize.mixers import MIXERS
from tests.conversions.real import perplexity, stories_rows
from tests.tiny import WHOLE_WAY, tiny_base

LIGER = {"gate": "key", "mix": "half", "normalise": False}
PUBLISHED = {
    "gla": {"name": "gla", "method": "copy", "window_tokens": 5, **LIGER},
    "lolcats": {"name": "lolcats", "method": "identity", "window_tokens": 5, "affine": False},
}


def parts(family, tmp_path, **spec):
    base = open_base(tiny_base(family, tmp_path))
    prefix = "model.layers.1.self_attn."
    source = {n.removeprefix(prefix): base.read(n) for n in base.tensors if n.startswith(prefix)}
    return base, source, build_mixer(MIXERS.build(spec), base.config, 1)


def calibration(base, mixer, made):
    """What a teacher whose heads are those of this very mixer would leave behind."""
    u = torch.randn(12, 48, 32, generator=torch.Generator().manual_seed(3))
    angles = family_of(base.config).rotary(base.config)(u, torch.arange(48)[None])
    with torch.no_grad():
        context = materialised(mixer, made).context(u, angles)
        return LayerCalibration(inputs=u, context=context, target=context @ made["o_proj.weight"].T, angles=angles)


def error(mixer, made, measured):
    with torch.no_grad():
        out = materialised(mixer, made)(measured.inputs, measured.angles)[0]
    return float((out - measured.target).pow(2).sum() / measured.target.pow(2).sum())


@pytest.mark.parametrize("family", FAMILIES)
def test_copy_is_the_bases_tensors_and_nothing_else(family, tmp_path):
    base, source, mixer = parts(family, tmp_path, name="gla", **LIGER)
    made = GLAFromAttention(method="copy")(source, mixer, base.config, torch.Generator(), None)
    assert set(made) == set(source) == set(mixer.state_dict())
    assert all(torch.equal(made[name], source[name]) for name in source)


def test_copy_with_scales_is_the_same_function(tmp_path):
    base, source, mixer = parts("llama", tmp_path, name="gla", window_tokens=5, **LIGER)
    made = GLAFromAttention(method="copy")(source, mixer, base.config, torch.Generator(), None)
    for window in (5, 0):
        spec = {"name": "gla", **LIGER, "window_tokens": window}
        fixed = build_mixer(MIXERS.build(spec), base.config, 1)
        learned = build_mixer(MIXERS.build({**spec, "mix": "learned"}), base.config, 1)
        wider = GLAFromAttention(method="copy")(source, learned, base.config, torch.Generator(), None)
        assert error(learned, wider, calibration(base, fixed, made)) < 1e-10


@pytest.mark.parametrize("family", FAMILIES)
def test_identity_start(family, tmp_path):
    base, source, mixer = parts(family, tmp_path, name="lolcats")
    made = LoLCATsFromAttention(method="identity")(source, mixer, base.config, torch.Generator(), None)
    assert all(torch.equal(made[name], source[name]) for name in source)
    assert set(made) - set(source) == {"feature_map_q", "feature_map_k", "window_factors"}
    assert torch.equal(made["feature_map_k"], torch.eye(8).expand(4, 8, 8))
    assert torch.allclose(torch.sigmoid(made["window_factors"]), torch.full((4,), 0.1))


@pytest.mark.parametrize("heads", ["grouped", "expanded"])
def test_gla_search_finds_a_layer_that_a_seed_can_be(heads, tmp_path):
    base, source, mixer = parts("qwen2", tmp_path, name="gla", window_tokens=6, heads=heads)
    states = mixer.state_heads
    truth = {name: tensor.clone() for name, tensor in source.items()}
    truth["gate_proj.weight"] = torch.zeros(states, 32)
    truth["dt_bias"] = torch.full((states,), math.log(math.e - 1))
    lives = torch.tensor([4.0, 32.0]).repeat_interleave(states // 2)
    truth["A_log"] = torch.log(math.log(2) / lives)
    truth["feature_scale"] = torch.tensor([2.0, 1.0]).repeat_interleave(states // 2)
    truth["window_scale"], truth["state_scale"] = torch.tensor([0.7, 0.2, 0.5, 0.9]), torch.tensor([0.4, 0.9, -0.6, 0.3])
    measured = calibration(base, mixer, truth)
    made = GLAFromAttention()(source, mixer, base.config, torch.Generator(), measured)
    assert torch.allclose(made["A_log"], truth["A_log"], rtol=1e-4)
    assert torch.equal(made["feature_scale"], truth["feature_scale"])
    for name in ("window_scale", "state_scale"):
        assert torch.allclose(made[name], truth[name], atol=5e-3)
    assert error(mixer, made, measured) < 1e-3
    assert error(mixer, {**made, "A_log": made["A_log"] + 3}, measured) > 0.01
    assert error(mixer, {**made, "state_scale": made["state_scale"].roll(1)}, measured) > 0.01


def test_gla_search_with_the_keys_own_gate(tmp_path):
    base, source, mixer = parts("llama", tmp_path, name="gla", window_tokens=6, gate="key")
    truth = GLAFromAttention(method="copy")(
        source, build_mixer(MIXERS.build({"name": "gla", "window_tokens": 6, "gate": "key", "normalise": False}), base.config, 1),
        base.config, torch.Generator(), None,
    )  # fmt: skip
    truth["window_scale"] = torch.tensor([0.7, 0.2, 0.5, 0.9])
    measured = calibration(base, mixer, truth)
    made = GLAFromAttention()(source, mixer, base.config, torch.Generator(), measured)
    assert torch.allclose(made["window_scale"], truth["window_scale"], atol=5e-3)
    assert error(mixer, made, measured) < 1e-3


@pytest.mark.parametrize("affine", [True, False])
def test_lolcats_search_finds_a_layer_that_a_seed_can_be(affine, tmp_path):
    base, source, mixer = parts("qwen3", tmp_path, name="lolcats", window_tokens=6, affine=affine)
    truth = LoLCATsFromAttention(method="identity")(source, mixer, base.config, torch.Generator(), None)
    scale = torch.tensor([0.5, 1.0, 2.0, 4.0])
    for name in ("feature_map_q", "feature_map_k"):
        truth[name] = truth[name] * scale[:, None, None]
    gamma = torch.tensor([0.9, 0.6, 0.3, 0.99])
    truth["window_factors"] = torch.logit(gamma)
    measured = calibration(base, mixer, truth)
    made = LoLCATsFromAttention()(source, mixer, base.config, torch.Generator(), measured)
    assert torch.allclose(torch.sigmoid(made["window_factors"]), gamma, atol=1e-4)
    assert torch.equal(made["feature_map_q"], truth["feature_map_q"])
    assert error(mixer, made, measured) < 1e-4
    assert error(mixer, {**made, "window_factors": made["window_factors"].roll(1)}, measured) > 1e-3


def test_rows_within_the_window_change_nothing_but_o_proj(tmp_path):
    base, source, mixer = parts("llama", tmp_path, name="lolcats", window_tokens=64)
    truth = LoLCATsFromAttention(method="identity")(source, mixer, base.config, torch.Generator(), None)
    measured = calibration(base, mixer, truth)
    made = LoLCATsFromAttention()(source, mixer, base.config, torch.Generator(), measured)
    assert all(torch.equal(made[name], truth[name]) for name in truth if name != "o_proj.weight")
    assert error(mixer, made, measured) < 1e-6


def test_unfit_options_are_named(tmp_path):
    base, source, mixer = parts("llama", tmp_path, name="gla")
    none = torch.Generator()
    with pytest.raises(ConfigError, match="got gate 'head' and normalise True, expected Liger's"):
        GLAFromAttention(method="copy")(source, mixer, base.config, none, None)
    with pytest.raises(ConfigError, match="needs text to calibrate on"):
        GLAFromAttention()(source, mixer, base.config, none, None)
    fixed = build_mixer(MIXERS.build({"name": "gla", "mix": "half"}), base.config, 1)
    with pytest.raises(ConfigError, match="got mix 'half', expected learned"):
        GLAFromAttention()(source, fixed, base.config, none, None)
    window = build_mixer(MIXERS.build({"name": "lolcats"}), base.config, 1)
    with pytest.raises(ConfigError, match="needs text to calibrate on"):
        LoLCATsFromAttention()(source, window, base.config, none, None)


@pytest.mark.parametrize("name", ["gla", "lolcats"])
@pytest.mark.parametrize("family", WHOLE_WAY)
def test_calibrated_conversion_of_every_family(family, name, tmp_path):
    base = open_base(tiny_base(family, tmp_path))
    made = plan(base, {"keep": {"layers": [1]}, "mixer": {"name": name, "window_tokens": 5}}, "t", 0)
    text = torch.randint(3, 64, (12, 32), generator=torch.Generator().manual_seed(0))
    outs = []
    for place in ("a", "b") if family == "llama" else ("a",):
        convert(made, tmp_path / place, text)
        outs.append((tmp_path / place / "model.safetensors").read_bytes())
    assert outs[0] == outs[-1]
    convert(plan(base, {"keep": {"layers": [1]}, "mixer": PUBLISHED[name]}, "t", 0), tmp_path / "c")
    teacher = AutoModelForCausalLM.from_pretrained(base.path).eval()
    fresh = torch.randint(3, 64, (8, 32), generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        want = teacher(fresh).logits.log_softmax(-1)
        kls = [float((want.exp() * (want - load_model(tmp_path / n).eval()(fresh).logits.log_softmax(-1))).sum(-1).mean())
               for n in ("a", "c")]  # fmt: skip
    assert kls[0] < kls[1]


@pytest.mark.slow
@pytest.mark.data
def test_real_model_before_any_training(shared_data, tmp_path):
    """stories260K, layer 3 of 5, a window of 16 in rows of 256."""
    path = shared_data / "models" / "stories260K"
    base = open_base(path)
    train, dev = stories_rows(shared_data, "v1_train.txt", 8), stories_rows(shared_data, "v1_dev.txt", 8)
    found = {"base": perplexity(load_model(path), dev)}
    ours = {name: {"name": name, "window_tokens": 16} for name in PUBLISHED}
    theirs = {f"published {name}": {**spec, "window_tokens": 16} for name, spec in PUBLISHED.items()}
    for label, spec in {**ours, **theirs}.items():
        convert(plan(base, {"keep": {"layers": [0, 1, 2, 4]}, "mixer": spec}, "t", 0), tmp_path / label, train)
        found[label] = perplexity(load_model(tmp_path / label), dev)
    assert max(found["gla"], found["lolcats"]) < 1.05 * found["base"]
    assert min(found["published gla"], found["published lolcats"]) > 1.2 * found["base"]
