"""A cache of fixed size: every tensor stays where it is and is written in place, counts are tensors on the model's device.

That is what a CUDA graph can replay (graphs.py), and what torch.compile compiles once. Entries of mixers that forget are those of
cache.py, `fixed`; here are the ones that keep every token.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, StaticLayer

from hybridize.errors import ConfigError


def unmoved(tensor: Tensor) -> Tensor:
    """The tensor, marked for torch.compile as one whose memory stays, without which it would not use CUDA graphs."""
    if not torch.compiler.is_compiling():
        torch._dynamo.mark_static_address(tensor)
    return tensor


class FixedKeys(StaticLayer):
    """Keys and values of all tokens in memory that never moves, [B, G, capacity, d].

    The first call gets its own tokens alone, as from a cache that grows, so that it needs no mask for the empty places.
    """

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        first = not self.is_initialized
        held = super().update(key_states, value_states, *args, **kwargs)
        return (key_states, value_states) if first else held

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.max_cache_len if self.is_initialized else query_length, 0

    def held(self) -> list[Tensor]:
        """The tensors this entry keeps between calls."""
        return [self.keys, self.values] if isinstance(self.keys, Tensor) and isinstance(self.values, Tensor) else []

    def reset(self) -> None:
        super().reset()
        self.is_initialized = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        for tensor in self.held():
            tensor.copy_(tensor.index_select(0, beam_idx.to(tensor.device)))


class FixedLatents(FixedKeys):
    """As LatentLayer, in memory that never moves; `positions` [B, capacity] is 0 in empty places."""

    positions: Any = None

    def extend(self, keys: Tensor, values: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As LatentLayer.extend; after the first call all places, empty ones too."""
        positions = positions.to(device=keys.device, dtype=torch.int32).expand(keys.shape[0], -1)
        first, before = not self.is_initialized, self.cumulative_length.to(keys.device)
        if self.positions is None:
            self.positions = unmoved(positions.new_zeros(positions.shape[0], self.max_cache_len))
        self.positions.index_copy_(1, torch.arange(positions.shape[1], device=keys.device) + before, positions)
        return *self.update(keys, values), positions if first else self.positions

    def held(self) -> list[Tensor]:
        return [*super().held(), *([] if self.positions is None else [self.positions])]


class HybridStaticCache(Cache):
    """A cache of fixed size for a hybrid: nothing in it moves, and a step of one token runs the same operations at any length.

    Entries take their memory in the first call, which is the prompt's. Attention that was kept, also with a sliding window of the
    base's, and latents have room for `max_tokens`; states and windows are as large as they ever become.

    Args:
        config: a hybrid's.
        max_tokens: of the longest text, prompt included.

    Attributes:
        rows: sequences of the batch; 0 before the first call.
        taken: tokens read so far, as far as calls outside of torch.compile and of a CUDA graph know it.

    Raises:
        ConfigError: fewer than one token.
    """

    def __init__(self, config: Any, max_tokens: int):
        if max_tokens < 1:
            raise ConfigError(f"max_tokens is {max_tokens}, expected at least 1")
        super().__init__(layers=[FixedKeys(max_tokens) for _ in config.mixers])
        self.max_tokens, self.taken, self.rows = max_tokens, 0, 0

    def entry(self, layer_idx: int, kind: type[Any]) -> Any:
        """A layer's entry of a mixer's own kind, in the place of kept attention's on first use."""
        entry: Any = self.layers[layer_idx]
        if type(entry) is FixedKeys:
            entry = self.layers[layer_idx] = kind.fixed(self.max_tokens)
        return entry

    def take(self, tokens: int, rows: int | None = None) -> None:
        """Count tokens that are about to be read, of so many rows (None: as before).

        Raises:
            ConfigError: there is no room for them, or the cache was filled with another number of rows.
        """
        if rows is not None:
            if self.rows not in (0, rows):
                raise ConfigError(f"the static cache holds {self.rows} rows, got {rows}. Make a new one")
            self.rows = rows
        if self.taken + tokens > self.max_tokens:
            raise ConfigError(
                f"the static cache has room for {self.max_tokens} tokens and holds {self.taken}, got {tokens} more. "
                f"Make it with max_tokens {self.taken + tokens} or more"
            )
        self.taken += tokens

    def tensors(self) -> list[Tensor]:
        """Every tensor that a step reads or writes, counts included."""
        found: list[Tensor] = []
        entries: list[Any] = list(self.layers)
        while entries:
            entry = entries.pop(0)
            if parts := getattr(entry, "parts", {}):
                entries += parts.values()
            else:
                found += entry.held()
            counts = (getattr(entry, "seen", None), getattr(entry, "cumulative_length", None))
            found += [count for count in counts if isinstance(count, Tensor)]
        return found

    def reset(self) -> None:
        super().reset()
        self.taken = 0
