"""Kernels of `gdn`, backward: what the outputs ask of the corrections, gradients of the states, gradients of the inputs.

With D, U = beta D, S, S' and the chunk's system as in triton_forward.py, and dS' the gradient of the state after the chunk:
    dU = qk^T dy + k_out dS',   W = (1 + kk diag(beta))^-T beta dU,   dv = W
    dS = total dS' + q_into^T dy - k_into^T W
    dqk = dy U^T,   dkk = -W U^T below the diagonal,   dq_into = dy S^T,   dk_into = -W S^T,   dk_out = U dS'^T
beta enters where U = beta D is read: dbeta_j is the sum of all these products of gradient and value with D in place of U.
A log decay's gradient is the plain sum over all that passes it, as in kernels/pairs.py. The forward's scratch is computed anew.

Scratch beside that of the forward, in the dtype of v, in chunks: asked [B, U, H, L, P] (qk^T dy), dstates [B, U, H, N, P] (dS').
Heads are shared in three independent ways, so no one loop over a group sums all gradients: each output head writes its
own, in fp32 where heads are shared, and these are added afterwards.

Letters: as in triton_forward.py.
"""

import triton
import triton.language as tl

from hybridize.kernels._core.tl_utils import kdot
from hybridize.kernels.gdn.triton_forward import INTO, OUT, decay_between, pair_mask


@triton.jit
def gdn_output_grads(
    q, k, gates, segments, products, dy, asked, tokens, chunks, heads, query_heads, key_heads, N, P,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_sb, stride_st,
    L: tl.constexpr, SLICE: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """qk^T dy: what the outputs of a chunk ask of its corrections."""
    columns, chunk, batch_head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    batch, h = batch_head // heads, batch_head % heads
    b = tl.cast(batch, tl.int64)
    place = (b * chunks + chunk) * heads + h
    i = tl.arange(0, L)
    p = columns * COLUMNS + tl.arange(0, COLUMNS)
    t = tl.cast(chunk, tl.int64) * L + i
    real, within = (t < tokens)[:, None], (p < P)[None, :]
    mask = pair_mask(segments, stride_sb, stride_st, batch, chunk, tokens, L)
    if CHANNELS:
        pairs = tl.where(mask, tl.load(products + place * (L * L) + i[:, None] * L + i[None, :]), 0.0)
    else:
        queries = q + b * stride_qb + tl.cast(h // (heads // query_heads), tl.int64) * stride_qh + t[:, None] * stride_qt
        keys = k + b * stride_kb + tl.cast(h // (heads // key_heads), tl.int64) * stride_kh + t[:, None] * stride_kt
        pairs = tl.zeros((L, L), tl.float32)
        for start in range(0, N, SLICE):
            n = start + tl.arange(0, SLICE)
            there = real & (n < N)[None, :]
            query = tl.load(queries + n[None, :], mask=there, other=0.0)
            key = tl.load(keys + n[None, :], mask=there, other=0.0)
            pairs += kdot(query, tl.trans(key), PRECISION)
        pairs = pairs * decay_between(gates + place * (4 * L), mask, L)
    grad = tl.load(dy + ((b * tokens + t[:, None]) * heads + h) * P + p[None, :], mask=real & within, other=0.0)
    found = kdot(tl.trans(pairs.to(grad.dtype)), grad, PRECISION)
    tl.store(asked + place * (L * P) + i[:, None] * P + p[None, :], found.to(asked.dtype.element_ty), mask=within)


@triton.jit
def gdn_state_grads(
    q, k, k_into, beta, gates, totals, inverse, asked, dy, dlast, dstates, dv, dfirst,
    tokens, chunks, heads, query_heads, key_heads, N, P,
    stride_qb, stride_qu, stride_qh, stride_qt, stride_kb, stride_ku, stride_kh, stride_kt, stride_bb, stride_bt, stride_bh,
    L: tl.constexpr, KEYS: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients of the states, last to first, and with them those of the values, for some columns of the state."""
    columns, h, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i, n = tl.arange(0, L), tl.arange(0, KEYS)
    p = columns * COLUMNS + tl.arange(0, COLUMNS)
    b = tl.cast(batch, tl.int64)
    inside = (n < N)[:, None] & (p < P)[None, :]
    square = n[:, None] * P + p[None, :]
    dstate = tl.load(dlast + (b * heads + h) * N * P + square, mask=inside, other=0.0)
    queries = q + b * stride_qb + tl.cast(h // (heads // query_heads), tl.int64) * stride_qh
    keys = b * stride_kb + tl.cast(h // (heads // key_heads), tl.int64) * stride_kh
    strengths = beta + b * stride_bb + h * stride_bh
    for step in range(chunks):
        chunk = chunks - 1 - step
        place = (b * chunks + chunk) * heads + h
        t = tl.cast(chunk, tl.int64) * L + i
        real, within = t < tokens, (p < P)[None, :]
        there = real[:, None] & (n < N)[None, :]
        tl.store(dstates + place * N * P + square, dstate.to(dstates.dtype.element_ty), mask=inside)
        at = keys + tl.cast(chunk, tl.int64) * stride_ku + i[:, None] * stride_kt + n[None, :]
        key = tl.load(k + at, mask=there, other=0.0)
        written = kdot(key, dstate.to(key.dtype), PRECISION)
        if not CHANNELS:
            written = written * tl.load(gates + place * (4 * L) + OUT * L + i)[:, None]
        reading = tl.load(asked + place * (L * P) + i[:, None] * P + p[None, :], mask=within, other=0.0)
        dcorrection = written + reading.to(tl.float32)
        strength = tl.load(strengths + t * stride_bt, mask=real, other=0.0).to(tl.float32)
        solve = tl.load(inverse + place * (L * L) + i[:, None] * L + i[None, :])
        dvalue = kdot(tl.trans(solve), (strength[:, None] * dcorrection).to(solve.dtype), PRECISION)
        token = ((b * tokens + t[:, None]) * heads + h) * P + p[None, :]
        tl.store(dv + token, dvalue.to(dv.dtype.element_ty), mask=real[:, None] & within)
        grad = tl.load(dy + token, mask=real[:, None] & within, other=0.0)
        at_query = tl.cast(chunk, tl.int64) * stride_qu + i[:, None] * stride_qt + n[None, :]
        query = tl.load(queries + at_query, mask=there, other=0.0)
        if CHANNELS:
            total = tl.load(totals + place * N + n, mask=n < N, other=0.0)
            dstate = dstate * total[:, None]
            key = tl.load(k_into + at, mask=there, other=0.0)
        else:
            into = tl.load(gates + place * (4 * L) + INTO * L + i)[:, None]
            dstate = dstate * tl.load(gates + place * (4 * L) + INTO * L + L - 1)
            grad, dvalue = (into * grad.to(tl.float32)).to(key.dtype), into * dvalue
        dstate += kdot(tl.trans(query), grad, PRECISION)
        dstate -= kdot(tl.trans(key), dvalue.to(key.dtype), PRECISION)
    tl.store(dfirst + (b * heads + h) * N * P + square, dstate, mask=inside)


@triton.jit
def chunk_grads(
    dy, dv, errors, states, dstates, place, token, real, n, N, P, L: tl.constexpr, SLICE: tl.constexpr, COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Sums over the value dim: dy D^T, -W D^T [L, L]; dy S^T, -W S^T, D dS'^T [L, SLICE]; the diagonal of S dS'^T [SLICE].

    `place` counts chunks of heads, `token` is where their tokens' rows begin in dy and dv [L].
    """
    i = tl.arange(0, L)
    reads, asks = tl.zeros((L, L), tl.float32), tl.zeros((L, L), tl.float32)
    q_state, k_state = tl.zeros((L, SLICE), tl.float32), tl.zeros((L, SLICE), tl.float32)
    k_next = tl.zeros((L, SLICE), tl.float32)
    kept = tl.zeros((SLICE,), tl.float32)
    for start in range(0, P, COLUMNS):
        p = start + tl.arange(0, COLUMNS)
        within = (p < P)[None, :]
        grad = tl.load(dy + token[:, None] + p[None, :], mask=real[:, None] & within, other=0.0)
        dvalue = tl.load(dv + token[:, None] + p[None, :], mask=real[:, None] & within, other=0.0).to(grad.dtype)
        error = tl.load(errors + place * (L * P) + i[:, None] * P + p[None, :], mask=within, other=0.0)
        rows = (n < N)[:, None] & within
        state = tl.load(states + place * N * P + n[:, None] * P + p[None, :], mask=rows, other=0.0)
        dstate = tl.load(dstates + place * N * P + n[:, None] * P + p[None, :], mask=rows, other=0.0)
        reads += kdot(grad, tl.trans(error), PRECISION)
        asks -= kdot(dvalue, tl.trans(error), PRECISION)
        q_state += kdot(grad, tl.trans(state), PRECISION)
        k_state -= kdot(dvalue, tl.trans(state), PRECISION)
        k_next += kdot(error, tl.trans(dstate), PRECISION)
        kept += tl.sum(state.to(tl.float32) * dstate.to(tl.float32), axis=1)
    return reads, asks, q_state, k_state, k_next, kept


@triton.jit
def gdn_input_grads(
    q, k, beta, gates, segments, states, errors, dstates, dv, dy, dq, dk, dscalars,
    batches, tokens, chunks, heads, query_heads, key_heads, N, P,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_bb, stride_bt, stride_bh, stride_sb, stride_st,
    L: tl.constexpr, SLICE: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of q and k for some key channels, and what these channels give to those of beta and of the log decay."""
    part, chunk, batch_head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    batch, h = batch_head // heads, batch_head % heads
    b = tl.cast(batch, tl.int64)
    place = (b * chunks + chunk) * heads + h
    i = tl.arange(0, L)
    n = part * SLICE + tl.arange(0, SLICE)
    t = tl.cast(chunk, tl.int64) * L + i
    real = t < tokens
    token = ((b * tokens + t) * heads + h) * P
    reads, asks, q_state, k_state, k_next, kept = chunk_grads(  # pyright: ignore[reportGeneralTypeIssues]
        dy, dv, errors, states, dstates, place, token, real, n, N, P, L, SLICE, COLUMNS, PRECISION
    )
    there = real[:, None] & (n < N)[None, :]
    at_query = b * stride_qb + tl.cast(h // (heads // query_heads), tl.int64) * stride_qh + t[:, None] * stride_qt + n[None, :]
    at_key = b * stride_kb + tl.cast(h // (heads // key_heads), tl.int64) * stride_kh + t[:, None] * stride_kt + n[None, :]
    query, key = tl.load(q + at_query, mask=there, other=0.0), tl.load(k + at_key, mask=there, other=0.0)
    strength = tl.load(beta + b * stride_bb + t * stride_bt + h * stride_bh, mask=real, other=0.0).to(tl.float32)
    into, out = tl.load(gates + place * (4 * L) + INTO * L + i), tl.load(gates + place * (4 * L) + OUT * L + i)
    total = tl.load(gates + place * (4 * L) + INTO * L + L - 1)

    between = decay_between(gates + place * (4 * L), pair_mask(segments, stride_sb, stride_st, batch, chunk, tokens, L), L)
    below = i[:, None] > i[None, :]
    reads, asks = reads * between, tl.where(below, asks * between, 0.0)
    used = reads * kdot(query, tl.trans(key), PRECISION) + asks * kdot(key, tl.trans(key), PRECISION)
    wide_query, wide_key = query.to(tl.float32), key.to(tl.float32)
    # By token: what passes from the state before the chunk, and what passes on to the state after it.
    entering = into * tl.sum(q_state * wide_query + k_state * wide_key, axis=1)
    leaving = out * tl.sum(k_next * wide_key, axis=1)
    dbeta = tl.sum(used, axis=0) + leaving
    leaving, used = strength * leaving, tl.where(below, used * strength[None, :], 0.0)
    # passed[i, t]: from the tokens before t to token i; the decay of t acts on it where i >= t.
    passed = tl.cumsum(used, axis=1) - used + entering[:, None]
    dlog = tl.sum(tl.where(i[:, None] >= i[None, :], passed, 0.0), axis=0)
    dlog += tl.sum(tl.where(below, leaving[None, :], 0.0), axis=1) + total * tl.sum(kept, axis=0)
    scalars = dscalars + (part * 2 * batches + b) * tokens * heads + t * heads + h
    tl.store(scalars, dlog, mask=real)
    tl.store(scalars + tl.cast(batches, tl.int64) * tokens * heads, dbeta, mask=real)

    reads, asks = reads * strength[None, :], asks * strength[None, :]
    dquery = kdot(reads.to(key.dtype), key, PRECISION) + into[:, None] * q_state
    dkey = kdot(tl.trans(reads.to(key.dtype)), query, PRECISION)
    dkey += kdot((asks + tl.trans(asks)).to(key.dtype), key, PRECISION)
    dkey += into[:, None] * k_state + (out * strength)[:, None] * k_next
    to = ((b * tokens + t[:, None]) * heads + h) * N + n[None, :]
    tl.store(dq + to, dquery.to(dq.dtype.element_ty), mask=there)
    tl.store(dk + to, dkey.to(dk.dtype.element_ty), mask=there)
