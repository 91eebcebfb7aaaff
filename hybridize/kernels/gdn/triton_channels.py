"""Kernels of `gdn` with a decay for each key channel: what two tokens of a chunk are to each other, and its gradients.

As in kernels/pairs.py: the triangle j < i is cut into squares, halving; a square lies beside a border between its columns and
its rows, so that both factors, q_i with the decay from the border to i and k_j with that from j to the border, are no larger than
q and k. Decays are running sums of negative numbers within pieces of a chunk: nothing overflows, nothing cancels.

Scratch beside that of triton_forward.py: q_into, k_into, k_out [B, U, H, L, N] in the dtype of v; totals [B, U, H, N], kk and qk
[B, U, H, L, L] in fp32, to be masked by whoever reads them.

Letters: as in triton_forward.py.
"""

import triton
import triton.language as tl

from hybridize.kernels._core.tl_utils import kdot
from hybridize.kernels.gdn.triton_backward import chunk_grads
from hybridize.kernels.gdn.triton_forward import chunk_documents, pair_mask


@triton.jit
def sums_within(log_decay, following, HALF: tl.constexpr, L: tl.constexpr, SLICE: tl.constexpr):
    """Log decay from the start of a token's piece of HALF tokens through it, and from after it to the piece's end.

    `following` is the log decay of the token after, [L, SLICE] like all of these.
    """
    if HALF == 1:
        return log_decay, tl.zeros((L, SLICE), tl.float32)
    last = ((tl.arange(0, L) + 1) % HALF == 0)[:, None]
    through = tl.cumsum(tl.reshape(log_decay, (L // HALF, HALF, SLICE)), axis=1)
    after = tl.cumsum(tl.reshape(tl.where(last, 0.0, following), (L // HALF, HALF, SLICE)), axis=1, reverse=True)
    return tl.reshape(through, (L, SLICE)), tl.reshape(after, (L, SLICE))


@triton.jit
def over_pieces(x, LENGTH: tl.constexpr, L: tl.constexpr, SLICE: tl.constexpr):
    """The sum over each piece of LENGTH tokens, for all its tokens, [L, SLICE]."""
    total = tl.sum(tl.reshape(x, (L // LENGTH, LENGTH, SLICE)), axis=1)
    return tl.reshape(total[:, None, :].broadcast_to(L // LENGTH, LENGTH, SLICE), (L, SLICE))


@triton.jit
def gdn_channels(
    q, k, g, segments, q_into, k_into, k_out, totals, kk, qk, tokens, chunks, heads, query_heads, key_heads, N,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_gb, stride_gt, stride_gh, stride_gn,
    stride_sb, stride_st,
    L: tl.constexpr, SLICE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The products of a chunk's keys and queries under their decays, and what reads and writes the states around it."""
    chunk, h, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    b = tl.cast(batch, tl.int64)
    place = (b * chunks + chunk) * heads + h
    i = tl.arange(0, L)
    t = tl.cast(chunk, tl.int64) * L + i
    queries = q + b * stride_qb + tl.cast(h // (heads // query_heads), tl.int64) * stride_qh + t[:, None] * stride_qt
    keys = k + b * stride_kb + tl.cast(h // (heads // key_heads), tl.int64) * stride_kh + t[:, None] * stride_kt
    decays = g + b * stride_gb + tl.cast(h, tl.int64) * stride_gh + t[:, None] * stride_gt
    k_pairs, q_pairs = tl.zeros((L, L), tl.float32), tl.zeros((L, L), tl.float32)
    for start in range(0, N, SLICE):
        n = start + tl.arange(0, SLICE)
        known = (n < N)[None, :]
        there = (t < tokens)[:, None] & known
        query = tl.load(queries + n[None, :], mask=there, other=0.0)
        key = tl.load(keys + n[None, :], mask=there, other=0.0)
        log_decay = tl.load(decays + n[None, :] * stride_gn, mask=there, other=0.0).to(tl.float32)
        more = ((t + 1 < tokens) & (i + 1 < L))[:, None] & known
        following = tl.load(decays + stride_gt + n[None, :] * stride_gn, mask=more, other=0.0).to(tl.float32)
        wide_query, wide_key = query.to(tl.float32), key.to(tl.float32)
        q_pairs += tl.where(i[:, None] == i[None, :], tl.sum(wide_query * wide_key, axis=1)[:, None], 0.0)
        for level in tl.static_range(0, 6):
            if (1 << level) < L:
                through, after = sums_within(log_decay, following, 1 << level, L, SLICE)
                late = ((i >> level) % 2 == 1)[:, None]
                rows = tl.where(late, tl.exp(through), 0.0)
                column = tl.trans(tl.where(late, 0.0, wide_key * tl.exp(after)).to(key.dtype))
                beside = (i[:, None] >> (level + 1)) == (i[None, :] >> (level + 1))
                k_pairs += tl.where(beside, kdot((wide_key * rows).to(key.dtype), column, PRECISION), 0.0)
                q_pairs += tl.where(beside, kdot((wide_query * rows).to(key.dtype), column, PRECISION), 0.0)
        through, after = sums_within(log_decay, following, L, L, SLICE)
        into, out, total = tl.exp(through), tl.exp(after), tl.exp(tl.sum(log_decay, axis=0))
        if segments is not None:
            own, before, last = chunk_documents(segments, stride_sb, stride_st, batch, chunk, tokens, L)
            into = tl.where((own == before)[:, None], into, 0.0)
            out = tl.where((own == last)[:, None], out, 0.0)
            total = tl.where(before == last, total, 0.0)
        to = place * (L * N) + i[:, None] * N + n[None, :]
        tl.store(q_into + to, (wide_query * into).to(q_into.dtype.element_ty), mask=known)
        tl.store(k_into + to, (wide_key * into).to(k_into.dtype.element_ty), mask=known)
        tl.store(k_out + to, (wide_key * out).to(k_out.dtype.element_ty), mask=known)
        tl.store(totals + place * N + n, total, mask=n < N)
    square = place * (L * L) + i[:, None] * L + i[None, :]
    tl.store(kk + square, k_pairs)
    tl.store(qk + square, q_pairs)


@triton.jit
def gdn_channel_grads(
    q, k, g, beta, segments, totals, kk, qk, states, errors, dstates, dv, dy, dq, dk, dg, dbeta,
    batches, tokens, chunks, heads, query_heads, key_heads, N, P,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_gb, stride_gt, stride_gh, stride_gn,
    stride_bb, stride_bt, stride_bh, stride_sb, stride_st,
    L: tl.constexpr, SLICE: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of q, k and the log decay for some key channels, and what these channels give to that of beta."""
    part, chunk, batch_head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    batch, h = batch_head // heads, batch_head % heads
    b = tl.cast(batch, tl.int64)
    place = (b * chunks + chunk) * heads + h
    i = tl.arange(0, L)
    n = part * SLICE + tl.arange(0, SLICE)
    t = tl.cast(chunk, tl.int64) * L + i
    real, known = t < tokens, (n < N)[None, :]
    there = real[:, None] & known
    token = ((b * tokens + t) * heads + h) * P
    reads, asks, q_state, k_state, k_next, kept = chunk_grads(  # pyright: ignore[reportGeneralTypeIssues]
        dy, dv, errors, states, dstates, place, token, real, n, N, P, L, SLICE, COLUMNS, PRECISION
    )
    at_query = b * stride_qb + tl.cast(h // (heads // query_heads), tl.int64) * stride_qh + t[:, None] * stride_qt + n[None, :]
    at_key = b * stride_kb + tl.cast(h // (heads // key_heads), tl.int64) * stride_kh + t[:, None] * stride_kt + n[None, :]
    query, key = tl.load(q + at_query, mask=there, other=0.0), tl.load(k + at_key, mask=there, other=0.0)
    wide_query, wide_key = query.to(tl.float32), key.to(tl.float32)
    decays = g + b * stride_gb + tl.cast(h, tl.int64) * stride_gh + t[:, None] * stride_gt + n[None, :] * stride_gn
    log_decay = tl.load(decays, mask=there, other=0.0).to(tl.float32)
    more = ((t + 1 < tokens) & (i + 1 < L))[:, None] & known
    following = tl.load(decays + stride_gt, mask=more, other=0.0).to(tl.float32)
    strength = tl.load(beta + b * stride_bb + t * stride_bt + h * stride_bh, mask=real, other=0.0).to(tl.float32)
    mask = pair_mask(segments, stride_sb, stride_st, batch, chunk, tokens, L)
    reads, asks = tl.where(mask, reads, 0.0), tl.where(mask & (i[:, None] > i[None, :]), asks, 0.0)

    through, after = sums_within(log_decay, following, L, L, SLICE)
    into, out = tl.exp(through), tl.exp(after)
    if segments is not None:
        own, before, last = chunk_documents(segments, stride_sb, stride_st, batch, chunk, tokens, L)
        into = tl.where((own == before)[:, None], into, 0.0)
        out = tl.where((own == last)[:, None], out, 0.0)
    leaving = tl.sum(k_next * wide_key * out, axis=1)
    if part == 0:
        square = place * (L * L) + i[:, None] * L + i[None, :]
        leaving += tl.sum(reads * tl.load(qk + square) + asks * tl.load(kk + square), axis=0)
    tl.store(dbeta + (part * batches + b) * tokens * heads + t * heads + h, leaving, mask=real)

    reads, asks = reads * strength[None, :], asks * strength[None, :]
    own_read = tl.sum(tl.where(i[:, None] == i[None, :], reads, 0.0), axis=1)[:, None]
    dquery = into * q_state + own_read * wide_key
    dkey = into * k_state + out * strength[:, None] * k_next + own_read * wide_query
    # Gradients of the two running sums, from whole chunks down to single tokens, and what falls to each token on the way.
    dthrough = into * (q_state * wide_query + k_state * wide_key)
    dafter = out * strength[:, None] * k_next * wide_key
    dlog = tl.zeros((L, SLICE), tl.float32) + (tl.load(totals + place * N + n, mask=n < N, other=0.0) * kept)[None, :]
    for step in tl.static_range(0, 6):
        if (1 << (5 - step)) < L:
            late = ((i >> (5 - step)) % 2 == 1)[:, None]
            to_early = over_pieces(tl.where(late, dthrough, 0.0), 2 << (5 - step), L, SLICE)
            to_late = over_pieces(tl.where(late, 0.0, dafter), 2 << (5 - step), L, SLICE)
            dlog += tl.where(late, to_late, to_early)
            through, after = sums_within(log_decay, following, 1 << (5 - step), L, SLICE)
            rows, columns = tl.where(late, tl.exp(through), 0.0), tl.where(late, 0.0, tl.exp(after))
            beside = (i[:, None] >> (6 - step)) == (i[None, :] >> (6 - step))
            q_pairs, k_pairs = tl.where(beside, reads, 0.0).to(key.dtype), tl.where(beside, asks, 0.0).to(key.dtype)
            column = (wide_key * columns).to(key.dtype)
            drow = rows * kdot(q_pairs, column, PRECISION)
            dquery += drow
            dthrough += drow * wide_query
            drow = rows * kdot(k_pairs, column, PRECISION)
            dkey += drow
            dthrough += drow * wide_key
            dcolumn = kdot(tl.trans(q_pairs), (wide_query * rows).to(key.dtype), PRECISION)
            dcolumn = columns * (dcolumn + kdot(tl.trans(k_pairs), (wide_key * rows).to(key.dtype), PRECISION))
            dkey += dcolumn
            dafter += dcolumn * wide_key
    dlog += dthrough
    to = ((b * tokens + t[:, None]) * heads + h) * N + n[None, :]
    tl.store(dq + to, dquery.to(dq.dtype.element_ty), mask=there)
    tl.store(dk + to, dkey.to(dk.dtype.element_ty), mask=there)
    tl.store(dg + to, dlog, mask=there)
