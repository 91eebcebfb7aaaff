"""Exports in a process that cannot import hybridize, 200 tokens long; those that the files of their classes do not take there."""

import pytest
import torch

from hybridize.checkpoint import open_base
from hybridize.conversions import convert, plan
from tests.native.exported import assert_same, needs_groups
from tests.native.hybrids import random_hybrid

WINDOW = {"keep": {"every": 2}, "mixer": {"name": "streaming", "sink_tokens": 0, "window_tokens": 16}}
MAMBA = {"keep": {"every": 2}, "mixer": {"name": "mamba2"}}


@pytest.mark.data
@pytest.mark.slow
@pytest.mark.parametrize(
    ("to", "section", "architecture"),
    [
        pytest.param("bamba", MAMBA, "BambaForCausalLM", marks=needs_groups),
        ("granite_swa", WINDOW, "GraniteSWAForCausalLM"),
        ("llama", {"keep": "all"}, "LlamaForCausalLM"),
    ],
)
def test_a_real_model(to, section, architecture, tmp_path, shared_data):
    base = open_base(shared_data / "models" / "stories260K")
    ids = torch.randint(3, 512, (8, 128), generator=torch.Generator().manual_seed(0))
    convert(plan(base, section, "t", 0), tmp_path / "hybrid", ids)
    assert_same(tmp_path / "hybrid", to, tmp_path / "out", architecture, 200, 512, elsewhere=True)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "architecture"), [("qwen2", "Qwen2ForCausalLM"), ("qwen3", "Qwen3ForCausalLM")])
def test_a_random_qwen(family, architecture, tmp_path):
    path = random_hybrid(family, tmp_path, WINDOW, max_position_embeddings=512)
    assert_same(path, family, tmp_path / "out", architecture, 200, elsewhere=True)
