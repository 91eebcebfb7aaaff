"""The backward of `ssd` in Triton. It reads the inputs and the states before the chunks, and works out the rest again.

With c the running log decay of a chunk, h and h' the states around it, dh and dh' their gradients, W_ij the decay from j to i:
    dz_j = sum_i (C_i . B_j) W_ij dy_i + e^(c_L - c_j) dh' B_j          for z = dt x: dx = dt dz, and x . dz is part of ddt
    dB_j = dt_j (sum_i (dy_i . x_j) W_ij C_i + e^(c_L - c_j) dh'^T x_j)
    dC_i = sum_j (dy_i . x_j) W_ij dt_j B_j + e^(c_i) h^T dy_i
    dh   = e^(c_L) dh' + sum_i e^(c_i) dy_i C_i^T
Heads that share a head of x, B or C are summed by a loop in the program that owns it: per-head parts in fp32 would be as much
traffic again as all the rest, and no two programs write one place, so results are the same in every run.

The log decay of token t acts on each pair j < t <= i, on the way from h to i >= t, on that from j < t to h', and from h to h'.
Its gradient is summed as these four, all partial sums running one way. Row sums minus column sums, as is usual, are equal in
exact arithmetic, but beside a strong decay they subtract two large numbers to find one that is e^-50 of them, which dt = 50
then multiplies. Sums that leave token t out are stored one place further on, instead of being taken off again.

Letters: as in triton_forward.py.
"""

import torch
import triton
import triton.language as tl

from hybridize.kernels._core.launch import cdiv, empty, launch, tiles
from hybridize.kernels._core.tl_utils import kdot
from hybridize.kernels.ssd.triton_forward import (
    block,
    chunk_decay,
    chunk_tokens,
    decays,
    dense,
    into_decay,
    out_decay,
    pair_decay,
    pairs_allowed,
    plain,
    precision,
    rows_of,
    sizes,
    state_of,
)


@triton.jit
def ssd_backward_states(
    dy, C, words, segments, states, dlast, dstates, dfirst, through,
    tokens, padded, chunks, heads, C_group, dy_b, dy_t, dy_h, C_b, C_t, C_h,
    P: tl.constexpr, N: tl.constexpr, L: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of the states behind each chunk, from the last to the first, and of the first state.

    through[tile, b, h, chunk]: what the decay from state to state gets from this tile of P x N.
    Grid: (batch * heads, tiles of P, tiles of N).
    """
    bh = tl.cast(tl.program_id(0), tl.int64)
    batch, h = bh // heads, bh % heads
    p = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    n = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)
    tile = p[:, None] * N + n[None, :]
    within = (p[:, None] < P) & (n[None, :] < N)
    dy += batch * dy_b + h * dy_h
    C += batch * C_b + h // C_group * C_h
    words += bh * 3 * padded
    states += bh * chunks * P * N
    dstates += bh * chunks * P * N
    part = tl.program_id(1) * tl.num_programs(2) + tl.program_id(2)
    through += (part * tl.cast(tl.num_programs(0), tl.int64) + bh) * chunks
    if segments is not None:
        segments += batch * tokens
    running = state_of(dlast + bh * P * N, p, n, P, N)
    for back in range(0, chunks):
        u = chunks - 1 - back
        at = tl.cast(u, tl.int64) * P * N
        start = u * L
        token = tl.arange(0, L)
        tl.store(dstates + at + tile, running.to(dstates.dtype.element_ty), mask=within)
        before = state_of(states + at, p, n, P, N).to(tl.float32)
        passed = chunk_decay(words, segments, tokens, start, start + L - 1)
        running = running * passed
        tl.store(through + u, tl.sum(tl.sum(running * before, axis=1), axis=0))
        weight = into_decay(words, segments, tokens, start, start + token)
        upper = rows_of(dy + tl.cast(start, tl.int64) * dy_t, token, dy_t, p, tokens - start, P)
        read = rows_of(C + tl.cast(start, tl.int64) * C_t, token, C_t, n, tokens - start, N)
        upper = (upper.to(tl.float32) * weight[:, None]).to(read.dtype)
        running += kdot(tl.trans(upper), read, PRECISION)
    if dfirst is not None:
        tl.store(dfirst + bh * P * N + tile, running, mask=within)


@triton.jit
def ssd_backward_values(
    x, B, C, D, dy, words, segments, dstates, dx, sums, dD,
    tokens, padded, chunks, heads, x_group, B_group, C_group,
    x_b, x_t, x_h, B_b, B_t, B_h, C_b, C_t, C_h, dy_b, dy_t, dy_h,
    P: tl.constexpr, N: tl.constexpr, L: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dx of ROWS tokens of a head of x; of each output head that reads it, into sums[b, h]: x . dz, and what goes to the state.

    A program takes BLOCK_P of P, and its part of the sums is sums[part]; dD[b, h] has a number of each program.
    Grid: (tiles of tokens * tiles of P, heads of x, batch).
    """
    parts: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P
    tile, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    batch = tl.cast(tl.program_id(2), tl.int64)
    chunk, column = tile // (L // ROWS), tile % (L // ROWS)
    start = chunk * L
    here = tl.arange(0, ROWS)
    p, n = part * BLOCK_P + tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    first = tl.cast(start, tl.int64)
    left = tokens - start
    j = column * ROWS + here
    value_rows = x + batch * x_b + tl.program_id(1) * x_h + first * x_t
    if segments is not None:
        segments += batch * tokens
    total = tl.zeros((ROWS, BLOCK_P), dtype=tl.float32)
    for member in range(0, x_group):
        h = tl.program_id(1) * x_group + member
        own = words + (batch * heads + h) * 3 * padded
        step = tl.load(own + 2 * padded + start + j)
        maps = rows_of(B + batch * B_b + h // B_group * B_h + first * B_t, j, B_t, n, left, N)
        dstate = state_of(dstates + ((batch * heads + h) * chunks + chunk) * P * N, p, n, P, N)
        dz = kdot(maps, tl.trans(dstate), PRECISION)
        dz = dz * out_decay(own, segments, tokens, padded, start + L - 1, start + j)[:, None]
        # x is read anew where it is needed: its tile is not to lie in registers meanwhile.
        into_sums = sums + ((part * tl.num_programs(2) + batch) * heads + h) * 2 * padded + start + j
        values = rows_of(value_rows, j, x_t, p, left, P).to(tl.float32)
        tl.store(into_sums + padded, tl.sum(dz * values, axis=1) * step)
        upper_rows = dy + batch * dy_b + h * dy_h + first * dy_t
        read_rows = C + batch * C_b + h // C_group * C_h + first * C_t
        for row in range(column, L // ROWS):
            i = row * ROWS + here
            read = rows_of(read_rows, i, C_t, n, left, N)
            upper = rows_of(upper_rows, i, dy_t, p, left, P)
            allowed = pairs_allowed(segments, tokens, start + i[None, :], start + j[:, None])
            decay = pair_decay(own, padded, start + i[None, :], start + j[:, None], allowed)
            scores = kdot(maps, tl.trans(read), PRECISION) * decay
            dz += kdot(scores.to(upper.dtype), upper, PRECISION)
        values = rows_of(value_rows, j, x_t, p, left, P).to(tl.float32)
        tl.store(into_sums, tl.sum(dz * values, axis=1))
        total += dz * step[:, None]
        if D is not None:
            upper = rows_of(upper_rows, j, dy_t, p, left, P).to(tl.float32)
            total += tl.load(D + h).to(tl.float32) * upper
            skipped = tl.sum(tl.sum(upper * values, axis=1), axis=0)
            tl.store(dD + (batch * heads + h) * tl.num_programs(0) + tl.program_id(0), skipped)
    valid = (j[:, None] < left) & (p[None, :] < P)
    at = ((batch * tokens + start + j[:, None]) * tl.num_programs(1) + tl.program_id(1)) * P + p[None, :]
    tl.store(dx + at, total.to(dx.dtype.element_ty), mask=valid)


@triton.jit
def ssd_backward_writes(
    x, C, dy, words, segments, dstates, dB,
    tokens, padded, chunks, heads, x_group, B_group, C_group,
    x_b, x_t, x_h, C_b, C_t, C_h, dy_b, dy_t, dy_h,
    P: tl.constexpr, N: tl.constexpr, L: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dB of ROWS tokens and BLOCK_N of N, of a head of B. Grid: (tiles of tokens * tiles of N, heads of B, batch)."""
    parts: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    tile, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    batch = tl.cast(tl.program_id(2), tl.int64)
    chunk, column = tile // (L // ROWS), tile % (L // ROWS)
    start = chunk * L
    here = tl.arange(0, ROWS)
    p, n = tl.arange(0, BLOCK_P), part * BLOCK_N + tl.arange(0, BLOCK_N)
    first = tl.cast(start, tl.int64)
    left = tokens - start
    j = column * ROWS + here
    if segments is not None:
        segments += batch * tokens
    total = tl.zeros((ROWS, BLOCK_N), dtype=tl.float32)
    for member in range(0, B_group):
        h = tl.program_id(1) * B_group + member
        own = words + (batch * heads + h) * 3 * padded
        step = tl.load(own + 2 * padded + start + j)
        values = rows_of(x + batch * x_b + h // x_group * x_h + first * x_t, j, x_t, p, left, P)
        dstate = state_of(dstates + ((batch * heads + h) * chunks + chunk) * P * N, p, n, P, N)
        weight = step * out_decay(own, segments, tokens, padded, start + L - 1, start + j)
        total += kdot(values, dstate, PRECISION) * weight[:, None]
        upper_rows = dy + batch * dy_b + h * dy_h + first * dy_t
        read_rows = C + batch * C_b + h // C_group * C_h + first * C_t
        for row in range(column, L // ROWS):
            i = row * ROWS + here
            read = rows_of(read_rows, i, C_t, n, left, N)
            upper = rows_of(upper_rows, i, dy_t, p, left, P)
            allowed = pairs_allowed(segments, tokens, start + i[None, :], start + j[:, None])
            decay = pair_decay(own, padded, start + i[None, :], start + j[:, None], allowed)
            dscores = kdot(values, tl.trans(upper), PRECISION) * decay * step[:, None]
            total += kdot(dscores.to(read.dtype), read, PRECISION)
    valid = (j[:, None] < left) & (n[None, :] < N)
    at = ((batch * tokens + start + j[:, None]) * tl.num_programs(1) + tl.program_id(1)) * N + n[None, :]
    tl.store(dB + at, total.to(dB.dtype.element_ty), mask=valid)


@triton.jit
def ssd_backward_reads(
    x, B, C, dy, words, segments, states, dC, parts,
    tokens, padded, chunks, heads, x_group, B_group, C_group,
    x_b, x_t, x_h, B_b, B_t, B_h, C_b, C_t, C_h, dy_b, dy_t, dy_h,
    P: tl.constexpr, N: tl.constexpr, L: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dC of ROWS tokens i of a head of C, and what these tokens give to the log decays up to them.

    parts[b, h, row, t]: for t up to the tile `row` of its chunk, the sum over i >= t in the tile, of pairs j < t and of the way
    from the state before the chunk. Grid: (tiles of tokens, heads of C, batch).
    """
    tile = tl.program_id(0)
    batch = tl.cast(tl.program_id(2), tl.int64)
    chunk, row = tile // (L // ROWS), tile % (L // ROWS)
    start = chunk * L
    here = tl.arange(0, ROWS)
    p, n = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    first = tl.cast(start, tl.int64)
    left = tokens - start
    i = row * ROWS + here
    read_rows = C + batch * C_b + tl.program_id(1) * C_h + first * C_t
    read = rows_of(read_rows, i, C_t, n, left, N)
    if segments is not None:
        segments += batch * tokens
    total = tl.zeros((ROWS, BLOCK_N), dtype=tl.float32)
    for member in range(0, C_group):
        h = tl.program_id(1) * C_group + member
        own = words + (batch * heads + h) * 3 * padded
        upper = rows_of(dy + batch * dy_b + h * dy_h + first * dy_t, i, dy_t, p, left, P)
        state = state_of(states + ((batch * heads + h) * chunks + chunk) * P * N, p, n, P, N)
        from_state = kdot(upper, state, PRECISION) * into_decay(own, segments, tokens, start, start + i)[:, None]
        total += from_state
        # What reaches each token i from before the tile that the loop is at.
        reached = tl.sum(from_state * rows_of(read_rows, i, C_t, n, left, N).to(tl.float32), axis=1)
        value_rows = x + batch * x_b + h // x_group * x_h + first * x_t
        map_rows = B + batch * B_b + h // B_group * B_h + first * B_t
        into_parts = parts + ((batch * heads + h) * (L // ROWS) + row) * padded + start
        for column in range(0, row + 1):
            j = column * ROWS + here
            values = rows_of(value_rows, j, x_t, p, left, P)
            maps = rows_of(map_rows, j, B_t, n, left, N)
            allowed = pairs_allowed(segments, tokens, start + i[:, None], start + j[None, :])
            decay = pair_decay(own, padded, start + i[:, None], start + j[None, :], allowed)
            step = tl.load(own + 2 * padded + start + j)
            dscores = kdot(upper, tl.trans(values), PRECISION) * decay * step[None, :]
            total += kdot(dscores.to(maps.dtype), maps, PRECISION)
            # Of token t = j + 1: all j' <= j and what came before, to all i >= t.
            pairs = dscores * kdot(read, tl.trans(maps), PRECISION)
            upto = tl.cumsum(pairs, axis=1) + reached[:, None]
            across = tl.sum(tl.where(i[:, None] > j[None, :], upto, 0.0), axis=0)
            tl.store(into_parts + column * ROWS, tl.sum(reached, axis=0))
            tl.store(into_parts + j + 1, across, mask=here < ROWS - 1)
            reached += tl.sum(pairs, axis=1)
    valid = (i[:, None] < left) & (n[None, :] < N)
    at = ((batch * tokens + start + i[:, None]) * tl.num_programs(1) + tl.program_id(1)) * N + n[None, :]
    tl.store(dC + at, total.to(dC.dtype.element_ty), mask=valid)


@triton.jit
def ssd_backward_decays(
    A, words, parts, sums, through, ddt, dA, tokens, padded, heads, parts_of_sums, tiles_of_state,
    L: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """ddt [B, T, H], and dA[b, h, chunk] of each chunk. Grid: (batch * heads, chunks)."""
    bh = tl.cast(tl.program_id(0), tl.int64)
    batch, h = bh // heads, bh % heads
    start = tl.program_id(1) * L
    token = tl.arange(0, L)
    direct = tl.zeros((L,), dtype=tl.float32)
    out = tl.zeros((L,), dtype=tl.float32)
    for part in range(0, parts_of_sums):
        own = sums + (part * tl.cast(tl.num_programs(0), tl.int64) + bh) * 2 * padded + start + token
        direct += tl.load(own)
        out += tl.load(own + padded - 1, mask=token > 0, other=0.0)
    # The sum over earlier tokens: token t has read that of t - 1.
    dlog = tl.cumsum(out, axis=0)
    for row in range(0, L // ROWS):
        at = parts + (bh * (L // ROWS) + row) * padded + start + token
        dlog += tl.load(at, mask=token // ROWS <= row, other=0.0)
    for tile in range(0, tiles_of_state):
        chunk = (tile * tl.cast(tl.num_programs(0), tl.int64) + bh) * tl.num_programs(1) + tl.program_id(1)
        dlog += tl.load(through + chunk)
    step = tl.load(words + bh * 3 * padded + 2 * padded + start + token)
    valid = start + token < tokens
    grad = direct + tl.load(A + h).to(tl.float32) * dlog
    tl.store(ddt + (batch * tokens + start + token) * heads + h, grad.to(ddt.dtype.element_ty), mask=valid)
    # Behind the last token dt is 0.
    tl.store(dA + bh * tl.num_programs(1) + tl.program_id(1), tl.sum(dlog * step, axis=0))


def backward(dy, dlast, x, dt, A, B, C, D, segments, states, wants_first):
    """Gradients of x, dt, A, B, C, D and the first state, in the dtypes of these; where there is none, an empty tensor.

    `dy` and `dlast` are those of the outputs and of the last state; `states` is what `forward` returned.
    """
    x, B, C, dy, A, D, segments = plain(x), plain(B), plain(C), plain(dy), dense(A), dense(D), dense(segments)
    P, N, x_group, B_group, C_group = sizes(x, dt, B, C)
    (batch, tokens, heads), L, like = dt.shape, chunk_tokens(x, P, N), {"P": P, "N": N, "BYTES": x.element_size()}
    chunks, words = cdiv(tokens, L), decays(dt, A, L)
    padded = chunks * L
    counts = (tokens, padded, chunks, heads)
    x_s, B_s, C_s, dy_s = (t.stride()[:3] for t in (x, B, C, dy))
    blocks, common = {"BLOCK_P": block(P), "BLOCK_N": block(N)}, {"P": P, "N": N, "L": L, "PRECISION": precision(x.dtype)}
    first_shape = (batch, heads, P, N) if wants_first else (0,)

    def scratch(*shape):
        return empty(shape, torch.float32, x.device)

    dstates = empty(states.shape, states.dtype, x.device)
    dfirst = scratch(*first_shape)
    row = tiles("ssd_backward_states", x.device, **like)
    row["BLOCK_P"], row["BLOCK_N"] = min(row["BLOCK_P"], block(P)), min(row["BLOCK_N"], block(N))
    over = cdiv(P, row["BLOCK_P"]), cdiv(N, row["BLOCK_N"])
    through = scratch(over[0] * over[1], batch, heads, chunks)
    inputs = (dy, C, words, segments, states, dense(dlast), dstates, dfirst if wants_first else None, through)
    launch(ssd_backward_states, (batch * heads, *over), *inputs, *counts, C_group, *dy_s, *C_s, **common, **row)

    dx, dB, dC = (empty(t.shape, t.dtype, x.device) for t in (x, B, C))
    ddt, groups = empty(dt.shape, dt.dtype, x.device), (x_group, B_group, C_group)
    row = blocks | tiles("ssd_backward_values", x.device, **like)
    row["BLOCK_P"] = min(row["BLOCK_P"], block(P))
    sums = scratch(cdiv(P, row["BLOCK_P"]), batch, heads, 2, padded)
    grid = (chunks * (L // row["ROWS"]) * sums.shape[0], x.shape[2], batch)
    dD_parts = None if D is None else scratch(batch, heads, grid[0])
    inputs = (x, B, C, D, dy, words, segments, dstates, dx, sums, dD_parts)
    launch(ssd_backward_values, grid, *inputs, *counts, *groups, *x_s, *B_s, *C_s, *dy_s, **common, **row)

    row = blocks | tiles("ssd_backward_writes", x.device, **like)
    row["BLOCK_N"] = min(row["BLOCK_N"], block(N))
    grid = (chunks * (L // row["ROWS"]) * cdiv(N, row["BLOCK_N"]), B.shape[2], batch)
    inputs = (x, C, dy, words, segments, dstates, dB)
    launch(ssd_backward_writes, grid, *inputs, *counts, *groups, *x_s, *C_s, *dy_s, **common, **row)

    row = tiles("ssd_backward_reads", x.device, C_GROUP=C_group, **like)
    parts = scratch(batch, heads, L // row["ROWS"], padded)
    grid = (chunks * (L // row["ROWS"]), C.shape[2], batch)
    inputs = (x, B, C, dy, words, segments, states, dC, parts)
    launch(ssd_backward_reads, grid, *inputs, *counts, *groups, *x_s, *B_s, *C_s, *dy_s, **common, **blocks, **row)

    dA_parts, rows = scratch(batch, heads, chunks), row["ROWS"]
    row = tiles("ssd_backward_decays", x.device, **like) | {"L": L, "ROWS": rows}
    inputs = (A, words, parts, sums, through, ddt, dA_parts, tokens, padded, heads, len(sums), len(through))
    launch(ssd_backward_decays, (batch * heads, chunks), *inputs, **row)

    dA = dA_parts.sum((0, 2), dtype=torch.float64).to(A.dtype)
    dD = x.new_empty(0) if D is None or dD_parts is None else dD_parts.sum((0, 2), dtype=torch.float64).to(D.dtype)
    return dx, ddt, dA, dB, dC, dD, dfirst


def backward_fake(dy, dlast, x, dt, A, B, C, D, segments, states, wants_first):
    """Empty results of `backward`."""
    dD = x.new_empty(0) if D is None else D.new_empty(D.shape)
    dfirst = states.new_empty(dlast.shape if wants_first else (0,), dtype=torch.float32)
    return *(t.new_empty(t.shape) for t in (x, dt, A, B, C)), dD, dfirst
