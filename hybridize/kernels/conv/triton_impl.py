"""The causal convolution as Triton kernels: forward, backward and one token.

Channels lie side by side in memory, so that a tap is the same tile one token earlier: forward reads K shifted tiles, all but
one of them from the nearest cache. Backward goes through the tokens of a block one after another with the last inputs and
the last gradients in registers: each input is read once, and the sum before the activation is computed once, which K shifted
tiles of gradients would do K times over. Gradients of taps and bias are sums over a block, added up afterwards.

Letters: B batch, T tokens, C channels, K taps, K1 = K - 1 inputs kept.
"""

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from hybridize.kernels._core.launch import DEVICES, cdiv, empty, launch, tiles
from hybridize.kernels._core.library import registered
from hybridize.kernels._core.tl_utils import silu, silu_slope

__all__ = ["DEVICES", "causal_conv1d", "causal_conv1d_step", "refuses_causal_conv1d", "refuses_causal_conv1d_step"]

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
TAPS = (2, 3, 4)


@triton.jit
def conv_forward(
    x, weight, bias, state, segments, y, last,
    T, C, x_b, x_t, x_c, w_c, w_k, state_b, state_c, state_k, seg_b, seg_t, last_b, last_c, last_k,
    K: tl.constexpr, SILU: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """y [B, T, C] (contiguous) and the last inputs; one program a block of channels, of tokens, and a batch row."""
    block, b = tl.program_id(1), tl.cast(tl.program_id(2), tl.int64)
    c = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    t = block * ROWS + tl.arange(0, ROWS)
    real = c < C
    x += b * x_b
    out = tl.zeros([ROWS, COLUMNS], tl.float32)
    if bias is not None:
        out += tl.load(bias + c, mask=real, other=0.0).to(tl.float32)[None, :]
    own = t
    if segments is not None:
        own = tl.load(segments + b * seg_b + tl.minimum(t, T - 1).to(tl.int64) * seg_t)
    for tap in tl.static_range(K):
        source = t + (tap - (K - 1))
        inside = (source >= 0) & (source < T)
        places = source.to(tl.int64)[:, None] * x_t + c[None, :] * x_c
        value = tl.load(x + places, mask=inside[:, None] & real[None, :], other=0.0).to(tl.float32)
        if tap < K - 1:
            if state is not None:
                if block == 0:
                    old = state + b * state_b + c[None, :] * state_c + (source + (K - 1))[:, None] * state_k
                    value += tl.load(old, mask=(source < 0)[:, None] & real[None, :], other=0.0).to(tl.float32)
            if segments is not None:
                theirs = tl.load(segments + b * seg_b + tl.minimum(tl.maximum(source, 0), T - 1).to(tl.int64) * seg_t)
                value = tl.where((own == theirs)[:, None], value, 0.0)
        out += value * tl.load(weight + c * w_c + tap * w_k, mask=real, other=0.0).to(tl.float32)[None, :]
    if SILU:
        out = silu(out)
    places = (b * T + t)[:, None] * C + c[None, :]
    tl.store(y + places, out.to(y.dtype.element_ty), mask=(t < T)[:, None] & real[None, :])
    if block == tl.num_programs(1) - 1:
        for kept in tl.static_range(K - 1):
            token = T + (kept - (K - 1))
            end = input_row(x, state, b, token, c, real, T, x_t, x_c, state_b, state_c, state_k, K)
            if segments is not None:
                end_own = document(segments + b * seg_b, T - 1, T, seg_t)
                end_theirs = document(segments + b * seg_b, token, T, seg_t)
                end = tl.where(end_own == end_theirs, end, 0.0)
            tl.store(last + b * last_b + c * last_c + kept * last_k, end.to(last.dtype.element_ty), mask=real)


@triton.jit
def input_row(x, state, b, token, c, real, T, x_t, x_c, state_b, state_c, state_k, K: tl.constexpr):
    """The inputs of one token [COLUMNS] in fp32: of the state before the first one, 0 behind the last one."""
    inside = (token >= 0) & (token < T)
    value = tl.load(x + tl.cast(token, tl.int64) * x_t + c * x_c, mask=real & inside, other=0.0).to(tl.float32)
    if state is not None:
        old = state + b * state_b + c * state_c + (token + (K - 1)) * state_k
        value += tl.load(old, mask=real & (token < 0), other=0.0).to(tl.float32)
    return value


@triton.jit
def conv_backward(
    x, weight, bias, state, segments, dy, dlast, dx, dstate, sums,
    T, C, x_b, x_t, x_c, w_c, w_k, state_b, state_c, state_k, seg_b, seg_t, dy_b, dy_t, dy_c, dlast_b, dlast_c, dlast_k,
    ds_b, ds_c, ds_k, K: tl.constexpr, SILU: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """dx (contiguous), dstate, and for each block of tokens the sums [K + 1, C] that dweight and dbias consist of.

    With the tokens t behind it, token t - K + 1 has all that it gives to: its gradient is written then. The K - 1 tokens
    behind a block are computed again by its program, and counted in the sums of the next one.
    """
    block, b = tl.program_id(1), tl.cast(tl.program_id(2), tl.int64)
    c = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    real = c < C
    x += b * x_b
    dy += b * dy_b
    if segments is not None:
        segments += b * seg_b
    start = block * ROWS
    zero = tl.zeros([COLUMNS], tl.float32)
    # Numbers count how many tokens ago: w0 is what the newest input weighs.
    w0 = tl.load(weight + c * w_c + (K - 1) * w_k, mask=real, other=0.0).to(tl.float32)
    w1 = tl.load(weight + c * w_c + (K - 2) * w_k, mask=real, other=0.0).to(tl.float32)
    w2, w3, x2, x3 = zero, zero, zero, zero
    x1 = input_row(x, state, b, start - 1, c, real, T, x_t, x_c, state_b, state_c, state_k, K)
    if K > 2:
        w2 = tl.load(weight + c * w_c + (K - 3) * w_k, mask=real, other=0.0).to(tl.float32)
        x2 = input_row(x, state, b, start - 2, c, real, T, x_t, x_c, state_b, state_c, state_k, K)
    if K > 3:
        w3 = tl.load(weight + c * w_c + (K - 4) * w_k, mask=real, other=0.0).to(tl.float32)
        x3 = input_row(x, state, b, start - 3, c, real, T, x_t, x_c, state_b, state_c, state_k, K)
    offset = zero
    if bias is not None:
        offset = tl.load(bias + c, mask=real, other=0.0).to(tl.float32)
    d1, d2, d3 = zero, zero, zero
    dw0, dw1, dw2, dw3, dbias = zero, zero, zero, zero, zero
    x_next = input_row(x, state, b, start, c, real, T, x_t, x_c, state_b, state_c, state_k, K)
    dy_next = tl.load(dy + tl.cast(start, tl.int64) * dy_t + c * dy_c, mask=real & (start < T), other=0.0).to(tl.float32)
    s1, s2, s3 = 0, 0, 0
    if segments is not None:
        s1 = document(segments, start - 1, T, seg_t)
        s2 = document(segments, start - 2, T, seg_t)
        s3 = document(segments, start - 3, T, seg_t)
    for i in range(0, ROWS + K - 1):
        t = start + i
        x0, d0 = x_next, dy_next
        # Of the next token, so that two are on their way.
        x_next = input_row(x, state, b, t + 1, c, real, T, x_t, x_c, state_b, state_c, state_k, K)
        after = dy + tl.cast(t + 1, tl.int64) * dy_t + c * dy_c
        dy_next = tl.load(after, mask=real & (t + 1 < T), other=0.0).to(tl.float32)
        y1, y2, y3 = x1, x2, x3
        if segments is not None:
            s0 = document(segments, t, T, seg_t)
            y1, y2, y3 = tl.where(s1 == s0, x1, 0.0), tl.where(s2 == s0, x2, 0.0), tl.where(s3 == s0, x3, 0.0)
        if SILU:
            d0 *= silu_slope(offset + w0 * x0 + w1 * y1 + w2 * y2 + w3 * y3)
        counted = tl.where(i < ROWS, d0, 0.0)
        dbias += counted
        dw0 += counted * x0
        dw1 += counted * y1
        if K > 2:
            dw2 += counted * y2
        if K > 3:
            dw3 += counted * y3
        # What the token `source` gives to itself and to the K - 1 behind it, where those are of its document.
        source = t - (K - 1)
        g0, g1, g2, g3 = d0, d1, d2, d3
        theirs = s3 if K == 4 else (s2 if K == 3 else s1)
        if segments is not None:
            g0, g1 = tl.where(s0 == theirs, d0, 0.0), tl.where(s1 == theirs, d1, 0.0)
            g2, g3 = tl.where(s2 == theirs, d2, 0.0), tl.where(s3 == theirs, d3, 0.0)
        if K == 2:
            given = w1 * g0 + w0 * g1
        elif K == 3:
            given = w2 * g0 + w1 * g1 + w0 * g2
        else:
            given = w3 * g0 + w2 * g1 + w1 * g2 + w0 * g3
        if (t >= T) & (t < T + K - 1):
            left = tl.load(dlast + b * dlast_b + c * dlast_c + (t - T) * dlast_k, mask=real, other=0.0).to(tl.float32)
            if segments is not None:
                left = tl.where(theirs == document(segments, T - 1, T, seg_t), left, 0.0)
            given += left
        mine = (source >= start) & (source < start + ROWS) & (source < T)
        tl.store(dx + (b * T + source) * C + c, given.to(dx.dtype.element_ty), mask=real & mine)
        if source < 0:
            tl.store(dstate + b * ds_b + c * ds_c + t * ds_k, given.to(dstate.dtype.element_ty), mask=real)
        x1, x2, x3 = x0, x1, x2
        d1, d2, d3 = d0, d1, d2
        if segments is not None:
            s1, s2, s3 = s0, s1, s2
    sums += (b * tl.num_programs(1) + block) * (K + 1) * C + c
    tl.store(sums + (K - 1) * C, dw0, mask=real)
    tl.store(sums + (K - 2) * C, dw1, mask=real)
    if K > 2:
        tl.store(sums + (K - 3) * C, dw2, mask=real)
    if K > 3:
        tl.store(sums + (K - 4) * C, dw3, mask=real)
    tl.store(sums + K * C, dbias, mask=real)


@triton.jit
def document(segments, token, T, seg_t):
    """The document of a token; of the first or last one for tokens before or behind them."""
    return tl.load(segments + tl.cast(tl.minimum(tl.maximum(token, 0), T - 1), tl.int64) * seg_t)


@triton.jit
def conv_step(
    x, weight, bias, state, rows, y, C, x_b, x_c, w_c, w_k, state_b, state_c, state_k,
    K: tl.constexpr, SILU: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """y [B, C] (contiguous) and the state, shifted in place; one program a block of channels and a batch row."""
    b = tl.cast(tl.program_id(1), tl.int64)
    c = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    real = c < C
    row = b
    if rows is not None:
        row = tl.load(rows + b).to(tl.int64)
    used = real & (row >= 0)
    state += row * state_b + c * state_c
    new = tl.load(x + b * x_b + c * x_c, mask=used, other=0.0)
    out = new.to(tl.float32) * tl.load(weight + c * w_c + (K - 1) * w_k, mask=used, other=0.0).to(tl.float32)
    if bias is not None:
        out += tl.load(bias + c, mask=used, other=0.0).to(tl.float32)
    for tap in tl.static_range(K - 1):  # pyright: ignore[reportGeneralTypeIssues]
        old = tl.load(state + tap * state_k, mask=used, other=0.0)
        out += old.to(tl.float32) * tl.load(weight + c * w_c + tap * w_k, mask=used, other=0.0).to(tl.float32)
        # Several threads may hold one channel: all have read the slot before one of them writes it.
        tl.debug_barrier()
        if tap > 0:
            tl.store(state + (tap - 1) * state_k, old, mask=used)
    tl.store(state + (K - 2) * state_k, new, mask=used)
    if SILU:
        out = silu(out)
    tl.store(y + b * C + c, out.to(y.dtype.element_ty), mask=real)


def refuses_causal_conv1d(x_BTC, weight_CK, bias_C, state_BCK1, activation, segments_BT):
    """Why these cannot be run, or None."""
    return _refuses(x_BTC, weight_CK, bias_C)


def refuses_causal_conv1d_step(x_BC, weight_CK, bias_C, state_BCK1, activation, rows_B):
    """Why these cannot be run, or None."""
    return _refuses(x_BC, weight_CK, bias_C)


def _refuses(x, weight_CK, bias_C):
    for tensor in (x, weight_CK, bias_C):
        if tensor is not None and tensor.dtype not in FLOATS:
            return f"got {tensor.dtype}, expected fp16, bf16 or fp32"
    if weight_CK.shape[1] not in TAPS:
        return f"got {weight_CK.shape[1]} taps, expected 2 to 4"
    return None


def _strides(tensor, dims):
    return (0,) * dims if tensor is None else tensor.stride()


def _state_like(x, weight_CK):
    """[B, C, K1] with the channels side by side in memory."""
    return empty((x.shape[0], weight_CK.shape[1] - 1, x.shape[-1]), x.dtype, x.device).mT


def _forward_outputs(x_BTC, weight_CK, bias_C, state_BCK1, segments_BT, silu):
    return empty(x_BTC.shape, x_BTC.dtype, x_BTC.device), _state_like(x_BTC, weight_CK)


def _forward(x_BTC, weight_CK, bias_C, state_BCK1, segments_BT, silu):
    y_BTC, last = outputs = _forward_outputs(x_BTC, weight_CK, bias_C, state_BCK1, segments_BT, silu)
    batch, tokens, channels = x_BTC.shape
    chosen = tiles("conv_forward", x_BTC.device, T=tokens, C=channels)
    grid = (cdiv(channels, chosen["COLUMNS"]), cdiv(tokens, chosen["ROWS"]), batch)
    launch(
        conv_forward, grid, x_BTC, weight_CK, bias_C, state_BCK1, segments_BT, y_BTC, last, tokens, channels,
        *x_BTC.stride(), *weight_CK.stride(), *_strides(state_BCK1, 3), *_strides(segments_BT, 2), *last.stride(),
        K=weight_CK.shape[1], SILU=silu, **chosen,
    )  # fmt: skip
    return outputs


def _backward_outputs(x_BTC, weight_CK, bias_C, state_BCK1, segments_BT, dy_BTC, dlast_BCK1, silu):
    sums = empty((weight_CK.shape[1] + 1, x_BTC.shape[-1]), torch.float32, x_BTC.device)
    return empty(x_BTC.shape, x_BTC.dtype, x_BTC.device), _state_like(x_BTC, weight_CK), sums


def _backward(x_BTC, weight_CK, bias_C, state_BCK1, segments_BT, dy_BTC, dlast_BCK1, silu):
    (batch, tokens, channels), taps = x_BTC.shape, weight_CK.shape[1]
    dx = empty(x_BTC.shape, x_BTC.dtype, x_BTC.device)
    dstate = _state_like(x_BTC, weight_CK)
    chosen = tiles("conv_backward", x_BTC.device, T=tokens, C=channels)
    blocks = cdiv(tokens, chosen["ROWS"])
    sums = empty((batch * blocks, taps + 1, channels), torch.float32, x_BTC.device)
    launch(
        conv_backward, (cdiv(channels, chosen["COLUMNS"]), blocks, batch),
        x_BTC, weight_CK, bias_C, state_BCK1, segments_BT, dy_BTC, dlast_BCK1, dx, dstate, sums, tokens, channels,
        *x_BTC.stride(), *weight_CK.stride(), *_strides(state_BCK1, 3), *_strides(segments_BT, 2),
        *dy_BTC.stride(), *dlast_BCK1.stride(), *dstate.stride(), K=taps, SILU=silu, **chosen,
    )  # fmt: skip
    return dx, dstate, sums.sum(0)


def _step_output(x_BC, weight_CK, bias_C, state_BCK1, rows_B, silu):
    return empty(x_BC.shape, x_BC.dtype, x_BC.device)


def _step(x_BC, weight_CK, bias_C, state_BCK1, rows_B, silu):
    y_BC = _step_output(x_BC, weight_CK, bias_C, state_BCK1, rows_B, silu)
    batch, channels = x_BC.shape
    chosen = tiles("conv_step", x_BC.device, C=channels)
    launch(
        conv_step, (cdiv(channels, chosen["COLUMNS"]), batch),
        x_BC, weight_CK, bias_C, state_BCK1, rows_B, y_BC, channels, *x_BC.stride(), *weight_CK.stride(), *state_BCK1.stride(),
        K=weight_CK.shape[1], SILU=silu, **chosen,
    )  # fmt: skip
    return y_BC


_INPUTS = "Tensor x, Tensor weight, Tensor? bias, "
FORWARD = registered(
    "conv_forward", f"({_INPUTS} Tensor? state, Tensor? segments, bool silu) -> (Tensor, Tensor)", _forward, _forward_outputs
)
BACKWARD = registered(
    "conv_backward",
    f"({_INPUTS} Tensor? state, Tensor? segments, Tensor dy, Tensor dlast, bool silu) -> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_outputs,
)
STEP = registered("conv_step", f"({_INPUTS} Tensor(a!) state, Tensor? rows, bool silu) -> Tensor", _step, _step_output)


class _Conv(torch.autograd.Function):
    """Saves the inputs only."""

    @staticmethod
    def forward(ctx, x_BTC, weight_CK, bias_C, state_BCK1, segments_BT, silu):
        ctx.save_for_backward(x_BTC, weight_CK, bias_C, state_BCK1, segments_BT)
        ctx.silu = silu
        return FORWARD(x_BTC, weight_CK, bias_C, state_BCK1, segments_BT, silu)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_BTC, dlast_BCK1):
        x, weight, bias, state, segments = ctx.saved_tensors
        dx, dstate, sums = BACKWARD(x, weight, bias, state, segments, dy_BTC, dlast_BCK1, ctx.silu)
        dbias = None if bias is None else sums[-1].to(bias.dtype)
        return dx, sums[:-1].mT.to(weight.dtype), dbias, None if state is None else dstate, None, None


def causal_conv1d(x_BTC, weight_CK, bias_C, state_BCK1, activation, segments_BT):
    """As `hybridize.kernels.conv.causal_conv1d`, for at least one token."""
    arguments = (x_BTC, weight_CK, bias_C, state_BCK1, segments_BT, activation == "silu")
    tracked = [t for t in (x_BTC, weight_CK, bias_C, state_BCK1) if t is not None]
    if torch.is_grad_enabled() and any(t.requires_grad for t in tracked):
        return _Conv.apply(*arguments)
    return FORWARD(*arguments)


def causal_conv1d_step(x_BC, weight_CK, bias_C, state_BCK1, activation, rows_B):
    """As `hybridize.kernels.conv.causal_conv1d_step`."""
    return STEP(x_BC, weight_CK, bias_C, state_BCK1, rows_B, activation == "silu")
