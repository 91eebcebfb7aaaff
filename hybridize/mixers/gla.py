"""Gated linear attention on the base's own projections, beside a softmax window.

    q, k, v = the base's heads, with its biases and q/k-norms; no rotary angle in the recurrent branch
    f = softmax(c q), e = softmax(c k)                  over the head's channels, c a scale of the state head
    S_t = diag(g_t) S_{t-1} + e_t v_t^T                 g_t: see `gate`
    y_t = a S_t^T f_t + b softmax_window(q, k) v        with `normalise`, S_t^T f_t is divided by the sum of its weights
    out = W_o y

With gate `key`, mix `half` and without `normalise` this is Liger's layer, which has no weights that the base has not. Its
pooled key is the key itself: the pooling there has as many outputs as inputs.

Letters: B batch, T tokens, H query heads, S state heads, d head width.
Source: Lan et al., arXiv 2503.01496 (repository OpenSparseLLMs/Linearization, liger/models/liger_gla); Yang et al.,
arXiv 2312.06635.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from hybridize.cache import WindowStateLayer
from hybridize.errors import ConfigError
from hybridize.families import element_bytes, head_dim
from hybridize.kernels.gla import gla, gla_step
from hybridize.mixers.windowed import Reach, WindowedAttention, one_hot

# Liger's temperature of the gate: log g = logsigmoid(k) / 16.
GATE_NORMALISER = 16
# softplus of this is 1: with zero gate_proj, exp(A_log) is a head's log decay per token.
UNIT_STEP = math.log(math.e - 1)
# Below this sum of weights a normalised output fades to nothing instead of dividing by it.
SMALLEST_SUM = 1e-20


@dataclass(frozen=True, kw_only=True)
class GLA:
    """Options of gated linear attention beside a window."""

    window_tokens: int = 64
    """Last tokens that the softmax branch sees, the token itself counted; 0 is no such branch."""
    gate: Literal["head", "key"] = "head"
    """`head`: log g = -exp(A_log) softplus(gate_proj(u) + dt_bias), one a state head. `key`: logsigmoid(k) / 16, one a
    channel, with nothing to learn (Liger)."""
    mix: Literal["learned", "half"] = "learned"
    """How the branches are joined. `learned`: a scale for each query head and branch, and the softmax scale c.
    `half`: half and half (the recurrent branch alone without a window), c = 1 (Liger)."""
    normalise: bool = True
    """Divide the recurrent branch by the sum of its weights; Liger does not."""
    heads: Literal["grouped", "expanded"] = "grouped"
    """`grouped`: a state for each of the base's n_kv heads. `expanded`: one for each query head."""

    forgets = True

    def __post_init__(self) -> None:
        if self.window_tokens < 0:
            raise ConfigError(f"window_tokens is {self.window_tokens}, expected at least 0; 0 is no window")

    def build(self, config: Any, layer_idx: int) -> nn.Module:
        return GatedLinearAttention(config, layer_idx, self)

    def state_heads(self, config: Any) -> int:
        return config.num_key_value_heads if self.heads == "grouped" else config.num_attention_heads

    def state_bytes(self, config: Any, tokens: int) -> int:
        """The fp32 state, and keys and values of the window."""
        if tokens == 0:
            return 0
        width = head_dim(config)
        state = self.state_heads(config) * width * (width + self.normalise) * 4
        return state + 2 * config.num_key_value_heads * width * element_bytes(config) * min(tokens, self.window_tokens)


class GatedLinearAttention(WindowedAttention):
    """The module that stands where `self_attn` was: projections and window of a streaming layer, and the recurrent branch."""

    entry_kind = WindowStateLayer

    def __init__(self, config: Any, layer_idx: int, options: GLA):
        super().__init__(config, layer_idx, Reach(sink=0, window=options.window_tokens))
        self.window = options.window_tokens
        self.options = options
        self.num_heads = config.num_attention_heads
        self.state_heads = options.state_heads(config)
        if options.gate == "head":
            self.gate_proj = nn.Linear(config.hidden_size, self.state_heads, bias=False)
            self.A_log = nn.Parameter(torch.zeros(self.state_heads))
            self.dt_bias = nn.Parameter(torch.full((self.state_heads,), UNIT_STEP))
        if options.mix == "learned":
            self.feature_scale = nn.Parameter(torch.ones(self.state_heads))
            self.state_scale = nn.Parameter(torch.ones(self.num_heads))
            if self.window:
                self.window_scale = nn.Parameter(torch.ones(self.num_heads))

    def reset_own_parameters(self, init: Any) -> None:
        """A start for a layer that is not seeded: half-lives from 4 to 1024 tokens over the heads, equal branches."""
        if self.options.gate == "head":
            lives = torch.logspace(2, 10, self.state_heads, base=2.0)
            init.copy_(self.A_log, torch.log(math.log(2) / lives))
            init.copy_(self.dt_bias, torch.full((self.state_heads,), UNIT_STEP))
        if self.options.mix == "learned":
            init.ones_(self.feature_scale)
            init.copy_(self.state_scale, torch.full((self.num_heads,), 0.5 if self.window else 1.0))
            if self.window:
                init.copy_(self.window_scale, torch.full((self.num_heads,), 0.5))

    def context(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        entry: WindowStateLayer | None = None,
        padding_mask: Tensor | None = None,
        segment_ids: Tensor | None = None,
    ) -> Tensor:
        """What o_proj reads, [B, T, H * d]. Arguments as in `forward`."""
        heads = self.unrotated(hidden_states)
        return self._mixed(hidden_states, heads, position_embeddings, entry, padding_mask, segment_ids).flatten(2)

    def mixing_matrix(self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> Tensor:
        q, k, v = self.unrotated(hidden_states)
        return self._mixed(hidden_states, (q, k, one_hot(v, 1)), position_embeddings, None, None, None).transpose(1, 2)

    def _mixed(
        self,
        hidden_states: Tensor,
        heads: tuple[Tensor, Tensor, Tensor],
        position_embeddings: tuple[Tensor, Tensor],
        entry: WindowStateLayer | None,
        padding_mask: Tensor | None,
        segment_ids: Tensor | None,
    ) -> Tensor:
        """Both branches joined, [B, T, H, width of the values], from what `unrotated` gives."""
        q, k, v = heads
        y = self.recurrent(hidden_states, q, k, v, entry, padding_mask, segment_ids)
        learned = self.options.mix == "learned"
        y = y * (self.state_scale.to(y)[:, None] if learned else 0.5 if self.window else 1.0)
        if self.window:
            near = self.attend_window(q, k, v, position_embeddings, entry, padding_mask, segment_ids)
            y = y + near * (self.window_scale.to(y)[:, None] if learned else 0.5)
        return y.to(hidden_states.dtype)

    def unrotated(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The base's heads before the rotary angle: q [B, T, H, d], k and v [B, T, n_kv, d]."""
        shape = (*hidden_states.shape[:2], -1, self.head_dim)
        q = self._norm("q_norm", self.q_proj(hidden_states).view(shape))
        k = self._norm("k_norm", self.k_proj(hidden_states).view(shape))
        return q, k, self.v_proj(hidden_states).view(shape)

    def attend_window(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        entry: WindowStateLayer | None = None,
        padding_mask: Tensor | None = None,
        segment_ids: Tensor | None = None,
    ) -> Tensor:
        """The softmax branch, [B, T, H, d], from what `unrotated` gives; other arguments as in `forward`."""
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        return self.attend(q, k, v, entry, padding_mask, segment_ids).transpose(1, 2)

    def log_decay(self, hidden_states: Tensor, k: Tensor) -> Tensor:
        """log g, [B, T, S, 1] or (gate `key`) [B, T, n_kv, d], fp32 (fp64 for fp64 input)."""
        if self.options.gate == "key":
            return F.logsigmoid(_wide(k)) / GATE_NORMALISER
        gate = _wide(self.gate_proj(hidden_states))
        return -(self.A_log.to(gate).exp() * F.softplus(gate + self.dt_bias.to(gate)))[..., None]

    def recurrent(
        self,
        hidden_states: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        entry: WindowStateLayer | None = None,
        padding_mask: Tensor | None = None,
        segment_ids: Tensor | None = None,
    ) -> Tensor:
        """The recurrent branch before its scale, [B, T, H, d], from what `unrotated` gives; other arguments as in `forward`."""
        log_decay = self.log_decay(hidden_states, k)
        q, k, v = _wide(q), *(self._repeated(_wide(t)) for t in (k, v))
        log_decay = self._repeated(log_decay)
        if self.options.mix == "learned":
            scale = self.feature_scale.to(k)[:, None]
            q, k = (q.unflatten(2, (self.state_heads, -1)) * scale[:, None]).flatten(2, 3), k * scale
        q, k = q.softmax(-1), k.softmax(-1)
        if padding_mask is not None:
            k, log_decay = k * padding_mask[..., None, None], log_decay * padding_mask[..., None, None]
        if self.options.normalise:
            # One more value, which is one: what is read of it is the sum of the weights.
            v = F.pad(v, (0, 1), value=1.0)
        if entry is not None and entry.is_initialized and hidden_states.shape[1] == 1:
            entry.state = entry.state.to(v.device)
            y = gla_step(q[:, 0], k[:, 0], v[:, 0], log_decay[:, 0], entry.state)[:, None]
        else:
            past = entry.state if entry is not None and entry.is_initialized else None
            y, state = gla(q, k, v, log_decay, past, segment_ids)
            if entry is not None:
                entry.hold(state=state.detach())
        if self.options.normalise:
            y = y[..., :-1] / y[..., -1:].clamp(min=SMALLEST_SUM)
        return y

    def _repeated(self, tensor: Tensor) -> Tensor:
        """[B, T, n_kv or S, E] -> one for each state head."""
        repeat = self.state_heads // tensor.shape[2]
        return tensor if repeat == 1 else tensor.repeat_interleave(repeat, dim=2)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
