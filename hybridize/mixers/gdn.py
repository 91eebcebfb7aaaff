"""Gated DeltaNet in the shape that attention can be turned into: queries, keys and values of the base, a state a query head.

Parameter names, order and function are those of transformers' Qwen3_5GatedDeltaNet:

    q, k, v = SiLU(conv(W_qkv u))                                       depthwise, causal, no bias
    q, k = q / |q| / sqrt(N), k / |k|
    g = -exp(A_log) softplus(W_a u + dt_bias),  beta = sigmoid(W_b u)
    S_t = e^g S_{t-1};  S_t += beta k_t (v_t - k_t^T S_t)^T;  y_t = q_t^T S_t
    out = W_out (w * RMSNorm_head(y) * SiLU(W_z u))

What it lacks are options here: biases on the projections, the base's q/k-norms after the convolution, its rotary embedding,
beta up to 2, and keys and values that stay grouped as in GQA (each query head has its own state, beta and decay).

Letters: B batch, T tokens, H query heads, G key and value heads, N = P head width.
Source: Yang, Kautz, Hatamizadeh, arXiv 2412.06464, section 3; transformers models/qwen3_5/modeling_qwen3_5.py.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from hybridize.cache import RecurrentLayer, own_layer
from hybridize.errors import ConfigError
from hybridize.families import element_bytes, family_of, head_dim
from hybridize.kernels._core.dispatch import fast_path
from hybridize.kernels.conv import causal_conv1d, causal_conv1d_step
from hybridize.kernels.gated_norm import gated_rms_norm
from hybridize.kernels.gdn import gdn, gdn_step
from hybridize.mixers.mamba2 import HeadNorm
from hybridize.mixers.windowed import one_hot

# Of the L2 norm of q and k, as the native class has it.
L2_EPS = 1e-6


@dataclass(frozen=True, kw_only=True)
class DeltaOptions:
    """Options of every mixer with a delta rule; head widths are the base's."""

    conv_tokens: int = 4
    """Taps of the causal convolution."""
    heads: Literal["expanded", "grouped"] = "expanded"
    """`expanded`: keys and values for each query head, free to diverge (the native layout). `grouped`: the base's n_kv."""
    proj_bias: bool = True
    """Biases on the projections: let the gate start open, set beta, and carry the base's q/k/v biases."""
    qk_norm: bool = True
    """Keep the base's q/k-norms, if it has them; otherwise their weights are folded into the projections."""
    rope: bool = False
    """Turn q and k by the base's rotary embedding before the delta rule. With kda, scores then depend on distance alone only
    where the two channels of a rotary pair decay alike, as they do at the start."""
    beta_max: Literal[1, 2] = 1
    """Upper end of beta; above 1 the state may also be reflected (arXiv 2411.12537)."""
    norm_eps: float | None = None
    """Of the norm of y; None is the base's rms_norm_eps, as the native class has it."""

    forgets = True

    def __post_init__(self) -> None:
        if not 1 <= self.conv_tokens <= 16:
            raise ConfigError(f"conv_tokens is {self.conv_tokens}, expected 1 to 16")
        if self.norm_eps is not None and self.norm_eps <= 0:
            raise ConfigError(f"norm_eps is {self.norm_eps}, expected more than 0")

    def state_bytes(self, config: Any, tokens: int) -> int:
        """The fp32 state of every query head and the last conv_tokens - 1 inputs of the convolution; the same at any length."""
        if tokens == 0:
            return 0
        groups = config.num_key_value_heads if self.heads == "grouped" else config.num_attention_heads
        channels = (config.num_attention_heads + 2 * groups) * head_dim(config)
        state = config.num_attention_heads * head_dim(config) ** 2 * 4
        return state + channels * (self.conv_tokens - 1) * element_bytes(config)


@dataclass(frozen=True, kw_only=True)
class GDN(DeltaOptions):
    """Options of the Gated DeltaNet mixer: one decay a head, SiLU gate."""

    def build(self, config: Any, layer_idx: int) -> nn.Module:
        return GDNMixer(config, layer_idx, self)


class DeltaMixer(nn.Module):
    """What stands where `self_attn` was: all but the names of the projections, which a subclass has.

    A subclass offers `qkv(u)` [B, T, C], `log_decay(u)` [B, T, H] or [B, T, H, N], `beta_logits(u)` [B, T, H],
    `gated(y, u)` and `project_out`.
    """

    qkv: Callable[[Tensor], Tensor]
    log_decay: Callable[[Tensor], Tensor]
    beta_logits: Callable[[Tensor], Tensor]
    gated: Callable[[Tensor, Tensor], Tensor]
    project_out: Callable[[Tensor], Tensor]

    def __init__(self, config: Any, layer_idx: int, options: DeltaOptions):
        super().__init__()
        self.layer_idx, self.options = layer_idx, options
        self.width = head_dim(config)
        self.num_heads = config.num_attention_heads
        self.num_groups = config.num_key_value_heads if options.heads == "grouped" else self.num_heads
        self.inner, self.grouped = self.num_heads * self.width, self.num_groups * self.width
        self.eps = options.norm_eps or config.rms_norm_eps
        channels = self.inner + 2 * self.grouped
        taps = options.conv_tokens
        self.conv1d = nn.Conv1d(channels, channels, taps, groups=channels, padding=taps - 1, bias=False)
        if family_of(config).qk_norm and options.qk_norm:
            self.q_norm = HeadNorm(self.width, config.rms_norm_eps)
            self.k_norm = HeadNorm(self.width, config.rms_norm_eps)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        past_key_values: Any = None,
        padding_mask: Tensor | None = None,
        segment_ids: Tensor | None = None,
        **unused: Any,
    ) -> tuple[Tensor, None]:
        """Mix tokens; see the module docstring.

        Args:
            hidden_states: u, [B, T, D].
            position_embeddings: cos and sin, [B, T, N]; read with `rope` only.
            past_key_values: a DynamicCache or None; this layer's entry becomes a RecurrentLayer.
            padding_mask: [B, T] bool, False on padding: such tokens leave no trace in the state.
            segment_ids: [B, T] int, documents of a packed row; the state starts anew at each border.
            **unused: what other attention modules read, such as the 4-D mask.

        Returns:
            ([B, T, D], None).
        """
        entry = None if past_key_values is None else own_layer(past_key_values, self.layer_idx, RecurrentLayer)
        return self.project_out(self.context(hidden_states, position_embeddings, entry, padding_mask, segment_ids)), None

    def context(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        entry: RecurrentLayer | None = None,
        padding_mask: Tensor | None = None,
        segment_ids: Tensor | None = None,
    ) -> Tensor:
        """What the last projection reads: the normed, gated mixture, [B, T, H * P]. Arguments as in `forward`."""
        new = hidden_states.shape[1]
        qkv = self.qkv(hidden_states)
        past = entry if entry is not None and entry.is_initialized else None
        if past is not None:
            past.conv, past.state = past.conv.to(qkv), past.state.to(qkv.device)
            if new == 1 and padding_mask is None:
                out = self.one_launch(hidden_states, qkv, past)
                if out is not None:
                    past.advance(hidden_states)
                    return out
        g = self.log_decay(hidden_states)
        beta = self.options.beta_max * torch.sigmoid(self.beta_logits(hidden_states).to(g.dtype))
        if padding_mask is not None:
            qkv = qkv * padding_mask[:, :, None].to(qkv.dtype)
            beta = beta * padding_mask[:, :, None]
            g = g * padding_mask.view(*padding_mask.shape, *(1,) * (g.dim() - 2))
        weight = self.conv1d.weight[:, 0]
        if past is not None and new == 1:
            qkv = causal_conv1d_step(qkv[:, 0], weight, None, past.conv)[:, None]
            q, k, v = self._heads(qkv, position_embeddings)
            y = gdn_step(q[:, 0], k[:, 0], v[:, 0], g[:, 0], beta[:, 0], past.state)[:, None]
        else:
            qkv, conv = causal_conv1d(qkv, weight, None, None if past is None else past.conv, "silu", segment_ids)
            q, k, v = self._heads(qkv, position_embeddings)
            y, state = gdn(q, k, v, g, beta, None if past is None else past.state, segment_ids)
            if entry is not None:
                entry.hold(conv=conv.detach(), state=state.detach())
        if entry is not None:
            entry.advance(hidden_states)
        return self.gated(y.to(hidden_states.dtype), hidden_states).flatten(2)

    def one_launch(self, u: Tensor, qkv: Tensor, past: RecurrentLayer) -> Tensor | None:
        """What `context` gives for one token, by one kernel; None where there is no such kernel."""
        return None

    def mixing_matrix(self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> Tensor:
        """What token s's v weighs in each head's y at token t, before the norm and the gate, [B, H, T, T].

        v is what the convolution gives. Arguments as in `forward`, no cache.
        """
        g = self.log_decay(hidden_states)
        beta = self.options.beta_max * torch.sigmoid(self.beta_logits(hidden_states).to(g.dtype))
        qkv, _ = causal_conv1d(self.qkv(hidden_states), self.conv1d.weight[:, 0], None, None, "silu", None)
        q, k, v = self._heads(qkv, position_embeddings)
        return gdn(q, k, one_hot(v, 1), g, beta, None, None)[0].transpose(1, 2)

    def _heads(self, qkv: Tensor, angles: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = qkv.split([self.inner, self.grouped, self.grouped], dim=-1)
        q, k, v = (t.unflatten(-1, (-1, self.width)) for t in (q, k, v))
        q, k = self.normalised(q, k, angles)
        return q * self.width**-0.5, k, v.to(k.dtype)

    def normalised(self, q: Tensor, k: Tensor, angles: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        """q [B, T, H, N] and k [B, T, G, N] behind the convolution -> of length 1, fp32 (fp64 for fp64)."""
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        if self.options.rope:
            if angles is None:
                raise ConfigError("gdn with rope: got no position_embeddings, expected cos and sin from the model")
            q, k = apply_rotary_pos_emb(q, k, *angles, unsqueeze_dim=2)
        return unit(q), unit(k)


def unit(x: Tensor) -> Tensor:
    """x / sqrt(|x|^2 + eps) over the last dim, as the native class: in fp32 at least."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + L2_EPS)


class GatedNorm(nn.Module):
    """RMSNorm over each head with one weight for all heads, then the SiLU gate; the native class's `norm.weight`."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, y: Tensor, gate: Tensor) -> Tensor:
        return gated_rms_norm(y, gate, self.weight, self.eps, y.shape[-1], gate_first=False)


class GDNMixer(DeltaMixer):
    """Gated DeltaNet under the native class's names."""

    def __init__(self, config: Any, layer_idx: int, options: GDN):
        super().__init__(config, layer_idx, options)
        hidden, bias = config.hidden_size, options.proj_bias
        self.in_proj_qkv = nn.Linear(hidden, self.inner + 2 * self.grouped, bias=bias)
        self.in_proj_z = nn.Linear(hidden, self.inner, bias=bias)
        self.in_proj_b = nn.Linear(hidden, self.num_heads, bias=bias)
        self.in_proj_a = nn.Linear(hidden, self.num_heads, bias=False)
        self.dt_bias = nn.Parameter(torch.ones(self.num_heads))
        self.A_log = nn.Parameter(torch.zeros(self.num_heads))
        self.norm = GatedNorm(self.width, self.eps)
        self.out_proj = nn.Linear(self.inner, hidden, bias=family_of(config).has_out_bias(config))

    def reset_own_parameters(self, init: Any) -> None:
        """Start of a layer that is not seeded: half-lives spread over the heads, from 4 tokens to 70."""
        init.copy_(self.A_log, torch.log(torch.linspace(1.0, 16.0, self.num_heads)))
        init.copy_(self.dt_bias, torch.full((self.num_heads,), math.log(math.expm1(0.01))))
        init.ones_(self.norm.weight)

    def qkv(self, u: Tensor) -> Tensor:
        return self.in_proj_qkv(u)

    def log_decay(self, u: Tensor) -> Tensor:
        a = self.in_proj_a(u)
        return -torch.exp(self.A_log.float()) * F.softplus(
            a.to(torch.promote_types(a.dtype, torch.float32)) + self.dt_bias.float()
        )

    def beta_logits(self, u: Tensor) -> Tensor:
        return self.in_proj_b(u)

    def one_launch(self, u: Tensor, qkv: Tensor, past: RecurrentLayer) -> Tensor | None:
        if hasattr(self, "q_norm") or self.options.rope:
            return None
        weights = (self.conv1d.weight[:, 0], self.A_log, self.dt_bias, self.options.beta_max, self.norm.weight, self.norm.eps)
        states, x = (past.conv, past.state), qkv[:, 0]
        # The other projections have the dtype of this one, which stands for them until they are known to be read.
        step = fast_path("mixer_step", "gdn_mixer_step", "auto", x, x, x, x, *weights, *states)
        if step is None:
            return None
        a, b = self.in_proj_a(u)[:, 0], self.in_proj_b(u)[:, 0]
        with torch.no_grad():
            return step(self.in_proj_z(u)[:, 0], x, a, b, *weights, *states)[:, None]

    def gated(self, y: Tensor, u: Tensor) -> Tensor:
        return self.norm(y, self.in_proj_z(u).view_as(y))

    def project_out(self, context: Tensor) -> Tensor:
        return self.out_proj(context)
