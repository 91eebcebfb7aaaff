"""Launches of the Triton kernels of sink + window attention.

Results lie in memory as [B, T, H, D], as what follows reads them, and are handed out as [B, H, T, D].
"""

import math

import torch
from torch.autograd.function import once_differentiable

from hybridize.kernels._core.launch import DEVICES, empty, launch, tiles
from hybridize.kernels._core.library import registered
from hybridize.kernels.stream_attn.torch_impl import document_starts
from hybridize.kernels.stream_attn.triton_backward import stream_dkdv, stream_dq, stream_sinks
from hybridize.kernels.stream_attn.triton_forward import stream_combine, stream_forward, stream_step

__all__ = ["DEVICES", "refuses_stream_attn", "refuses_stream_attn_step", "stream_attn", "stream_attn_step"]

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Of a head: wider ones leave tiles that spill.
MOST_BYTES = 512
LOG2_E = math.log2(math.e)
# Programs that keep a large GPU busy; a step is split until there are as many, each of at least so many slots.
PROGRAMS, LEAST_SLOTS = 264, 64


def stream_attn(q, k, v, sink, window, segments, scale, dropout):
    """See `hybridize.kernels.stream_attn.stream_attn`."""
    starts = None if segments is None else document_starts(segments).to(torch.int32)
    tokens = max(1, q.shape[2])
    return _StreamAttention.apply(_rows(q), _rows(k), _rows(v), starts, min(sink, tokens), min(window, tokens), scale)


def refuses_stream_attn(q, k, v, sink, window, segments, scale, dropout):
    """Why these arguments are left to PyTorch, or None."""
    if dropout > 0:
        return f"got dropout {dropout}, expected 0"
    return _refused(q, k, v)


def stream_attn_step(q, keys, values, counts, scale):
    """See `hybridize.kernels.stream_attn.stream_attn_step`."""
    return _step(_rows(q), _rows(keys), _rows(values), counts, scale)


def refuses_stream_attn_step(q, keys, values, counts, scale):
    """Why these arguments are left to PyTorch, or None."""
    return _refused(q, keys, values)


def _refused(q, k, v):
    dtypes = {one.dtype for one in (q, k, v)}
    if len(dtypes) > 1 or q.dtype not in DTYPES:
        return f"got {', '.join(sorted(str(one) for one in dtypes))}, expected one of fp16, bf16 and fp32 for all"
    widest = MOST_BYTES // q.element_size()
    if v.shape[-1] != q.shape[-1] or not 1 <= q.shape[-1] <= widest:
        return f"got heads {q.shape[-1]} and values {v.shape[-1]} wide, expected equal widths of 1 to {widest}"
    return None


def _ceil_div(total: int, size: int) -> int:
    return (total + size - 1) // size


def _rows(x):
    """With the numbers of a head side by side, as the kernels read them."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _heads(like, heads, dtype):
    batch, _, tokens, width = like.shape
    return empty((batch, tokens, heads, width), dtype, like.device).transpose(1, 2)


def _widths(x):
    width = x.shape[-1]
    precision = "tf32x3" if x.dtype == torch.float32 else "ieee"
    # `tl.dot` takes 16 at least.
    return {"D": width, "BLOCK_D": max(16, 1 << (width - 1).bit_length()), "PRECISION": precision}


def _tiles(kernel, x):
    return tiles(kernel, x.device, D=x.shape[-1], BYTES=x.element_size())


def _launch_forward(q, k, v, starts, sink, window, scale):
    (batch, heads, tokens, _), groups = q.shape, k.shape[1]
    out, lse = _heads(q, heads, q.dtype), empty((batch, heads, tokens), torch.float32, q.device)
    chosen = _tiles("stream_forward", q)
    launch(
        stream_forward, (_ceil_div(tokens, chosen["M"]), heads, batch), q, k, v, starts, out, lse,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3],
        heads, heads // groups, tokens, sink, window, scale * LOG2_E,
        PACKED=starts is not None, **_widths(q), **chosen,
    )  # fmt: skip
    return out, lse


def _fake_forward(q, k, v, starts, sink, window, scale):
    return _heads(q, q.shape[1], q.dtype), q.new_empty(q.shape[:3], dtype=torch.float32)


def _launch_backward(q, k, v, starts, out, lse, dout, sink, window, scale):
    (batch, heads, tokens, width), groups = q.shape, k.shape[1]
    packed, per_group, widths = starts is not None, heads // groups, _widths(q)
    dq, dk, dv = _heads(q, heads, q.dtype), _heads(k, groups, k.dtype), _heads(v, groups, v.dtype)
    delta = empty((batch, heads, tokens), torch.float32, q.device)
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    by_query, by_key, by_sink = (_tiles(name, q) for name in ("stream_dq", "stream_dkdv", "stream_sinks"))
    launch(
        stream_dq, (_ceil_div(tokens, by_query["M"]), heads, batch), q, k, v, out, dout, starts, lse, delta, dq,
        *strides, *out.stride()[:3], *dout.stride()[:3], heads, per_group, tokens, sink, window, scale, scale * LOG2_E,
        PACKED=packed, **widths, **by_query,
    )  # fmt: skip
    chunks = _ceil_div(tokens, by_sink["CHUNK"])
    part_k, part_v = (empty((batch, groups, chunks, sink, width), torch.float32, q.device) for _ in range(2))
    launch(
        stream_sinks, (chunks, _ceil_div(sink, by_sink["N"]), batch * groups), q, k, v, dout, starts, lse, delta, part_k, part_v,
        *strides, *dout.stride()[:3], heads, per_group, tokens, sink, window, scale * LOG2_E,
        PACKED=packed, **widths, **by_sink,
    )  # fmt: skip
    launch(
        stream_dkdv, (_ceil_div(tokens, by_key["N"]), groups, batch), q, k, v, dout, starts, lse, delta, part_k, part_v, dk, dv,
        *strides, *dout.stride()[:3], *dk.stride()[:3],
        heads, per_group, tokens, chunks, sink, window, scale, scale * LOG2_E,
        PACKED=packed, SINKS=sink > 0, CHUNK=by_sink["CHUNK"], **widths, **by_key,
    )  # fmt: skip
    return dq, dk, dv


def _fake_backward(q, k, v, starts, out, lse, dout, sink, window, scale):
    return tuple(_heads(one, one.shape[1], one.dtype) for one in (q, k, v))


def _launch_step(q, keys, values, counts, scale):
    (batch, heads, width), (groups, slots) = q.shape, keys.shape[1:3]
    chosen, per_group = _tiles("stream_step", q), heads // groups
    columns = groups * _ceil_div(per_group, chosen["M"])
    splits = max(1, min(_ceil_div(PROGRAMS, max(1, batch * columns)), slots // LEAST_SLOTS))
    share = _ceil_div(_ceil_div(slots, splits), chosen["N"]) * chosen["N"]
    splits = _ceil_div(slots, share)
    out = empty((batch, heads, width), q.dtype, q.device)
    part, lse = out, None
    if splits > 1:
        part = empty((batch, splits, heads, width), torch.float32, q.device)
        lse = empty((batch, splits, heads), torch.float32, q.device)
    launch(
        stream_step, (splits, columns, batch), q, keys, values, counts, part, lse,
        *q.stride()[:2], *keys.stride()[:3], *values.stride()[:3], heads, per_group, slots, share, scale * LOG2_E,
        COUNTED=counts is not None, SPLIT=splits > 1, **_widths(q), **chosen,
    )  # fmt: skip
    if splits > 1:
        blocks = {name: size for name, size in _widths(q).items() if name != "PRECISION"}
        launch(
            stream_combine, (heads, batch), part, lse, out, heads, splits,
            BLOCK_SPLITS=1 << (splits - 1).bit_length(), **blocks, **_tiles("stream_combine", q),
        )  # fmt: skip
    return out


def _fake_step(q, keys, values, counts, scale):
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


_forward = registered(
    "stream_attn_forward",
    "(Tensor q, Tensor k, Tensor v, Tensor? starts, int sink, int window, float scale) -> (Tensor, Tensor)",
    _launch_forward,
    _fake_forward,
)
_backward = registered(
    "stream_attn_backward",
    "(Tensor q, Tensor k, Tensor v, Tensor? starts, Tensor out, Tensor lse, Tensor dout, int sink, int window, float scale)"
    " -> (Tensor, Tensor, Tensor)",
    _launch_backward,
    _fake_backward,
)
_step = registered(
    "stream_attn_step", "(Tensor q, Tensor keys, Tensor values, Tensor? counts, float scale) -> Tensor", _launch_step, _fake_step
)


class _StreamAttention(torch.autograd.Function):
    """Keeps inputs, result and the logarithm of each row's sum."""

    @staticmethod
    def forward(ctx, q, k, v, starts, sink, window, scale):
        out, lse = _forward(q, k, v, starts, sink, window, scale)
        ctx.save_for_backward(q, k, v, starts, out, lse)
        ctx.numbers = sink, window, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        q, k, v, starts, out, lse = ctx.saved_tensors
        return *_backward(q, k, v, starts, out, lse, _rows(dout), *ctx.numbers), None, None, None, None
