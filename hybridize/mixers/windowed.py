"""Attention that reads part of the past, and a cache that holds that part alone: what several mixers share.

Keys are kept with the rotary angle of their true position, so that a reach as wide as the text is exactly the base.

Letters: B batch, T new tokens, S tokens to attend to, H query heads, G key/value heads, d head width.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from hybridize.cache import LeavingWindowLayer, SinkWindowLayer, own_layer
from hybridize.families import family_of, head_dim
from hybridize.kernels.stream_attn import stream_attn, stream_attn_step
from hybridize.kernels.stream_attn.torch_impl import block_attention
from hybridize.mixers.ring import Ring


def _at_most(value: Any, limit: int) -> Any:
    return value.clamp(max=limit) if isinstance(value, Tensor) else min(value, limit)


@dataclass(frozen=True)
class Reach:
    """Which tokens of its document a query sees: those before it that last, and the last `window` ones, itself counted.

    A token lasts when its position is below `sink`, or when the number of its block of `block` tokens is a multiple of
    `stride`. Stride 0 means that no block lasts, 1 that all do. Positions count from the start of the document.

    The cache holds what lasts and what is in the window, each token in a slot that it never leaves: the slot of the
    token that drops out of the window as it comes in, or a new one where none drops out or that one lasts. Counts and
    positions may be integers or integer tensors.
    """

    sink: int
    window: int
    block: int = 1
    stride: int = 0

    @property
    def everything(self) -> bool:
        return self.stride == 1

    def lasts(self, place: Any) -> Any:
        """Whether the token at a position stays readable for ever."""
        if self.stride == 0:
            return place < self.sink
        return (place < self.sink) | (place // self.block % self.stride == 0)

    def _strided(self, count: Any) -> Any:
        if self.stride == 0:
            return 0 * count
        period = self.block * self.stride
        return count // period * self.block + _at_most(count % period, self.block)

    def lasting(self, count: Any) -> Any:
        """How many of the first `count` tokens last."""
        early = _at_most(count, self.sink)
        return early + self._strided(count) - self._strided(early)

    def nth_lasting(self, rank: Tensor) -> Tensor:
        """Position of the token that `rank` lasting ones come before."""
        if self.stride == 0:
            return rank
        strided = rank - self.sink + self._strided(self.sink)
        return torch.where(rank < self.sink, rank, strided // self.block * (self.block * self.stride) + strided % self.block)

    def slots(self, count: int) -> int:
        """How many tokens the cache holds once `count` were seen."""
        return self.lasting(max(count - self.window, 0)) + min(count, self.window)

    def slot(self, place: int) -> int:
        """The slot that the token at a position came to lie in."""
        if self.stride == 0 and place >= self.sink:
            return self.sink + (place - self.sink) % self.window
        while place >= self.window and not self.lasts(place - self.window):
            place -= self.window
        return place if place < self.window else self.window + self.lasting(place - self.window)

    def places(self, count: Tensor, slots: int) -> Tensor:
        """Position held by each slot once `count` [B] tokens of a row were seen, [B, slots]; -1 is an empty slot."""
        index, count = torch.arange(slots, device=count.device)[None], count[:, None]
        gone = (count - self.window).clamp(min=0)
        kept = self.lasting(gone)
        held = torch.where(index < kept, self.nth_lasting(index), index - kept + gone)
        held = torch.where(held < count, held, -1)
        if self.everything:
            return held
        # The token that each slot was made for. All that ever lay in a slot lies whole windows apart, and a slot is closed
        # by a token that lasts, upon which the next one is made: in each class of positions modulo the window, the order
        # of what is held is the order of the slots.
        first = torch.where(index < self.window, index, self.nth_lasting(index - self.window) + self.window)
        by_slot = torch.where(first < count, first % self.window, self.window).argsort(dim=1, stable=True)
        by_place = torch.where(held >= 0, held % self.window, self.window).argsort(dim=1, stable=True)
        return torch.empty_like(held).scatter_(1, by_slot, held.gather(1, by_place))


EVERYTHING = Reach(sink=0, window=1, stride=1)


def has_base_heads(attention: Any) -> bool:
    """Whether `base_heads` can be asked of a module."""
    return all(hasattr(attention, name) for name in ("q_proj", "k_proj", "v_proj", "head_dim"))


def base_heads(
    attention: Any, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """q [B, H, T, d], k and v [B, G, T, d] of [B, T, D]; q and k normalised where the base does, and rotated.

    Args:
        attention: a base's own attention or a mixer with its projections and `head_dim`.
        hidden_states: what it reads, [B, T, D].
        position_embeddings: cos and sin, [B, T, d].
    """
    shape = (*hidden_states.shape[:2], -1, attention.head_dim)
    q, k, v = (getattr(attention, f"{name}_proj")(hidden_states).view(shape) for name in "qkv")
    if hasattr(attention, "q_norm"):
        q, k = attention.q_norm(q), attention.k_norm(k)
    return *apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), *position_embeddings), v.transpose(1, 2)


def one_hot(values: Tensor, dim: int = 2) -> Tensor:
    """In place of values with tokens along `dim`: T channels, each of which is one token's. What reads them is the matrix."""
    eye = torch.eye(values.shape[dim], dtype=values.dtype, device=values.device)
    shape = [*values.shape[:-1], values.shape[dim]]
    return eye.view([len(eye) if index in (dim, 3) else 1 for index in range(4)]).expand(shape)


def attention_matrix(
    attention: Any, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor]
) -> Tensor:  # fmt: skip
    """softmax(q k^T / sqrt(d)) of a base's own causal attention, [B, H, T, T], fp32 or wider. Arguments as in `base_heads`."""
    q, k, _ = base_heads(attention, hidden_states, position_embeddings)
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = q.to(wide) @ k.to(wide).repeat_interleave(q.shape[1] // k.shape[1], dim=1).mT * attention.head_dim**-0.5
    ahead = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
    return scores.masked_fill(ahead, -torch.inf).softmax(-1)


class WindowedAttention(nn.Module):
    """Attention with the base's own projections (names, biases and q/k-norms included) over a reach, with its cache."""

    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    o_proj: nn.Linear
    entry_kind: type[SinkWindowLayer] | type[LeavingWindowLayer] = SinkWindowLayer
    # Whether `_sdpa` is the softmax over keys alone, which kernels know.
    plain_softmax = True

    def __init__(self, config: Any, layer_idx: int, reach: Reach):
        super().__init__()
        self.layer_idx, self.reach = layer_idx, reach
        self.head_dim = head_dim(config)
        self.dropout = float(config.attention_dropout)
        for name, child in family_of(config).attention(config, layer_idx).named_children():
            self.add_module(name, child)

    def _norm(self, name: str, heads: Tensor) -> Tensor:
        return getattr(self, name)(heads) if hasattr(self, name) else heads

    def project(self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """See `base_heads`."""
        return base_heads(self, hidden_states, position_embeddings)

    def mixing_matrix(self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> Tensor:
        """What token s's values weigh in each head's output at token t, [B, H, T, T]. Arguments as in `forward`, no cache."""
        q, k, v = self.project(hidden_states, position_embeddings)
        return self.attend(q, k, one_hot(v), None)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        past_key_values: Any = None,
        padding_mask: Tensor | None = None,
        segment_ids: Tensor | None = None,
        **unused: Any,
    ) -> tuple[Tensor, None]:
        """Attend; see Reach.

        Args:
            hidden_states: [B, T, D].
            position_embeddings: cos and sin, [B, T, d].
            past_key_values: a DynamicCache, a HybridStaticCache or None.
            padding_mask: [B, T] bool, False on left padding; None is no padding.
            segment_ids: [B, T] int, documents of a packed row; None is one document. Not with a cache.
            **unused: what other attention modules read, such as the 4-D mask.

        Returns:
            ([B, T, D], None).
        """
        entry = None if past_key_values is None else own_layer(past_key_values, self.layer_idx, self.entry_kind)
        out = self.context(hidden_states, position_embeddings, entry, padding_mask, segment_ids)
        if entry is not None:
            if padding_mask is not None:
                pads = entry.pads if entry.is_initialized and entry.pads is not None else 0
                entry.hold(pads=pads + (~padding_mask).sum(dim=1))
            elif entry.capacity is not None and not entry.is_initialized:
                entry.hold(pads=torch.zeros(hidden_states.shape[0], dtype=torch.long, device=hidden_states.device))
            entry.advance(hidden_states)
        return self.o_proj(out), None

    def context(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        entry: Any = None,
        padding_mask: Tensor | None = None,
        segment_ids: Tensor | None = None,
    ) -> Tensor:
        """What o_proj reads, [B, T, H * d]. Arguments as in `forward`; `entry` is of `entry_kind`, and `forward` counts it on."""
        q, k, v = self.project(hidden_states, position_embeddings)
        return self.attend(q, k, v, entry, padding_mask, segment_ids).transpose(1, 2).flatten(2)

    def parts(self) -> list[tuple[str, Reach]]:
        """What the cache is made of: prefix of the entry's tensors `keys` and `values`, and what they hold."""
        return [("", self.reach)]

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, entry: Any, padding: Tensor | None = None, segments: Tensor | None = None
    ) -> Tensor:
        """[B, H, T, d] of what `project` makes; reads and fills the cache entry."""
        return self.attend_part("", self.reach, q, k, v, entry, padding, segments)

    def attend_part(
        self,
        prefix: str,
        reach: Reach,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        entry: Any,
        padding: Tensor | None,
        segments: Tensor | None,
    ) -> Tensor:
        """As `attend`, over a reach and with the entry's tensors of that prefix."""
        if entry is None:
            return self._fresh(reach, q, k, v, padding, segments)
        if entry.capacity is not None:
            return self._in_ring(prefix, Ring(reach, entry.capacity), q, k, v, entry, padding)
        if not entry.is_initialized:
            out = self._fresh(reach, q, k, v, padding, segments)
            held = self._first(reach, k, v, padding)
        else:
            past = getattr(entry, f"{prefix}keys").to(k), getattr(entry, f"{prefix}values").to(v)
            out, held = self._cached(reach, q, k, v, past, entry, padding)
        setattr(entry, f"{prefix}keys", held[0])
        setattr(entry, f"{prefix}values", held[1])
        return out

    def _sdpa(self, q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None, causal: bool = False) -> Tensor:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=allowed, dropout_p=self.dropout if self.training else 0.0, is_causal=causal,
            scale=self.head_dim**-0.5, enable_gqa=True,
        )  # fmt: skip

    def _steps(self) -> bool:
        """Whether `stream_attn_step` may attend for one token."""
        return self.plain_softmax and not torch.is_grad_enabled() and not (self.training and self.dropout)

    def _fresh(self, reach: Reach, q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None, segments: Tensor | None) -> Tensor:
        """No past. Padding is a document of its own."""
        if segments is None and padding is not None:
            segments = (~padding).long() * -1
        if segments is None and (q.shape[2] <= reach.window or reach.everything):
            return self._sdpa(q, k, v, None, causal=True)
        if self.plain_softmax and (reach.stride == 0 or reach.everything):
            sink, window = (0, q.shape[2]) if reach.everything else (reach.sink, reach.window)
            dropout = self.dropout if self.training else 0.0
            # Values that are not as wide as heads ask for a matrix, which is PyTorch's to make.
            impl = "auto" if v.shape[-1] == self.head_dim else "torch"
            return stream_attn(q, k, v, sink, window, segments, self.head_dim**-0.5, dropout, impl)

        def earlier(count: int) -> Tensor:
            return reach.nth_lasting(torch.arange(reach.lasting(count), device=q.device))

        return block_attention(q, k, v, reach.window, reach.lasts, earlier, segments, self._sdpa)

    def _first(self, reach: Reach, k: Tensor, v: Tensor, padding: Tensor | None) -> tuple[Tensor, Tensor]:
        """What the cache keeps of a first call's keys and values."""
        new = k.shape[2]
        if padding is not None:
            place = torch.where(padding, padding.cumsum(dim=1) - 1, -1)
            return self._kept(reach, k, v, place, padding.sum(dim=1), new)
        if reach.slots(new) == new:
            return k.contiguous(), v.contiguous()
        # Without padding every row is alike: one index serves all.
        keep = reach.places(torch.tensor([new], device=k.device), reach.slots(new))[0]
        return k.index_select(2, keep), v.index_select(2, keep)

    def _kept(
        self, reach: Reach, k: Tensor, v: Tensor, place: Tensor, count: Tensor, longest: int
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Of `k`, `v` [B, G, S, d] of the tokens at `place` [B, S] (-1: not a token), what `count` [B] tokens leave behind.

        `longest` is a bound of the counts; asking the counts themselves would stop the device.
        """
        wanted = reach.places(count, reach.slots(longest))
        # Column 0 is for what is no token: padding is written there, and empty slots read it.
        column = torch.zeros(place.shape[0], longest + 1, dtype=torch.long, device=k.device)
        column.scatter_(1, place + 1, torch.arange(place.shape[1], device=k.device).expand_as(place))
        source = column.gather(1, wanted + 1)[:, None, :, None].expand(-1, k.shape[1], -1, k.shape[3])
        return k.gather(2, source), v.gather(2, source)

    def _cached(
        self, reach: Reach, q: Tensor, k: Tensor, v: Tensor, past: tuple[Tensor, Tensor], entry: Any, padding: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """New tokens after a past: (their output, what the cache keeps)."""
        new, (keys, values) = q.shape[2], past
        if entry.pads is None and padding is None and new == 1:
            leaving = entry.seen - reach.window
            if leaving < 0 or reach.lasts(leaving):
                keys, values = torch.cat([keys, k], 2), torch.cat([values, v], 2)
            else:
                # Overwrite the token that just left the window, in place.
                slot = torch.full((1,), reach.slot(leaving), device=k.device)
                keys.index_copy_(2, slot, k)
                values.index_copy_(2, slot, v)
            if self._steps():
                return stream_attn_step(q[:, :, 0], keys, values, scale=self.head_dim**-0.5)[:, :, None], (keys, values)
            return self._sdpa(q, keys, values, None), (keys, values)
        batch = q.shape[0]
        pads = torch.zeros(batch, dtype=torch.long, device=q.device) if entry.pads is None else entry.pads
        real = torch.ones(batch, new, dtype=torch.bool, device=q.device) if padding is None else padding
        before = entry.seen - pads
        place_new = torch.where(real, before[:, None] + real.cumsum(dim=1) - 1, -1)
        place = torch.cat([reach.places(before, keys.shape[2]), place_new], dim=1)
        k, v = torch.cat([keys, k], 2), torch.cat([values, v], 2)
        return self._among(reach, q, k, v, place, real), self._kept(
            reach, k, v, place, before + real.sum(dim=1), entry.seen + new
        )

    def _among(self, reach: Reach, q: Tensor, k: Tensor, v: Tensor, place: Tensor, real: Tensor) -> Tensor:
        """Queries [B, H, T, d], of which `real` [B, T] are no padding, over tokens at `place` [B, S], the last T their own."""
        new = q.shape[2]
        distance = place[:, -new:, None] - place[:, None, :]
        allowed = (place >= 0)[:, None] & (distance >= 0) & ((distance < reach.window) | reach.lasts(place)[:, None])
        # A padded query sees itself alone, so that its (unused) row is not a softmax over nothing.
        itself = torch.zeros_like(allowed)
        itself[:, torch.arange(new), torch.arange(new) + place.shape[1] - new] = True
        return self._sdpa(q, k, v, (allowed | (itself & ~real[:, :, None]))[:, None])

    def _in_ring(
        self, prefix: str, ring: Ring, q: Tensor, k: Tensor, v: Tensor, entry: Any, padding: Tensor | None
    ) -> Tensor:  # fmt: skip
        """As `attend_part`, with an entry of fixed size."""
        batch, new = q.shape[0], q.shape[2]
        named = {f"{prefix}keys": k, f"{prefix}values": v}
        if not entry.is_initialized and getattr(entry, f"{prefix}keys") is None:
            entry.hold(**{name: t.new_zeros(batch, t.shape[1], ring.slots, t.shape[3]) for name, t in named.items()})
        pairs = [(getattr(entry, name), fresh) for name, fresh in named.items()]
        (keys, _), (values, _) = pairs
        if not entry.is_initialized:
            ring.write(pairs, torch.zeros(batch, dtype=torch.long, device=q.device), padding)
            return self._fresh(ring.reach, q, k, v, padding, None)
        before = entry.seen - entry.pads
        if new == 1 and padding is None:
            ring.write(pairs, before, None)
            if ring.in_order and self._steps():
                counts = (before + 1).clamp(max=ring.slots)
                return stream_attn_step(q[:, :, 0], keys, values, counts, scale=self.head_dim**-0.5)[:, :, None]
            return self._sdpa(q, keys, values, (ring.read(before + 1) >= 0)[:, None, None])
        real = torch.ones(batch, new, dtype=torch.bool, device=q.device) if padding is None else padding
        place = torch.cat([ring.read(before), torch.where(real, before[:, None] + real.cumsum(dim=1) - 1, -1)], dim=1)
        out = self._among(ring.reach, q, torch.cat([keys, k], 2), torch.cat([values, v], 2), place, real)
        ring.write(pairs, before, padding)
        return out
