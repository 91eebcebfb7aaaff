"""Latent attention as a native class: when a plan has one, and that it computes the same."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from hybridize.checkpoint import load_model, open_base
from hybridize.conversions import convert, plan
from tests.tiny import SIZES, tiny_base
from tests.tolerances import assert_close, rms_ratio

NATIVE = {"latent_norm": "rms", "frequencies": "uniform", "kv_rank": 10}
D, HEADS = 8, 4


def verdict(tmp_path, family="llama", keep=(), base=None, **options):
    checkpoint = open_base(tiny_base(family, tmp_path, **(base or {})))
    mixer = {"name": "mla", **NATIVE, **options}
    return plan(checkpoint, {"keep": {"layers": list(keep)}, "mixer": mixer}, "t", 0).native


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"keep": [1]}, "mixes latent attention"),
        ({"latent_norm": "none"}, "norms the latent"),
        ({"family": "qwen2"}, "biases"),
        ({"family": "qwen3"}, "q/k-norms"),
        ({"frequencies": "chosen"}, "frequencies of its own"),
        ({"rope_dim": 16}, "has 16 dimensions"),
        ({"base": {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}}}, "type linear"),
    ],
)
def test_no_native_class(arguments, words, tmp_path):
    found = verdict(tmp_path, **arguments)
    assert found["target"] == "none"
    assert words in found["reason"]


@pytest.mark.parametrize(("family", "options"), [("llama", {"rope_dim": 4}), ("mistral", {}), ("qwen3", {"qk_norm": "fold"})])
def test_the_native_class_computes_the_same(family, options, tmp_path):
    """deepseek_v3 with the same tensors; its score's other scale is a factor on q_proj."""
    assert verdict(tmp_path, family, **options)["target"] == "deepseek_v3"
    base = open_base(tmp_path / f"{family}-base")
    ids = torch.randint(3, 64, (2, 20), generator=torch.Generator().manual_seed(1))
    convert(plan(base, {"keep": {"layers": []}, "mixer": {"name": "mla", **NATIVE, **options}}, "t", 0), tmp_path / "out", ids)
    hybrid, rope = load_model(tmp_path / "out"), options.get("rope_dim", D)
    native = AutoModelForCausalLM.from_config(_deepseek_config(base.config, rope)).eval()
    native.load_state_dict(hybrid.state_dict(), strict=True)

    def scaled(factor):
        with torch.no_grad():
            for layer in native.model.layers:
                layer.self_attn.q_proj.weight.mul_(factor)
            return native(ids).logits

    with torch.no_grad():
        want = hybrid(ids).logits
    assert rms_ratio(scaled(1.0), want) > 1e-3
    assert_close(scaled(((D + rope) / D) ** 0.5), want, "fp32")


def _deepseek_config(base, rope):
    sizes = {**SIZES, "num_key_value_heads": HEADS, "head_dim": rope, "rms_norm_eps": base.rms_norm_eps}
    latent = {"q_lora_rank": None, "kv_lora_rank": 10, "qk_nope_head_dim": D, "qk_rope_head_dim": rope, "v_head_dim": D}
    return AutoConfig.for_model(
        "deepseek_v3", **sizes, **latent, first_k_dense_replace=3, num_mtp_layers=0, rope_interleave=False,
        rope_parameters=dict(base.rope_parameters),
    )  # fmt: skip
