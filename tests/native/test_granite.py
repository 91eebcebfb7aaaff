"""Attention and Mamba2 as granitemoehybrid."""

import pytest
import torch

from hybridize.checkpoint import open_base
from hybridize.conversions import convert, plan
from hybridize.errors import ConfigError
from hybridize.native import granite, native_verdict, target
from hybridize.native.export import export
from tests.native.exported import assert_same, difference, needs_groups
from tests.native.hybrids import random_hybrid
from tests.tiny import tiny_base

MAMBA = {"keep": {"every": 3}, "mixer": {"name": "mamba2"}}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "options", "base"),
    [
        ("llama", {"heads": "grouped"}, {"tie_word_embeddings": True}),
        ("qwen2", {"heads": "expanded", "proj_bias": False, "conv_tokens": 3}, {}),
        ("llama", {"heads": "grouped", "proj_bias": False}, {"attention_bias": True}),
    ],
)
@needs_groups
def test_the_export_is_the_hybrid(family, options, base, tmp_path):
    section = {**MAMBA, "mixer": {"name": "mamba2", **options}}
    path = random_hybrid(family, tmp_path, section, **base)
    # The class masks padding in front of in_proj alone: its bias on x, B and C reaches the first tokens through the convolution.
    pads = not options.get("proj_bias", True)
    assert_same(path, "granitemoehybrid", tmp_path / "out", "GraniteMoeHybridForCausalLM", pads=pads)


def wrong_pairs(config, spec):
    right = original(config, spec)
    return {name: lambda rows, part=part: part(rows).roll(1, 0) for name, part in right.items()}


original = granite.expanded


@pytest.mark.parametrize("wrong", ["heads", "scale", "rope", "mlp"])
@needs_groups
def test_a_wrong_export_is_caught(wrong, tmp_path, monkeypatch):
    path = random_hybrid("llama", tmp_path, MAMBA)
    kind = type(target("granitemoehybrid"))
    fields = {"scale": {"attention_multiplier": 1.0}, "rope": {"position_embedding_type": None}}.get(wrong, {})
    if wrong == "heads":
        monkeypatch.setattr(granite, "expanded", wrong_pairs)
    if wrong == "mlp":
        monkeypatch.setattr(granite, "_stacked", lambda gate, up: torch.cat([up, gate]))
    whole = kind.config
    monkeypatch.setattr(kind, "config", lambda self, config, mixers: {**whole(self, config, mixers), **fields})
    assert difference(path, tmp_path / "out") > 1e-3


@pytest.mark.parametrize(
    ("family", "section", "words"),
    [
        ("qwen3", MAMBA, "q/k-norms"),
        ("llama", {"keep": {"layers": []}, "mixer": {"name": "mamba2"}}, "at least one attention layer"),
        ("llama", {"layers": {0: {"name": "mamba2", "conv_tokens": 3}, 1: {"name": "mamba2"}, "default": {"name": "attention"}}},
         "one set of Mamba2 options"),
    ],
)  # fmt: skip
def test_no_native_class(family, section, words, tmp_path):
    found = plan(open_base(tiny_base(family, tmp_path)), section, "t", 0).native
    assert found["target"] == "none"
    assert words in found["reason"]
    assert all(said["target"] in ("none", "itself") for said in found["engines"].values())


def test_an_older_transformers_norms_otherwise_and_is_refused(tmp_path, monkeypatch):
    path = random_hybrid("llama", tmp_path, MAMBA)
    monkeypatch.setattr(granite.transformers, "__version__", "5.22.2")
    with pytest.raises(ConfigError, match="granitemoehybrid: transformers 5.22.2 norms all heads of this class as one"):
        export(path, "auto", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_grouped_and_expanded_layers_share_one_class(tmp_path):
    section = {"layers": {0: {"name": "mamba2", "heads": "expanded"}, 1: {"name": "mamba2"}, "default": {"name": "attention"}}}
    base = open_base(tiny_base("llama", tmp_path))
    made = plan(base, section, "t", 0)
    assert native_verdict(base.config, [layer.mixer for layer in made.layers])["target"] == "granitemoehybrid"


@pytest.mark.data
@pytest.mark.slow
@pytest.mark.parametrize(("name", "vocab"), [("stories260K", 512), ("tinystories-656k", 2048), ("babyllama-tok105", 105)])
@needs_groups
def test_real_models(name, vocab, tmp_path, shared_data):
    ids = torch.randint(3, vocab, (8, 128), generator=torch.Generator().manual_seed(0))
    base = open_base(shared_data / "models" / name)
    convert(plan(base, {"keep": {"every": 2}, "mixer": {"name": "mamba2"}}, "t", 0), tmp_path / "hybrid", ids)
    new = min(200, base.config.max_position_embeddings - 32)
    assert_same(
        tmp_path / "hybrid", "granitemoehybrid", tmp_path / "out", "GraniteMoeHybridForCausalLM", new, vocab, elsewhere=True
    )
