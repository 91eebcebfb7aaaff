"""Mamba2 in the shape that attention can be turned into: C from queries, B from keys, x from values.

Parameter names, order and function are those of transformers' GraniteMoeHybridMambaLayer (SiLU after the convolution, gate
before a norm over each head), so that export is renaming and repeating. Two things it lacks are options here: heads that
stay grouped as in GQA (x and B have n_kv heads, repeated after the convolution), and the base's q/k-norms on C and B.

    [z | x | B | C | dt] = W_in u + b_in
    x, B, C = SiLU(conv(x, B, C))                           depthwise, causal
    h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T              dt = softplus(dt + dt_bias), A = -exp(A_log)
    y_t = h_t C_t + D x_t
    out = W_out (w * RMSNorm_head(y * SiLU(z)))
    memory = w * RMSNorm_head(y)                            for the layers that read this one: before the gate

Letters: B batch, T tokens, H query heads, G value and key groups, P value width, N key width.
The memory is what the layer's readers gate with gates of their own (mixers/gmu.py). SambaY hands over y itself, and where
Mamba2 or a delta rule is read normalises after the reader's gate; here the norm stays on this side, because y has the size
that this layer's norm and eps need, whatever that is, and a seed makes it a thousandth.

Source: Dao and Gu, arXiv 2405.21060, section 7; the layout of Wang et al., arXiv 2408.15237.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybridize.cache import RecurrentLayer, own_layer
from hybridize.errors import ConfigError
from hybridize.families import element_bytes, family_of, head_dim
from hybridize.kernels._core.dispatch import fast_path
from hybridize.kernels.conv import causal_conv1d, causal_conv1d_step
from hybridize.kernels.gated_norm import gated_rms_norm
from hybridize.kernels.ssd import ssd, ssd_step
from hybridize.mixers.memory import Memories
from hybridize.mixers.windowed import one_hot


@dataclass(frozen=True, kw_only=True)
class Mamba2:
    """Options of the Mamba2 mixer; its head widths are the base's."""

    conv_tokens: int = 4
    """Taps of the causal convolution (Mamba2's d_conv)."""
    heads: Literal["grouped", "expanded"] = "grouped"
    """`grouped`: x and B keep the base's n_kv heads. `expanded`: one for each query head, free to diverge in training."""
    proj_bias: bool = True
    """Bias on in_proj: lets the gate start open, and carries the base's q/k/v biases."""
    norm_eps: float | None = None
    """Of the gated norm; None is the base's rms_norm_eps, as the native class has it."""

    forgets = True
    leaves = "mixture"

    def __post_init__(self) -> None:
        if not 1 <= self.conv_tokens <= 16:
            raise ConfigError(f"conv_tokens is {self.conv_tokens}, expected 1 to 16")

    def build(self, config: Any, layer_idx: int) -> nn.Module:
        return Mamba2Mixer(config, layer_idx, self)

    def conv_channels(self, config: Any) -> int:
        groups = config.num_key_value_heads if self.heads == "grouped" else config.num_attention_heads
        return (2 * groups + config.num_attention_heads) * head_dim(config)

    def memory_width(self, config: Any) -> int:
        """Width of what a layer above can read, see the module docstring."""
        return config.num_attention_heads * head_dim(config)

    def state_bytes(self, config: Any, tokens: int) -> int:
        """The fp32 state of every head and the last conv_tokens - 1 inputs of the convolution; the same at any length."""
        if tokens == 0:
            return 0
        state = config.num_attention_heads * head_dim(config) ** 2 * 4
        return state + self.conv_channels(config) * (self.conv_tokens - 1) * element_bytes(config)


class HeadNorm(nn.Module):
    """The base's q- or k-norm: RMSNorm over one head's width, as Qwen3RMSNorm."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, heads: Tensor) -> Tensor:
        wide = heads.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(heads.dtype)


class GatedHeadNorm(nn.Module):
    """Gate, then RMSNorm over each head; holds the weight under the native class's name `norm.weight`."""

    def __init__(self, width: int, group: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.group, self.eps = group, eps

    def forward(self, y: Tensor, gate: Tensor) -> Tensor:
        return gated_rms_norm(y, gate, self.weight, self.eps, self.group)

    def ungated(self, y: Tensor) -> Tensor:
        """The norm alone, [..., width], dtype of y."""
        heads = (y if y.dtype == torch.float64 else y.float()).unflatten(-1, (-1, self.group))
        heads = heads * torch.rsqrt(heads.square().mean(-1, keepdim=True) + self.eps)
        return (heads.flatten(-2) * self.weight).to(y.dtype)


class Mamba2Mixer(nn.Module):
    """The module that stands where `self_attn` was."""

    def __init__(self, config: Any, layer_idx: int, options: Mamba2):
        super().__init__()
        family = family_of(config)
        self.layer_idx = layer_idx
        self.width = head_dim(config)
        self.num_heads = config.num_attention_heads
        self.num_groups = config.num_key_value_heads if options.heads == "grouped" else self.num_heads
        self.inner = self.num_heads * self.width
        self.grouped = self.num_groups * self.width
        self.conv_tokens = options.conv_tokens
        channels = self.inner + 2 * self.grouped
        self.in_proj = nn.Linear(config.hidden_size, self.inner + channels + self.num_heads, bias=options.proj_bias)
        self.conv1d = nn.Conv1d(channels, channels, self.conv_tokens, groups=channels, padding=self.conv_tokens - 1)
        self.dt_bias = nn.Parameter(torch.ones(self.num_heads))
        self.A_log = nn.Parameter(torch.zeros(self.num_heads))
        self.D = nn.Parameter(torch.ones(self.num_heads))
        self.norm = GatedHeadNorm(self.inner, self.width, options.norm_eps or config.rms_norm_eps)
        self.out_proj = nn.Linear(self.inner, config.hidden_size, bias=family.has_out_bias(config))
        if family.qk_norm:
            self.q_norm = HeadNorm(self.width, config.rms_norm_eps)
            self.k_norm = HeadNorm(self.width, config.rms_norm_eps)

    def reset_own_parameters(self, init: Any) -> None:
        """Mamba2's own start for a layer that is not seeded: half-lives spread over the heads."""
        init.copy_(self.A_log, torch.log(torch.linspace(1.0, 16.0, self.num_heads)))
        init.copy_(self.dt_bias, torch.full((self.num_heads,), math.log(math.expm1(0.01))))
        init.ones_(self.D)
        init.ones_(self.norm.weight)

    def split_sizes(self) -> dict[str, int]:
        """Rows of in_proj by what they feed, in order."""
        return {"z": self.inner, "x": self.grouped, "B": self.grouped, "C": self.inner, "dt": self.num_heads}

    def forward(
        self,
        hidden_states: Tensor,
        past_key_values: Any = None,
        padding_mask: Tensor | None = None,
        segment_ids: Tensor | None = None,
        memories: Memories | None = None,
        **unused: Any,
    ) -> tuple[Tensor, None]:
        """Mix tokens; see the module docstring.

        Args:
            hidden_states: u, [B, T, D].
            past_key_values: a DynamicCache or None; this layer's entry becomes a RecurrentLayer.
            padding_mask: [B, T] bool, False on padding: such tokens leave no trace in the state.
            segment_ids: [B, T] int, documents of a packed row; the state starts anew at each border.
            memories: where readers of this layer look for its memory, or None.
            **unused: what other attention modules read, such as the 4-D mask.

        Returns:
            ([B, T, D], None).
        """
        entry = None if past_key_values is None else own_layer(past_key_values, self.layer_idx, RecurrentLayer)
        out = self.out_proj(self.context(hidden_states, entry, padding_mask, segment_ids, memories))
        return out, None

    def context(
        self,
        hidden_states: Tensor,
        entry: RecurrentLayer | None = None,
        padding_mask: Tensor | None = None,
        segment_ids: Tensor | None = None,
        memories: Memories | None = None,
    ) -> Tensor:
        """What out_proj reads: the gated, normed mixture, [B, T, H * P]. Arguments as in `forward`."""
        batch, new, _ = hidden_states.shape
        z, xBC, dt = self.in_proj(hidden_states).split([self.inner, self.inner + 2 * self.grouped, self.num_heads], dim=-1)
        readers = memories if memories is not None and memories.wants(self.layer_idx) else None
        past = entry if entry is not None and entry.is_initialized else None
        if past is not None and new == 1 and padding_mask is None and readers is None:
            out = self._one_launch(z, xBC, dt, past)
            if out is not None:
                past.advance(hidden_states)
                return out
        dt = F.softplus(dt.float() + self.dt_bias.float())
        if padding_mask is not None:
            xBC = xBC * padding_mask[:, :, None].to(xBC.dtype)
            dt = dt * padding_mask[:, :, None]
        weight, bias = self.conv1d.weight[:, 0], self.conv1d.bias
        A = -torch.exp(self.A_log.float())
        if past is not None and new == 1:
            past.conv, past.state = past.conv.to(xBC), past.state.to(xBC.device)
            xBC = causal_conv1d_step(xBC[:, 0], weight, bias, past.conv)
            x, b, c = self._heads(xBC)
            y = ssd_step(x, dt[:, 0], A, b, c, self.D, past.state)[:, None]
        else:
            xBC, conv = causal_conv1d(xBC, weight, bias, None if past is None else past.conv, "silu", segment_ids)
            x, b, c = self._heads(xBC)
            y, state = ssd(x, dt, A, b, c, self.D, None if past is None else past.state, segment_ids)
            if entry is not None:
                entry.hold(conv=conv.detach(), state=state.detach())
        if entry is not None:
            entry.advance(hidden_states)
        y = y.reshape(batch, new, self.inner)
        if readers is not None:
            readers.leave(self.layer_idx, self.norm.ungated(y))
        return self.norm(y, z)

    def _one_launch(self, z: Tensor, xBC: Tensor, dt: Tensor, past: RecurrentLayer) -> Tensor | None:
        """One token [B, 1, ...] through convolution, state and norm in one kernel, where there is one for it."""
        if hasattr(self, "q_norm"):
            return None
        past.conv, past.state = past.conv.to(xBC), past.state.to(xBC.device)
        inputs = (
            z[:, 0], xBC[:, 0], dt[:, 0], self.conv1d.weight[:, 0], self.conv1d.bias, self.A_log, self.dt_bias, self.D,
            self.norm.weight, self.norm.eps, past.conv, past.state,
        )  # fmt: skip
        step = fast_path("mixer_step", "mamba2_mixer_step", "auto", *inputs)
        if step is None:
            return None
        with torch.no_grad():
            return step(*inputs)[:, None]

    def mixing_matrix(self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> Tensor:
        """What token s's x weighs in each head's y at token t, before the gate and the norm, [B, H, T, T].

        x is what the convolution gives. Arguments as in `forward`, no cache; the angles are not read.
        """
        _, xBC, dt = self.in_proj(hidden_states).split([self.inner, self.inner + 2 * self.grouped, self.num_heads], dim=-1)
        xBC, _ = causal_conv1d(xBC, self.conv1d.weight[:, 0], self.conv1d.bias, None, "silu", None)
        x, b, c = self._heads(xBC)
        dt = F.softplus(dt.float() + self.dt_bias.float())
        return ssd(one_hot(x, 1), dt, -torch.exp(self.A_log.float()), b, c, self.D, None, None)[0].transpose(1, 2)

    def _heads(self, xBC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, b, c = xBC.split([self.grouped, self.grouped, self.inner], dim=-1)
        x, b, c = (t.unflatten(-1, (-1, self.width)) for t in (x, b, c))
        if hasattr(self, "q_norm"):
            b, c = self.k_norm(b), self.q_norm(c)
        return x, b, c
