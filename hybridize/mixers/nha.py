"""Native hybrid attention: a fixed number of slots and the last tokens under one softmax.

    g_t = logsigmoid(W_g x_t + b_g) / 8,   a_t = exp(g_t)           one per slot and key/value head
    K~_t = diag(a_t) K~_{t-1} + (1 - a_t) k_t^T                     V~ alike, with v_t
    o_t = softmax([q_t K~_t^T / sqrt(d) + b_s ; q_t K_window^T / sqrt(d)]) [V~_t ; V_window]

Every token is written to the slots when it comes, not when it leaves the window: its gate needs its hidden state, which
the ring of keys and values does not hold. The keys of the slots are the rotated ones of the window. A slot's score is then
the weighted mean of the base's own scores of the tokens in it, at their true distances, and one key serves both branches.
Decoding computes this function and no other (the published decode averages the two branches by halves, which it was not
trained with). `b_s`, one for each query head and slot, is ours: 0 is the published function, log n makes a slot count as n
tokens, and `MUTED` takes it out; with all slots muted and a window as long as the text the layer is the base's attention.

All tokens at once: with g_s = (1 - a_s) times the decays after s, the score of slot i is sum_s (q_t k_s) decay_i(s..t) (1 -
a_si), linear attention whose values are gates; reading with softmax weights p_t is linear attention once more, with gates
for keys. Both run over chunks with the slots carried between them, in halves inside (see SlotScan).

Letters: B batch, T tokens, H query heads, G key/value heads, R = H / G, d head width, m slots.
Source: Du et al., Native Hybrid Attention, arXiv 2510.07019; slots as in Zhang et al., Gated Slot Attention, arXiv 2409.07146.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybridize.cache import SlotWindowLayer
from hybridize.errors import ConfigError
from hybridize.families import element_bytes, head_dim
from hybridize.mixers.streaming import Streaming
from hybridize.mixers.windowed import Reach, WindowedAttention, one_hot

# Tokens between two carried slot states; a power of two.
CHUNK = 64
# The gate's logsigmoid is divided by this, so that a fresh gate forgets slowly (the published constant).
GATE_DIVISOR = 8
# A slot bias that no score makes up for.
MUTED = -1e4


@dataclass(frozen=True, kw_only=True)
class NativeHybrid:
    """Options of native hybrid attention."""

    slots: int | None = None
    """Slots of each key/value head; None is the head width, as published."""
    window_tokens: int = 64
    """Last tokens that are seen one by one, the token itself counted (published hybrid layers: up to 64)."""
    sink_tokens: int = 0
    """First tokens that stay visible one by one, as in streaming (published: none)."""

    forgets = True

    def __post_init__(self) -> None:
        if self.slots is not None and self.slots < 1:
            raise ConfigError(f"slots is {self.slots}, expected >= 1, or null for the head width")
        Streaming(sink_tokens=self.sink_tokens, window_tokens=self.window_tokens)

    def build(self, config: Any, layer_idx: int) -> nn.Module:
        return NativeHybridAttention(config, layer_idx, self)

    def slot_count(self, config: Any) -> int:
        return head_dim(config) if self.slots is None else self.slots

    def state_bytes(self, config: Any, tokens: int) -> int:
        """The ring of keys and values in the model's dtype, and the slots' keys and values in fp32."""
        if tokens == 0:
            return 0
        held = min(tokens, self.sink_tokens + self.window_tokens) * element_bytes(config) + self.slot_count(config) * 4
        return 2 * config.num_key_value_heads * head_dim(config) * held


class SlotScan:
    """The decays of T tokens, and the two passes over them: what queries score in the slots, what weights read from them.

    Inside a chunk, ranges of 2, 4, ... CHUNK tokens are split in halves; what the right half takes from the left one is
    a product of matrices with the middle as reference, so that every exponent is <= 0 whatever the gates are.
    The chunk's result goes into the state that the next one starts from.

    Args:
        gates: g = log a, [B, G, T, m], fp32 or wider, <= 0; 0 where a token is to leave no trace.
        segments: [B, T] int, documents of a packed row; None is one document.
    """

    def __init__(self, gates: Tensor, segments: Tensor | None):
        self.tokens = gates.shape[2]
        self.chunk = min(CHUNK, 1 << (self.tokens - 1).bit_length())
        self.padded = -self.tokens % self.chunk
        self.gates = self._pad(gates)
        self.write = -torch.expm1(self.gates)
        self.segments = segments
        if segments is not None and self.padded:
            self.segments = torch.cat([segments, segments[:, -1:].expand(-1, self.padded)], 1)
        chunks = self.gates.unflatten(2, (-1, self.chunk))
        self.since = chunks.cumsum(3)
        self.after = torch.exp(self.since[:, :, :, -1:] - self.since)

    def _pad(self, x: Tensor) -> Tensor:
        return F.pad(x, (0, 0, 0, self.padded)) if self.padded else x

    def _levels(self) -> Iterator[tuple[int, Tensor, Tensor, Tensor | None]]:
        """Per level: h, decays to the right tokens, shares of the left ones, pairs within one document.

        Decays from the middle to each right token and written shares decayed up to the middle are [B, G, 1, T/2h, h, m],
        the pairs [B, 1, 1, T/2h, h, h] (None: all of them).
        """
        half = 1
        while half < self.chunk:
            gates = self.gates.unflatten(2, (-1, 2, half))
            to = gates[:, :, :, 1].cumsum(3)
            since = gates[:, :, :, 0].cumsum(3)
            left = torch.exp(since[:, :, :, -1:] - since) * self.write.unflatten(2, (-1, 2, half))[:, :, :, 0]
            same = None
            if self.segments is not None:
                parts = self.segments.unflatten(1, (-1, 2, half))
                same = (parts[:, :, 1, :, None] == parts[:, :, 0, None, :])[:, None, None]
            yield half, torch.exp(to)[:, :, None], left[:, :, None], same
            half *= 2

    def _states(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """The slots before each chunk, [B, G, n, m, d], and after the last, from what is written, x [B, G, T, d]."""
        shares = self.after * self.write.unflatten(2, (-1, self.chunk))
        keeps = torch.exp(self.since[:, :, :, -1])
        if self.segments is not None:
            parts = self.segments.unflatten(1, (-1, self.chunk))
            shares = shares * (parts == parts[:, :, -1:])[:, None, :, :, None]
            keeps = keeps * (parts[:, :, -1] == self._before(parts))[:, None, :, None]
        added = shares.transpose(3, 4) @ x.unflatten(2, (-1, self.chunk))
        states = []
        for place in range(added.shape[2]):
            states.append(state)
            state = keeps[:, :, place, :, None] * state + added[:, :, place]
        return torch.stack(states, 2), state

    @staticmethod
    def _before(parts: Tensor) -> Tensor:
        """The document of the last token before each chunk, [B, n]; before the first chunk there is nothing to cut off."""
        return torch.cat([parts[:, :1, 0], parts[:, :-1, -1]], 1)

    def _carried(self) -> Tensor:
        """Decay of the carried slots down to each token, [B, G, 1, n, C, m]; 0 where a document has begun since."""
        decay = torch.exp(self.since)
        if self.segments is not None:
            parts = self.segments.unflatten(1, (-1, self.chunk))
            decay = decay * (parts == self._before(parts)[:, :, None])[:, None, :, :, None]
        return decay[:, :, None]

    def scores(self, q: Tensor, k: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """q_t K~_t^T.

        Args:
            q: [B, G, R, T, d].
            k: [B, G, T, d].
            state: K~ before the first token, [B, G, m, d].

        Returns:
            ([B, G, R, T, m], K~ after the last token).
        """
        q, k = self._pad(q), self._pad(k)
        states, state = self._states(k, state)
        out = (q.unflatten(3, (-1, self.chunk)) @ states[:, :, None].transpose(-1, -2) * self._carried()).flatten(3, 4)
        out = out + (q * k[:, :, None]).sum(-1, keepdim=True) * self.write[:, :, None]
        for half, to, left, same in self._levels():
            pairs = q.unflatten(3, (-1, 2, half))[..., 1, :, :] @ k.unflatten(2, (-1, 2, half))[:, :, None, :, 0].transpose(
                -1, -2
            )
            piece = (pairs if same is None else pairs * same) @ left * to
            out = out + torch.stack([torch.zeros_like(piece), piece], 4).flatten(3, 5)
        return out[:, :, :, : self.tokens], state

    def read(self, p: Tensor, v: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """p_t V~_t.

        Args:
            p: softmax weights of the slots, [B, G, R, T, m].
            v: [B, G, T, d].
            state: V~ before the first token, [B, G, m, d].

        Returns:
            ([B, G, R, T, d], V~ after the last token).
        """
        p, v = self._pad(p), self._pad(v)
        states, state = self._states(v, state)
        out = ((p.unflatten(3, (-1, self.chunk)) * self._carried()) @ states[:, :, None]).flatten(3, 4)
        out = out + (p * self.write[:, :, None]).sum(-1, keepdim=True) * v[:, :, None]
        for half, to, left, same in self._levels():
            pairs = (p.unflatten(3, (-1, 2, half))[..., 1, :, :] * to) @ left.transpose(-1, -2)
            piece = (pairs if same is None else pairs * same) @ v.unflatten(2, (-1, 2, half))[:, :, None, :, 0]
            out = out + torch.stack([torch.zeros_like(piece), piece], 4).flatten(3, 5)
        return out[:, :, :, : self.tokens], state


class NativeHybridAttention(WindowedAttention):
    """Streaming attention whose softmax also runs over slots; projections under the base's names, W_g is `gate_proj`."""

    entry_kind = SlotWindowLayer
    plain_softmax = False

    def __init__(self, config: Any, layer_idx: int, options: NativeHybrid):
        super().__init__(config, layer_idx, Reach(sink=options.sink_tokens, window=options.window_tokens))
        self.slots = options.slot_count(config)
        self.num_groups = config.num_key_value_heads
        self.gate_proj = nn.Linear(config.hidden_size, self.num_groups * self.slots)
        self.slot_bias = nn.Parameter(torch.zeros(config.num_attention_heads, self.slots))

    def reset_own_parameters(self, init: Any) -> None:
        """A layer that is not seeded starts as the published function."""
        init.zeros_(self.slot_bias)

    def context(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        entry: Any = None,
        padding_mask: Tensor | None = None,
        segment_ids: Tensor | None = None,
    ) -> Tensor:
        """What o_proj reads, [B, T, H * d]. Arguments as in `forward`; `entry` is a SlotWindowLayer or None."""
        heads = self.project(hidden_states, position_embeddings)
        return self._mixed(hidden_states, heads, entry, padding_mask, segment_ids).transpose(1, 2).flatten(2)

    def mixing_matrix(self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> Tensor:
        q, k, v = self.project(hidden_states, position_embeddings)
        return self._mixed(hidden_states, (q, k, one_hot(v)), None, None, None)

    def _mixed(
        self,
        hidden_states: Tensor,
        heads: tuple[Tensor, Tensor, Tensor],
        entry: Any,
        padding_mask: Tensor | None,
        segment_ids: Tensor | None,
    ) -> Tensor:
        """What the softmax over window and slots reads, [B, H, T, width of the values], from what `project` gives."""
        q, k, v = heads
        wide = torch.promote_types(q.dtype, torch.float32)
        scan = SlotScan(self.slot_gates(hidden_states, padding_mask), segment_ids)
        keys = torch.zeros(q.shape[0], self.num_groups, self.slots, self.head_dim, dtype=wide, device=q.device)
        values = keys.new_zeros(*keys.shape[:3], v.shape[-1])
        if entry is not None and entry.is_initialized:
            keys, values = entry.slot_keys.to(keys), entry.slot_values.to(keys)
        grouped = q.unflatten(1, (self.num_groups, -1)).to(wide)
        scores, keys = scan.scores(grouped, k.to(wide), keys)
        scores = scores.flatten(1, 2) * self.head_dim**-0.5 + self.slot_bias.to(wide)[:, None]
        # The slots' scores ride beside the queries through streaming's blocks and ring, their weights come back so.
        out = self.attend(torch.cat([q.to(wide), scores], -1), k, v, entry, padding_mask, segment_ids)
        out, weights = out.split([v.shape[-1], self.slots], -1)
        read, values = scan.read(weights.unflatten(1, (self.num_groups, -1)), v.to(wide), values)
        if entry is not None:
            entry.hold(slot_keys=keys.detach(), slot_values=values.detach())
        return (out + read.flatten(1, 2)).to(q.dtype)

    def slot_gates(self, hidden_states: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """g of each token, [B, G, T, m], fp32 or wider; 0 on padding, which is then neither written nor forgets."""
        raw = self.gate_proj(hidden_states)
        gates = F.logsigmoid(raw.to(torch.promote_types(raw.dtype, torch.float32))) / GATE_DIVISOR
        if padding_mask is not None:
            gates = gates * padding_mask[:, :, None]
        return gates.unflatten(2, (self.num_groups, self.slots)).transpose(1, 2)

    def _sdpa(self, q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None, causal: bool = False) -> Tensor:
        """One softmax over the slots and the keys given.

        Args:
            q: queries and slot scores side by side, [B, H, T, d + m].
            k: [B, G, S, d].
            v: [B, G, S, d].
            allowed: [B or 1, 1, T, S] bool, None is all.
            causal: allow keys up to the query's own place (T = S).

        Returns:
            What the keys' values give and the slots' weights side by side, [B, H, T, d + m].
        """
        grouped = q.unflatten(1, (self.num_groups, -1))
        queries, slots = grouped.split([self.head_dim, self.slots], -1)
        scores = (queries.to(k.dtype) @ k[:, :, None].transpose(-1, -2)).to(q.dtype) * self.head_dim**-0.5
        if causal:
            allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()[None, None]
        if allowed is not None:
            scores = scores.masked_fill(~allowed[:, :, None], float("-inf"))
        weights = torch.softmax(torch.cat([slots, scores], -1), -1)
        weights = F.dropout(weights, self.dropout, self.training)
        read = (weights[..., self.slots :].to(v.dtype) @ v[:, :, None]).to(q.dtype)
        return torch.cat([read, weights[..., : self.slots]], -1).flatten(1, 2)
