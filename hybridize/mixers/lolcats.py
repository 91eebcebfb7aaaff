"""A softmax window and learnable linear attention beyond it, under one normaliser (LoLCATs).

    w_ts = gamma exp(q_t . k_s / sqrt(d) - m_t)         t - s < window
    w_ts = beta phi_q(q_t) . phi_k(k_s)                 t - s >= window
    y_t = sum_s w_ts v_s / sum_s w_ts
    phi(x) = [softmax(x F); softmax(-x F)]              over features

Each query head has an F [d, feature_dim] for q and one for k. q and k carry their rotary angle in both parts. beta is 1, or
1 - gamma with `affine`, an option of the published code: gamma is at most 1 and the weights beyond the window add up, so that
without it a long past outweighs the window until F has learned otherwise. m_t is the largest score of token t *inside its
window*: that is the published function, and safe in fp32, since every weight of the window is at most gamma, one of them is
gamma, and no other exceeds 2. The maximum is not shared with the linear part, so the balance of the two depends on the
window's content alone, and decoding, which has that content, computes the training function exactly. With no token beyond the
window gamma cancels: the layer is the base's attention.

Letters: B batch, T new tokens, S tokens at hand, H query heads, G key/value heads, d head width.
Source: Zhang et al., arXiv 2410.10254 (repository HazyResearch/lolcats, src/model/linear_attention/
linear_window_attention_sw.py and src/model/feature_map.py).
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybridize.cache import LeavingWindowLayer
from hybridize.errors import ConfigError
from hybridize.families import element_bytes, head_dim
from hybridize.kernels.gla import gla, gla_step
from hybridize.kernels.stream_attn.torch_impl import QUERY_BLOCK
from hybridize.mixers.windowed import Reach, WindowedAttention, one_hot

# gamma = sigmoid of this = 0.1, the published start.
WINDOW_FACTOR = -math.log(9)


@dataclass(frozen=True, kw_only=True)
class LoLCATs:
    """Options of window + linear attention."""

    window_tokens: int = 64
    """Last tokens under the softmax, the token itself counted."""
    feature_dim: int | None = None
    """Columns of each F (a token has twice as many features); None is the head's width, so that F can be the identity."""
    affine: bool = True
    """Weigh what is beyond the window by 1 - gamma; False is by 1, the published setting."""

    forgets = True

    def __post_init__(self) -> None:
        if self.window_tokens < 1:
            raise ConfigError(f"window_tokens is {self.window_tokens}, expected at least 1")
        if self.feature_dim is not None and self.feature_dim < 1:
            raise ConfigError(f"feature_dim is {self.feature_dim}, expected at least 1 or null")

    def build(self, config: Any, layer_idx: int) -> nn.Module:
        return LoLCATsAttention(config, layer_idx, self)

    def state_bytes(self, config: Any, tokens: int) -> int:
        """Keys and values of the window; the fp32 sums once a token has left it."""
        width = head_dim(config)
        near = 2 * config.num_key_value_heads * width * element_bytes(config) * min(tokens, self.window_tokens)
        if tokens <= self.window_tokens:
            return near
        return near + config.num_attention_heads * 2 * (self.feature_dim or width) * (width + 1) * 4


class LoLCATsAttention(WindowedAttention):
    """The module that stands where `self_attn` was: the base's projections, two feature maps and gamma for each query head."""

    entry_kind = LeavingWindowLayer

    def __init__(self, config: Any, layer_idx: int, options: LoLCATs):
        super().__init__(config, layer_idx, Reach(sink=0, window=options.window_tokens))
        self.window, self.affine = options.window_tokens, options.affine
        self.num_heads = config.num_attention_heads
        shape = (self.num_heads, self.head_dim, options.feature_dim or self.head_dim)
        self.feature_map_q = nn.Parameter(torch.zeros(shape))
        self.feature_map_k = nn.Parameter(torch.zeros(shape))
        self.window_factors = nn.Parameter(torch.full((self.num_heads,), WINDOW_FACTOR))

    def reset_own_parameters(self, init: Any) -> None:
        """The published start: F the identity, gamma 0.1."""
        start = torch.eye(*self.feature_map_q.shape[1:]).expand(self.feature_map_q.shape)
        init.copy_(self.feature_map_q, start)
        init.copy_(self.feature_map_k, start)
        init.copy_(self.window_factors, torch.full((self.num_heads,), WINDOW_FACTOR))

    def context(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        entry: LeavingWindowLayer | None = None,
        padding_mask: Tensor | None = None,
        segment_ids: Tensor | None = None,
    ) -> Tensor:
        """What o_proj reads, [B, T, H * d]. Arguments as in `forward`."""
        q, k, v = self.project(hidden_states, position_embeddings)
        new, real = k.shape[2], padding_mask
        if entry is not None and entry.is_initialized:
            keys, values = torch.cat([entry.keys.to(k), k], dim=2), torch.cat([entry.values.to(v), v], dim=2)
            real = self._real(entry, keys.shape[2] - new, padding_mask, k)
        else:
            keys, values = k, v
        state = None if entry is None or not entry.is_initialized else entry.state
        # A score rounded to bf16 is another weight: all sums under the normaliser are fp32, whatever the autocast.
        with torch.autocast(q.device.type, enabled=False):
            far, state = self.beyond(q, keys, values, state, real, segment_ids, decode=entry is not None)
            near = self.inside(q, keys, values, real, segment_ids)
            y = self.join(near, far, torch.sigmoid(self.window_factors.to(near)))
        if entry is not None:
            # Of a fixed size: a window that padding fills, and sums of nothing.
            missing = 0 if entry.capacity is None else max(0, self.window - keys.shape[2])
            if state is None and entry.capacity is not None:
                state = y.new_zeros(*y.shape[:2], 2 * self.feature_map_k.shape[2], y.shape[3] + 1)
            # Copied, so that the entry holds no more than the window.
            keys, values = (F.pad(t[:, :, -self.window :], (0, 0, missing, 0)).contiguous() for t in (keys, values))
            entry.hold(keys=keys, values=values)
            if state is not None and state is not entry.state:
                entry.hold(state=state.detach())
        return y.transpose(1, 2).flatten(2).to(hidden_states.dtype)

    def join(self, near: Tensor, far: Tensor | None, gamma: Tensor) -> Tensor:
        """Both parts under one normaliser, [B, H, T, d]: `inside`, `beyond` and gamma [H]."""
        gamma = gamma[:, None, None]
        sums = gamma * near
        if far is not None:
            sums = sums + (1 - gamma if self.affine else 1) * far
        return sums[..., :-1] / sums[..., -1:]

    def mixing_matrix(self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> Tensor:
        """What token s's values weigh in each head's output at token t, [B, H, T, T]. Arguments as in `forward`, no cache."""
        q, k, v = self.project(hidden_states, position_embeddings)
        with torch.autocast(q.device.type, enabled=False):
            v = one_hot(v)
            far, _ = self.beyond(q, k, v, None, None, None)
            near = self.inside(q, k, v, None, None)
            return self.join(near, far, torch.sigmoid(self.window_factors.to(near)))

    @staticmethod
    def _real(entry: LeavingWindowLayer, held: int, padding: Tensor | None, k: Tensor) -> Tensor | None:
        """Which of the tokens at hand are no padding, [B, S]; None is all. Padding is on the left, so a count is enough."""
        if entry.pads is None and padding is None:
            return None
        pads = 0 if entry.pads is None else entry.pads.to(k.device)[:, None]
        place = (torch.arange(held, device=k.device) + (entry.seen - held))[None].expand(k.shape[0], -1)
        new = torch.ones(k.shape[0], k.shape[2], dtype=torch.bool, device=k.device) if padding is None else padding
        return torch.cat([place >= pads, new], dim=1)

    def features(self, heads: Tensor, weight: Tensor) -> Tensor:
        """phi, [B, H, T, 2 * feature_dim], fp32 (fp64 for fp64 input); key heads are repeated to the query heads."""
        heads = _wide(heads).repeat_interleave(self.num_heads // heads.shape[1], dim=1)
        mapped = heads @ weight.to(heads)
        return torch.cat([mapped.softmax(-1), (-mapped).softmax(-1)], dim=-1)

    def beyond(
        self,
        q: Tensor,
        keys: Tensor,
        values: Tensor,
        state: Tensor | None,
        real: Tensor | None,
        segments: Tensor | None,
        decode: bool = False,
    ) -> tuple[Tensor | None, Tensor | None]:
        """The linear part: weighted values and, as one more value, the sum of the weights.

        A token enters the state when it leaves the window, so the scan reads keys `window` tokens late.

        Args:
            q: [B, H, T, d].
            keys: [B, G, S, d], the last T of them the queries' own; the others are the whole window before.
            values: as keys.
            state: sums over tokens that left before, [B, H, 2 * feature_dim, d + 1], or None.
            real: [B, S] bool, False on padding, or None.
            segments: [B, S] document ids, or None.
            decode: no gradient is needed, and one token may update `state` in place.

        Returns:
            [B, H, T, d + 1] and the new state; None twice when no token has left yet.
        """
        batch, heads, new, _ = q.shape
        behind = self.window - (keys.shape[2] - new)
        if new <= behind and state is None:
            return None, None

        def late(tensor: Tensor, dim: int) -> Tensor:
            """Row t holds what is `window` tokens before query t; zeros where there is nothing."""
            kept = tensor.narrow(dim, 0, max(0, new - behind))
            zeros = list(kept.shape)
            zeros[dim] = new - kept.shape[dim]
            return torch.cat([kept.new_zeros(zeros), kept], dim=dim)

        left = torch.ones(batch, keys.shape[2], dtype=torch.bool, device=q.device) if real is None else real
        left = late(left, 1)
        if segments is not None:
            left = left & (late(segments, 1) == segments)
        phi_q = self.features(q, self.feature_map_q).transpose(1, 2)
        phi_k = self.features(late(keys, 2), self.feature_map_k).transpose(1, 2) * left[..., None, None]
        v = _wide(late(values, 2)).repeat_interleave(heads // values.shape[1], dim=1).transpose(1, 2)
        v = F.pad(v, (0, 1), value=1.0)
        still = v.new_zeros(*v.shape[:3], 1)
        if decode and new == 1 and state is not None:
            state = state.to(v.device)
            return gla_step(phi_q[:, 0], phi_k[:, 0], v[:, 0], still[:, 0], state)[:, :, None], state
        out, state = gla(phi_q, phi_k, v, still, state, segments)
        return out.transpose(1, 2), state

    def inside(self, q: Tensor, keys: Tensor, values: Tensor, real: Tensor | None, segments: Tensor | None) -> Tensor:
        """The window: values weighted by exp(score - largest), and as one more value the weights' sum, [B, H, T, d + 1].

        Arguments as in `beyond`. A padded query sees itself, so that its (unused) row is no sum over nothing.
        """
        new, groups = q.shape[2], keys.shape[1]
        held = keys.shape[2] - new
        queries = _wide(q).unflatten(1, (groups, -1)) * self.head_dim**-0.5
        index = torch.arange(keys.shape[2], device=q.device)
        pieces = []
        for start in range(0, new, QUERY_BLOCK):
            stop = min(start + QUERY_BLOCK, new)
            first, last = max(0, held + start - self.window + 1), held + stop
            rows, columns = index[held + start : last], index[first:last]
            distance = rows[:, None] - columns[None]
            seen = ((distance >= 0) & (distance < self.window))[None]
            if real is not None:
                seen = (seen & real[:, None, first:last]) | (distance == 0)
            if segments is not None:
                seen = seen & (segments[:, start:stop, None] == segments[:, None, first:last])
            scores = queries[:, :, :, start:stop] @ _wide(keys[:, :, None, first:last]).mT
            scores = scores.masked_fill(~seen[:, None, None], -math.inf)
            weights = (scores - scores.amax(-1, keepdim=True)).exp()
            total = weights.sum(-1, keepdim=True)
            pieces.append(torch.cat([weights @ _wide(values[:, :, None, first:last]), total], dim=-1))
        return torch.cat(pieces, dim=3).flatten(1, 2)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
