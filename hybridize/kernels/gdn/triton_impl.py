"""`gdn` and `gdn_step` by Triton kernels: what they take, their launches, their place in autograd and in compiled graphs."""

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from hybridize.kernels._core.launch import DEVICES, empty, launch, tiles
from hybridize.kernels._core.library import registered
from hybridize.kernels.gdn.triton_backward import gdn_input_grads, gdn_output_grads, gdn_state_grads
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
        return cls(batch, tokens, triton.cdiv(tokens, L), heads, *shared, N, P, L, precision, v)

    def tiles(self, kernel: str) -> dict[str, int]:
        found = tiles(kernel, self.like.device, N=self.N, P=self.P, BYTES=self.like.element_size())
        return found | {"PRECISION": self.precision, "L": self.L}

    def new(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return empty(shape, dtype or self.like.dtype, self.like.device)

    @property
    def keys(self) -> int:
        return max(16, triton.next_power_of_2(self.N))


class _Chunks(NamedTuple):
    """Scratch of a forward pass, as in triton_forward.py."""

    gates: Tensor
    inverse: Tensor
    states: Tensor
    errors: Tensor
    last: Tensor


def _by_token(tensor: Tensor) -> tuple[int, int, int]:
    return tensor.stride()[:3]


def _by_chunk(tensor: Tensor, L: int) -> tuple[int, int, int, int]:
    """Strides of batch, chunk, head and token of a tensor [B, T, h, N]."""
    return tensor.stride(0), L * tensor.stride(1), tensor.stride(2), tensor.stride(1)


def _documents(segments: Tensor | None) -> tuple[int, ...]:
    return (0, 0) if segments is None else segments.stride()


def _walk(s: _Shape, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, first: Tensor | None, segments: Tensor | None) -> _Chunks:
    """From the inputs to the states before all chunks, and what that takes."""
    gates = s.new(s.batch, s.chunks, s.heads, 4, s.L, dtype=torch.float32)
    options = s.tiles("gdn_gates")
    del options["PRECISION"]
    launch(
        gdn_gates, (s.chunks, triton.cdiv(s.heads, options["HEADS"]), s.batch),
        g, segments, gates, s.tokens, s.chunks, s.heads, *g.stride(), *_documents(segments), **options,
    )  # fmt: skip
    inverse = s.new(s.batch, s.chunks, s.heads, s.L, s.L)
    launch(
        gdn_solve, (s.chunks, s.key_heads, s.batch),
        k, beta, gates, segments, None, inverse, s.tokens, s.chunks, s.heads, s.key_heads, s.N,
        *_by_token(k), *beta.stride(), *_documents(segments), CHANNELS=False, **s.tiles("gdn_solve"),
    )  # fmt: skip
    states, errors = s.new(s.batch, s.chunks, s.heads, s.N, s.P), s.new(s.batch, s.chunks, s.heads, s.L, s.P)
    last = s.new(s.batch, s.heads, s.N, s.P, dtype=torch.float32)
    options = s.tiles("gdn_states")
    launch(
        gdn_states, (triton.cdiv(s.P, options["COLUMNS"]), s.heads, s.batch),
        k, None, v, beta, gates, None, inverse, first, states, errors, last,
        s.tokens, s.chunks, s.heads, s.key_heads, s.value_heads, s.N, s.P,
        *_by_chunk(k, s.L), *_by_token(v), *beta.stride(), KEYS=s.keys, CHANNELS=False, **options,
    )  # fmt: skip
    return _Chunks(gates, inverse, states, errors, last)


def _plain(*tensors: Tensor | None) -> Any:
    """The tensors with the elements of their last dim side by side."""
    return tuple(one if one is None or one.stride(-1) == 1 else one.contiguous() for one in tensors)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, first: Tensor | None, segments: Tensor | None
) -> tuple[Tensor, Tensor]:
    q, k, v = _plain(q, k, v)
    first = None if first is None else first.contiguous()
    s = _Shape.of(q, k, v, beta)
    c = _walk(s, k, v, g, beta, first, segments)
    y = s.new(s.batch, s.tokens, s.heads, s.P)
    options = s.tiles("gdn_outputs")
    launch(
        gdn_outputs, (triton.cdiv(s.P, options["COLUMNS"]), s.chunks, s.batch * s.heads),
        q, k, beta, c.gates, segments, None, c.states, c.errors, y,
        s.tokens, s.chunks, s.heads, s.query_heads, s.key_heads, s.N, s.P,
        *_by_chunk(q, s.L), *_by_token(k), *beta.stride(), *_documents(segments), CHANNELS=False, **options,
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
    q_in, k_in, v_in = q, k, v
    q, k, v = _plain(q, k, v)
    first, dy, dlast = None if first is None else first.contiguous(), dy.contiguous(), dlast.contiguous()
    s = _Shape.of(q, k, v, beta)
    c = _walk(s, k, v, g, beta, first, segments)
    asked, dstates = s.new(*c.errors.shape), s.new(*c.states.shape)
    heads = (s.heads, s.query_heads, s.key_heads, s.N, s.P)
    options = s.tiles("gdn_output_grads")
    launch(
        gdn_output_grads, (triton.cdiv(s.P, options["COLUMNS"]), s.chunks, s.batch * s.heads),
        q, k, c.gates, segments, None, dy, asked, s.tokens, s.chunks, *heads,
        *_by_token(q), *_by_token(k), *_documents(segments), CHANNELS=False, **options,
    )  # fmt: skip

    def grad_of(tensor: Tensor) -> Tensor:
        shared = tensor.shape[2] < s.heads
        return s.new(s.batch, s.tokens, s.heads, tensor.shape[3], dtype=torch.float32 if shared else tensor.dtype)

    dq, dk, dv = grad_of(q), grad_of(k), grad_of(v)
    dfirst = s.new(s.batch, s.heads, s.N, s.P, dtype=torch.float32)
    options = s.tiles("gdn_state_grads")
    launch(
        gdn_state_grads, (triton.cdiv(s.P, options["COLUMNS"]), s.heads, s.batch),
        q, k, None, beta, c.gates, None, c.inverse, asked, dy, dlast, dstates, dv, dfirst, s.tokens, s.chunks, *heads,
        *_by_chunk(q, s.L), *_by_chunk(k, s.L), *beta.stride(), KEYS=s.keys, CHANNELS=False, **options,
    )  # fmt: skip
    options = s.tiles("gdn_input_grads")
    parts = triton.cdiv(s.N, options["SLICE"])
    dscalars = s.new(parts, 2, *beta.shape, dtype=torch.float32)
    launch(
        gdn_input_grads, (parts, s.chunks, s.batch * s.heads),
        q, k, beta, c.gates, segments, c.states, c.errors, dstates, dv, dy, dq, dk, dscalars, s.batch, s.tokens, s.chunks, *heads,
        *_by_token(q), *_by_token(k), *beta.stride(), *_documents(segments), **options,
    )  # fmt: skip
    dg, dbeta = dscalars.sum(0)
    return _summed(dq, q_in), _summed(dk, k_in), _summed(dv, v_in), dg.to(g.dtype), dbeta.to(beta.dtype), dfirst


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


def _step(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, rows: Tensor | None
) -> Tensor:
    q, k, v = _plain(q, k, v)
    (batch, heads), N, P = beta.shape, k.shape[2], v.shape[2]
    y = empty((batch, heads, P), v.dtype, v.device)
    options = tiles("gdn_advance", v.device, N=N, P=P)
    channels = g.dim() == 3
    launch(
        gdn_advance, (triton.cdiv(P, options["COLUMNS"]), heads, batch),
        q, k, v, g, beta, state, rows, y, heads, q.shape[1], k.shape[1], v.shape[1], N, P,
        *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *g.stride(), *(() if channels else (0,)), *beta.stride(),
        0 if rows is None else rows.stride(0), *state.stride()[:3], KEYS=triton.next_power_of_2(N), CHANNELS=channels, **options,
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
