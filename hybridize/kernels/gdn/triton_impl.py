"""`gdn` and `gdn_step` by Triton kernels: what they take, their launches, their place in autograd and in compiled graphs."""

from typing import NamedTuple

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from hybridize.kernels._core.launch import DEVICES, empty, launch, tiles
from hybridize.kernels._core.library import registered
from hybridize.kernels.gdn import triton_forward as forward_kernels

__all__ = ["DEVICES", "gdn", "refuses_gdn"]

MOST_KEYS = 256


def _unit(tensor: Tensor) -> Tensor:
    """The tensor with its last dim's elements side by side."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


class _Sizes(NamedTuple):
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


def _sizes(q: Tensor, k: Tensor, v: Tensor, beta: Tensor) -> _Sizes:
    N, P = k.shape[3], v.shape[3]
    L = tiles("gdn_solve", v.device, N=N, P=P, BYTES=v.element_size())["L"]
    precision = "tf32x3" if v.dtype == torch.float32 else "tf32"
    return _Sizes(
        *beta.shape[:2], triton.cdiv(beta.shape[1], L), beta.shape[2], q.shape[2], k.shape[2], v.shape[2], N, P, L, precision
    )  # fmt: skip


class _Chunks(NamedTuple):
    """Scratch of a forward pass, as in triton_forward.py."""

    gates: Tensor
    inverse: Tensor
    states: Tensor
    errors: Tensor
    last: Tensor


def _run_states(s: _Sizes, q, k, v, g, beta, first, segments) -> _Chunks:
    new = lambda *shape, dtype=v.dtype: empty(shape, dtype, v.device)  # noqa: E731
    row = lambda kernel: tiles(kernel, v.device, N=s.N, P=s.P, BYTES=v.element_size())  # noqa: E731
    documents = (0, 0) if segments is None else segments.stride()
    gates = new(s.batch, s.chunks, s.heads, 4, s.L, dtype=torch.float32)
    options = row("gdn_gates")
    launch(
        forward_kernels.gdn_gates, (s.chunks, triton.cdiv(s.heads, options["HEADS"]), s.batch),
        g, segments, gates, s.tokens, s.chunks, s.heads, *g.stride(), *documents, L=s.L, **options,
    )  # fmt: skip
    inverse = new(s.batch, s.chunks, s.heads, s.L, s.L)
    launch(
        forward_kernels.gdn_solve, (s.chunks, s.key_heads, s.batch),
        k, beta, gates, segments, None, inverse, s.tokens, s.chunks, s.heads, s.key_heads, s.N,
        *k.stride()[:3], *beta.stride(), *documents,
        CHANNELS=False, PRECISION=s.precision, MERGE=s.precision, **row("gdn_solve"),
    )  # fmt: skip
    states, errors = new(s.batch, s.chunks, s.heads, s.N, s.P), new(s.batch, s.chunks, s.heads, s.L, s.P)
    last = new(s.batch, s.heads, s.N, s.P, dtype=torch.float32)
    options = row("gdn_states")
    launch(
        forward_kernels.gdn_states, (triton.cdiv(s.P, options["COLUMNS"]), s.heads, s.batch),
        k, None, v, beta, gates, None, inverse, first, states, errors, last,
        s.tokens, s.chunks, s.heads, s.key_heads, s.value_heads, s.N, s.P,
        k.stride(0), s.L * k.stride(1), k.stride(2), k.stride(1), *v.stride()[:3], *beta.stride(),
        L=s.L, KEYS=max(16, triton.next_power_of_2(s.N)), CHANNELS=False, PRECISION=s.precision, **options,
    )  # fmt: skip
    return _Chunks(gates, inverse, states, errors, last)


def _forward(q, k, v, g, beta, first, segments):
    q, k, v = _unit(q), _unit(k), _unit(v)
    s = _sizes(q, k, v, beta)
    c = _run_states(s, q, k, v, g, beta, first, segments)
    y = empty((s.batch, s.tokens, s.heads, s.P), v.dtype, v.device)
    options = tiles("gdn_outputs", v.device, N=s.N, P=s.P, BYTES=v.element_size())
    documents = (0, 0) if segments is None else segments.stride()
    launch(
        forward_kernels.gdn_outputs, (triton.cdiv(s.P, options["COLUMNS"]), s.chunks, s.batch * s.heads),
        q, k, beta, c.gates, segments, None, c.states, c.errors, y,
        s.tokens, s.chunks, s.heads, s.query_heads, s.key_heads, s.N, s.P,
        q.stride(0), s.L * q.stride(1), q.stride(2), q.stride(1), k.stride(0), k.stride(1), k.stride(2),
        *beta.stride(), *documents, L=s.L, CHANNELS=False, PRECISION=s.precision, **options,
    )  # fmt: skip
    return y, c.last


def gdn(q_BTQN, k_BTGN, v_BTXP, g, beta_BTH, state_BHNP, segments_BT, chunk):
    """As `hybridize.kernels.gdn.gdn`, which has checked the arguments; `chunk` is that of the PyTorch path."""
    return _forward(q_BTQN, k_BTGN, v_BTXP, g, beta_BTH, state_BHNP, segments_BT)
