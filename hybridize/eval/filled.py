"""Caches of a given length without a prompt: random numbers in the shapes that a prompt would leave.

What a step costs follows from shapes alone, and a prompt of 64k tokens would take a CPU an hour.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from hybridize.cache import BranchedLayer, ForgetfulLayer, LatentLayer, SinkWindowLayer, cache_bytes
from hybridize.modeling import state_bytes

# Read for real first, so that every tensor of an entry is there, also those that a token must leave a window for.
SETTLING_TOKENS = 256


@torch.no_grad()
def filled_cache(model: Any, tokens: int, batch: int) -> DynamicCache:
    """A cache as after `tokens` tokens of `batch` sequences, most of its contents random.

    Args:
        model: a causal LM of transformers.
        tokens: in each sequence, at least 1.
        batch: sequences.

    Raises:
        AssertionError: its bytes are not those that the mixers promise, which is a bug of this function or of a mixer.
    """
    cache = DynamicCache(config=model.config)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (batch, min(tokens, SETTLING_TOKENS)), generator=generator)
    model(input_ids=ids.to(model.device), past_key_values=cache, use_cache=True, logits_to_keep=1)
    for entry, layer in zip(cache.layers, model.model.layers, strict=True):
        _stretch(entry, layer.self_attn, tokens)
    held, promised = cache_bytes(cache), batch * state_bytes(model.config, tokens)
    assert held == promised, f"a cache filled for {tokens} tokens holds {held} bytes, promised {promised}"
    return cache


def _stretch(entry: Any, mixer: Any, tokens: int) -> None:
    """Give an entry the shapes and the count of `tokens` tokens."""
    if isinstance(entry, BranchedLayer):
        for part in entry.parts.values():
            _stretch(part, mixer, tokens)
    if isinstance(entry, ForgetfulLayer):
        entry.seen = tokens
    if isinstance(entry, SinkWindowLayer):
        for prefix, reach in mixer.parts():
            for name in (f"{prefix}keys", f"{prefix}values"):
                setattr(entry, name, _longer(getattr(entry, name), reach.slots(tokens)))
    elif isinstance(entry, LatentLayer):
        entry.positions = torch.arange(tokens, dtype=torch.int32, device=entry.positions.device).expand(
            entry.positions.shape[0], -1
        )
    if isinstance(entry, DynamicLayer) and entry.keys is not None and entry.values is not None:
        entry.keys, entry.values = _longer(entry.keys, tokens), _longer(entry.values, tokens)


def _longer(held: Tensor, slots: int) -> Tensor:
    """`held` [B, G, S, d] with random numbers for as many tokens as `slots` (dim 2) wants more."""
    missing = slots - held.shape[2]
    if missing <= 0:
        return held
    more = torch.randn(*held.shape[:2], missing, held.shape[3], dtype=held.dtype, device=held.device)
    return torch.cat([held, more], dim=2)
