"""`ssd` and `ssd_step` in Triton: the running log decays, the states at the chunk boundaries, the outputs, and the step.

Two phases. `ssd_states` walks through the chunks with the state in registers (fp32) and leaves the state before each chunk in
memory, in the dtype of x. `ssd_outputs` then takes tiles of tokens independently: what the state of their chunk gives, and the
masked products with the tokens before them in the chunk. Head counts stay apart: a program reads the heads of x, B and C that its
output head pairs with, and nothing is repeated in memory.

A chunk that decays by e^-3000 and then by e^-0.0001 needs more digits than fp32 has. So log decays are summed in fp64, once, and
kept as two fp32 words; exponents are differences of the high words plus differences of the low ones.

Letters: B batch, T tokens, H output heads, X, G, M heads of x, B, C, P value dim, N state dim, L tokens of a chunk.
Pointers and strides: `x_b, x_t, x_h` step by a row of the batch, a token, a head; the last dim has stride 1.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from hybridize.kernels._core.launch import cdiv, empty, launch, power_of_2, tiles
from hybridize.kernels._core.tl_utils import kdot, masked_exp


@triton.jit
def ssd_decays(dt, A, words, tokens, padded, heads, dt_b, dt_t, dt_h, L: tl.constexpr, HEADS: tl.constexpr):
    """words[b, h] = high and low word of the log decay summed from the start of the chunk, and dt, at every token.

    Behind the last token the sums stay and dt is 0. Grid: (chunks, head tiles, batch).
    """
    batch = tl.cast(tl.program_id(2), tl.int64)
    start = tl.program_id(0) * L
    h = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    token = start + tl.arange(0, L)
    valid = (token[:, None] < tokens) & (h[None, :] < heads)
    at = tl.cast(token, tl.int64)[:, None] * dt_t + h[None, :] * dt_h
    step = tl.load(dt + batch * dt_b + at, mask=valid, other=0.0).to(tl.float32)
    rate = tl.load(A + h, mask=h < heads, other=0.0).to(tl.float32)
    total = tl.cumsum(step.to(tl.float64) * rate.to(tl.float64)[None, :], axis=0)
    high = total.to(tl.float32)
    low = (total - high.to(tl.float64)).to(tl.float32)
    out = words + (batch * heads + h[None, :]) * 3 * padded + token[:, None]
    own = tl.broadcast_to(h[None, :] < heads, (L, HEADS))
    tl.store(out, high, mask=own)
    tl.store(out + padded, low, mask=own)
    tl.store(out + 2 * padded, step, mask=own)


@triton.jit
def documents(segments, token, tokens):
    """Document ids of tokens; behind the end that of the last token."""
    return tl.load(segments + tl.minimum(token, tokens - 1))


@triton.jit
def pair_decay(words, padded, later, earlier, allowed):
    """The decay between tokens, e^(c_later - c_earlier) where allowed, else 0; `later` and `earlier` broadcast."""
    high = tl.load(words + later) - tl.load(words + earlier)
    low = tl.load(words + padded + later) - tl.load(words + padded + earlier)
    return masked_exp(high + low, allowed)


@triton.jit
def into_decay(words, segments, tokens, start, token):
    """The decay from the state before a chunk to its tokens; 0 in a later document."""
    decay = tl.exp(tl.load(words + token))
    if segments is not None:
        before = documents(segments, tl.maximum(start - 1, 0), tokens)
        decay = tl.where(documents(segments, token, tokens) == before, decay, 0.0)
    return decay


@triton.jit
def out_decay(words, segments, tokens, padded, end, token):
    """The decay from tokens of a chunk to the state behind it, whose last token is `end`; 0 from an earlier document."""
    exponent = tl.load(words + end) - tl.load(words + token) + (tl.load(words + padded + end) - tl.load(words + padded + token))
    decay = tl.exp(exponent)
    if segments is not None:
        last = documents(segments, end, tokens)
        decay = tl.where(documents(segments, token, tokens) == last, decay, 0.0)
    return decay


@triton.jit
def chunk_decay(words, segments, tokens, start, end):
    """The decay from the state before a chunk to that behind it; 0 if a document ends between."""
    decay = tl.exp(tl.load(words + end))
    if segments is not None:
        before = documents(segments, tl.maximum(start - 1, 0), tokens)
        decay = tl.where(documents(segments, end, tokens) == before, decay, 0.0)
    return decay


@triton.jit
def pairs_allowed(segments, tokens, later, earlier):
    """Which pairs see each other: not ahead in time, and in one document."""
    allowed = later >= earlier
    if segments is not None:
        allowed = allowed & (documents(segments, later, tokens) == documents(segments, earlier, tokens))
    return allowed


@triton.jit
def rows_of(pointer, token, token_stride, column, tokens, columns: tl.constexpr):
    """Tokens x columns of a tensor, 0 outside."""
    valid = (token[:, None] < tokens) & (column[None, :] < columns)
    return tl.load(pointer + token[:, None] * token_stride + column[None, :], mask=valid, other=0.0)


@triton.jit
def state_of(pointer, p, n, P: tl.constexpr, N: tl.constexpr):
    """A tile of a P x N state, 0 outside."""
    return tl.load(pointer + p[:, None] * N + n[None, :], mask=(p[:, None] < P) & (n[None, :] < N), other=0.0)


@triton.jit
def ssd_states(
    x, B, words, segments, first, states, last,
    tokens, padded, chunks, heads, x_group, B_group, x_b, x_t, x_h, B_b, B_t, B_h,
    P: tl.constexpr, N: tl.constexpr, L: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """States before each chunk, [B, H, chunks, P, N], and behind the last. Grid: (batch * heads, tiles of P, tiles of N)."""
    bh = tl.cast(tl.program_id(0), tl.int64)
    batch, h = bh // heads, bh % heads
    p = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    n = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)
    tile = p[:, None] * N + n[None, :]
    within = (p[:, None] < P) & (n[None, :] < N)
    x += batch * x_b + h // x_group * x_h
    B += batch * B_b + h // B_group * B_h
    words += bh * 3 * padded
    states += bh * chunks * P * N
    if segments is not None:
        segments += batch * tokens
    running = tl.zeros((BLOCK_P, BLOCK_N), dtype=tl.float32)
    if first is not None:
        running = state_of(first + bh * P * N, p, n, P, N)
    for u in range(0, chunks):
        tl.store(states + tl.cast(u, tl.int64) * P * N + tile, running.to(states.dtype.element_ty), mask=within)
        start = u * L
        token = start + tl.arange(0, L)
        weight = out_decay(words, segments, tokens, padded, start + L - 1, token) * tl.load(words + 2 * padded + token)
        values = rows_of(x + tl.cast(start, tl.int64) * x_t, tl.arange(0, L), x_t, p, tokens - start, P)
        maps = rows_of(B + tl.cast(start, tl.int64) * B_t, tl.arange(0, L), B_t, n, tokens - start, N)
        values = (values.to(tl.float32) * weight[:, None]).to(maps.dtype)
        running = running * chunk_decay(words, segments, tokens, start, start + L - 1) + kdot(tl.trans(values), maps, PRECISION)
    tl.store(last + bh * P * N + tile, running, mask=within)


@triton.jit
def ssd_outputs(
    x, B, C, D, words, segments, states, y,
    tokens, padded, chunks, heads, x_group, B_group, C_group, x_b, x_t, x_h, B_b, B_t, B_h, C_b, C_t, C_h,
    P: tl.constexpr, N: tl.constexpr, L: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y of ROWS tokens of a head. Grid: (tiles of tokens, heads, batch)."""
    tile = tl.program_id(0)
    h = tl.program_id(1)
    batch = tl.cast(tl.program_id(2), tl.int64)
    chunk, row = tile // (L // ROWS), tile % (L // ROWS)
    start = chunk * L
    here = tl.arange(0, ROWS)
    p, n = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    first = tl.cast(start, tl.int64)
    x += batch * x_b + h // x_group * x_h + first * x_t
    B += batch * B_b + h // B_group * B_h + first * B_t
    C += batch * C_b + h // C_group * C_h + first * C_t
    words += (batch * heads + h) * 3 * padded
    if segments is not None:
        segments += batch * tokens
    i = row * ROWS + here
    left = tokens - start
    read = rows_of(C, i, C_t, n, left, N)
    state = state_of(states + ((batch * heads + h) * chunks + chunk) * P * N, p, n, P, N)
    out = kdot(read, tl.trans(state), PRECISION) * into_decay(words, segments, tokens, start, start + i)[:, None]
    for column in range(0, row + 1):
        j = column * ROWS + here
        values = rows_of(x, j, x_t, p, left, P)
        maps = rows_of(B, j, B_t, n, left, N)
        allowed = pairs_allowed(segments, tokens, start + i[:, None], start + j[None, :])
        decay = pair_decay(words, padded, start + i[:, None], start + j[None, :], allowed)
        scores = kdot(read, tl.trans(maps), PRECISION) * decay * tl.load(words + 2 * padded + start + j)[None, :]
        out += kdot(scores.to(values.dtype), values, PRECISION)
    if D is not None:
        out += tl.load(D + h).to(tl.float32) * rows_of(x, i, x_t, p, left, P).to(tl.float32)
    valid = (i[:, None] < left) & (p[None, :] < P)
    at = ((batch * tokens + start + i[:, None]) * heads + h) * P + p[None, :]
    tl.store(y + at, out.to(y.dtype.element_ty), mask=valid)


@triton.jit
def ssd_one_token(
    x, dt, A, B, C, D, state, slots, y,
    states, heads, x_group, B_group, C_group, x_b, x_h, dt_b, dt_h, B_b, B_h, C_b, C_h, s_b, s_h, s_p,
    P: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One token; the state is read and written once. Grid: (tiles of P, heads, batch)."""
    h = tl.program_id(1)
    batch = tl.cast(tl.program_id(2), tl.int64)
    p = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    n = tl.arange(0, BLOCK_N)
    slot = batch
    if slots is not None:
        slot = tl.load(slots + batch).to(tl.int64)
    runs = (slot >= 0) & (slot < states)
    within = (p[:, None] < P) & (n[None, :] < N) & runs
    place = state + slot * s_b + h * s_h + p[:, None] * s_p + n[None, :]
    step = tl.load(dt + batch * dt_b + h * dt_h).to(tl.float32)
    decay = tl.exp(step * tl.load(A + h).to(tl.float32))
    values = tl.load(x + batch * x_b + h // x_group * x_h + p, mask=p < P, other=0.0).to(tl.float32)
    maps = tl.load(B + batch * B_b + h // B_group * B_h + n, mask=n < N, other=0.0).to(tl.float32)
    read = tl.load(C + batch * C_b + h // C_group * C_h + n, mask=n < N, other=0.0).to(tl.float32)
    new = tl.load(place, mask=within, other=0.0) * decay + (values * step)[:, None] * maps[None, :]
    tl.store(place, new, mask=within)
    out = tl.sum(new * read[None, :], axis=1)
    if D is not None:
        out += tl.load(D + h).to(tl.float32) * values
    # A row that is left out gives 0, one whose slot is not there gives NaN.
    out = tl.where(runs, out, tl.where(slot < 0, 0.0, float("nan")))
    tl.store(y + (batch * heads + h) * P + p, out.to(y.dtype.element_ty), mask=p < P)


def plain(tensor: Any) -> Any:
    """The tensor, copied if its last dim is not one after the other in memory."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def dense(tensor: Any) -> Any:
    """The tensor without gaps in memory, or None."""
    return None if tensor is None else tensor.contiguous()


def block(size):
    """The power of two, at least 16, that holds `size`: what a product of tiles takes."""
    return max(16, power_of_2(size))


def precision(dtype):
    """How products of operands of this dtype are taken; half precision operands go as they are."""
    return "tf32x3" if dtype == torch.float32 else "ieee"


def sizes(x, dt, B, C):
    """(P, N, heads of the output per head of x, of B, of C)."""
    heads = dt.shape[-1]
    return x.shape[-1], B.shape[-1], *(heads // t.shape[-2] for t in (x, B, C))


def chunk_tokens(x, P, N):
    """L, for forward and backward alike: the saved states are those before chunks of L."""
    return tiles("ssd_decays", x.device, P=P, N=N, BYTES=x.element_size())["L"]


def decays(dt, A, L):
    """[B, H, 3, tokens up to whole chunks] fp32: what `ssd_decays` writes."""
    batch, tokens, heads = dt.shape
    chunks = cdiv(tokens, L)
    words = empty((batch, heads, 3, chunks * L), torch.float32, dt.device)
    row = tiles("ssd_decays", dt.device, P=0, N=0, BYTES=0) | {"L": L}
    grid = (chunks, cdiv(heads, row["HEADS"]), batch)
    launch(ssd_decays, grid, dt, dense(A), words, tokens, chunks * L, heads, *dt.stride(), **row)
    return words


def forward(x, dt, A, B, C, D, state, segments):
    """(y [B, T, H, P], last state [B, H, P, N] fp32, states before each chunk [B, H, chunks, P, N] in the dtype of x)."""
    x, B, C = plain(x), plain(B), plain(C)
    P, N, x_group, B_group, C_group = sizes(x, dt, B, C)
    (batch, tokens, heads), L, like = dt.shape, chunk_tokens(x, P, N), {"P": P, "N": N, "BYTES": x.element_size()}
    chunks, segments, words = cdiv(tokens, L), dense(segments), decays(dt, A, L)
    counts = (tokens, chunks * L, chunks, heads)
    states = empty((batch, heads, chunks, P, N), x.dtype, x.device)
    last = empty((batch, heads, P, N), torch.float32, x.device)
    common = {"P": P, "N": N, "L": L, "PRECISION": precision(x.dtype)}

    row = tiles("ssd_states", x.device, **like)
    row["BLOCK_P"], row["BLOCK_N"] = min(row["BLOCK_P"], block(P)), min(row["BLOCK_N"], block(N))
    grid = (batch * heads, cdiv(P, row["BLOCK_P"]), cdiv(N, row["BLOCK_N"]))
    strides = (*x.stride()[:3], *B.stride()[:3])
    launch(
        ssd_states, grid, x, B, words, segments, dense(state), states, last, *counts, x_group, B_group, *strides, **common, **row
    )

    y = empty((batch, tokens, heads, P), x.dtype, x.device)
    row = tiles("ssd_outputs", x.device, **like)
    grid = (chunks * (L // row["ROWS"]), heads, batch)
    inputs = (x, B, C, dense(D), words, segments, states, y)
    strides += C.stride()[:3]
    blocks = {"BLOCK_P": block(P), "BLOCK_N": block(N)}
    launch(ssd_outputs, grid, *inputs, *counts, x_group, B_group, C_group, *strides, **common, **blocks, **row)
    return y, last, states


def forward_fake(x, dt, A, B, C, D, state, segments):
    """Empty results of `forward`."""
    P, N, *_ = sizes(x, dt, B, C)
    batch, tokens, heads = dt.shape
    chunks = cdiv(tokens, chunk_tokens(x, P, N))
    last = x.new_empty(batch, heads, P, N, dtype=torch.float32)
    return x.new_empty(batch, tokens, heads, P), last, x.new_empty(batch, heads, chunks, P, N)


def step(x, dt, A, B, C, D, state, slots):
    """y [B, H, P]; the state [slots, H, P, N] is updated in place."""
    x, B, C = plain(x), plain(B), plain(C)
    P, N, x_group, B_group, C_group = sizes(x, dt, B, C)
    batch, heads = dt.shape
    y = empty((batch, heads, P), x.dtype, x.device)
    row = tiles("ssd_one_token", x.device, P=P, N=N, BYTES=x.element_size())
    grid = (cdiv(P, row["ROWS"]), heads, batch)
    inputs = (x, dt, dense(A), B, C, dense(D), state, dense(slots), y)
    strides = (*x.stride()[:2], *dt.stride(), *B.stride()[:2], *C.stride()[:2], *state.stride()[:3])
    launch(
        ssd_one_token,
        grid,
        *inputs,
        state.shape[0],
        heads,
        x_group,
        B_group,
        C_group,
        *strides,
        P=P,
        N=N,
        BLOCK_N=block(N),
        **row,
    )
    return y


def step_fake(x, dt, A, B, C, D, state, slots):
    """Empty results of `step`."""
    return x.new_empty(*dt.shape, x.shape[-1])
