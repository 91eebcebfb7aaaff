"""Depthwise causal convolution over a few taps, with an optional SiLU: the short filter of Mamba2.

    y_t = act(bias + sum_{k=0}^{K-1} weight_k x_{t-K+1+k}),   act = SiLU or nothing

Inputs before the first token come from a state of the last K - 1 inputs, or are 0.

Letters: B batch, T tokens, C channels, K taps, K1 = K - 1 inputs kept.
"""

import torch
import torch.nn.functional as F

from hybridize.errors import ConfigError
from hybridize.kernels._core.dispatch import fast_path
from hybridize.kernels.conv.torch_impl import conv_shifts

__all__ = ["causal_conv1d", "causal_conv1d_step"]

ACTIVATIONS = ("silu", None)


def causal_conv1d(x_BTC, weight_CK, bias_C=None, state_BCK1=None, activation="silu", segments_BT=None, impl="auto"):
    """Convolve every channel with its own K taps; return outputs and the last K - 1 inputs.

    y_t = act(bias + sum_{k=0}^{K-1} weight_k x_{t-K+1+k})

    Args:
        x_BTC: inputs, [B, T, C], fp16 | bf16 | fp32 | fp64.
        weight_CK: taps, oldest input first, [C, K], floating, K >= 1.
        bias_C: bias, [C], floating, or None.
        state_BCK1: the K - 1 inputs before the first token, [B, C, K - 1], dtype of x, or None.
        activation: "silu" or None.
        segments_BT: integer document ids, [B, T], non-decreasing along T; a tap that would read
            another document reads 0. `state_BCK1` belongs to the document of the first token.
        impl: "auto", "torch" or "triton" (2 to 4 taps, no fp64).

    Returns:
        y_BTC: outputs, dtype of x.
        state_BCK1: the last K - 1 inputs, dtype of x; inputs of earlier documents are 0.

    Raises:
        ConfigError: a shape, a dtype, an unknown activation, or an `impl` that cannot run here.

    Numerics: sums in fp32 (fp64 for fp64 inputs).
    Cost: O(T K) per channel; differentiable once, in x, weight, bias and state.
    Source: Dao, Gu, arXiv 2405.21060, section 7; Gu, Dao, arXiv 2312.00752, section 3.4.
    """
    _check("causal_conv1d", x_BTC, weight_CK, bias_C, state_BCK1, activation, leading=2)
    batch, tokens, channels = x_BTC.shape
    kept = weight_CK.shape[1] - 1
    if segments_BT is not None and (tuple(segments_BT.shape) != (batch, tokens) or segments_BT.dtype.is_floating_point):
        raise ConfigError(
            f"run causal_conv1d: segments_BT: got {segments_BT.dtype} {tuple(segments_BT.shape)}, "
            f"expected integers of shape {(batch, tokens)}."
        )
    if tokens == 0:
        return x_BTC.clone(), x_BTC.new_zeros(batch, channels, kept) if state_BCK1 is None else state_BCK1.clone()
    inputs = (x_BTC, weight_CK, bias_C, state_BCK1, activation, segments_BT)
    if fast := fast_path("conv", "causal_conv1d", impl, *inputs):
        return fast(*inputs)
    if state_BCK1 is None:
        state_BCK1 = x_BTC.new_zeros(batch, channels, kept)
    padded_BTC = torch.cat([state_BCK1.mT, x_BTC], dim=1)
    ids_BT = None
    if segments_BT is not None:
        ids_BT = torch.cat([segments_BT[:, :1].expand(-1, kept), segments_BT], dim=1)
    new_state = padded_BTC[:, tokens:].mT.clone()
    if ids_BT is not None:
        new_state = new_state * (ids_BT[:, tokens:] == ids_BT[:, -1:])[:, None, :]

    dtype = torch.float64 if x_BTC.dtype == torch.float64 else torch.float32
    weight, bias = weight_CK.to(dtype), None if bias_C is None else bias_C.to(dtype)
    return conv_shifts(padded_BTC, weight, bias, ids_BT, activation == "silu"), new_state


@torch.no_grad()
def causal_conv1d_step(x_BC, weight_CK, bias_C, state_BCK1, activation="silu", rows_B=None, impl="auto"):
    """Convolve one token, updating the state in place. Not differentiable.

    Args:
        x_BC: inputs, [B, C], fp16 | bf16 | fp32 | fp64.
        weight_CK: taps, oldest input first, [C, K], floating, K >= 1.
        bias_C: bias, [C], floating, or None.
        state_BCK1: the last K - 1 inputs, [B, C, K - 1], dtype of x; overwritten.
        activation: "silu" or None.
        rows_B: integers, [B]: the row of `state_BCK1` (then [any number, C, K - 1]) that each row of x goes on from, none
            of them twice; -1 skips the row, whose output says nothing. None is row b for b.
        impl: "auto", "torch" or "triton" (2 to 4 taps, no fp64).

    Returns:
        y_BC: outputs, dtype of x.

    Raises:
        ConfigError: a shape, a dtype, an unknown activation, or an `impl` that cannot run here.

    Numerics: as `causal_conv1d`.
    Cost: O(K) per channel.
    Source: as `causal_conv1d`.
    """
    if state_BCK1 is None:
        raise ConfigError("run causal_conv1d_step: state_BCK1: got None, expected a tensor.")
    _check("causal_conv1d_step", x_BC, weight_CK, bias_C, state_BCK1, activation, leading=1, rows_B=rows_B)
    inputs = (x_BC, weight_CK, bias_C, state_BCK1, activation, rows_B)
    if fast := fast_path("conv", "causal_conv1d_step", impl, *inputs):
        return fast(*inputs)
    if rows_B is not None:
        used = rows_B >= 0
        rows = rows_B[used].long()
        picked = state_BCK1[rows]
        y_BC = torch.zeros_like(x_BC)
        y_BC[used] = causal_conv1d_step(x_BC[used], weight_CK, bias_C, picked, activation, impl="torch")
        state_BCK1[rows] = picked
        return y_BC
    dtype = torch.float64 if x_BC.dtype == torch.float64 else torch.float32
    window_BCK = torch.cat([state_BCK1, x_BC[..., None]], dim=2)
    state_BCK1.copy_(window_BCK[..., 1:])
    y_BC = (window_BCK.to(dtype) * weight_CK.to(dtype)).sum(-1)
    y_BC = y_BC if bias_C is None else y_BC + bias_C.to(dtype)
    return (y_BC if activation is None else F.silu(y_BC)).to(x_BC.dtype)


def _check(op, x, weight_CK, bias_C, state_BCK1, activation, leading, rows_B=None):
    if activation not in ACTIVATIONS:
        raise ConfigError(f"run {op}: activation: got {activation!r}, expected 'silu' or None.")
    if x.dim() != leading + 1 or not x.dtype.is_floating_point:
        raise ConfigError(f"run {op}: x: got {x.dtype} {tuple(x.shape)}, expected {leading + 1} floating dims.")
    if weight_CK.dim() != 2 or weight_CK.shape[0] != x.shape[-1] or weight_CK.shape[1] < 1:
        raise ConfigError(f"run {op}: weight_CK: got shape {tuple(weight_CK.shape)}, expected ({x.shape[-1]}, K) with K >= 1.")
    if bias_C is not None and tuple(bias_C.shape) != (x.shape[-1],):
        raise ConfigError(f"run {op}: bias_C: got shape {tuple(bias_C.shape)}, expected ({x.shape[-1]},).")
    if rows_B is not None and (tuple(rows_B.shape) != (x.shape[0],) or rows_B.dtype.is_floating_point):
        raise ConfigError(
            f"run {op}: rows_B: got {rows_B.dtype} {tuple(rows_B.shape)}, expected integers of shape {x.shape[:1]}."
        )
    if state_BCK1 is not None:
        held = x.shape[0] if rows_B is None else state_BCK1.shape[0]
        shape = (held, x.shape[-1], weight_CK.shape[1] - 1)
        if tuple(state_BCK1.shape) != shape or state_BCK1.dtype != x.dtype:
            raise ConfigError(
                f"run {op}: state_BCK1: got {state_BCK1.dtype} {tuple(state_BCK1.shape)}, expected {x.dtype} {shape}."
            )
