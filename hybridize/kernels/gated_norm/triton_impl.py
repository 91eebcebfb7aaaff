"""The gated RMS norm in Triton: one pass over y and z, the statistics in registers.

A program takes ROWS tokens of one group of channels, so that groups of any width are rows of a small tile. Backward, a program
walks over a run of tokens and writes one partial sum of the weight's gradient; the sums are added afterwards, in fp32, which
makes the result the same at every run.

Letters: n tokens (all leading dims), D channels, P programs over tokens.
"""

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from hybridize.kernels._core.launch import DEVICES, cdiv, empty, launch, power_of_2, tiles
from hybridize.kernels._core.library import registered
from hybridize.kernels._core.tl_utils import silu, silu_slope

__all__ = ["DEVICES", "gated_rms_norm", "refuses_gated_rms_norm"]

# Programs over tokens in the backward pass: two for each multiprocessor of an H200, for one group.
PARTS = 264
WIDEST_GROUP = 16384


@triton.jit
def gated_norm_forward(
    y, z, weight, out, y_stride, z_stride, tokens, width, eps,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, GATE_FIRST: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = tl.arange(0, BLOCK)
    columns = tl.program_id(1) * SIZE + inside
    mask = (rows < tokens)[:, None] & (inside < SIZE)[None, :]
    long = rows.to(tl.int64)[:, None]
    values = tl.load(y + long * y_stride + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    gate = silu(tl.load(z + long * z_stride + columns[None, :], mask=mask, other=0.0).to(tl.float32))
    if GATE_FIRST:
        values = values * gate
    scale = tl.rsqrt(tl.sum(values * values, axis=1) / SIZE + eps)
    values = values * scale[:, None]
    values = values * tl.load(weight + columns, mask=inside < SIZE, other=0.0).to(tl.float32)[None, :]
    if not GATE_FIRST:
        values = values * gate
    tl.store(out + long * width + columns[None, :], values.to(out.dtype.element_ty), mask=mask)


@triton.jit
def gated_norm_backward(
    y, z, weight, dout, dy, dz, dweight, y_stride, z_stride, tokens, width, eps, steps,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, GATE_FIRST: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    inside = tl.arange(0, BLOCK)
    columns = tl.program_id(1) * SIZE + inside
    factor = tl.load(weight + columns, mask=inside < SIZE, other=0.0).to(tl.float32)[None, :]
    total = tl.zeros([BLOCK], tl.float32)
    for step in range(steps):
        rows = (tl.program_id(0) * steps + step) * ROWS + tl.arange(0, ROWS)
        mask = (rows < tokens)[:, None] & (inside < SIZE)[None, :]
        long = rows.to(tl.int64)[:, None]
        values = tl.load(y + long * y_stride + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        before = tl.load(z + long * z_stride + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(dout + long * width + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        gate = silu(before)
        normed = values * gate if GATE_FIRST else values
        scale = tl.rsqrt(tl.sum(normed * normed, axis=1) / SIZE + eps)[:, None]
        normed = normed * scale
        through = grad if GATE_FIRST else grad * gate
        total += tl.sum(through * normed, axis=0)
        through = through * factor
        dnormed = scale * (through - normed * (tl.sum(through * normed, axis=1) / SIZE)[:, None])
        if GATE_FIRST:
            dvalues = dnormed * gate
            dbefore = dnormed * values * silu_slope(before)
        else:
            dvalues = dnormed
            dbefore = grad * normed * factor * silu_slope(before)
        tl.store(dy + long * width + columns[None, :], dvalues.to(dy.dtype.element_ty), mask=mask)
        tl.store(dz + long * width + columns[None, :], dbefore.to(dz.dtype.element_ty), mask=mask)
    tl.store(dweight + tl.program_id(0).to(tl.int64) * width + columns, total, mask=inside < SIZE)


def _constants(group_size, gate_first):
    return {"SIZE": group_size, "BLOCK": power_of_2(group_size), "GATE_FIRST": gate_first}


def _forward(y_nD, z_nD, weight, eps, group_size, gate_first):
    (tokens, width), device = y_nD.shape, y_nD.device
    out = empty((tokens, width), y_nD.dtype, device)
    chosen = tiles("gated_norm_forward", device, SIZE=group_size)
    launch(
        gated_norm_forward, (cdiv(tokens, chosen["ROWS"]), width // group_size),
        y_nD, z_nD, weight, out, y_nD.stride(0), z_nD.stride(0), tokens, width, eps,
        **_constants(group_size, gate_first), **chosen,
    )  # fmt: skip
    return out


def _backward(y_nD, z_nD, weight, dout_nD, eps, group_size, gate_first):
    (tokens, width), device = y_nD.shape, y_nD.device
    dy, dz = (empty((tokens, width), t.dtype, device) for t in (y_nD, z_nD))
    chosen = tiles("gated_norm_backward", device, SIZE=group_size)
    blocks = cdiv(tokens, chosen["ROWS"])
    steps = cdiv(blocks, max(1, PARTS * group_size // width))
    parts = cdiv(blocks, steps) if blocks else 0
    partial = empty((parts, width), torch.float32, device)
    launch(
        gated_norm_backward, (parts, width // group_size),
        y_nD, z_nD, weight, dout_nD, dy, dz, partial, y_nD.stride(0), z_nD.stride(0), tokens, width, eps, steps,
        **_constants(group_size, gate_first), **chosen,
    )  # fmt: skip
    return dy, dz, partial.sum(0).to(weight.dtype)


forward = registered(
    "gated_norm_forward",
    "(Tensor y, Tensor z, Tensor weight, float eps, int group_size, bool gate_first) -> Tensor",
    _forward,
    lambda y, z, weight, eps, group_size, gate_first: y.new_empty(y.shape),
)
backward = registered(
    "gated_norm_backward",
    "(Tensor y, Tensor z, Tensor weight, Tensor dout, float eps, int group_size, bool gate_first) -> (Tensor, Tensor, Tensor)",
    _backward,
    lambda y, z, weight, *rest: (y.new_empty(y.shape), z.new_empty(z.shape), weight.new_empty(weight.shape)),
)


class _GatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y_nD, z_nD, weight, eps, group_size, gate_first):
        ctx.save_for_backward(y_nD, z_nD, weight)
        ctx.options = eps, group_size, gate_first
        return forward(y_nD, z_nD, weight, eps, group_size, gate_first)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout_nD):
        return *backward(*ctx.saved_tensors, dout_nD.contiguous(), *ctx.options), None, None, None


def refuses_gated_rms_norm(y, z, weight, eps, group_size, gate_first):
    """Why the kernel cannot run, or None."""
    if y.dtype == torch.float64 or z.dtype == torch.float64:
        return "got fp64, expected fp16, bf16 or fp32"
    if group_size > WIDEST_GROUP:
        return f"got groups of {group_size} channels, expected at most {WIDEST_GROUP}"
    return None


def gated_rms_norm(y, z, weight, eps, group_size, gate_first):
    """As `hybridize.kernels.gated_norm.gated_rms_norm`, unchecked. Statistics in fp32."""
    flat = [t.reshape(-1, t.shape[-1]) for t in (y, z)]
    flat = [t if t.stride(-1) == 1 else t.contiguous() for t in flat]
    return _GatedNorm.apply(*flat, weight.contiguous(), float(eps), int(group_size), bool(gate_first)).view(y.shape)
