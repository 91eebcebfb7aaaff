"""Gradients of sink + window attention as Triton kernels, without atomics.

dq goes by tiles of queries, as the forward does. dk and dv go by tiles of keys, over all query heads of their group. A key in the
window meets about `window` queries, but a sink meets all that follow it: queries are cut into chunks, and what lies before the
reach of a chunk's first query is left to a pass of its own (`stream_sinks`), which sums over one chunk; the tile that holds those
keys adds the chunks' sums in their order.

Letters as in triton_forward.py.
"""

import triton
import triton.language as tl

from hybridize.kernels._core.tl_utils import kdot
from hybridize.kernels.stream_attn.triton_forward import ranges, rows_of, visible


@triton.jit
def add_dq(
    dq, q, dout, lse, delta, k_ptr, v_ptr, stride_k, stride_v, rows, starts, first, stop, tokens, sink, window, scale,
    MASKED: tl.constexpr, PACKED: tl.constexpr, D: tl.constexpr, N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What keys `first` to `stop` add to dq, still to be multiplied by the scale."""
    for base in range(first, stop, N):
        cols = base + tl.arange(0, N)
        k = rows_of(k_ptr, cols, stride_k, tokens, D, BLOCK_D)
        v = rows_of(v_ptr, cols, stride_v, tokens, D, BLOCK_D)
        exponent = kdot(q, tl.trans(k), PRECISION) * scale - lse[:, None]
        if MASKED:
            exponent = tl.where(visible(rows, cols, starts, sink, window, stop, PACKED), exponent, float("-inf"))
        dscores = tl.exp2(exponent) * (kdot(dout, tl.trans(v), PRECISION) - delta[:, None])
        dq += kdot(dscores.to(k.dtype), k, PRECISION)
    return dq


@triton.jit
def stream_dq(
    q_ptr, k_ptr, v_ptr, out_ptr, dout_ptr, starts_ptr, lse_ptr, delta_ptr, dq_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_ob, stride_oh, stride_ot, stride_gb, stride_gh, stride_gt, heads, per_group, tokens, sink, window, scale, scale2,
    PACKED: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """dq, which has the strides of out, and delta [B, H, T] = sum_d out dout. Grid as of stream_forward."""
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * M
    head, batch = tl.program_id(1), tl.program_id(2)
    wide_group = tl.cast(head // per_group, tl.int64)
    wide_head, wide_batch = tl.cast(head, tl.int64), tl.cast(batch, tl.int64)
    k_ptr += wide_batch * stride_kb + wide_group * stride_kh
    v_ptr += wide_batch * stride_vb + wide_group * stride_vh
    if PACKED:
        starts_ptr += wide_batch * tokens
    rows = first + tl.arange(0, M)
    starts = tl.zeros([M], tl.int32)
    if PACKED:
        starts = tl.load(starts_ptr + rows, mask=rows < tokens, other=0)
    start, sinks, low, whole, edge, stop = ranges(starts_ptr, first, tokens, sink, window, PACKED, M, N)
    q = rows_of(q_ptr + wide_batch * stride_qb + wide_head * stride_qh, rows, stride_qt, tokens, D, BLOCK_D)
    dout = rows_of(dout_ptr + wide_batch * stride_gb + wide_head * stride_gh, rows, stride_gt, tokens, D, BLOCK_D)
    at = wide_batch * stride_ob + wide_head * stride_oh
    out = rows_of(out_ptr + at, rows, stride_ot, tokens, D, BLOCK_D)
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), axis=1)
    row_place = (wide_batch * heads + wide_head) * tokens
    tl.store(delta_ptr + row_place + rows, delta, mask=rows < tokens)
    lse = tl.load(lse_ptr + row_place + rows, mask=rows < tokens, other=0.0)
    dq = tl.zeros([M, BLOCK_D], tl.float32)
    dq = add_dq(
        dq, q, dout, lse, delta, k_ptr, v_ptr, stride_kt, stride_vt, rows, starts, start, sinks, tokens, sink, window, scale2,
        True, PACKED, D, N, BLOCK_D, PRECISION,
    )  # fmt: skip
    dq = add_dq(
        dq, q, dout, lse, delta, k_ptr, v_ptr, stride_kt, stride_vt, rows, starts, low, whole, tokens, sink, window, scale2,
        True, PACKED, D, N, BLOCK_D, PRECISION,
    )  # fmt: skip
    dq = add_dq(
        dq, q, dout, lse, delta, k_ptr, v_ptr, stride_kt, stride_vt, rows, starts, whole, edge, tokens, sink, window, scale2,
        False, PACKED, D, N, BLOCK_D, PRECISION,
    )  # fmt: skip
    dq = add_dq(
        dq, q, dout, lse, delta, k_ptr, v_ptr, stride_kt, stride_vt, rows, starts, edge, stop, tokens, sink, window, scale2,
        True, PACKED, D, N, BLOCK_D, PRECISION,
    )  # fmt: skip
    dims = tl.arange(0, BLOCK_D)
    inside = (rows < tokens)[:, None] & (dims < D)[None, :]
    dq_ptrs = dq_ptr + at + rows.to(tl.int64)[:, None] * stride_ot + dims[None, :]
    tl.store(dq_ptrs, (dq * scale).to(dq_ptr.dtype.element_ty), mask=inside)


@triton.jit
def document_start(starts_ptr, token, PACKED: tl.constexpr):
    """Where the document of a token starts."""
    start = 0
    if PACKED:
        start = tl.load(starts_ptr + token)
    return start


@triton.jit
def add_keys(
    dk, dv, k, v, q_ptr, dout_ptr, lse_ptr, delta_ptr, starts_ptr, stride_qt, stride_gt, cols, until, base, tokens, scale,
    PACKED: tl.constexpr, D: tl.constexpr, M: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What queries `base` to `base` + M add to dk and dv of keys `cols`; dk is still to be multiplied by the scale.

    A key is seen by the queries of its document from itself on and before `until`.
    """
    rows = base + tl.arange(0, M)
    q = rows_of(q_ptr, rows, stride_qt, tokens, D, BLOCK_D)
    dout = rows_of(dout_ptr, rows, stride_gt, tokens, D, BLOCK_D)
    lse = tl.load(lse_ptr + rows, mask=rows < tokens, other=0.0)
    delta = tl.load(delta_ptr + rows, mask=rows < tokens, other=0.0)
    seen = (rows[None, :] >= cols[:, None]) & (rows[None, :] < until[:, None])
    if PACKED:
        starts = tl.load(starts_ptr + rows, mask=rows < tokens, other=0)
        seen = seen & (starts[None, :] <= cols[:, None])
    exponent = kdot(k, tl.trans(q), PRECISION) * scale - lse[None, :]
    weights = tl.exp2(tl.where(seen, exponent, float("-inf")))
    dv += kdot(weights.to(dout.dtype), dout, PRECISION)
    dscores = weights * (kdot(v, tl.trans(dout), PRECISION) - delta[None, :])
    dk += kdot(dscores.to(q.dtype), q, PRECISION)
    return dk, dv


@triton.jit
def stream_sinks(
    q_ptr, k_ptr, v_ptr, dout_ptr, starts_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_gb, stride_gh, stride_gt, heads, per_group, tokens, sink, window, scale,
    PACKED: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One chunk's part of dk and dv of the sinks before its reach, [B, G, chunks, sink, D] in fp32.

    Rows of sinks that lie in its reach are not written. Grid: chunks, tiles of N sinks, B x G.
    """
    chunk, tile = tl.program_id(0), tl.program_id(1)
    groups = heads // per_group
    wide_batch = tl.cast(tl.program_id(2) // groups, tl.int64)
    group = tl.program_id(2) % groups
    wide_group = tl.cast(group, tl.int64)
    if PACKED:
        starts_ptr += wide_batch * tokens
    first = chunk * CHUNK
    start = document_start(starts_ptr, first, PACKED)
    # Keys before the reach of the chunk's first query.
    high = tl.minimum(start + sink, tl.maximum(start, first - window + 1))
    cols = start + tile * N + tl.arange(0, N)
    k = rows_of(k_ptr + wide_batch * stride_kb + wide_group * stride_kh, cols, stride_kt, high, D, BLOCK_D)
    v = rows_of(v_ptr + wide_batch * stride_vb + wide_group * stride_vh, cols, stride_vt, high, D, BLOCK_D)
    until = tl.where(cols < high, tokens, 0)
    stop = tl.where(start + tile * N < high, tl.minimum(first + CHUNK, tokens), first)
    dk = tl.zeros([N, BLOCK_D], tl.float32)
    dv = tl.zeros([N, BLOCK_D], tl.float32)
    for one in range(per_group):
        head = tl.cast(group * per_group + one, tl.int64)
        place = (wide_batch * heads + head) * tokens
        q_head = q_ptr + wide_batch * stride_qb + head * stride_qh
        dout_head = dout_ptr + wide_batch * stride_gb + head * stride_gh
        for base in range(first, stop, M):
            dk, dv = add_keys(
                dk, dv, k, v, q_head, dout_head, lse_ptr + place, delta_ptr + place, starts_ptr, stride_qt, stride_gt, cols,
                until, base, tokens, scale, PACKED, D, M, BLOCK_D, PRECISION,
            )  # fmt: skip
    dims = tl.arange(0, BLOCK_D)
    inside = (cols < high)[:, None] & (dims < D)[None, :]
    place = (tl.cast(tl.program_id(2), tl.int64) * tl.num_programs(0) + chunk) * sink
    at = (place + cols - start)[:, None] * D + dims[None, :]
    tl.store(dk_ptr + at, dk, mask=inside)
    tl.store(dv_ptr + at, dv, mask=inside)


@triton.jit
def stream_dkdv(
    q_ptr, k_ptr, v_ptr, dout_ptr, starts_ptr, lse_ptr, delta_ptr, part_k_ptr, part_v_ptr, dk_ptr, dv_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_gb, stride_gh, stride_gt, stride_db, stride_dh, stride_dt,
    heads, per_group, tokens, chunks, sink, window, scale, scale2,
    PACKED: tl.constexpr, SINKS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
    CHUNK: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """dk and dv, of equal strides. Grid: tiles of N keys, G, B; SINKS is whether there are any."""
    first, group = tl.program_id(0) * N, tl.program_id(1)
    wide_batch, wide_group = tl.cast(tl.program_id(2), tl.int64), tl.cast(group, tl.int64)
    if PACKED:
        starts_ptr += wide_batch * tokens
    cols = first + tl.arange(0, N)
    k = rows_of(k_ptr + wide_batch * stride_kb + wide_group * stride_kh, cols, stride_kt, tokens, D, BLOCK_D)
    v = rows_of(v_ptr + wide_batch * stride_vb + wide_group * stride_vh, cols, stride_vt, tokens, D, BLOCK_D)
    stop = tl.minimum(first + N, tokens) + window - 1
    until = tl.minimum(cols + window, tokens)
    holds_sinks = 0
    if SINKS:
        starts = tl.zeros([N], tl.int32)
        if PACKED:
            starts = tl.load(starts_ptr + cols, mask=cols < tokens, other=0)
        lasting = (cols - starts < sink) & (cols < tokens)
        until = tl.where(lasting, tokens, until)
        holds_sinks = tl.max(lasting.to(tl.int32), axis=0)
        # Queries beyond the window, up to the end of the chunk that the window's last one lies in.
        stop += holds_sinks * CHUNK
    stop = tl.minimum(stop, tokens)
    dk = tl.zeros([N, BLOCK_D], tl.float32)
    dv = tl.zeros([N, BLOCK_D], tl.float32)
    for one in range(per_group):
        head = tl.cast(group * per_group + one, tl.int64)
        place = (wide_batch * heads + head) * tokens
        q_head = q_ptr + wide_batch * stride_qb + head * stride_qh
        dout_head = dout_ptr + wide_batch * stride_gb + head * stride_gh
        for base in range(first // M * M, stop, M):
            here = until
            if SINKS:
                chunk_first = base // CHUNK * CHUNK
                low = tl.maximum(document_start(starts_ptr, chunk_first, PACKED), chunk_first - window + 1)
                here = tl.where(cols >= low, until, 0)
            dk, dv = add_keys(
                dk, dv, k, v, q_head, dout_head, lse_ptr + place, delta_ptr + place, starts_ptr, stride_qt, stride_gt, cols, here,
                base, tokens, scale2, PACKED, D, M, BLOCK_D, PRECISION,
            )  # fmt: skip
    dims = tl.arange(0, BLOCK_D)
    inside = (cols < tokens)[:, None] & (dims < D)[None, :]
    if SINKS:
        part = (wide_batch * (heads // per_group) + wide_group) * chunks * sink
        for chunk in range(first // CHUNK + 1, chunks * holds_sinks):
            start = document_start(starts_ptr, chunk * CHUNK, PACKED)
            low = tl.maximum(start, chunk * CHUNK - window + 1)
            rank = cols - start
            there = ((rank >= 0) & (rank < sink) & (cols < low))[:, None] & (dims < D)[None, :]
            at = (part + tl.cast(chunk, tl.int64) * sink + rank)[:, None] * D + dims[None, :]
            dk += tl.load(part_k_ptr + at, mask=there, other=0.0)
            dv += tl.load(part_v_ptr + at, mask=there, other=0.0)
    at = wide_batch * stride_db + wide_group * stride_dh + cols.to(tl.int64)[:, None] * stride_dt + dims[None, :]
    tl.store(dk_ptr + at, (dk * scale).to(dk_ptr.dtype.element_ty), mask=inside)
    tl.store(dv_ptr + at, dv.to(dv_ptr.dtype.element_ty), mask=inside)
