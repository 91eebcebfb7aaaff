"""Sink + window attention: each token sees the first few tokens of its document and the last `window_tokens` ones.

Keys are kept with the rotary angle of their true position (unlike StreamingLLM, which re-numbers them inside the cache), so
that a window wider than the text is exactly the base's attention.

Letters: B batch, T new tokens, S tokens to attend to, H query heads, G key/value heads, d head width.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from hybridize.cache import SinkWindowLayer, own_layer
from hybridize.errors import ConfigError
from hybridize.families import element_bytes, family_of, head_dim

# Queries handled at once: the mask and scores of a block stay small however long the text is.
QUERY_BLOCK = 256


@dataclass(frozen=True, kw_only=True)
class Streaming:
    """Options of sink + window attention (Xiao et al., arXiv 2309.17453; LightTransfer, arXiv 2410.13846)."""

    sink_tokens: int = 4
    """First tokens that stay visible to all (LightTransfer's w_sink)."""
    window_tokens: int = 1020
    """Last tokens that are visible, the token itself counted (LightTransfer's w_recent)."""

    forgets = True

    def __post_init__(self) -> None:
        if self.sink_tokens < 0 or self.window_tokens < 1:
            raise ConfigError(f"sink_tokens is {self.sink_tokens} and window_tokens {self.window_tokens}, expected >= 0 and >= 1")

    def build(self, config: Any, layer_idx: int) -> nn.Module:
        return StreamingAttention(config, layer_idx, self.sink_tokens, self.window_tokens)

    def state_bytes(self, config: Any, tokens: int) -> int:
        held = min(tokens, self.sink_tokens + self.window_tokens)
        return 2 * config.num_key_value_heads * head_dim(config) * element_bytes(config) * held


class StreamingAttention(nn.Module):
    """Attention with the base's own projections (names, biases and q/k-norms included) and a bounded cache."""

    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    o_proj: nn.Linear
    entry_kind: type[SinkWindowLayer] = SinkWindowLayer

    def __init__(self, config: Any, layer_idx: int, sink: int, window: int):
        super().__init__()
        self.layer_idx, self.sink, self.window = layer_idx, sink, window
        self.head_dim = head_dim(config)
        self.dropout = float(config.attention_dropout)
        for name, child in family_of(config).attention(config, layer_idx).named_children():
            self.add_module(name, child)

    def _norm(self, name: str, heads: Tensor) -> Tensor:
        return getattr(self, name)(heads) if hasattr(self, name) else heads

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        past_key_values: Any = None,
        padding_mask: Tensor | None = None,
        segment_ids: Tensor | None = None,
        **unused: Any,
    ) -> tuple[Tensor, None]:
        """Attend; see the module docstring.

        Args:
            hidden_states: [B, T, D].
            position_embeddings: cos and sin, [B, T, d].
            past_key_values: a DynamicCache or None.
            padding_mask: [B, T] bool, False on left padding; None is no padding.
            segment_ids: [B, T] int, documents of a packed row; None is one document. Not with a cache.
            **unused: what other attention modules read, such as the 4-D mask.

        Returns:
            ([B, T, D], None).
        """
        entry = None if past_key_values is None else own_layer(past_key_values, self.layer_idx, self.entry_kind)
        return self.o_proj(self.context(hidden_states, position_embeddings, entry, padding_mask, segment_ids)), None

    def context(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        entry: Any = None,
        padding_mask: Tensor | None = None,
        segment_ids: Tensor | None = None,
    ) -> Tensor:
        """What o_proj reads, [B, T, H * d]. Arguments as in `forward`, `entry` of `entry_kind` or None."""
        q, k, v = self.heads(hidden_states, position_embeddings)
        return self._attend(q, k, v, entry, padding_mask, segment_ids).transpose(1, 2).flatten(2)

    def heads(self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, H, T, d], keys and values [B, G, T, d] of the tokens, normed and rotated as the base does."""
        shape = (*hidden_states.shape[:2], -1, self.head_dim)
        q = self._norm("q_norm", self.q_proj(hidden_states).view(shape)).transpose(1, 2)
        k = self._norm("k_norm", self.k_proj(hidden_states).view(shape)).transpose(1, 2)
        v = self.v_proj(hidden_states).view(shape).transpose(1, 2)
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        return q, k, v

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        entry: SinkWindowLayer | None,
        padding: Tensor | None,
        segments: Tensor | None,
    ) -> Tensor:
        """[B, H, T, d] of T new tokens after those that the entry holds; the entry takes them up."""
        if entry is not None and entry.seen > 0:
            out = self._attend_cached(q, k, v, entry, padding)
        else:
            out = self._attend_fresh(q, k, v, padding, segments)
            if entry is not None:
                self._fill(entry, k, v, padding)
        if entry is not None:
            entry.seen += q.shape[2]
            entry.is_initialized = True
        return out

    def _sdpa(self, q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None, causal: bool = False) -> Tensor:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=allowed, dropout_p=self.dropout if self.training else 0.0, is_causal=causal,
            scale=self.head_dim**-0.5, enable_gqa=True,
        )  # fmt: skip

    def _attend_fresh(self, q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None, segments: Tensor | None) -> Tensor:
        """No past: blocks of queries against the sinks and the slice of keys their windows reach."""
        new = q.shape[2]
        plain = padding is None and segments is None
        if plain and new <= self.window:
            return self._sdpa(q, k, v, None, causal=True)
        index = torch.arange(new, device=q.device)
        if plain:
            place, row_segments = index[None], torch.zeros_like(index)[None]
        else:
            real = torch.ones(q.shape[0], new, dtype=torch.bool, device=q.device) if padding is None else padding
            row_segments = (~real).long() * -1 if segments is None else segments.long()
            # Position of each token in its own document: where the document starts is the running maximum of the borders.
            starts = torch.ones_like(real)
            starts[:, 1:] = row_segments[:, 1:] != row_segments[:, :-1]
            place = index - torch.where(starts, index, 0).cummax(dim=1).values
        pieces = []
        for start in range(0, new, QUERY_BLOCK):
            stop = min(start + QUERY_BLOCK, new)
            first = max(0, start - self.window + 1)
            if plain and first > self.sink:
                keep = torch.cat([index[: self.sink], index[first:stop]])
            else:
                keep = index[:stop]
            rows = index[start:stop]
            distance = rows[:, None] - keep[None]
            seen = (distance >= 0) & (distance < self.window)
            seen = seen[None] | ((distance >= 0)[None] & (place[:, None, keep] < self.sink))
            seen = seen & (row_segments[:, start:stop, None] == row_segments[:, None, keep])
            pieces.append(self._sdpa(q[:, :, start:stop], k[:, :, keep], v[:, :, keep], seen[:, None]))
        return torch.cat(pieces, dim=2)

    def _slot_places(self, count: Tensor, slots: int) -> Tensor:
        """Position held by each slot once `count` [B] tokens of a row were seen, [B, slots]; -1 is an empty slot."""
        slot = torch.arange(slots, device=count.device)[None]
        # The latest position p < count with the slot's remainder; slots below `sink` hold their own number for ever.
        turns = torch.div(count[:, None] - 1 - slot, self.window, rounding_mode="floor").clamp(min=0)
        place = torch.where(slot < self.sink, slot, slot + turns * self.window)
        return torch.where(place < count[:, None], place, -1)

    def _store(self, entry: SinkWindowLayer, k: Tensor, v: Tensor, place: Tensor, count: Tensor) -> None:
        """Keep of `k`, `v` [B, G, S, d], held at `place` [B, S] (-1: not a token), what `count` [B] tokens leave behind."""
        slots = min(int(count.max()), self.sink + self.window)
        wanted = self._slot_places(count, slots)
        found = wanted[:, :, None] == place[:, None, :]
        source = found.int().argmax(dim=-1)[:, None, :, None].expand(-1, k.shape[1], -1, k.shape[3])
        entry.keys, entry.values = k.gather(2, source), v.gather(2, source)

    def _fill(self, entry: SinkWindowLayer, k: Tensor, v: Tensor, padding: Tensor | None) -> None:
        new = k.shape[2]
        if padding is None:
            if new <= self.sink + self.window:
                entry.keys, entry.values = k.contiguous(), v.contiguous()
            else:
                # Without padding every row is alike: one index serves all, and no [slots, T] comparison is made.
                keep = self._slot_places(torch.tensor([new], device=k.device), self.sink + self.window)[0]
                entry.keys, entry.values = k.index_select(2, keep), v.index_select(2, keep)
            return
        entry.pads = new - padding.sum(dim=1)
        index = torch.arange(new, device=k.device)[None]
        self._store(entry, k, v, torch.where(padding, index - entry.pads[:, None], -1), padding.sum(dim=1))

    def _attend_cached(self, q: Tensor, k: Tensor, v: Tensor, entry: SinkWindowLayer, padding: Tensor | None) -> Tensor:
        new, slots = q.shape[2], self.sink + self.window
        entry.keys, entry.values = entry.keys.to(k), entry.values.to(v)
        if entry.pads is None and padding is None and new == 1:
            if entry.seen < slots:
                entry.keys, entry.values = torch.cat([entry.keys, k], 2), torch.cat([entry.values, v], 2)
            else:
                # The ring is full: overwrite the token that just left the window, in place.
                slot = self.sink + (entry.seen - self.sink) % self.window
                entry.keys[:, :, slot], entry.values[:, :, slot] = k[:, :, 0], v[:, :, 0]
            return self._sdpa(q, entry.keys, entry.values, None)
        batch = q.shape[0]
        pads = torch.zeros(batch, dtype=torch.long, device=q.device) if entry.pads is None else entry.pads
        real = torch.ones(batch, new, dtype=torch.bool, device=q.device) if padding is None else padding
        before = entry.seen - pads
        pads = pads + (~real).sum(dim=1)
        place_new = torch.where(real, entry.seen + torch.arange(new, device=q.device)[None] - pads[:, None], -1)
        place = torch.cat([self._slot_places(before, entry.keys.shape[2]), place_new], dim=1)
        k, v = torch.cat([entry.keys, k], 2), torch.cat([entry.values, v], 2)
        distance = place_new[:, :, None] - place[:, None, :]
        allowed = (place >= 0)[:, None] & (distance >= 0) & ((distance < self.window) | (place < self.sink)[:, None])
        # A padded query sees itself alone, so that its (unused) row is not a softmax over nothing.
        itself = torch.zeros_like(allowed)
        itself[:, torch.arange(new), torch.arange(new) + place.shape[1] - new] = True
        out = self._sdpa(q, k, v, (allowed | (itself & ~real[:, :, None]))[:, None])
        self._store(entry, k, v, place, (before + real.sum(dim=1)))
        entry.pads = pads if entry.pads is not None or padding is not None else None
        return out
