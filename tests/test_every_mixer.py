"""Every mixer on a real pretrained model, and a plan that mixes five: converted, trained, saved, loaded elsewhere, generating."""

import json
import subprocess
import sys

import pytest
import torch
from transformers import DynamicCache

from hybridize.cache import cache_bytes
from hybridize.checkpoint import load_model, open_base
from hybridize.conversions import convert, plan
from hybridize.data import eval_blocks, read_documents, tokenize
from hybridize.distill import distill, metrics_path
from hybridize.mixers import MIXERS
from hybridize.modeling import state_bytes
from hybridize.pipeline import load_tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.data]

PROMPTS = ["Once upon a time, there was a little girl named Lily. She", "Tom had a big"]
# Windows that the prompts fill.
SMALL = {
    "streaming": {"window_tokens": 8},
    "block_sparse": {"window_tokens": 8, "block_tokens": 4, "stride_blocks": 2},
    "streaming_heads": {"sink_tokens": 4, "window_tokens": 8},
    "nha": {"slots": 4, "window_tokens": 8},
    "parallel": {"window_tokens": 8, "recurrent": {"name": "gdn"}},
    "gla": {"window_tokens": 8},
    "lolcats": {"window_tokens": 8},
}
MIXED = {0: {"name": "mla"}, 1: {"name": "gdn"}, 2: {"name": "streaming"}, 3: {"name": "attention"}, 4: {"name": "mamba2"}}


@pytest.fixture(scope="module")
def base(shared_data):
    return shared_data / "models" / "stories260K"


@pytest.fixture(scope="module")
def text(shared_data, base):
    return tokenize(load_tokenizer(base), read_documents(shared_data / "text" / "tinystories" / "v1_dev.txt"))


def converted(base, text, layers, out):
    convert(plan(open_base(base), {"layers": layers}, "test", 0), out, eval_blocks(text, 128, 1, 4096))
    return load_model(out)


def generated(model, tokenizer, prompts):
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, return_token_type_ids=False)
    out = model.generate(**inputs, max_new_tokens=16, do_sample=False, pad_token_id=0, eos_token_id=None)
    return out[:, inputs["input_ids"].shape[1] :]


@pytest.mark.parametrize("name", MIXERS.names())
def test_generates_in_mixed_batches_at_the_declared_bytes(name, base, text, tmp_path):
    layers = {0: {"name": "mamba2"}, 3: {"name": "attention"}, "default": {"name": name, **SMALL.get(name, {})}}
    model = converted(base, text, layers, tmp_path / "out")
    tokenizer = load_tokenizer(tmp_path / "out")
    tokenizer.padding_side, tokenizer.pad_token_id = "left", 0
    together = generated(model, tokenizer, PROMPTS)
    alone = torch.cat([generated(model, tokenizer, [prompt]) for prompt in PROMPTS])
    assert torch.equal(together, alone)
    ids = eval_blocks(text, 40, 1, 80)[:1]
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, past_key_values=cache, use_cache=True)
    assert cache_bytes(cache) == state_bytes(model.config, 40)


def test_a_plan_of_five_mixers(base, text, tmp_path):
    converted(base, text, MIXED, tmp_path / "hybrid")
    stage = {"name": "kl", "tokens": 50 * 4 * 64, "seq_tokens": 64, "rows": 4, "lr": 1e-3}
    distill(tmp_path / "hybrid", [stage], text, tmp_path / "trained", teacher=base)
    losses = [json.loads(line)["loss"] for line in metrics_path(tmp_path / "trained").read_text().splitlines()]
    assert len(losses) == 50
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
    command = [sys.executable, "-m", "hybridize", "generate", str(tmp_path / "trained"), "--prompt", PROMPTS[0], "--tokens", "8"]
    out = subprocess.run(command, capture_output=True, text=True, check=True)
    assert out.stdout.startswith("Once upon a time")
