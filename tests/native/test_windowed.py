"""Windows without sinks as ministral and as Qwen's own classes; kept layers as the base's own."""

import pytest
import torch

from hybridize.checkpoint import open_base
from hybridize.conversions import convert, plan
from hybridize.native import target
from tests.native.exported import assert_same, difference
from tests.native.hybrids import random_hybrid
from tests.tiny import tiny_base

WINDOW = {"keep": {"every": 3}, "mixer": {"name": "streaming", "sink_tokens": 0, "window_tokens": 9}}


@pytest.mark.parametrize(
    ("family", "to", "architecture"),
    [
        ("llama", "ministral", "MinistralForCausalLM"),
        ("qwen2", "qwen2", "Qwen2ForCausalLM"),
        ("qwen3", "qwen3", "Qwen3ForCausalLM"),
    ],
)
def test_the_export_is_the_hybrid(family, to, architecture, tmp_path):
    assert_same(random_hybrid(family, tmp_path, WINDOW), to, tmp_path / "out", architecture)


@pytest.mark.parametrize(("family", "architecture"), [("mistral", "MistralForCausalLM"), ("qwen2", "Qwen2ForCausalLM")])
def test_a_hybrid_with_every_layer_kept_is_its_base(family, architecture, tmp_path):
    path = random_hybrid(family, tmp_path, {"keep": "all"})
    assert assert_same(path, "auto", tmp_path / "out", architecture).proof[0].max_difference == 0


@pytest.mark.parametrize(("family", "wrong"), [("llama", 8), ("mistral", 10), ("qwen3", None)])
def test_a_wrong_window_is_caught(family, wrong, tmp_path, monkeypatch):
    path = random_hybrid(family, tmp_path, WINDOW)
    kind = type(target("qwen3" if family == "qwen3" else "ministral"))
    whole = kind.config
    # None: every layer full.
    fields = {"layer_types": ["full_attention"] * 3} if wrong is None else {"sliding_window": wrong}
    monkeypatch.setattr(kind, "config", lambda self, config, mixers: {**whole(self, config, mixers), **fields})
    assert difference(path, tmp_path / "out") > 1e-3


@pytest.mark.parametrize(
    ("options", "words"),
    [({"sink_tokens": 4}, "first tokens"), ({"sink_tokens": 0, "window_tokens": 9}, None)],
)
def test_verdict(options, words, tmp_path):
    section = {"keep": {"layers": [0]}, "mixer": {"name": "streaming", **options}}
    found = plan(open_base(tiny_base("llama", tmp_path)), section, "t", 0).native
    assert found["target"] == ("none" if words else "ministral")
    assert (words or "") in found["reason"]


def test_two_windows_have_no_class(tmp_path):
    layers = {i: {"name": "streaming", "sink_tokens": 0, "window_tokens": 8 + i} for i in range(2)}
    found = plan(open_base(tiny_base("qwen3", tmp_path)), {"layers": {**layers, "default": {"name": "attention"}}}, "t", 0).native
    assert "one window for all layers" in found["reason"]


@pytest.mark.data
@pytest.mark.slow
@pytest.mark.parametrize(("name", "vocab"), [("stories260K", 512), ("babyllama-tok105", 105)])
def test_real_models(name, vocab, tmp_path, shared_data):
    base = open_base(shared_data / "models" / name)
    section = {"keep": {"every": 2}, "mixer": {"name": "streaming", "sink_tokens": 0, "window_tokens": 16}}
    convert(plan(base, section, "t", 0), tmp_path / "hybrid", torch.zeros(1, 1, dtype=torch.int64))
    assert_same(tmp_path / "hybrid", "ministral", tmp_path / "out", "MinistralForCausalLM", 200, vocab, elsewhere=True)
