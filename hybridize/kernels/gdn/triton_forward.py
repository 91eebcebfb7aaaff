"""Kernels of `gdn`, forward: decays of a chunk, its triangular system, the states from chunk to chunk, the outputs.

The system is written for the errors D that tokens see, U = beta D their corrections, S the state before the chunk:
    (1 + kk diag(beta)) D = v - k_into S,   y = q_into S + qk U,   S' = total S + k_out^T U
so that D serves all gradients and nothing is divided by beta. Its inverse is all that the chunk's keys leave behind.
Where the decay is one a head, k_into and k_out are k itself, and the rows of the products are scaled after them. With a decay
for each channel they are tensors of their own: see triton_channels.py.

Scratch is cut in chunks and padded to whole ones, so that its loads need no mask: rows beyond the last token hold zeros.
    gates   [B, U, H, 4, L] fp32: running log decay as two numbers, its high part and the rest; decay from the incoming state
            to the token; from the token to the outgoing state
    inverse [B, U, H, L, L];   errors [B, U, H, L, P];   states [B, U, H, N, P] before each chunk; all in the dtype of v

Letters: B batch, T tokens, U chunks, L tokens of a chunk, H output heads, Q, G, X heads of q, k, v, N key dim, P value dim.
"""

import triton
import triton.language as tl

from hybridize.kernels._core.tl_utils import kdot, masked_exp

HIGH, REST, INTO, OUT = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)


@triton.jit
def chunk_documents(segments, stride_b, stride_t, batch, chunk, tokens, L: tl.constexpr):
    """Document ids of a chunk's tokens [L], of the token before it, and of its last; beyond the last token its own."""
    ids = segments + tl.cast(batch, tl.int64) * stride_b
    t = tl.cast(chunk, tl.int64) * L
    own = tl.load(ids + tl.minimum(t + tl.arange(0, L), tokens - 1) * stride_t)
    return own, tl.load(ids + tl.maximum(t - 1, 0) * stride_t), tl.load(ids + tl.minimum(t + L, tokens) * stride_t - stride_t)


@triton.jit
def pair_mask(segments, stride_sb, stride_st, batch, chunk, tokens, L: tl.constexpr):
    """[L, L]: token i may read what token j <= i wrote."""
    i = tl.arange(0, L)
    mask = i[:, None] >= i[None, :]
    if segments is not None:
        ids = chunk_documents(segments, stride_sb, stride_st, batch, chunk, tokens, L)
        own = ids[0]
        mask = mask & (own[:, None] == own[None, :])
    return mask


@triton.jit
def decay_between(gates, mask, L: tl.constexpr):
    """exp(c_i - c_j) where `mask` holds, else 0, [L, L]; `gates` points to the chunk's four rows."""
    i = tl.arange(0, L)
    high, rest = tl.load(gates + HIGH * L + i), tl.load(gates + REST * L + i)
    return masked_exp((high[:, None] - high[None, :]) + (rest[:, None] - rest[None, :]), mask)


@triton.jit
def unit_inverse(a, L: tl.constexpr, PRECISION: tl.constexpr):
    """(1 + a)^-1 for `a` [L, L] fp32, zero on and above the diagonal; L is 16, 32 or 64.

    Forward substitution in the squares of 16 on the diagonal, which are then merged two by two. (Sums of powers of `a` overflow
    where keys repeat.)
    """
    n: tl.constexpr = L // 16
    i = tl.arange(0, 16)
    b = tl.arange(0, n)
    own = (b[:, None, None, None] == b[None, None, :, None]).broadcast_to(n, 16, n, 16)
    diagonal = tl.sum(tl.where(own, tl.reshape(a, (n, 16, n, 16)), 0.0), axis=2)
    x = tl.where((i[:, None] == i[None, :])[None, :, :], tl.full((n, 16, 16), 1.0, tl.float32), 0.0)
    for row in range(1, 16):
        is_row = i[None, :, None] == row
        factors = tl.sum(tl.where(is_row, diagonal, 0.0), axis=1)
        known = tl.sum(factors[:, :, None] * x, axis=1)
        x = x - tl.where(is_row, known[:, None, :], 0.0)
    inverse = tl.reshape(tl.where(own, x[:, :, None, :].broadcast_to(n, 16, n, 16), 0.0), (L, L))
    j = tl.arange(0, L)
    for level in tl.static_range(4, 6):
        if (1 << level) < L:
            row, column = j[:, None] >> level, j[None, :] >> level
            beside = tl.where((row == column + 1) & (row % 2 == 1), a, 0.0)
            inverse = inverse - kdot(kdot(inverse, beside, PRECISION), inverse, PRECISION)
    return inverse


@triton.jit
def gdn_gates(
    g, segments, gates, tokens, chunks, heads, stride_gb, stride_gt, stride_gh, stride_sb, stride_st,
    L: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Running log decays of a chunk, one a head."""
    chunk, group, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i = tl.arange(0, L)
    h = group * HEADS + tl.arange(0, HEADS)
    t = tl.cast(chunk, tl.int64) * L + i
    there = (t < tokens)[:, None] & (h < heads)[None, :]
    at = g + tl.cast(batch, tl.int64) * stride_gb + t[:, None] * stride_gt + h[None, :] * stride_gh
    log_decay = tl.load(at, mask=there, other=0.0).to(tl.float64)
    # A chunk that decays by e^-3000 and then by e^-0.0001 needs more digits than fp32 has.
    running = tl.cumsum(log_decay, axis=0)
    total = tl.sum(log_decay, axis=0)
    high = running.to(tl.float32)
    into = tl.exp(high)
    out = tl.exp((total[None, :] - running).to(tl.float32))
    if segments is not None:
        own, before, last = chunk_documents(segments, stride_sb, stride_st, batch, chunk, tokens, L)
        into = tl.where((own == before)[:, None], into, 0.0)
        out = tl.where((own == last)[:, None], out, 0.0)
    to = gates + (((tl.cast(batch, tl.int64) * chunks + chunk) * heads + h[None, :]) * (4 * L) + i[:, None])
    known = (h < heads)[None, :]
    tl.store(to + HIGH * L, high, mask=known)
    tl.store(to + REST * L, (running - high.to(tl.float64)).to(tl.float32), mask=known)
    tl.store(to + INTO * L, into, mask=known)
    tl.store(to + OUT * L, out, mask=known)


@triton.jit
def gdn_solve(
    k, beta, gates, segments, products, inverse, tokens, chunks, heads, key_heads, N,
    stride_kb, stride_kt, stride_kh, stride_bb, stride_bt, stride_bh, stride_sb, stride_st,
    L: tl.constexpr, SLICE: tl.constexpr, CHANNELS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Invert the system of a chunk for all output heads of a key head: their keys' products are computed once."""
    chunk, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i = tl.arange(0, L)
    t = tl.cast(chunk, tl.int64) * L
    group = heads // key_heads
    mask = pair_mask(segments, stride_sb, stride_st, batch, chunk, tokens, L)
    strictly = mask & (i[:, None] > i[None, :])
    square = i[:, None] * L + i[None, :]
    kk = tl.zeros((L, L), tl.float32)
    if not CHANNELS:
        keys = k + tl.cast(batch, tl.int64) * stride_kb + t * stride_kt + tl.cast(head, tl.int64) * stride_kh
        for start in range(0, N, SLICE):
            n = start + tl.arange(0, SLICE)
            there = (t + i < tokens)[:, None] & (n < N)[None, :]
            part = tl.load(keys + i[:, None] * stride_kt + n[None, :], mask=there, other=0.0)
            kk += kdot(part, tl.trans(part), PRECISION)
    for member in range(group):
        h = head * group + member
        place = (tl.cast(batch, tl.int64) * chunks + chunk) * heads + h
        strength = tl.load(
            beta + tl.cast(batch, tl.int64) * stride_bb + (t + i) * stride_bt + h * stride_bh, mask=t + i < tokens, other=0.0
        ).to(tl.float32)
        if CHANNELS:
            own = tl.where(strictly, tl.load(products + place * (L * L) + square), 0.0)
        else:
            own = kk * decay_between(gates + place * (4 * L), strictly, L)
        found = unit_inverse(own * strength[None, :], L, PRECISION)
        tl.store(inverse + place * (L * L) + square, found)


@triton.jit
def gdn_states(
    k, k_into, v, beta, gates, totals, inverse, first, states, errors, last, tokens, chunks, heads, key_heads, value_heads, N, P,
    stride_kb, stride_ku, stride_kh, stride_kt, stride_vb, stride_vt, stride_vh, stride_bb, stride_bt, stride_bh,
    L: tl.constexpr, KEYS: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The states from chunk to chunk, and the errors that the tokens see, for some columns of the state."""
    columns, h, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i, n = tl.arange(0, L), tl.arange(0, KEYS)
    p = columns * COLUMNS + tl.arange(0, COLUMNS)
    b = tl.cast(batch, tl.int64)
    inside = (n < N)[:, None] & (p < P)[None, :]
    square = n[:, None] * P + p[None, :]
    state = tl.zeros((KEYS, COLUMNS), tl.float32)
    if first is not None:
        state = tl.load(first + (b * heads + h) * N * P + square, mask=inside, other=0.0)
    keys = b * stride_kb + tl.cast(h // (heads // key_heads), tl.int64) * stride_kh
    values = v + b * stride_vb + tl.cast(h // (heads // value_heads), tl.int64) * stride_vh + p[None, :]
    strengths = beta + b * stride_bb + h * stride_bh
    for chunk in range(chunks):
        place = (b * chunks + chunk) * heads + h
        t = tl.cast(chunk, tl.int64) * L + i
        real = t < tokens
        tl.store(states + place * N * P + square, state.to(states.dtype.element_ty), mask=inside)
        at = keys + tl.cast(chunk, tl.int64) * stride_ku + i[:, None] * stride_kt + n[None, :]
        there = real[:, None] & (n < N)[None, :]
        key = tl.load(k + at, mask=there, other=0.0)
        if CHANNELS:
            reads = tl.load(k_into + at, mask=there, other=0.0)
            known = kdot(reads, state.to(reads.dtype), PRECISION)
        else:
            into = tl.load(gates + place * (4 * L) + INTO * L + i)
            known = kdot(key, state.to(key.dtype), PRECISION) * into[:, None]
        value = tl.load(values + t[:, None] * stride_vt, mask=real[:, None] & (p < P)[None, :], other=0.0)
        wrong = (value.to(tl.float32) - known).to(value.dtype)
        solve = tl.load(inverse + place * (L * L) + i[:, None] * L + i[None, :])
        error = kdot(solve, wrong, PRECISION)
        tl.store(errors + place * (L * P) + i[:, None] * P + p[None, :], error.to(errors.dtype.element_ty), mask=(p < P)[None, :])
        strength = tl.load(strengths + t * stride_bt, mask=real, other=0.0).to(tl.float32)
        if CHANNELS:
            total = tl.load(totals + place * N + n, mask=n < N, other=0.0)
            state = state * total[:, None] + kdot(tl.trans(key), (strength[:, None] * error).to(key.dtype), PRECISION)
        else:
            strength = strength * tl.load(gates + place * (4 * L) + OUT * L + i)
            total = tl.load(gates + place * (4 * L) + INTO * L + L - 1)
            state = state * total + kdot(tl.trans(key), (strength[:, None] * error).to(key.dtype), PRECISION)
    tl.store(last + (b * heads + h) * N * P + square, state, mask=inside)


@triton.jit
def gdn_outputs(
    q, k, beta, gates, segments, products, states, errors, y, tokens, chunks, heads, query_heads, key_heads, N, P,
    stride_qb, stride_qu, stride_qh, stride_qt, stride_kb, stride_kt, stride_kh, stride_bb, stride_bt, stride_bh,
    stride_sb, stride_st,
    L: tl.constexpr, SLICE: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What the queries of a chunk read: of the state before it, and of the corrections in it."""
    columns, chunk, batch_head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    batch, h = batch_head // heads, batch_head % heads
    b = tl.cast(batch, tl.int64)
    place = (b * chunks + chunk) * heads + h
    i = tl.arange(0, L)
    p = columns * COLUMNS + tl.arange(0, COLUMNS)
    t = tl.cast(chunk, tl.int64) * L + i
    real, within = t < tokens, (p < P)[None, :]
    query_head = tl.cast(h // (heads // query_heads), tl.int64)
    queries = q + b * stride_qb + tl.cast(chunk, tl.int64) * stride_qu + query_head * stride_qh
    keys = k + b * stride_kb + tl.cast(h // (heads // key_heads), tl.int64) * stride_kh + t[:, None] * stride_kt
    out = tl.zeros((L, COLUMNS), tl.float32)
    pairs = tl.zeros((L, L), tl.float32)
    for start in range(0, N, SLICE):
        n = start + tl.arange(0, SLICE)
        there = real[:, None] & (n < N)[None, :]
        query = tl.load(queries + i[:, None] * stride_qt + n[None, :], mask=there, other=0.0)
        rows = (n < N)[:, None] & within
        state = tl.load(states + place * N * P + n[:, None] * P + p[None, :], mask=rows, other=0.0)
        out += kdot(query, state, PRECISION)
        if not CHANNELS:
            key = tl.load(keys + n[None, :], mask=there, other=0.0)
            pairs += kdot(query, tl.trans(key), PRECISION)
    mask = pair_mask(segments, stride_sb, stride_st, batch, chunk, tokens, L)
    if CHANNELS:
        pairs = tl.where(mask, tl.load(products + place * (L * L) + i[:, None] * L + i[None, :]), 0.0)
    else:
        out = out * tl.load(gates + place * (4 * L) + INTO * L + i)[:, None]
        pairs = pairs * decay_between(gates + place * (4 * L), mask, L)
    strength = tl.load(beta + b * stride_bb + t * stride_bt + h * stride_bh, mask=real, other=0.0).to(tl.float32)
    error = tl.load(errors + place * (L * P) + i[:, None] * P + p[None, :], mask=within, other=0.0)
    out += kdot((pairs * strength[None, :]).to(error.dtype), error, PRECISION)
    to = y + ((b * tokens + t[:, None]) * heads + h) * P + p[None, :]
    tl.store(to, out.to(y.dtype.element_ty), mask=real[:, None] & within)
