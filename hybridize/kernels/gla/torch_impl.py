"""The chunked matrix form of `gla`, with its own backward.

Between chunks only the state travels; inside a chunk it is matrix products over the pairs of tokens (kernels/pairs.py).
Chunks are worked off in blocks small enough to stay in cache. Query heads that share a state are rows of one product.

Letters: B batch, T tokens, U chunks of a block, L tokens of a chunk, S state heads, R query heads per state head, N key dim,
P value dim, E decays of a head (N or 1).
"""

import torch
from torch.autograd.function import once_differentiable

from hybridize.kernels.chunks import Block, blocks, compute_dtype, no_autocast
from hybridize.kernels.pairs import ChannelPairs, HeadPairs

BLOCK_NUMBERS = 1 << 18  # numbers in the largest temporary of a block, as in ssd


def _blocks(inputs, chunk):
    q, _, v, _ = inputs
    batch, tokens, heads, width = q.shape
    length = min(chunk, tokens)
    return blocks(tokens, chunk, batch * heads * length * max(length, width, v.shape[-1]), BLOCK_NUMBERS)


def _cut(tensor_BTSE, block: Block, dtype):
    """[B, T, S, E] -> this block's [U, B, S, L, E]."""
    return block.of(tensor_BTSE).permute(1, 0, 3, 2, 4).to(dtype).contiguous()


def _cut_queries(tensor_BTHE, block: Block, states, dtype):
    """[B, T, H, E] -> this block's [U, B, S, L, R, E]."""
    return block.of(tensor_BTHE).unflatten(3, (states, -1)).permute(1, 0, 3, 2, 4, 5).to(dtype).contiguous()


def _put(grad_BTSE, part_USBLE, block: Block):
    """The inverse of `_cut`."""
    block.of(grad_BTSE).copy_(part_USBLE.permute(1, 0, 3, 2, 4))


def _put_queries(grad_BTHE, part_UBSLRE, block: Block):
    """The inverse of `_cut_queries`."""
    block.of(grad_BTHE).unflatten(3, part_UBSLRE.shape[2:5:2]).copy_(part_UBSLRE.permute(1, 0, 3, 2, 4, 5))


def _prepare(block, inputs, segments_BT, dtype):
    """The pairs of a block, and its values [U, B, S, L, P]."""
    q, k, v, log_decay = inputs
    kind = HeadPairs if log_decay.shape[-1] == 1 else ChannelPairs
    q, k = _cut_queries(q, block, k.shape[2], dtype), _cut(k, block, dtype)
    return kind(q, k, _cut(log_decay, block, log_decay.dtype), block, segments_BT), _cut(v, block, dtype)


def _forward(inputs, state_BSNP, segments_BT, chunk, keep_states):
    """Return y, the state after the last token, and the states at the chunk boundaries or None."""
    q, k, v, _ = inputs
    dtype = compute_dtype(v.dtype)
    cut = _blocks(inputs, chunk)
    kept = cut[-1].first_chunk + cut[-1].chunks if keep_states else cut[0].chunks
    states = torch.empty(kept + 1, q.shape[0], k.shape[2], k.shape[3], v.shape[3], dtype=dtype, device=v.device)
    last = states[0].copy_(state_BSNP) if state_BSNP is not None else states[0].zero_()
    y_BTHP = v.new_empty(*q.shape[:3], v.shape[3])
    for block in cut:
        pairs, values = _prepare(block, inputs, segments_BT, dtype)
        here = (states[block.first_chunk :] if keep_states else states)[: block.chunks + 1]
        here[0] = last
        here[1:] = pairs.k_out.mT @ values
        for u in range(block.chunks):
            here[u + 1].addcmul_(here[u], pairs.total[u, ..., None])
        last = here[block.chunks]
        y = (pairs.w.flatten(3, 4) @ values).add_(pairs.q_into.flatten(3, 4) @ here[:-1])
        _put_queries(y_BTHP, y.unflatten(3, pairs.w.shape[3:5]), block)
    return y_BTHP, last.clone(), states if keep_states else None


class _ChunkedGLA(torch.autograd.Function):
    """Backward of the chunked form; saves the inputs and the states at the chunk boundaries.

    With S, S' the states around a chunk and w its pairs, y = q_into S + w v and S' = total S + k_out^T v:
        dv = w^T dy + k_out dS',   dw = dy v^T,   dS = q_into^T dy + total dS'
    """

    @staticmethod
    def forward(ctx, q, k, v, log_decay, state_BSNP, segments_BT, chunk):
        inputs = (q, k, v, log_decay)
        y_BTHP, last, states = _forward(inputs, state_BSNP, segments_BT, chunk, True)
        ctx.save_for_backward(*inputs, segments_BT, states)
        ctx.chunk = chunk
        return y_BTHP, last

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_BTHP, dlast_BSNP):
        *inputs, segments, states = ctx.saved_tensors
        grads = [torch.empty_like(t) for t in inputs]
        dstate = dlast_BSNP.to(states.dtype)
        with no_autocast(states):
            for block in reversed(_blocks(inputs, ctx.chunk)):
                dstate = _backward_block(block, inputs, segments, states, dy_BTHP, dstate, grads)
        return *grads, dstate if ctx.needs_input_grad[4] else None, None, None


def _backward_block(block, inputs, segments_BT, states, dy_BTHP, dstate, grads):
    """Write a block's gradients into `grads`; return the gradient of its incoming state."""
    pairs, values = _prepare(block, inputs, segments_BT, states.dtype)
    here = states[block.first_chunk : block.first_chunk + block.chunks]
    dy = _cut_queries(dy_BTHP, block, values.shape[2], states.dtype).flatten(3, 4)

    # From chunk to chunk, last to first.
    dhere = torch.empty(block.chunks + 1, *here.shape[1:], dtype=here.dtype, device=here.device)
    dhere[block.chunks] = dstate
    dhere[:-1] = pairs.q_into.flatten(3, 4).mT @ dy
    for u in reversed(range(block.chunks)):
        dhere[u].addcmul_(dhere[u + 1], pairs.total[u, ..., None])

    dv = (pairs.w.flatten(3, 4).mT @ dy).add_(pairs.k_out @ dhere[1:])
    dw, dq_into = (dy @ values.mT).view(pairs.w.shape), (dy @ here.mT).view(pairs.q_into.shape)
    through = (dhere[1:] * here).sum(-1) * pairs.total
    dq, dk, dlog_decay = pairs.grads(dw, dq_into, values @ dhere[1:].mT, through)
    _put_queries(grads[0], dq, block)
    for grad, part in zip(grads[1:], (dk, dv, dlog_decay), strict=True):
        _put(grad, part, block)
    return dhere[0]


def gla_chunked(q_BTHN, k_BTSN, v_BTSP, log_decay_BTSE, state_BSNP, segments_BT, chunk):
    """Run `gla` in chunks; arguments and results as there, unchecked, `chunk` a number.

    Source: Yang et al., arXiv 2312.06635, section 4.2; the halving is our own, as are the order of sums and the backward.
    """
    inputs = (q_BTHN, k_BTSN, v_BTSP, log_decay_BTSE)
    tracked = [t for t in (*inputs, state_BSNP) if t is not None]
    with no_autocast(v_BTSP):
        if torch.is_grad_enabled() and any(t.requires_grad for t in tracked):
            return _ChunkedGLA.apply(*inputs, state_BSNP, segments_BT, chunk)
        y_BTHP, last, _ = _forward(inputs, state_BSNP, segments_BT, chunk, False)
    return y_BTHP, last
