"""The chunked matrix form of `ssd`, with its own backward.

Tokens are cut into chunks of L. Inside a chunk the recurrence is a masked L x L product (the
scores), between chunks only the state travels. Chunks are worked off in blocks small enough to
stay in cache. The head counts of x, B and C stay apart: heads that share a B or a C are rows or
columns of one matrix product, and nothing is repeated.

Letters: B batch, T tokens, U chunks of a block, L tokens of a chunk, H output heads, X value heads,
G heads of B, M heads of C (a multiple of G here), R output heads per head of B or C, P value dim,
N state dim, E any last dim.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from hybridize.kernels.chunks import blocks, compute_dtype, no_autocast

BLOCK_NUMBERS = 1 << 18  # numbers in the largest temporary of a block: 1 MiB in fp32, measured best on 2 cores


class _Decay(NamedTuple):
    """Products of the decays between two tokens of a chunk, zero across a segment boundary."""

    pair_UBHLL: Tensor  # from column token to row token, zero above the diagonal
    into_UBHL: Tensor  # from the incoming state to the token
    out_UBHL: Tensor  # from the token to the outgoing state
    total_UBH: Tensor  # from the incoming to the outgoing state


def _blocks(batch, tokens, heads, widest, chunk):
    length = min(chunk, tokens)
    return blocks(tokens, chunk, batch * heads * length * max(length, widest), BLOCK_NUMBERS)


def _heads_first(tensor_BULHE, dtype):
    batch, chunks, length, heads, width = tensor_BULHE.shape
    out = torch.empty(chunks, batch, heads, length, width, dtype=dtype, device=tensor_BULHE.device)
    return out.copy_(tensor_BULHE.permute(1, 0, 3, 2, 4))


def _tokens_first(tensor_UBHLE):
    return tensor_UBHLE.permute(1, 0, 3, 2, 4)


def _grouped(tensor_UBHLE, groups):
    """[U, B, H, L, E] -> [U*B*groups, L, R*E]: heads of a group become columns side by side."""
    chunks, batch, heads, length, width = tensor_UBHLE.shape
    split = tensor_UBHLE.unflatten(2, (groups, heads // groups)).transpose(3, 4)
    return split.reshape(chunks * batch * groups, length, -1)


def _ungrouped(tensor, shape_UBHLE, groups):
    """The inverse of `_grouped`, as a view [U, B, groups, R, L, E]."""
    chunks, batch, heads, length, width = shape_UBHLE
    return tensor.view(chunks, batch, groups, length, heads // groups, width).transpose(3, 4)


def _flat(tensor, rows):
    """Merge all leading dims so that a matrix of `rows` rows per batch entry is left (a view)."""
    return tensor.view(-1, rows, tensor.shape[-1])


def _decays(dt_UBHL, A_H, block, segments_BT, dtype):
    # A chunk that decays by e^-3000 and then by e^-0.0001 needs more digits than fp32 has: the
    # running sum is fp64, its low word is added back after the high words were subtracted.
    total = (dt_UBHL.double() * A_H.double()[:, None]).cumsum(-1)
    high = total.to(dtype)
    pair = high[..., :, None] - high[..., None, :]
    if dtype != torch.float64:
        low = (total - high).to(dtype)
        pair.add_(low[..., :, None]).sub_(low[..., None, :])
    length = dt_UBHL.shape[-1]
    barred = torch.ones(length, length, dtype=torch.bool, device=pair.device).triu_(1)
    into, out = total.exp(), (total[..., -1:] - total).exp()
    last = total[..., -1].exp()
    if segments_BT is not None:
        ids, before = (t[:, :, None] for t in block.borders(segments_BT))
        barred = barred | (ids[..., :, None] != ids[..., None, :])
        into = into * (ids == before)
        out = out * (ids == ids[..., -1:])
        last = last * (ids[..., -1] == before[..., 0])
    pair.add_(torch.zeros_like(barred, dtype=dtype).masked_fill_(barred, -math.inf)).exp_()
    return _Decay(pair, into.to(dtype), out.to(dtype), last.to(dtype))


def _scores(B_UBGLN, C_UBMLN):
    """C_i . B_j for every pair of tokens of a chunk: [U, B, M, L, L]."""
    length = C_UBMLN.shape[3]
    rows = C_UBMLN.shape[2] // B_UBGLN.shape[2] * length
    flat = torch.bmm(_flat(C_UBMLN, rows), _flat(B_UBGLN, length).mT)
    return flat.view(*C_UBMLN.shape[:4], length)


def _times_scores(pair_UBHLL, scores_UBMLL):
    """Multiply in place; the R output heads that share a head of C share its scores."""
    shared = pair_UBHLL.unflatten(2, (scores_UBMLL.shape[2], -1))
    shared.mul_(scores_UBMLL[:, :, :, None])
    return pair_UBHLL


def _cut(block, inputs, segments_BT, dtype):
    """This block's x, dt, z = dt x, B and C, heads first, and its decays."""
    x_BTXP, dt_BTH, A_H, B_BTGN, C_BTMN = inputs
    x = _heads_first(block.of(x_BTXP), dtype)
    dt = _heads_first(block.of(dt_BTH)[..., None], dtype)
    Bs, Cs = (_heads_first(block.of(t), dtype) for t in (B_BTGN, C_BTMN))
    dtx = (x[:, :, :, None] * dt.unflatten(2, (x.shape[2], -1))).flatten(2, 3)
    return x, dt, dtx, Bs, Cs, _decays(dt[..., 0], A_H, block, segments_BT, dtype)


def _forward(inputs, D_H, state_BHPN, segments_BT, chunk, keep_states):
    """Return y, the state after the last token, and the states at the chunk boundaries or None."""
    x_BTXP, dt_BTH, _, B_BTGN, C_BTMN = inputs
    dtype = compute_dtype(x_BTXP.dtype)
    batch, tokens, heads = dt_BTH.shape
    (X, P), (G, N), M = x_BTXP.shape[2:], B_BTGN.shape[2:], C_BTMN.shape[2]
    cut = _blocks(batch, tokens, heads, max(P, N), chunk)
    kept = cut[-1].first_chunk + cut[-1].chunks if keep_states else cut[0].chunks
    states = torch.empty(kept + 1, batch, heads, P, N, dtype=dtype, device=x_BTXP.device)
    states[0] = 0 if state_BHPN is None else state_BHPN
    y_BTHP = x_BTXP.new_empty(batch, tokens, heads, P)
    last = states[0]
    for block in cut:
        x, _, dtx, Bs, Cs, decay = _cut(block, inputs, segments_BT, dtype)
        length = x.shape[3]
        here = states[block.first_chunk :] if keep_states else states
        here = here[: block.chunks + 1]
        if not keep_states:
            here[0] = last
        updates = here[1:].view(-1, heads // G * P, N)
        dtx_out = _grouped(dtx * decay.out_UBHL[..., None], G)
        torch.bmm(dtx_out.mT, _flat(Bs, length), out=updates)
        for u in range(block.chunks):
            here[u + 1].addcmul_(here[u], decay.total_UBH[u, ..., None, None])
        last = here[block.chunks]

        weights = _times_scores(decay.pair_UBHLL, _scores(Bs, Cs))
        y = torch.bmm(_flat(weights, length), _flat(dtx, length)).view(dtx.shape)
        carried = torch.bmm(_flat(Cs, length), here[:-1].reshape(-1, heads // M * P, N).mT)
        into = decay.into_UBHL[..., None].unflatten(2, (M, -1))
        y.unflatten(2, (M, -1)).addcmul_(_ungrouped(carried, y.shape, M), into)
        if D_H is not None:
            skip = D_H.to(dtype).view(X, -1, 1, 1)
            y.unflatten(2, (X, -1)).addcmul_(x[:, :, :, None], skip)
        block.of(y_BTHP).copy_(_tokens_first(y))
    return y_BTHP, last.clone(), states if keep_states else None


class _ChunkedSSD(torch.autograd.Function):
    """Backward of the chunked form; saves the inputs and the states at the chunk boundaries.

    With c the running log decay of a chunk, z = dt x, and h, h' the states around the chunk:
        dz_j = sum_i (C_i . B_j) e^(c_i - c_j) dy_i + e^(c_L - c_j) dh' B_j
    The log decay of token t acts on each pair (i, j) with j < t <= i, on the way from h to i >= t,
    from j < t to h', and from h to h'. Its gradient is the plain sum of these four. The difference
    of row and column sums that is usual for the pairs cancels badly beside a strong decay.
    """

    @staticmethod
    def forward(ctx, x_BTXP, dt_BTH, A_H, B_BTGN, C_BTMN, D_H, state_BHPN, segments_BT, chunk):
        inputs = (x_BTXP, dt_BTH, A_H, B_BTGN, C_BTMN)
        y_BTHP, last, states = _forward(inputs, D_H, state_BHPN, segments_BT, chunk, True)
        ctx.save_for_backward(*inputs, D_H, segments_BT, states)
        ctx.chunk = chunk
        return y_BTHP, last

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_BTHP, dlast_BHPN):
        x, dt, A, B, C, D, segments, states = ctx.saved_tensors
        dtype = states.dtype
        grads = [torch.empty_like(t) for t in (x, dt, B, C)]
        dA, dD = torch.zeros(2, len(A), dtype=torch.float64, device=A.device)
        dstate = dlast_BHPN.to(dtype)
        inputs = (x, dt, A, B, C, D)
        batch, tokens, heads = dt.shape
        with no_autocast(x):
            for block in reversed(_blocks(batch, tokens, heads, max(states.shape[-2:]), ctx.chunk)):
                dstate = _backward_block(block, inputs, segments, states, dy_BTHP, dstate, grads, (dA, dD))
        dx, ddt, dB, dC = grads
        dD = None if D is None else dD.to(D.dtype)
        dstate = dstate if ctx.needs_input_grad[6] else None
        return dx, ddt, dA.to(A.dtype), dB, dC, dD, dstate, None, None


def _dlog_of_states(dy, dtx, y_into, dz_out, states, dstates, decay):
    """The gradient of each log decay through incoming and outgoing state, [U, B, H, L]."""
    into = (dy.view(y_into.shape) * y_into).sum(-1).flatten(2, 3) * decay.into_UBHL
    out = (dtx.view(dz_out.shape) * dz_out).sum(-1).flatten(2, 3) * decay.out_UBHL
    through = (dstates[1:] * states[:-1]).sum((-2, -1)) * decay.total_UBH
    from_here = into.double().flip(-1).cumsum(-1).flip(-1)
    before = F.pad(out.double().cumsum(-1)[..., :-1], (1, 0))
    return from_here + before + through[..., None]


def _dlog_of_pairs(dscores_UBHLL, scores_UBMLL):
    """The gradient of each log decay through the pairs of tokens around it, [U, B, H, L]."""
    pairs = dscores_UBHLL.unflatten(2, (scores_UBMLL.shape[2], -1)) * scores_UBMLL[:, :, :, None]
    # Column t of the running row sums holds, per i, the pairs (i, j <= t); only i > t is wanted.
    before = pairs.flatten(2, 3).cumsum(-1).tril_(-1).sum(-2)
    return F.pad(before[..., :-1], (1, 0)).double()


def _backward_block(block, inputs, segments_BT, states, dy_BTHP, dstate_BHPN, grads, sums):
    """Write a block's gradients into `grads`, add those of A and D to `sums`; return dstate."""
    *inputs, D_H = inputs
    dtype = states.dtype
    x, dt, dtx, Bs, Cs, decay = _cut(block, inputs, segments_BT, dtype)
    dy = _heads_first(block.of(dy_BTHP), dtype)
    (chunks, _, heads, length, P), N = dy.shape, Bs.shape[4]
    X, G, M = x.shape[2], Bs.shape[2], Cs.shape[2]
    here = states[block.first_chunk :][: chunks + 1]

    # The state: gradients at the chunk boundaries, last to first.
    dy_into = _grouped(dy * decay.into_UBHL[..., None], M)
    dhere = torch.empty_like(here)
    dhere[chunks] = dstate_BHPN
    torch.bmm(dy_into.mT, _flat(Cs, length), out=dhere[:-1].view(-1, heads // M * P, N))
    for u in reversed(range(chunks)):
        dhere[u].addcmul_(dhere[u + 1], decay.total_UBH[u, ..., None, None])
    incoming = here[:-1].reshape(-1, heads // M * P, N)
    doutgoing = dhere[1:].view(-1, heads // G * P, N)
    dC = torch.bmm(dy_into, incoming).view(Cs.shape)
    dB = torch.bmm(_grouped(dtx * decay.out_UBHL[..., None], G), doutgoing).view(Bs.shape)
    dz_out = _ungrouped(torch.bmm(_flat(Bs, length), doutgoing.mT), dy.shape, G)
    y_into = _ungrouped(torch.bmm(_flat(Cs, length), incoming.mT), dy.shape, M)
    dlog = _dlog_of_states(dy, dtx, y_into, dz_out, here, dhere, decay)

    # Inside the chunk: first the scores and their gradient, then z = dt x.
    scores = _scores(Bs, Cs)
    dscores = torch.bmm(_flat(dy, length), _flat(dtx, length).mT).view(decay.pair_UBHLL.shape)
    dscores.mul_(decay.pair_UBHLL)
    dlog += _dlog_of_pairs(dscores, scores)
    dscores = dscores.unflatten(2, (M, -1))
    dscores = dscores.sum(3) if M < heads else dscores
    rows = M // G * length
    dC.view(-1, rows, N).baddbmm_(_flat(dscores, rows), _flat(Bs, length))
    dB.view(-1, length, N).baddbmm_(_flat(dscores, rows).mT, _flat(Cs, rows))
    weights = _times_scores(decay.pair_UBHLL, scores)
    dz = torch.bmm(_flat(weights, length).mT, _flat(dy, length)).view(dy.shape)
    dz_split = dz.unflatten(2, (G, -1))
    dz_split.addcmul_(dz_out, decay.out_UBHL[..., None].unflatten(2, (G, -1)))

    ddt = (dz.unflatten(2, (X, -1)) * x[:, :, :, None]).sum(-1).flatten(2, 3).double()
    ddt += dlog * inputs[2].double()[:, None]
    sums[0].add_((dlog * dt[..., 0]).sum((0, 1, 3)))
    dx = dz.mul_(dt)
    if D_H is not None:
        dx.addcmul_(dy, D_H.to(dtype)[:, None, None])
        sums[1].add_((dy.unflatten(2, (X, -1)) * x[:, :, :, None]).sum((0, 1, 4, 5)).flatten())
    dx = dx.unflatten(2, (X, -1)).sum(3) if X < heads else dx
    for grad, part in zip(grads, (dx, ddt[..., None], dB, dC), strict=True):
        block.of(grad if grad.dim() == 4 else grad[..., None]).copy_(_tokens_first(part))
    return dhere[0]


def ssd_chunked(x_BTXP, dt_BTH, A_H, B_BTGN, C_BTMN, D_H, state_BHPN, segments_BT, chunk):
    """Run `ssd` in chunks; arguments and results as there, unchecked, `chunk` a number.

    Source: Dao, Gu, arXiv 2405.21060, section 6 (block decomposition); own backward.
    """
    if B_BTGN.shape[2] and C_BTMN.shape[2] % B_BTGN.shape[2]:
        common = math.lcm(B_BTGN.shape[2], C_BTMN.shape[2])
        C_BTMN = C_BTMN.repeat_interleave(common // C_BTMN.shape[2], dim=2)
    inputs = (x_BTXP, dt_BTH, A_H, B_BTGN, C_BTMN)
    tracked = [t for t in (*inputs, D_H, state_BHPN) if t is not None]
    with no_autocast(x_BTXP):
        if torch.is_grad_enabled() and any(t.requires_grad for t in tracked):
            return _ChunkedSSD.apply(*inputs, D_H, state_BHPN, segments_BT, chunk)
        y_BTHP, last, _ = _forward(inputs, D_H, state_BHPN, segments_BT, chunk, False)
    return y_BTHP, last


def ssd_step_torch(x_BXP, dt_BH, A_H, B_BGN, C_BMN, D_H, state_BHPN, rows_B):
    """Run `ssd_step`; arguments and results as there, unchecked."""
    if rows_B is None:
        return _step(x_BXP, dt_BH, A_H, B_BGN, C_BMN, D_H, state_BHPN)
    kept = (rows_B >= 0).nonzero()[:, 0]
    rows = rows_B[kept]
    own = state_BHPN[rows]
    y_BHP = x_BXP.new_zeros(*dt_BH.shape, x_BXP.shape[-1])
    y_BHP[kept] = _step(x_BXP[kept], dt_BH[kept], A_H, B_BGN[kept], C_BMN[kept], D_H, own)
    state_BHPN[rows] = own
    return y_BHP


def _step(x_BXP, dt_BH, A_H, B_BGN, C_BMN, D_H, state_BHPN):
    dtype = state_BHPN.dtype
    (G, M), heads_per_x = (B_BGN.shape[1], C_BMN.shape[1]), dt_BH.shape[1] // x_BXP.shape[1]
    dt = dt_BH.to(dtype)
    x = x_BXP.to(dtype)[:, :, None].expand(-1, -1, heads_per_x, -1).flatten(1, 2)
    decay = torch.exp(dt * A_H.to(dtype))
    state_BHPN.mul_(decay[..., None, None])
    grouped = state_BHPN.unflatten(1, (G, -1))
    dtx = (x * dt[..., None]).unflatten(1, (G, -1))
    grouped.addcmul_(dtx[..., None], B_BGN.to(dtype)[:, :, None, None, :])
    rows = state_BHPN.unflatten(1, (M, -1)).flatten(2, 3)
    with no_autocast(x):
        y = torch.matmul(rows, C_BMN.to(dtype)[..., None]).view(x.shape)
    if D_H is not None:
        y = y.addcmul_(x, D_H.to(dtype)[:, None])
    return y.to(x_BXP.dtype)
