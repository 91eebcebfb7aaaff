"""The chunked matrix form of `gdn`, with its own backward.

Inside a chunk every token's correction depends on the corrections before it: a unit lower triangular system, solved by
forward substitution. (The inverse by doubling, sum of (-A)^(2^i), overflows where keys repeat.) Between chunks only the
state travels. How two tokens of a chunk are compared under the decay is in kernels/pairs.py.

Letters: B batch, T tokens, U chunks of a block, L tokens of a chunk, H output heads, N key dim, P value dim.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hybridize.kernels.chunks import blocks, compute_dtype, no_autocast
from hybridize.kernels.pairs import ChannelPairs, HeadPairs

BLOCK_NUMBERS = 1 << 18  # numbers in the largest temporary of a block, as in ssd


class _Chunk(NamedTuple):
    """What forward and backward of a block share, each [U, B, H, L, ...]."""

    v: Tensor
    beta: Tensor  # [..., L, 1]
    pairs: HeadPairs | ChannelPairs  # of k and q (K = 2, in this order) with k
    kk: Tensor  # [..., L, L]: <k_i, k_j> with the decay between, below the diagonal
    qk: Tensor  # [..., L, L]: <q_i, k_j> with the decay between, with the diagonal
    solve: Tensor  # [..., L, L]: inverse of the unit lower triangular 1 + beta kk


def _blocks(inputs, chunk):
    _, k, v, _, beta = inputs
    batch, tokens, heads = beta.shape
    length = min(chunk, tokens)
    return blocks(tokens, chunk, batch * heads * length * max(length, k.shape[-1], v.shape[-1]), BLOCK_NUMBERS)


def _cut(tensor_BTHE, block, heads, dtype):
    """[B, T, h, E] -> this block's [U, B, H, L, E], heads repeated side by side."""
    part = block.of(tensor_BTHE).permute(1, 0, 3, 2, 4).to(dtype)
    return part.repeat_interleave(heads // part.shape[2], dim=2) if part.shape[2] < heads else part.contiguous()


def _put(grad_BTHE, part_UBHLE, block):
    """The inverse of `_cut`, gradients of a shared head summed."""
    heads = grad_BTHE.shape[2]
    if heads < part_UBHLE.shape[2]:
        part_UBHLE = part_UBHLE.unflatten(2, (heads, -1)).sum(3)
    block.of(grad_BTHE).copy_(part_UBHLE.permute(1, 0, 3, 2, 4))


def _prepare(block, inputs, segments_BT, dtype):
    q, k, v, g, beta = inputs
    heads = beta.shape[2]
    q, k, v = (_cut(t, block, heads, dtype) for t in (q, k, v))
    beta = _cut(beta[..., None], block, heads, dtype)
    kind = ChannelPairs if g.dim() == 4 else HeadPairs
    log_decay = _cut(g if g.dim() == 4 else g[..., None], block, heads, g.dtype)
    pairs = kind(torch.stack([k, q], dim=-2), k, log_decay, block, segments_BT)
    kk, qk = pairs.w[..., 0, :].tril(-1), pairs.w[..., 1, :]
    # Where keys repeat, corrections alternate and rounding adds up: fp64, which costs little in so small a system.
    identity = torch.eye(kk.shape[-1], dtype=torch.float64, device=kk.device)
    solve = torch.linalg.solve_triangular((beta * kk).double() + identity, identity, upper=False, unitriangular=True)
    return _Chunk(v, beta, pairs, kk, qk, solve.to(dtype))


def _solved(c):
    """(corrections if the state were zero, what the state takes off them)."""
    weighted = c.solve * c.beta.mT
    return weighted @ c.v, weighted @ c.pairs.q_into[..., 0, :]


def _forward(inputs, state_BHNP, segments_BT, chunk, keep_states):
    """Return y, the state after the last token, and the states at the chunk boundaries or None."""
    _, k, v, _, beta = inputs
    dtype = compute_dtype(v.dtype)
    batch, tokens, heads = beta.shape
    N, P = k.shape[-1], v.shape[-1]
    state = torch.zeros(batch, heads, N, P, dtype=dtype, device=v.device) if state_BHNP is None else state_BHNP.clone()
    states = [state]
    y_BTHP = v.new_empty(batch, tokens, heads, P)
    for block in _blocks(inputs, chunk):
        c = _prepare(block, inputs, segments_BT, dtype)
        fresh, takes = _solved(c)
        corrections, incoming = torch.empty_like(fresh), []
        for u in range(block.chunks):
            incoming.append(state)
            corrections[u] = fresh[u] - takes[u] @ state
            state = c.pairs.total[u, ..., None] * state + c.pairs.k_out[u].mT @ corrections[u]
            if keep_states:
                states.append(state)
        _put(y_BTHP, c.pairs.q_into[..., 1, :] @ torch.stack(incoming) + c.qk @ corrections, block)
    return y_BTHP, state, torch.stack(states) if keep_states else None


class _ChunkedGDN(torch.autograd.Function):
    """Backward of the chunked form; saves the inputs and the states at the chunk boundaries.

    With S, S' the states around the chunk, M = 1 + beta kk the system, D = v - k_into S - kk U the errors that the tokens
    saw, U = beta D = M^-1 beta (v - k_into S) the corrections, y = q_into S + qk U and S' = total S + k_out^T U:
        dU = qk^T dy + k_out dS',   Z = M^-T dU,   dv = beta Z,   dbeta = sum_P Z D,   dkk = -beta Z U^T below the diagonal
    """

    @staticmethod
    def forward(ctx, q, k, v, g, beta, state_BHNP, segments_BT, chunk):
        y_BTHP, last, states = _forward((q, k, v, g, beta), state_BHNP, segments_BT, chunk, True)
        ctx.save_for_backward(q, k, v, g, beta, segments_BT, states)
        ctx.chunk = chunk
        return y_BTHP, last

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_BTHP, dlast_BHNP):
        *inputs, segments, states = ctx.saved_tensors
        grads = [torch.empty_like(t) for t in inputs]
        dstate = dlast_BHNP.to(states.dtype)
        with no_autocast(states):
            for block in reversed(_blocks(inputs, ctx.chunk)):
                dstate = _backward_block(block, inputs, segments, states, dy_BTHP, dstate, grads)
        return *grads, dstate if ctx.needs_input_grad[5] else None, None, None


def _backward_block(block, inputs, segments_BT, states, dy_BTHP, dstate, grads):
    """Write a block's gradients into `grads`; return the gradient of its incoming state."""
    dtype = states.dtype
    c = _prepare(block, inputs, segments_BT, dtype)
    fresh, takes = _solved(c)
    S = states[block.first_chunk : block.first_chunk + block.chunks]
    U = fresh - takes @ S
    dy = _cut(dy_BTHP, block, c.v.shape[2], dtype)

    # From chunk to chunk, last to first: dS and with it all of dU.
    dU, dS_next = c.qk.mT @ dy, torch.empty_like(S)
    direct = c.pairs.q_into[..., 1, :].mT @ dy
    for u in reversed(range(block.chunks)):
        dS_next[u] = dstate
        dU[u] += c.pairs.k_out[u] @ dstate
        dstate = c.pairs.total[u, ..., None] * dstate + direct[u] - takes[u].mT @ dU[u]

    Z = c.solve.mT @ dU
    dbeta = (Z * (c.v - c.pairs.q_into[..., 0, :] @ S - c.kk @ U)).sum(-1, keepdim=True)
    dv = c.beta * Z
    # What the tokens read, by their key and by their query, of each other and of the state.
    read = torch.stack([-dv, dy], dim=-2).flatten(3, 4)
    dw = (read @ U.mT).view(c.pairs.w.shape)
    dw[..., 0, :].tril_(-1)
    through = (dS_next * S).sum(-1) * c.pairs.total
    dkq, dk, dg = c.pairs.grads(dw, (read @ S.mT).view(c.pairs.q_into.shape), U @ dS_next.mT, through)
    dq, dk = dkq[..., 1, :], dk + dkq[..., 0, :]
    for grad, part in zip(grads, (dq, dk, dv, dg, dbeta), strict=True):
        _put(grad if grad.dim() == 4 else grad[..., None], part, block)
    return dstate


def gdn_chunked(q_BTQN, k_BTGN, v_BTXP, g, beta_BTH, state_BHNP, segments_BT, chunk):
    """Run `gdn` in chunks; arguments and results as there, unchecked, `chunk` a number.

    Source: Yang, Kautz, Hatamizadeh, arXiv 2412.06464, section 3.3 (the chunked form); own backward.
    """
    inputs = (q_BTQN, k_BTGN, v_BTXP, g, beta_BTH)
    tracked = [t for t in (*inputs, state_BHNP) if t is not None]
    with no_autocast(v_BTXP):
        if torch.is_grad_enabled() and any(t.requires_grad for t in tracked):
            return _ChunkedGDN.apply(*inputs, state_BHNP, segments_BT, chunk)
        y_BTHP, last, _ = _forward(inputs, state_BHNP, segments_BT, chunk, False)
    return y_BTHP, last
