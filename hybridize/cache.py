"""Cache entries of the new mixers, to sit beside transformers' own in a DynamicCache.

Entries that forget report the tokens *seen* as their length and call themselves sliding, because transformers sizes masks and
positions from the first entry that does not. They cannot be rolled back: `crop` raises, `is_croppable` is False, and a model
that holds one says `_is_stateful`, which keeps assisted decoding away from it. `LatentLayer` forgets nothing.

In a HybridStaticCache (static_cache.py) the same entries are `fixed`: their tensors never move, counts are tensors too.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer

from hybridize.errors import ConfigError
from hybridize.static_cache import FixedKeys, FixedLatents, HybridStaticCache, unmoved


class ForgetfulLayer(CacheLayerMixin):
    """What streaming and recurrent entries share: a count of tokens seen, tensors by name, no way back.

    Attributes:
        seen: tokens seen, an integer; of a fixed entry an int64 tensor without dimensions once it is filled.
        capacity: tokens that a fixed entry can hold; None is an entry that grows.
    """

    is_sliding = True
    is_croppable = False
    is_compileable = False
    supports_early_init = False
    tensor_names: tuple[str, ...] = ()

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self.seen: Any = 0
        self.capacity: int | None = None
        for name in self.tensor_names:
            setattr(self, name, None)

    @classmethod
    def fixed(cls, capacity: int) -> Any:
        """An entry whose tensors never move, for a text of at most `capacity` tokens."""
        entry = cls()
        entry.capacity, entry.is_compileable = capacity, True
        return entry

    def hold(self, **tensors: Tensor) -> None:
        """Keep tensors by name. A fixed entry copies each into memory of its own, which it takes the first time."""
        for name, tensor in tensors.items():
            own = getattr(self, name)
            if self.capacity is None:
                setattr(self, name, tensor)
            elif own is None:
                setattr(self, name, unmoved(tensor.detach().clone(memory_format=torch.contiguous_format)))
            elif own is not tensor:
                own.copy_(tensor)

    def advance(self, tokens: Tensor) -> None:
        """Count what was just read, [B, T, ...]."""
        if self.capacity is not None and not isinstance(self.seen, Tensor):
            self.seen = unmoved(torch.zeros((), dtype=torch.long, device=tokens.device))
        self.seen += tokens.shape[1]
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise ConfigError(f"{type(self).__name__} is filled by its mixer; this model and this cache do not belong together")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        # Layers that forget read no mask of the library's, but it may be sized for others by the first of them.
        if self.capacity is not None:
            return self.capacity if self.is_initialized else query_length, 0
        return self.seen + query_length, 0

    def get_seq_length(self) -> int:
        return self.seen

    def get_max_length(self) -> int:
        return -1 if self.capacity is None else self.capacity

    def held(self) -> list[Tensor]:
        """The tensors this entry keeps between calls; their bytes are what `state_bytes` promises."""
        return [t for t in (getattr(self, name) for name in self.tensor_names) if t is not None]

    def _apply(self, change: Any) -> None:
        for name in self.tensor_names:
            if (tensor := getattr(self, name)) is None:
                continue
            changed = change(tensor)
            if self.capacity is not None and changed.shape != tensor.shape:
                raise ConfigError(f"a static cache of {len(tensor)} rows cannot become one of {len(changed)}. Use a DynamicCache")
            self.hold(**{name: changed})

    def reset(self) -> None:
        self.is_initialized = False
        if self.capacity is None:
            self.seen = 0
            for name in self.tensor_names:
                setattr(self, name, None)
        elif isinstance(self.seen, Tensor):
            self.seen.zero_()

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove != 0:
            raise ConfigError(
                f"crop({tokens_to_remove}): a {type(self).__name__} keeps no past to go back to. Start from an empty cache, "
                "or decode without assistance"
            )

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._apply(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._apply(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._apply(lambda t: t[indices.to(t.device)])

    def offload(self) -> None:
        self._apply(lambda t: t.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Nothing to do: the mixer moves its own tensors to where its input is."""


class RecurrentLayer(ForgetfulLayer):
    """State of a recurrent mixer: `conv` [B, C, K-1] in the model's dtype and `state` [B, H, P, N] in fp32."""

    tensor_names = ("conv", "state")
    conv: Any
    state: Any


class StatelessLayer(ForgetfulLayer):
    """Entry of a mixer that keeps nothing: it counts tokens, so that sizes taken from any layer agree."""


class SinkWindowLayer(ForgetfulLayer):
    """Keys and values of the tokens of each row that can still be read, [B, G, slots, d]; mixers/windowed.py says which.

    `pads` [B] counts the padding before each row's first token; None means there is none.
    """

    tensor_names = ("keys", "values", "pads")
    keys: Any
    values: Any
    pads: Any


class SplitHeadsLayer(SinkWindowLayer):
    """As SinkWindowLayer for the streaming heads, and the keys and values of all tokens for the full ones."""

    tensor_names = ("keys", "values", "full_keys", "full_values", "pads")
    full_keys: Any
    full_values: Any


class WindowStateLayer(SinkWindowLayer):
    """A window of keys and values as in SinkWindowLayer (none without a window) and a `state` [B, S, N, P] in fp32."""

    tensor_names = (*SinkWindowLayer.tensor_names, "state")
    state: Any


class LeavingWindowLayer(ForgetfulLayer):
    """Keys and values of the last tokens in their order, [B, G, held, d], and the sum over those that left the window.

    `state` [B, H, F, d + 1] is fp32 and None until a token has left. `pads` [B] counts each row's padding; None is none.
    """

    tensor_names = ("keys", "values", "pads", "state")
    keys: Any
    values: Any
    pads: Any
    state: Any


class SlotWindowLayer(SinkWindowLayer):
    """A SinkWindowLayer and the slots that every token was written to: `slot_keys`, `slot_values` [B, G, m, d] in fp32."""

    tensor_names = (*SinkWindowLayer.tensor_names, "slot_keys", "slot_values")
    slot_keys: Any
    slot_values: Any


class BranchedLayer(ForgetfulLayer):
    """The entries of mixers that run side by side in one layer, one of a kind; bytes and moves are those of its parts."""

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self.parts: dict[type[Any], Any] = {}

    def part(self, kind: type[Any]) -> Any:
        if kind not in self.parts:
            self.parts[kind] = kind() if self.capacity is None else kind.fixed(self.capacity)
        return self.parts[kind]

    def held(self) -> list[Tensor]:
        return [tensor for part in self.parts.values() for tensor in part.held()]

    def _apply(self, change: Any) -> None:
        for part in self.parts.values():
            part._apply(change)

    def reset(self) -> None:
        super().reset()
        for part in self.parts.values():
            part.reset()


class LatentLayer(DynamicLayer):
    """Latents of keys and values, [B, groups, S, r], and the position of each token, `positions` [B, S] int32.

    It grows with every token and can be rolled back like transformers' own. Positions are kept because keys are rebuilt, and
    rotated, at every step: padding, packing and gaps cannot be told from a token's place in the cache. Tokens are counted by
    them, since latents may have no width at all.
    """

    positions: Any = None

    @classmethod
    def fixed(cls, capacity: int) -> FixedLatents:
        """An entry whose tensors never move, for a text of at most `capacity` tokens."""
        return FixedLatents(capacity)

    def get_seq_length(self) -> int:
        return 0 if self.positions is None else self.positions.shape[1]

    def extend(self, keys: Tensor, values: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Add new tokens; returns keys, values and positions of all. `positions` is [1, T] or [B, T]."""
        positions = positions.to(device=keys.device, dtype=torch.int32).expand(keys.shape[0], -1)
        self.positions = (
            positions if self.get_seq_length() == 0 else torch.cat([self.positions.to(keys.device), positions], dim=1)
        )
        return *self.update(keys, values), self.positions

    def held(self) -> list[Tensor]:
        """The tensors this entry keeps between calls; their bytes are what `state_bytes` promises."""
        return [t for t in (self.keys, self.values, self.positions) if isinstance(t, Tensor)]

    def reset(self) -> None:
        super().reset()
        self.positions = None

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        if self.positions is not None:
            self.positions = self.positions[:, : self.held()[0].shape[-2]]

    def _select(self, change: Any) -> None:
        if self.positions is not None:
            self.positions = change(self.positions)

    def reorder_cache(self, beam_idx: Any) -> None:
        super().reorder_cache(beam_idx)
        self._select(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._select(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._select(lambda t: t[indices.to(t.device)])


def own_layer(cache: Cache | BranchedLayer, layer_idx: int, kind: type[Any]) -> Any:
    """The cache entry of a mixer, put in place of transformers' own on first use.

    A mixer that is one branch of a layer gets the layer's BranchedLayer for a cache, and its part of it here.

    Raises:
        ConfigError: the cache is of a kind that cannot hold it (the library's static or quantised one), or the entry holds
            other tokens.
    """
    if isinstance(cache, BranchedLayer):
        return cache.part(kind)
    if isinstance(cache, HybridStaticCache):
        return cache.entry(layer_idx, kind)
    if not isinstance(cache, DynamicCache):
        raise ConfigError(f"got a {type(cache).__name__}, expected a DynamicCache or a HybridStaticCache")
    while len(cache.layers) <= layer_idx:
        cache.layers.append(DynamicLayer())
    entry: Any = cache.layers[layer_idx]
    if not isinstance(entry, kind):
        if entry.get_seq_length() > 0:
            raise ConfigError(f"layer {layer_idx} of the cache is a filled {type(entry).__name__}, expected {kind.__name__}")
        entry = cache.layers[layer_idx] = kind()
    return entry


def cache_bytes(cache: Cache) -> int:
    """Bytes of every tensor a cache holds, summed over layers and batch."""
    total = 0
    for entry in cache.layers:
        if isinstance(entry, ForgetfulLayer | LatentLayer | FixedKeys):
            tensors = entry.held()
        else:
            tensors = [t for t in (getattr(entry, "keys", None), getattr(entry, "values", None)) if isinstance(t, torch.Tensor)]
        total += sum(t.numel() * t.element_size() for t in tensors)
    return total
