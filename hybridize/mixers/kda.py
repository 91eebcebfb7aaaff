"""Kimi delta attention in the shape that attention can be turned into: the delta rule with a decay for each key channel.

Parameter names and function are those of transformers' KimiLinearDeltaAttention: as Gated DeltaNet (mixers/gdn.py), but

    g = -exp(A_log) softplus(W_fb W_fa u + dt_bias)                  one for each head and channel, rank N
    out = W_o (w * RMSNorm_head(y) * sigmoid(W_gb W_ga u))           rank N

Biases (on q, k, v, b and the second factor of the gate) and the other options are ours.

Source: Kimi Team, arXiv 2510.26692, section 3; transformers models/kimi_linear/modeling_kimi_linear.py.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybridize.families import family_of
from hybridize.mixers.gdn import DeltaMixer, DeltaOptions


@dataclass(frozen=True, kw_only=True)
class KDA(DeltaOptions):
    """Options of the Kimi delta attention mixer: a decay for each channel, sigmoid gate."""

    def build(self, config: Any, layer_idx: int) -> nn.Module:
        return KDAMixer(config, layer_idx, self)


class ForgetGate(nn.Module):
    """The log decay of each channel through a bottleneck of one head's width."""

    def __init__(self, hidden: int, heads: int, width: int):
        super().__init__()
        self.f_a_proj = nn.Linear(hidden, width, bias=False)
        self.f_b_proj = nn.Linear(width, heads * width, bias=False)
        self.dt_bias = nn.Parameter(torch.ones(heads * width))
        self.A_log = nn.Parameter(torch.zeros(1, 1, heads, 1))

    def forward(self, u: Tensor) -> Tensor:
        step = self.f_b_proj(self.f_a_proj(u))
        step = F.softplus(step.to(torch.promote_types(step.dtype, torch.float32)) + self.dt_bias.float())
        return -torch.exp(self.A_log.float()) * step.unflatten(-1, (self.A_log.shape[2], -1))


class SigmoidNorm(nn.Module):
    """RMSNorm over each head with one weight for all heads, then a sigmoid gate."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, y: Tensor, gate: Tensor) -> Tensor:
        dtype = torch.promote_types(y.dtype, torch.float32)
        wide = y.to(dtype)
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (wide * self.weight.to(dtype) * torch.sigmoid(gate.to(dtype))).to(y.dtype)


class KDAMixer(DeltaMixer):
    """Kimi delta attention under the native class's names."""

    def __init__(self, config: Any, layer_idx: int, options: KDA):
        super().__init__(config, layer_idx, options)
        hidden, bias = config.hidden_size, options.proj_bias
        self.q_proj = nn.Linear(hidden, self.inner, bias=bias)
        self.k_proj = nn.Linear(hidden, self.grouped, bias=bias)
        self.v_proj = nn.Linear(hidden, self.grouped, bias=bias)
        self.forget_gate = ForgetGate(hidden, self.num_heads, self.width)
        self.b_proj = nn.Linear(hidden, self.num_heads, bias=bias)
        self.g_a_proj = nn.Linear(hidden, self.width, bias=False)
        self.g_b_proj = nn.Linear(self.width, self.inner, bias=bias)
        self.o_norm = SigmoidNorm(self.width, self.eps)
        self.o_proj = nn.Linear(self.inner, hidden, bias=family_of(config).has_out_bias(config))

    def reset_own_parameters(self, init: Any) -> None:
        """Start of a layer that is not seeded: half-lives spread over the heads, from 4 tokens to 70."""
        gate = self.forget_gate
        init.copy_(gate.A_log, torch.log(torch.linspace(1.0, 16.0, self.num_heads)).view_as(gate.A_log))
        init.copy_(gate.dt_bias, torch.full_like(gate.dt_bias, math.log(math.expm1(0.01))))
        init.ones_(self.o_norm.weight)

    def qkv(self, u: Tensor) -> Tensor:
        return torch.cat([self.q_proj(u), self.k_proj(u), self.v_proj(u)], dim=-1)

    def log_decay(self, u: Tensor) -> Tensor:
        return self.forget_gate(u)

    def beta_logits(self, u: Tensor) -> Tensor:
        return self.b_proj(u)

    def gated(self, y: Tensor, u: Tensor) -> Tensor:
        return self.o_norm(y, self.g_b_proj(self.g_a_proj(u)).view_as(y))

    def project_out(self, context: Tensor) -> Tensor:
        return self.o_proj(context)
