"""When a plan of latent attention has a native class. That it computes the same is tests/native/test_deepseek.py's."""

import pytest

from hybridize.checkpoint import open_base
from hybridize.conversions import plan
from hybridize.native import native_verdict
from tests.tiny import tiny_base

NATIVE = {"latent_norm": "rms", "frequencies": "uniform", "kv_rank": 10}


def rotary(kind):
    return {"rope_parameters": {"rope_type": kind, "factor": 2.0, "rope_theta": 10000.0, "original_max_position_embeddings": 64}}


def verdict(tmp_path, family="llama", keep=(), base=None, **options):
    checkpoint = open_base(tiny_base(family, tmp_path, **(base or {})))
    mixer = {"name": "mla", **NATIVE, **options}
    made = plan(checkpoint, {"keep": {"layers": list(keep)}, "mixer": mixer}, "t", 0)
    return native_verdict(checkpoint.config, [layer.mixer for layer in made.layers])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"keep": [1]}, "mixes latent attention"),
        ({"latent_norm": "none"}, "norms the latent"),
        ({"family": "qwen2"}, "biases"),
        ({"family": "qwen3"}, "q/k-norms"),
        ({"frequencies": "chosen"}, "frequencies of its own"),
        ({"rope_dim": 16}, "has 16 dimensions"),
        ({"base": rotary("dynamic")}, "type dynamic"),
        ({"base": rotary("yarn"), "rope_dim": 4}, "type yarn"),
        ({"base": {"mlp_bias": True}}, "biases in its MLP"),
    ],
)
def test_no_native_class(arguments, words, tmp_path):
    found = verdict(tmp_path, **arguments)
    assert found["target"] == "none"
    assert words in found["reason"]


@pytest.mark.parametrize(
    ("family", "arguments"),
    [("llama", {"rope_dim": 4}), ("mistral", {}), ("qwen3", {"qk_norm": "fold"}), ("llama", {"base": rotary("yarn")})],
)
def test_a_native_class(family, arguments, tmp_path):
    assert verdict(tmp_path, family, **arguments)["target"] == "deepseek_v3"
