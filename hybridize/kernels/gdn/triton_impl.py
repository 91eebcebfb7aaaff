"""`gdn` and `gdn_step` by Triton kernels: what they take, their launches, their place in autograd and in compiled graphs."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hybridize.kernels._core.launch import DEVICES, cdiv, empty, launch, power_of_2, tiles
from hybridize.kernels._core.library import registered
from hybridize.kernels.gdn.triton_backward import gdn_input_grads, gdn_output_grads, gdn_state_grads
from hybridize.kernels.gdn.triton_channels import gdn_channel_grads, gdn_channels
from hybridize.kernels.gdn.triton_forward import gdn_gates, gdn_outputs, gdn_solve, gdn_states
from hybridize.kernels.gdn.triton_step import gdn_advance

__all__ = ["DEVICES", "gdn", "gdn_step", "refuses_gdn", "refuses_gdn_step"]

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
MOST_CHANNELS = 256


def _refuses(k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> str | None:
    for name, tensor in (("v", v), ("g", g), ("beta", beta)):
        if tensor.dtype not in FLOATS:
            return f"{name}: got {tensor.dtype}, expected fp16, bf16 or fp32"
    if max(k.shape[-1], v.shape[-1]) > MOST_CHANNELS:
        return f"got head dims {k.shape[-1]} and {v.shape[-1]}, expected at most {MOST_CHANNELS}"
    return None


class _Shape(NamedTuple):
    """Sizes of a call, in the order in which kernels take them, and how its products are computed."""

    batch: int
    tokens: int
    chunks: int
    heads: int
    query_heads: int
    key_heads: int
    value_heads: int
    N: int
    P: int
    L: int
    precision: str
    like: Tensor

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor, beta: Tensor) -> "_Shape":
        N, P = k.shape[3], v.shape[3]
        L = tiles("gdn_solve", v.device, N=N, P=P, BYTES=v.element_size())["L"]
        precision = "tf32x3" if v.dtype == torch.float32 else "tf32"
        (batch, tokens, heads), shared = beta.shape, (q.shape[2], k.shape[2], v.shape[2])
        return cls(batch, tokens, cdiv(tokens, L), heads, *shared, N, P, L, precision, v)

    def tiles(self, kernel: str) -> dict[str, int]:
        found = tiles(kernel, self.like.device, N=self.N, P=self.P, BYTES=self.like.element_size())
        return found | {"PRECISION": self.precision, "L": self.L}

    def new(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return empty(shape, dtype or self.like.dtype, self.like.device)

    @property
    def keys(self) -> int:
        """Rows of a state as kernels hold it."""
        return max(16, power_of_2(self.N))


class _Channels(NamedTuple):
    """Scratch of gdn_channels, as in triton_channels.py."""

    q_into: Tensor
    k_into: Tensor
    k_out: Tensor
    totals: Tensor
    kk: Tensor
    qk: Tensor


class _Chunks(NamedTuple):
    """Scratch of a forward pass, as in triton_forward.py; `gates` is None where there is a decay for each channel."""

    gates: Tensor | None
    channels: _Channels | None
    inverse: Tensor
    states: Tensor
    errors: Tensor
    last: Tensor


class _Side(NamedTuple):
    """q or k of the states' kernels: the tensors, the strides of batch, chunk, head and token, and how many heads it has."""

    tensor: Tensor
    strides: tuple[int, ...]
    heads: int


def _by_token(tensor: Tensor) -> tuple[int, ...]:
    return tensor.stride()[:3]


def _side(tensor: Tensor, scaled: Tensor | None, L: int) -> _Side:
    """Of [B, T, h, N] itself, or of its scaled form [B, U, H, L, N]."""
    if scaled is not None:
        return _Side(scaled, scaled.stride()[:4], scaled.shape[2])
    return _Side(tensor, (tensor.stride(0), L * tensor.stride(1), tensor.stride(2), tensor.stride(1)), tensor.shape[2])


def _documents(segments: Tensor | None) -> tuple[int, ...]:
    return (0, 0) if segments is None else segments.stride()


def _run_gates(s: _Shape, g: Tensor, segments: Tensor | None) -> Tensor:
    gates = s.new(s.batch, s.chunks, s.heads, 4, s.L, dtype=torch.float32)
    options = s.tiles("gdn_gates")
    del options["PRECISION"]
    launch(
        gdn_gates, (s.chunks, cdiv(s.heads, options["HEADS"]), s.batch),
        g, segments, gates, s.tokens, s.chunks, s.heads, *g.stride(), *_documents(segments), **options,
    )  # fmt: skip
    return gates


def _run_channels(s: _Shape, q: Tensor, k: Tensor, g: Tensor, segments: Tensor | None) -> _Channels:
    chunks = (s.batch, s.chunks, s.heads)
    q_into, k_into, k_out = (s.new(*chunks, s.L, s.N) for _ in range(3))
    kk, qk = (s.new(*chunks, s.L, s.L, dtype=torch.float32) for _ in range(2))
    c = _Channels(q_into, k_into, k_out, s.new(*chunks, s.N, dtype=torch.float32), kk, qk)
    launch(
        gdn_channels, (s.chunks, s.heads, s.batch),
        q, k, g, segments, *c, s.tokens, s.chunks, s.heads, s.query_heads, s.key_heads, s.N,
        *_by_token(q), *_by_token(k), *g.stride(), *_documents(segments), **s.tiles("gdn_channels"),
    )  # fmt: skip
    return c


def _walk(
    s: _Shape, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, first: Tensor | None, segments: Tensor | None
) -> _Chunks:
    """From the inputs to the states before all chunks, and what that takes."""
    c = _run_channels(s, q, k, g, segments) if g.dim() == 4 else None
    gates = _run_gates(s, g, segments) if c is None else None
    key_heads, kk = (s.key_heads, None) if c is None else (s.heads, c.kk)
    inverse = s.new(s.batch, s.chunks, s.heads, s.L, s.L)
    launch(
        gdn_solve, (s.chunks, key_heads, s.batch),
        k, beta, gates, segments, kk, inverse, s.tokens, s.chunks, s.heads, key_heads, s.N,
        *_by_token(k), *beta.stride(), *_documents(segments), CHANNELS=c is not None, **s.tiles("gdn_solve"),
    )  # fmt: skip
    states, errors = s.new(s.batch, s.chunks, s.heads, s.N, s.P), s.new(s.batch, s.chunks, s.heads, s.L, s.P)
    last = s.new(s.batch, s.heads, s.N, s.P, dtype=torch.float32)
    keys, k_into, totals = (_side(k, None, s.L), None, None) if c is None else (_side(k, c.k_out, s.L), c.k_into, c.totals)
    options = s.tiles("gdn_states")
    launch(
        gdn_states, (cdiv(s.P, options["COLUMNS"]), s.heads, s.batch),
        keys.tensor, k_into, v, beta, gates, totals, inverse, first, states, errors, last,
        s.tokens, s.chunks, s.heads, keys.heads, s.value_heads, s.N, s.P,
        *keys.strides, *_by_token(v), *beta.stride(), KEYS=s.keys, CHANNELS=c is not None, **options,
    )  # fmt: skip
    return _Chunks(gates, c, inverse, states, errors, last)


def _plain(*tensors: Tensor | None) -> Any:
    """The tensors with the elements of their last dim side by side."""
    return tuple(one if one is None or one.stride(-1) == 1 else one.contiguous() for one in tensors)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, first: Tensor | None, segments: Tensor | None
) -> tuple[Tensor, Tensor]:
    q, k, v = _plain(q, k, v)
    s = _Shape.of(q, k, v, beta)
    c = _walk(s, q, k, v, g, beta, None if first is None else first.contiguous(), segments)
    y = s.new(s.batch, s.tokens, s.heads, s.P)
    queries, qk = (_side(q, None, s.L), None) if c.channels is None else (_side(q, c.channels.q_into, s.L), c.channels.qk)
    options = s.tiles("gdn_outputs")
    launch(
        gdn_outputs, (cdiv(s.P, options["COLUMNS"]), s.chunks, s.batch * s.heads),
        queries.tensor, k, beta, c.gates, segments, qk, c.states, c.errors, y,
        s.tokens, s.chunks, s.heads, queries.heads, s.key_heads, s.N, s.P,
        *queries.strides, *_by_token(k), *beta.stride(), *_documents(segments), CHANNELS=qk is not None, **options,
    )  # fmt: skip
    return y, c.last


def _summed(grad_BTHE: Tensor, like: Tensor) -> Tensor:
    """Gradients of output heads -> of the heads they share, in its dtype."""
    if grad_BTHE.shape != like.shape:
        grad_BTHE = grad_BTHE.unflatten(2, (like.shape[2], -1)).sum(3)
    return grad_BTHE.to(like.dtype)


def _backward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, first: Tensor | None, segments: Tensor | None, dy: Tensor,
    dlast: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    given = (q, k, v, g, beta)
    q, k, v = _plain(q, k, v)
    s = _Shape.of(q, k, v, beta)
    dy, dlast = dy.contiguous(), dlast.contiguous()
    c = _walk(s, q, k, v, g, beta, None if first is None else first.contiguous(), segments)
    asked, dstates = s.new(*c.errors.shape), s.new(*c.states.shape)
    channels, qk = c.channels, None if c.channels is None else c.channels.qk
    options = s.tiles("gdn_output_grads")
    launch(
        gdn_output_grads, (cdiv(s.P, options["COLUMNS"]), s.chunks, s.batch * s.heads),
        q, k, c.gates, segments, qk, dy, asked, s.tokens, s.chunks, s.heads, s.query_heads, s.key_heads, s.N, s.P,
        *_by_token(q), *_by_token(k), *_documents(segments), CHANNELS=channels is not None, **options,
    )  # fmt: skip

    def grad_of(tensor: Tensor) -> Tensor:
        shared = tensor.shape[2] < s.heads
        return s.new(s.batch, s.tokens, s.heads, tensor.shape[3], dtype=torch.float32 if shared else tensor.dtype)

    dq, dk, dv = grad_of(q), grad_of(k), grad_of(v)
    dfirst = s.new(s.batch, s.heads, s.N, s.P, dtype=torch.float32)
    queries, keys = _side(q, channels and channels.q_into, s.L), _side(k, channels and channels.k_out, s.L)
    options = s.tiles("gdn_state_grads")
    launch(
        gdn_state_grads, (cdiv(s.P, options["COLUMNS"]), s.heads, s.batch),
        queries.tensor, keys.tensor, channels and channels.k_into, beta, c.gates, channels and channels.totals, c.inverse,
        asked, dy, dlast, dstates, dv, dfirst, s.tokens, s.chunks, s.heads, queries.heads, keys.heads, s.N, s.P,
        *queries.strides, *keys.strides, *beta.stride(), KEYS=s.keys, CHANNELS=channels is not None, **options,
    )  # fmt: skip
    sizes = (s.batch, s.tokens, s.chunks, s.heads, s.query_heads, s.key_heads, s.N, s.P)
    if channels is None:
        options = s.tiles("gdn_input_grads")
        parts = cdiv(s.N, options["SLICE"])
        dscalars = s.new(parts, 2, *beta.shape, dtype=torch.float32)
        launch(
            gdn_input_grads, (parts, s.chunks, s.batch * s.heads),
            q, k, beta, c.gates, segments, c.states, c.errors, dstates, dv, dy, dq, dk, dscalars, *sizes,
            *_by_token(q), *_by_token(k), *beta.stride(), *_documents(segments), **options,
        )  # fmt: skip
        dg, dbeta = dscalars[:, 0].sum(0), dscalars[:, 1].sum(0)
    else:
        options = s.tiles("gdn_channel_grads")
        parts = cdiv(s.N, options["SLICE"])
        dg, dbeta = s.new(*g.shape, dtype=torch.float32), s.new(parts, *beta.shape, dtype=torch.float32)
        launch(
            gdn_channel_grads, (parts, s.chunks, s.batch * s.heads),
            q, k, g, beta, segments, channels.totals, channels.kk, channels.qk, c.states, c.errors, dstates, dv, dy,
            dq, dk, dg, dbeta, *sizes,
            *_by_token(q), *_by_token(k), *g.stride(), *beta.stride(), *_documents(segments), **options,
        )  # fmt: skip
        dbeta = dbeta.sum(0)
    dq, dk, dv, dg, dbeta = (_summed(grad, like) for grad, like in zip((dq, dk, dv, dg, dbeta), given, strict=True))
    return dq, dk, dv, dg, dbeta, dfirst


def _fake_forward(q, k, v, g, beta, first, segments):
    return v.new_empty(*beta.shape, v.shape[3]), v.new_empty(
        beta.shape[0], beta.shape[2], k.shape[3], v.shape[3], dtype=torch.float32
    )


def _fake_backward(q, k, v, g, beta, first, segments, dy, dlast):
    grads = (torch.empty(one.shape, dtype=one.dtype, device=one.device) for one in (q, k, v, g, beta))
    return *grads, torch.empty(dlast.shape, dtype=torch.float32, device=v.device)


INPUTS = "Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor? first, Tensor? segments"
forward = registered("gdn_forward", f"({INPUTS}) -> (Tensor, Tensor)", _forward, _fake_forward)
backward = registered(
    "gdn_backward",
    f"({INPUTS}, Tensor dy, Tensor dlast) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
)


class _GDN(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, g, beta, first, segments):
        ctx.save_for_backward(q, k, v, g, beta, first, segments)
        return forward(q, k, v, g, beta, first, segments)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dlast):
        grads = backward(*ctx.saved_tensors, dy, dlast)
        return *(grad if needed else None for grad, needed in zip(grads, ctx.needs_input_grad, strict=False)), None


def refuses_gdn(q_BTQN, k_BTGN, v_BTXP, g, beta_BTH, state_BHNP, segments_BT, chunk):
    """Why `gdn` cannot run these, or None."""
    return _refuses(k_BTGN, v_BTXP, g, beta_BTH)


def gdn(q_BTQN, k_BTGN, v_BTXP, g, beta_BTH, state_BHNP, segments_BT, chunk):
    """As `hybridize.kernels.gdn.gdn`, which has checked the arguments; `chunk` is that of the PyTorch path."""
    return _GDN.apply(q_BTQN, k_BTGN, v_BTXP, g, beta_BTH, state_BHNP, segments_BT)


def _step(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, rows: Tensor | None) -> Tensor:
    q, k, v = _plain(q, k, v)
    (batch, heads), N, P = beta.shape, k.shape[2], v.shape[2]
    y = empty((batch, heads, P), v.dtype, v.device)
    options = tiles("gdn_advance", v.device, N=N, P=P)
    channels = g.dim() == 3
    launch(
        gdn_advance, (cdiv(P, options["COLUMNS"]), heads, batch),
        q, k, v, g, beta, state, rows, y, heads, q.shape[1], k.shape[1], v.shape[1], N, P,
        *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *g.stride(), *(() if channels else (0,)), *beta.stride(),
        0 if rows is None else rows.stride(0), *state.stride()[:3], KEYS=power_of_2(N), CHANNELS=channels, **options,
    )  # fmt: skip
    return y


def _fake_step(q, k, v, g, beta, state, rows):
    return v.new_empty(*beta.shape, v.shape[2])


step = registered(
    "gdn_step",
    "(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor(a!) state, Tensor? rows) -> Tensor",
    _step,
    _fake_step,
)


def refuses_gdn_step(q_BQN, k_BGN, v_BXP, g, beta_BH, state_BHNP, rows_B):
    """Why `gdn_step` cannot run these, or None."""
    if state_BHNP.stride(3) != 1:
        return f"got a state of strides {state_BHNP.stride()}, expected its last dim in one piece"
    return _refuses(k_BGN, v_BXP, g, beta_BH)


def gdn_step(q_BQN, k_BGN, v_BXP, g, beta_BH, state_BHNP, rows_B):
    """As `hybridize.kernels.gdn.gdn_step`, which has checked the arguments."""
    return step(q_BQN, k_BGN, v_BXP, g, beta_BH, state_BHNP, rows_B)
