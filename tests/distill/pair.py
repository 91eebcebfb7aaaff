"""A tiny teacher and a tiny hybrid made from it: real models, random weights, streaming mixers a little off."""

from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from hybridize.checkpoint import open_checkpoint, save_checkpoint
from hybridize.data import Tokens
from hybridize.modeling import build_model, hybrid_config
from hybridize.storage import Staging
from tests.tiny import tiny_base

STREAMING = {"name": "streaming", "sink_tokens": 1, "window_tokens": 4}
KEEP = {"name": "attention"}
# Both losses of a layer: the second is not align's default, and takes other paths.
BOTH = [{"name": "mixer_output"}, {"name": "hidden_state"}]


def tiny_pair(tmp: Path, mixers: tuple = (STREAMING, KEEP, STREAMING), noise: float = 0.3, **overrides) -> tuple[Path, Path]:
    """(teacher's folder, student's folder); the student's mixers are the teacher's with `noise` added."""
    base = tiny_base("llama", tmp, **overrides)
    teacher = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    student = build_model(hybrid_config(open_checkpoint(base).config, list(mixers)))
    generator = torch.Generator().manual_seed(3)
    weights = teacher.state_dict()
    own = student.state_dict()
    for name in own:
        if name in weights and weights[name].shape == own[name].shape:
            own[name] = weights[name].clone()
        if any(f"layers.{i}.self_attn" in name and spec != KEEP for i, spec in enumerate(mixers)):
            own[name] = own[name] + noise * torch.randn(own[name].shape, generator=generator) * own[name].std(correction=0)
    student.load_state_dict(own)
    out = tmp / "student"
    with Staging(out, False, "test") as staging:
        save_checkpoint(student, base, staging, {"base": {"location": str(base)}})
        staging.finish()
    return base, out


def tiny_tokens(count: int = 4000, seed: int = 0) -> Tokens:
    ids = np.random.default_rng(seed).integers(3, 64, size=count).astype(np.int32)
    return Tokens(ids=ids, text_bytes=count, sha256=f"random-{seed}-{count}", bos_id=1)
