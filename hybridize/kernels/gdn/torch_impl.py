"""The chunked matrix form of `gdn`, with its own backward.

Inside a chunk every token's correction depends on the corrections before it: a unit lower triangular system, solved by
forward substitution. (The inverse by doubling, sum of (-A)^(2^i), overflows where keys repeat.) Between chunks only the
state travels. One decay for a head, and one for each of its channels, differ in how two tokens of a chunk are compared;
the rest is shared.

Letters: B batch, T tokens, U chunks of a block, L tokens of a chunk, H output heads, N key dim, P value dim, M 1 or N.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from hybridize.kernels.ssd.torch_impl import compute_dtype, no_autocast

BLOCK_NUMBERS = 1 << 18  # numbers in the largest temporary of a block, as in ssd


class _Block(NamedTuple):
    start: int
    stop: int
    chunks: int
    first_chunk: int


class _Decay(NamedTuple):
    """Products of the decays between two tokens of a chunk, zero across a segment boundary."""

    pair: Tensor  # [U, B, H, L, L, M], from column token to row token, zero above the diagonal
    into: Tensor  # [U, B, H, L, M], from the incoming state to the token
    out: Tensor  # [U, B, H, L, M], from the token to the outgoing state
    total: Tensor  # [U, B, H, M], from the incoming to the outgoing state


class _Chunk(NamedTuple):
    """What forward and backward of a block share, each [U, B, H, L, ...]."""

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor  # [..., L, 1]
    decay: _Decay
    kk: Tensor  # [..., L, L]: <k_i, k_j> with the decay between, below the diagonal
    qk: Tensor  # [..., L, L]: <q_i, k_j> with the decay between, with the diagonal
    system: Tensor  # [..., L, L]: unit lower triangular, 1 + beta kk
    k_into: Tensor
    q_into: Tensor
    k_out: Tensor


def _blocks(batch, tokens, heads, widest, chunk):
    length = min(chunk, tokens)
    full = tokens // length
    most = max(1, BLOCK_NUMBERS // (batch * heads * length * max(length, widest)))
    cuts = [(first, min(most, full - first)) for first in range(0, full, most)]
    blocks = [_Block(first * length, (first + count) * length, count, first) for first, count in cuts]
    if tokens % length:
        blocks.append(_Block(full * length, tokens, 1, full))
    return blocks


def _cut(tensor_BTHE, block, heads, dtype):
    """[B, T, h, E] -> this block's [U, B, H, L, E], heads repeated side by side."""
    part = tensor_BTHE[:, block.start : block.stop].unflatten(1, (block.chunks, -1)).permute(1, 0, 3, 2, 4).to(dtype)
    return part.repeat_interleave(heads // part.shape[2], dim=2) if part.shape[2] < heads else part.contiguous()


def _put(grad_BTHE, part_UBHLE, block):
    """The inverse of `_cut`, gradients of a shared head summed."""
    heads = grad_BTHE.shape[2]
    if heads < part_UBHLE.shape[2]:
        part_UBHLE = part_UBHLE.unflatten(2, (heads, -1)).sum(3)
    target = grad_BTHE[:, block.start : block.stop].unflatten(1, (block.chunks, -1))
    target.copy_(part_UBHLE.permute(1, 0, 3, 2, 4))


def _decays(g_UBHLM, block, segments_BT, dtype):
    # Summed and subtracted in fp64: e^-3000 and then e^-0.0001 need more digits than fp32 has.
    total = g_UBHLM.double().cumsum(-2)
    length = total.shape[-2]
    barred = torch.ones(length, length, dtype=torch.bool, device=total.device).triu_(1)
    into, out, last = total.exp(), (total[..., -1:, :] - total).exp(), total[..., -1, :].exp()
    if segments_BT is not None:
        ids = segments_BT[:, block.start : block.stop].unflatten(1, (block.chunks, -1)).transpose(0, 1)[:, :, None]
        first = segments_BT[:, max(block.start - 1, 0) : max(block.start, 1)].T[..., None, None]
        before = torch.cat([first, ids[:-1, ..., -1:]])
        barred = barred | (ids[..., :, None] != ids[..., None, :])
        into = into * (ids == before)[..., None]
        out = out * (ids == ids[..., -1:])[..., None]
        last = last * (ids[..., -1:] == before)
    # Masked before exp: above the diagonal the difference is positive and may overflow.
    pair = (total[..., :, None, :] - total[..., None, :, :]).to(dtype)
    pair = pair.masked_fill_(barred[..., None], -math.inf).exp_()
    return _Decay(pair, into.to(dtype), out.to(dtype), last.to(dtype))


def _prepare(block, inputs, segments_BT, dtype):
    q, k, v, g, beta = inputs
    heads = beta.shape[2]
    q, k, v = (_cut(t, block, heads, dtype) for t in (q, k, v))
    beta = _cut(beta[..., None], block, heads, dtype)
    decay = _decays(_cut(g if g.dim() == 4 else g[..., None], block, heads, g.dtype), block, segments_BT, dtype)
    if decay.pair.shape[-1] == 1:
        pair = decay.pair[..., 0]
        kk, qk = (k @ k.mT) * pair, (q @ k.mT) * pair
    else:
        # Row i: all keys with the decay from them to i, against k_i and q_i.
        both = (decay.pair * k[..., None, :, :]) @ torch.stack([k, q], dim=-1)
        kk, qk = both.unbind(-1)
    kk = kk.tril(-1)
    system = beta * kk + torch.eye(kk.shape[-1], dtype=dtype, device=kk.device)
    return _Chunk(q, k, v, beta, decay, kk, qk, system, k * decay.into, q * decay.into, k * decay.out)


def _solved(c):
    """[corrections if the state were zero | what the state takes off them], each row by forward substitution."""
    right = c.beta * torch.cat([c.v, c.k_into], dim=-1)
    solved = torch.linalg.solve_triangular(c.system, right, upper=False, unitriangular=True)
    return solved.split([c.v.shape[-1], c.k.shape[-1]], dim=-1)


def _forward(inputs, state_BHNP, segments_BT, chunk, keep_states):
    """Return y, the state after the last token, and the states at the chunk boundaries or None."""
    q, k, v, g, beta = inputs
    dtype = compute_dtype(v.dtype)
    batch, tokens, heads = beta.shape
    N, P = k.shape[-1], v.shape[-1]
    blocks = _blocks(batch, tokens, heads, _widest(g, N, P, chunk), chunk)
    state = torch.zeros(batch, heads, N, P, dtype=dtype, device=v.device) if state_BHNP is None else state_BHNP.clone()
    states = [state]
    y_BTHP = v.new_empty(batch, tokens, heads, P)
    for block in blocks:
        c = _prepare(block, inputs, segments_BT, dtype)
        fresh, takes = _solved(c)
        corrections, incoming = torch.empty_like(fresh), []
        for u in range(block.chunks):
            incoming.append(state)
            corrections[u] = fresh[u] - takes[u] @ state
            state = c.decay.total[u, ..., None] * state + c.k_out[u].mT @ corrections[u]
            if keep_states:
                states.append(state)
        _put(y_BTHP, c.q_into @ torch.stack(incoming) + c.qk @ corrections, block)
    return y_BTHP, state, torch.stack(states) if keep_states else None


def _widest(g, N, P, chunk):
    return max(N, P, min(chunk, g.shape[1]) * N if g.dim() == 4 else 0)


class _ChunkedGDN(torch.autograd.Function):
    """Backward of the chunked form; saves the inputs and the states at the chunk boundaries.

    With S, S' the states around the chunk, M = 1 + beta kk the system, D = v - k_into S - kk U the errors that the tokens
    saw, U = beta D = M^-1 beta (v - k_into S) the corrections, y = q_into S + qk U and S' = total S + k_out^T U:
        dU = qk^T dy + k_out dS',   Z = M^-T dU,   dv = beta Z,   dbeta = sum_P Z D,   dkk = -beta Z U^T below the diagonal
    The log decay of token t acts on each pair (i, j) with j < t <= i, on the way from S to i >= t, from j < t to S', and
    from S to S'; its gradient is the plain sum of these four.
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
        k, v, g, beta = inputs[1:]
        grads = [torch.empty_like(t) for t in inputs]
        dstate = dlast_BHNP.to(states.dtype)
        widest = _widest(g, k.shape[-1], v.shape[-1], ctx.chunk)
        with no_autocast(v):
            batch, tokens, heads = beta.shape
            for block in reversed(_blocks(batch, tokens, heads, widest, ctx.chunk)):
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
    direct = c.q_into.mT @ dy
    for u in reversed(range(block.chunks)):
        dS_next[u] = dstate
        dU[u] += c.k_out[u] @ dstate
        dstate = c.decay.total[u, ..., None] * dstate + direct[u] - takes[u].mT @ dU[u]

    Z = torch.linalg.solve_triangular(c.system.mT, dU, upper=True, unitriangular=True)
    dbeta = (Z * (c.v - c.k_into @ S - c.kk @ U)).sum(-1, keepdim=True)
    dv = c.beta * Z
    dk_into, dq_into, dk_out = -dv @ S.mT, dy @ S.mT, U @ dS_next.mT
    dkk, dqk = -(dv @ U.mT).tril(-1), (dy @ U.mT).tril()
    dq, dk = dq_into * c.decay.into, dk_into * c.decay.into + dk_out * c.decay.out
    through = (dS_next * S).sum(-1) * c.decay.total
    into, out = dq_into * c.q_into + dk_into * c.k_into, dk_out * c.k_out
    if c.decay.pair.shape[-1] == 1:
        pair = c.decay.pair[..., 0]
        pairs = (dkk * c.kk + dqk * c.qk)[..., None]
        dkk, dqk = dkk * pair, dqk * pair
        dq += dqk @ c.k
        dk += dkk @ c.k + dkk.mT @ c.k + dqk.mT @ c.q
        into, out, through = (t.sum(-1, keepdim=True) for t in (into, out, through))
    else:
        keys = c.decay.pair * c.k[..., None, :, :]
        ways = torch.stack([dqk, dkk], dim=-2) @ keys
        dq += ways[..., 0, :]
        dk += ways[..., 1, :]
        rows = dqk[..., None] * c.q[..., :, None, :] + dkk[..., None] * c.k[..., :, None, :]
        dk += (c.decay.pair * rows).sum(-3)
        pairs = keys.mul_(rows)
    dg = into.double().flip(-2).cumsum(-2).flip(-2) + through.double()[..., None, :]
    dg += F.pad(out.double().cumsum(-2)[..., :-1, :], (0, 0, 1, 0))
    # Column t of the running row sums holds, per i, the pairs (i, j <= t); only i > t is wanted.
    before = pairs.cumsum(-2).mul_(torch.ones_like(c.kk[0, 0, 0]).tril_(-1)[..., None]).sum(-3)
    dg += F.pad(before[..., :-1, :], (0, 0, 1, 0))
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
