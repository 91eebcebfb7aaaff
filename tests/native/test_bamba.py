"""Attention and Mamba2 as bamba, whose heads stand twice for llama.cpp."""

import pytest
import torch

from hybridize.checkpoint import open_base, stored_tensors
from hybridize.conversions import plan
from hybridize.native import bamba, granite, target
from hybridize.native.export import export
from tests.native.exported import assert_same, difference, needs_groups
from tests.native.hybrids import random_hybrid
from tests.tiny import tiny_base

MAMBA = {"keep": {"every": 3}, "mixer": {"name": "mamba2", "proj_bias": False}}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 10000.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip


@needs_groups
def test_the_export_is_the_hybrid(tmp_path):
    path = random_hybrid("llama", tmp_path, MAMBA, tie_word_embeddings=True)
    assert_same(path, "bamba", tmp_path / "out", "BambaForCausalLM", new_tokens=12)
    found, made = (stored_tensors(folder)[0] for folder in (path, tmp_path / "out"))
    before, after = "model.layers.0.self_attn.", "model.layers.0.mamba."
    # [z | x | B | C | dt]: z and x twice, and B repeated for every head.
    assert found[f"{before}in_proj.weight"].shape == (32 + 16 + 16 + 32 + 4, 32)
    assert made[f"{after}in_proj.weight"].shape == (64 + 64 + 32 + 32 + 4, 32)
    assert made[f"{after}A_log"].shape == found[f"{before}A_log"].shape


@pytest.mark.parametrize(
    ("family", "options", "base"),
    [
        ("qwen2", {"heads": "expanded", "conv_tokens": 3}, {}),
        ("mistral", {"proj_bias": True}, {}),
        # Heads wider than hidden_size / heads: together they are as wide as the class wants them, and stand once.
        ("llama", {}, {"head_dim": 16}),
    ],
)
@needs_groups
def test_the_logits_are_the_hybrids(family, options, base, tmp_path):
    path = random_hybrid(family, tmp_path, {**MAMBA, "mixer": {**MAMBA["mixer"], **options}}, **base)
    *unpadded, padded = export(path, "bamba", tmp_path / "out").proof
    assert all(proof.exact for proof in unpadded)
    assert padded.exact != options.get("proj_bias", False)


def zeros(rows, heads, times):
    """Nothing beside a head, which halves the mean square that its norm divides by."""
    rows = rows.unflatten(0, (heads, 1, -1))
    return torch.cat([rows, torch.zeros_like(rows)], dim=1).flatten(0, 2)


def apart(rows, heads, times):
    """All heads, and then all heads again: no norm has both copies of one head."""
    return rows.repeat(times, *[1] * (rows.dim() - 1))


@pytest.mark.parametrize("wrong", ["rotary", zeros, apart, "groups"])
@needs_groups
def test_a_wrong_export_is_caught(wrong, tmp_path, monkeypatch):
    path = random_hybrid("llama", tmp_path, MAMBA)
    kind = type(target("bamba"))
    whole = kind.config

    def config(self, config, mixers):
        fields = whole(self, config, mixers)
        if wrong == "rotary":
            fields["rope_parameters"]["partial_rotary_factor"] = 0.5
        return fields

    monkeypatch.setattr(kind, "config", config)
    if callable(wrong):
        monkeypatch.setattr(bamba, "beside", wrong)
    if wrong == "groups":
        monkeypatch.setattr(granite, "expanded", lambda config, spec: {
            name: lambda rows, part=part: part(rows).roll(1, 0) for name, part in expanded(config, spec).items()
        })  # fmt: skip
    assert difference(path, tmp_path / "out", "bamba") > 1e-3


expanded = granite.expanded


@pytest.mark.parametrize(
    ("options", "base", "words"),
    [
        ({}, {}, None),
        ({"proj_bias": True}, {}, "proj_bias: false"),
        ({}, {"head_dim": 16}, "head_dim = hidden_size / heads"),
        ({}, {"vocab_size": 65}, "in eights"),
        ({}, {"rope_parameters": LLAMA3}, "type llama3"),
        ({}, {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}}, None),
    ],
)
def test_what_llama_cpp_takes(options, base, words, tmp_path):
    section = {**MAMBA, "mixer": {**MAMBA["mixer"], **options}}
    engines = plan(open_base(tiny_base("llama", tmp_path, **base)), section, "t", 0).native["engines"]
    assert engines["llama.cpp"]["target"] == ("none" if words else "bamba")
    assert (words or "granitehybrid") in engines["llama.cpp"]["reason"]
    assert engines["transformers"]["target"] == "granitemoehybrid"
