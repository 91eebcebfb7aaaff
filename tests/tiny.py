"""Tiny real base checkpoints: random weights, the family's own class, nothing at a value that could hide a mistake."""

import json
import shutil
import tempfile
from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from hybridize.families import FAMILIES

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

# For tests that go the whole way: the plainest family and the one with norms of queries and keys are unit tests.
WHOLE_WAY = [name if name in ("llama", "qwen3") else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]


def tiny_base(family: str, tmp: Path, **overrides) -> Path:
    """Save a random base of `family` (llama, mistral, qwen2, qwen3) in fp32 and return its folder.

    `overrides` are config fields; `max_shard_size` goes to save_pretrained. Norms and biases are perturbed, so that one
    that is left out shows.
    """
    return Path(shutil.copytree(_made(family, json.dumps(overrides, sort_keys=True)), tmp / f"{family}-base", dirs_exist_ok=True))


@cache
def _folders() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="tiny-")


@cache
def _made(family: str, overrides: str) -> Path:
    """The base itself, made once in a process and without a draw from its random numbers."""
    fields = {**SIZES, "dtype": "float32", **({"sliding_window": None} if family == "mistral" else {}), **json.loads(overrides)}
    shard = {"max_shard_size": fields.pop("max_shard_size")} if "max_shard_size" in fields else {}
    config = AutoConfig.for_model(family, **fields)
    generator = torch.Generator().manual_seed(7)
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter)
            if parameter.dim() == 1:
                parameter.copy_((1.0 if "norm" in name else 0.0) + 0.2 * noise)
            else:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
    path = Path(tempfile.mkdtemp(dir=_folders().name))
    model.save_pretrained(path, **shard)
    return path
