"""Windows without sinks as granite_swa, its learned sinks off."""

import pytest
import torch

from hybridize.checkpoint import open_base
from hybridize.conversions import plan
from hybridize.native import granite_swa, target
from hybridize.native.export import export
from tests.native.exported import assert_same, difference
from tests.native.hybrids import random_hybrid
from tests.tiny import tiny_base

WINDOW = {"keep": {"every": 3}, "mixer": {"name": "streaming", "sink_tokens": 0, "window_tokens": 9}}
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 32}


def test_the_export_is_the_hybrid(tmp_path):
    path = random_hybrid("qwen2", tmp_path, WINDOW)
    assert_same(path, "granite_swa", tmp_path / "out", "GraniteSWAForCausalLM", new_tokens=12)


@pytest.mark.parametrize(
    ("family", "base"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("mistral", {"tie_word_embeddings": True, "head_dim": 16}),
        ("llama", {"dtype": torch.bfloat16, "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}),
    ],
)
def test_the_logits_are_the_hybrids(family, base, tmp_path):
    proofs = export(random_hybrid(family, tmp_path, WINDOW, **base), "granite_swa", tmp_path / "out").proof
    assert all(proof.exact for proof in proofs)


@pytest.mark.parametrize(
    ("wrong", "fields"),
    [("sinks", {}), ("window", {"sliding_window": 8}), ("scale", {"attention_multiplier": 1.0}),
     ("layers", {"layer_types": None})],
)  # fmt: skip
def test_a_wrong_export_is_caught(wrong, fields, tmp_path, monkeypatch):
    path = random_hybrid("llama", tmp_path, WINDOW)
    kind = type(target("granite_swa"))
    whole = kind.config
    monkeypatch.setattr(kind, "config", lambda self, config, mixers: {**whole(self, config, mixers), **fields})
    if wrong == "sinks":
        monkeypatch.setattr(granite_swa, "OFF", 0.0)
    assert difference(path, tmp_path / "out", "granite_swa") > 1e-3


@pytest.mark.parametrize(
    ("family", "base", "found"),
    [
        ("llama", {}, ("ministral", "ministral", "ministral", "granite_swa")),
        ("qwen2", {}, ("qwen2", "qwen2", "qwen2", "granite_swa")),
        ("llama", {"rope_parameters": {**YARN, "beta_fast": 32.0}}, ("ministral", "ministral", "ministral", "granite_swa")),
        ("llama", {"rope_parameters": {**YARN, "beta_fast": 16.0}}, ("ministral", "ministral", "ministral", "none")),
        ("llama", {"head_dim": 16}, ("ministral", "ministral", "ministral", "none")),
        ("qwen3", {}, ("qwen3", "qwen3", "qwen3", "none")),
    ],
)
def test_who_runs_what(family, base, found, tmp_path):
    engines = plan(open_base(tiny_base(family, tmp_path, **base)), WINDOW, "t", 0).native["engines"]
    assert tuple(engines[name]["target"] for name in ("transformers", "vLLM", "SGLang", "llama.cpp")) == found
