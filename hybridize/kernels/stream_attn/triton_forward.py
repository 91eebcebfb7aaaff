"""Sink + window attention forward, and its decode step, as Triton kernels.

A tile of queries reads two ranges of keys: the window that its rows reach, and what lies before it of the sinks of ONE document.
A document that starts inside the tile has its sinks inside the window's range, so that packed rows cost no search.

Letters: B batch, H query heads, G key/value heads, T tokens, D head width; M queries and N keys of a tile.
"""

import triton
import triton.language as tl

from hybridize.kernels._core.tl_utils import kdot

# Below every score, and finite, so that a row that has seen nothing yet is not a difference of infinities.
LOWEST = tl.constexpr(-1.0e30)


@triton.jit
def visible(rows, cols, starts, sink, window, stop, PACKED: tl.constexpr):
    """Whether tokens `rows` [M] see tokens `cols` [N] that are below `stop`; `starts` [M] is where the rows' documents start."""
    near = tl.maximum(rows - window + 1, starts)
    # What is past the stop is later than every row.
    cols = tl.where(cols < stop, cols, 2147483647)[None, :]
    seen = (cols <= rows[:, None]) & ((cols >= near[:, None]) | (cols < (starts + sink)[:, None]))
    if PACKED:
        seen = seen & (cols >= starts[:, None])
    return seen


@triton.jit
def ranges(starts_ptr, first, tokens, sink, window, PACKED: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    """Keys that the tile of queries from `first` on reads.

    (start of the first row's document, end of its sinks before the window, first key of the window, first and last border of the
    tiles that all rows see whole, one past the last key).
    """
    stop = tl.minimum(first + M, tokens)
    start = 0
    last_start = 0
    if PACKED:
        start = tl.load(starts_ptr + first)
        last_start = tl.load(starts_ptr + stop - 1)
    low = tl.maximum(tl.maximum(start, first - window + 1), 0) // N * N
    sinks = tl.maximum(start, tl.minimum(start + sink, low))
    whole = (tl.maximum(tl.maximum(low, stop - window), last_start) + N - 1) // N * N
    edge = (first + 1) // N * N
    some = whole < edge
    whole = tl.where(some, whole, stop)
    edge = tl.where(some, edge, stop)
    return start, sinks, low, whole, edge, stop


@triton.jit
def rows_of(pointer, rows, stride, tokens, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """[rows, BLOCK_D] of one head; 0 outside of the tokens and of the head's width."""
    dims = tl.arange(0, BLOCK_D)
    inside = (rows < tokens)[:, None] & (dims < D)[None, :]
    return tl.load(pointer + rows.to(tl.int64)[:, None] * stride + dims[None, :], mask=inside, other=0.0)


@triton.jit
def attend(
    acc, top, total, q, k_ptr, v_ptr, stride_k, stride_v, rows, starts, first, stop, tokens, sink, window, scale,
    MASKED: tl.constexpr, PACKED: tl.constexpr, D: tl.constexpr, N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Keys `first` to `stop` into the running softmax: weighted sum of values, maximum and sum, in base 2."""
    for base in range(first, stop, N):
        cols = base + tl.arange(0, N)
        k = rows_of(k_ptr, cols, stride_k, tokens, D, BLOCK_D)
        scores = kdot(q, tl.trans(k), PRECISION) * scale
        if MASKED:
            scores = tl.where(visible(rows, cols, starts, sink, window, stop, PACKED), scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, axis=1))
        weights = tl.exp2(scores - higher[:, None])
        shrink = tl.exp2(top - higher)
        total = total * shrink + tl.sum(weights, axis=1)
        v = rows_of(v_ptr, cols, stride_v, tokens, D, BLOCK_D)
        acc = acc * shrink[:, None] + kdot(weights.to(v.dtype), v, PRECISION)
        top = higher
    return acc, top, total


@triton.jit
def stream_forward(
    q_ptr, k_ptr, v_ptr, starts_ptr, out_ptr, lse_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_ob, stride_oh, stride_ot, heads, per_group, tokens, sink, window, scale,
    PACKED: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """out [B, H, T, D] and lse [B, H, T] (base 2). `scale` is times log2(e). Grid: tiles of M queries, H, B."""
    # The first tiles of a text have the least to do, so they come last.
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * M
    head, batch = tl.program_id(1), tl.program_id(2)
    group = tl.cast(head // per_group, tl.int64)
    wide_head, wide_batch = tl.cast(head, tl.int64), tl.cast(batch, tl.int64)
    q_ptr += wide_batch * stride_qb + wide_head * stride_qh
    k_ptr += wide_batch * stride_kb + group * stride_kh
    v_ptr += wide_batch * stride_vb + group * stride_vh
    if PACKED:
        starts_ptr += wide_batch * tokens
    rows = first + tl.arange(0, M)
    starts = tl.zeros([M], tl.int32)
    if PACKED:
        starts = tl.load(starts_ptr + rows, mask=rows < tokens, other=0)
    start, sinks, low, whole, edge, stop = ranges(starts_ptr, first, tokens, sink, window, PACKED, M, N)
    q = rows_of(q_ptr, rows, stride_qt, tokens, D, BLOCK_D)
    acc = tl.zeros([M, BLOCK_D], tl.float32)
    top = tl.full([M], LOWEST, tl.float32)
    total = tl.zeros([M], tl.float32)
    acc, top, total = attend(
        acc, top, total, q, k_ptr, v_ptr, stride_kt, stride_vt, rows, starts, start, sinks, tokens, sink, window, scale,
        True, PACKED, D, N, BLOCK_D, PRECISION,
    )  # fmt: skip
    acc, top, total = attend(
        acc, top, total, q, k_ptr, v_ptr, stride_kt, stride_vt, rows, starts, low, whole, tokens, sink, window, scale,
        True, PACKED, D, N, BLOCK_D, PRECISION,
    )  # fmt: skip
    acc, top, total = attend(
        acc, top, total, q, k_ptr, v_ptr, stride_kt, stride_vt, rows, starts, whole, edge, tokens, sink, window, scale,
        False, PACKED, D, N, BLOCK_D, PRECISION,
    )  # fmt: skip
    acc, top, total = attend(
        acc, top, total, q, k_ptr, v_ptr, stride_kt, stride_vt, rows, starts, edge, stop, tokens, sink, window, scale,
        True, PACKED, D, N, BLOCK_D, PRECISION,
    )  # fmt: skip
    dims = tl.arange(0, BLOCK_D)
    inside = (rows < tokens)[:, None] & (dims < D)[None, :]
    # Rows past the text have seen nothing.
    total = tl.where(rows < tokens, total, 1.0)
    out_ptr += wide_batch * stride_ob + wide_head * stride_oh
    out_ptrs = out_ptr + rows.to(tl.int64)[:, None] * stride_ot + dims[None, :]
    tl.store(out_ptrs, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=inside)
    lse_ptr += (wide_batch * heads + wide_head) * tokens
    tl.store(lse_ptr + rows, top + tl.log2(total), mask=rows < tokens)


@triton.jit
def stream_step(
    q_ptr, k_ptr, v_ptr, counts_ptr, out_ptr, lse_ptr,
    stride_qb, stride_qh, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    heads, per_group, slots, share, scale,
    COUNTED: tl.constexpr, SPLIT: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """One query a head over `share` slots of a ring. Grid: splits, G x tiles of M heads of a group, B.

    out [B, splits, H, D] in fp32 and lse [B, splits, H] (base 2) where SPLIT, else out [B, H, D] in its dtype.
    """
    split, batch = tl.program_id(0), tl.program_id(2)
    row_tiles = (per_group + M - 1) // M
    group, tile = tl.program_id(1) // row_tiles, tl.program_id(1) % row_tiles
    wide_batch, wide_group = tl.cast(batch, tl.int64), tl.cast(group, tl.int64)
    within = tile * M + tl.arange(0, M)
    real = within < per_group
    head = group * per_group + within
    dims = tl.arange(0, BLOCK_D)
    inside = real[:, None] & (dims < D)[None, :]
    q = tl.load(q_ptr + wide_batch * stride_qb + head[:, None] * stride_qh + dims[None, :], mask=inside, other=0.0)
    k_ptr += wide_batch * stride_kb + wide_group * stride_kh
    v_ptr += wide_batch * stride_vb + wide_group * stride_vh
    first = split * share
    stop = tl.minimum(first + share, slots)
    if COUNTED:
        stop = tl.minimum(stop, tl.load(counts_ptr + batch).to(tl.int32))
    acc = tl.zeros([M, BLOCK_D], tl.float32)
    top = tl.full([M], LOWEST, tl.float32)
    total = tl.zeros([M], tl.float32)
    for base in range(first, stop, N):
        cols = base + tl.arange(0, N)
        k = rows_of(k_ptr, cols, stride_ks, stop, D, BLOCK_D)
        scores = kdot(q, tl.trans(k), PRECISION) * scale
        scores = tl.where((cols < stop)[None, :], scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, axis=1))
        weights = tl.exp2(scores - higher[:, None])
        shrink = tl.exp2(top - higher)
        total = total * shrink + tl.sum(weights, axis=1)
        v = rows_of(v_ptr, cols, stride_vs, stop, D, BLOCK_D)
        acc = acc * shrink[:, None] + kdot(weights.to(v.dtype), v, PRECISION)
        top = higher
    # A split past the filled slots has seen nothing: it weighs 2^LOWEST, which is 0.
    seen = tl.where(total > 0.0, total, 1.0)
    place = (wide_batch * tl.num_programs(0) + split) * heads + head
    tl.store(out_ptr + place[:, None] * D + dims[None, :], (acc / seen[:, None]).to(out_ptr.dtype.element_ty), mask=inside)
    if SPLIT:
        tl.store(lse_ptr + place, top + tl.log2(seen), mask=real)


@triton.jit
def stream_combine(
    part_ptr, lse_ptr, out_ptr, heads, splits, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_SPLITS: tl.constexpr
):  # fmt: skip
    """Weighs the splits' outputs [B, splits, H, D] by their sums: out [B, H, D]. Grid: H, B."""
    head, batch = tl.program_id(0), tl.cast(tl.program_id(1), tl.int64)
    split = tl.arange(0, BLOCK_SPLITS)
    dims = tl.arange(0, BLOCK_D)
    place = (batch * splits + split) * heads + head
    lse = tl.load(lse_ptr + place, mask=split < splits, other=LOWEST)
    weights = tl.exp2(lse - tl.max(lse, axis=0))
    inside = (split < splits)[:, None] & (dims < D)[None, :]
    parts = tl.load(part_ptr + place[:, None] * D + dims[None, :], mask=inside, other=0.0)
    out = tl.sum(parts * weights[:, None], axis=0) / tl.sum(weights, axis=0)
    tl.store(out_ptr + (batch * heads + head) * D + dims, out.to(out_ptr.dtype.element_ty), mask=dims < D)
