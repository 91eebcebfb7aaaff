"""The chunked matrix form of `gla`.

Tokens are cut into chunks of L. Between chunks only the state travels. Inside a chunk the weight of token j for token i is
sum_n q_in k_jn exp(c_in - c_jn), c the running log decay. With one decay a head the exponential leaves the sum and the pairs
are one masked product. With a decay for each channel it does not, and factors such as exp(-c_jn) overflow; so the triangle
i > j is cut into squares, halving: every square lies beside a token a between its columns and its rows, and
exp(c_i - c_a), exp(c_a - c_j) are both at most one. log2(L) products, no L x L x N tensor, nothing to overflow.

Letters: B batch, T tokens, C chunks, L tokens of a chunk, S state heads, R query heads per state head, N key dim, P value dim,
E decays of a head (N or 1).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of state, decay and every product: fp64 for fp64 values, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _chunks(tensor_BTSE: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """[B, T, S, E] -> [B, C, S, L, E], zeros after the last token."""
    missing = -tensor_BTSE.shape[1] % length
    return F.pad(tensor_BTSE.to(dtype), (0, 0, 0, 0, 0, missing)).unflatten(1, (-1, length)).transpose(2, 3)


def _pairs_of_scalar(q: Tensor, k: Tensor, v: Tensor, running: Tensor, same: Tensor | None) -> Tensor:
    """What the tokens of a chunk read of each other, [B, C, S, R, L, P], with one decay a head."""
    length = k.shape[3]
    # The diagonal stays out: beside a strong decay its gradient, which is none, would drown the others in rounding.
    itself = torch.eye(length, dtype=torch.bool, device=k.device)
    barred = torch.ones_like(itself).triu_(0)
    if same is not None:
        barred = barred | ~same
    # Masked before the exponential: above the diagonal the difference is positive and may overflow.
    weight = (running - running.mT).masked_fill(barred, -math.inf).to(k.dtype).exp() + itself.to(k.dtype)
    scores = q @ k[:, :, :, None].mT
    return (scores * weight[:, :, :, None]) @ v[:, :, :, None]


def _pairs_of_channels(q: Tensor, k: Tensor, v: Tensor, running: Tensor, same: Tensor | None) -> Tensor:
    """As `_pairs_of_scalar`, with a decay for each channel; the length is a power of two."""
    length, dtype = k.shape[3], k.dtype
    out = (q * k[:, :, :, None]).sum(-1, keepdim=True) * v[:, :, :, None]
    half = length // 2
    while half:
        cut = (-1, 2, half)
        rows = running.unflatten(3, cut)[..., 1, :, :]
        columns = running.unflatten(3, cut)[..., 0, :, :]
        middle = columns[..., -1:, :]
        left = q.unflatten(4, cut)[..., 1, :, :] * (rows - middle).to(dtype).exp()[:, :, :, None]
        right = k.unflatten(3, cut)[..., 0, :, :] * (middle - columns).to(dtype).exp()
        scores = left @ right[:, :, :, None].mT
        if same is not None:
            # Square u joins rows of [u, 1] with columns of [u, 0].
            squares = same.unflatten(4, cut).unflatten(3, cut)[:, :, :, :, 1, :, :, 0]
            scores = scores * squares.diagonal(dim1=3, dim2=5).movedim(-1, 3)[:, :, :, None].to(dtype)
        read = scores @ v.unflatten(3, cut)[:, :, :, None, :, 0]
        out = out + torch.stack([torch.zeros_like(read), read], dim=-3).flatten(-4, -2)
        half //= 2
    return out


def gla_chunked(q_BTHN, k_BTSN, v_BTSP, log_decay_BTSE, state_BSNP, segments_BT, chunk):
    """Run `gla` in chunks; arguments and results as there, unchecked, `chunk` a power of two.

    Source: Yang et al., arXiv 2312.06635, section 4.2; the halving is our own, as is the order of sums. Plain autograd.
    """
    dtype = compute_dtype(v_BTSP.dtype)
    batch, tokens, heads, _ = q_BTHN.shape
    states = k_BTSN.shape[2]
    k, v = _chunks(k_BTSN, chunk, dtype), _chunks(v_BTSP, chunk, dtype)
    q = _chunks(q_BTHN, chunk, dtype).unflatten(2, (states, heads // states))
    # Summed in fp64: a chunk may decay by e^-3000 and then by e^-0.0001, and only differences of sums are used.
    log_decay = _chunks(log_decay_BTSE, chunk, torch.float64)
    running = log_decay.cumsum(3)
    left = F.pad(log_decay[:, :, :, 1:], (0, 0, 0, 1)).flip(3).cumsum(3).flip(3)
    into, out, total = running.to(dtype).exp(), left.to(dtype).exp(), running[:, :, :, -1].to(dtype).exp()
    same = None
    if segments_BT is not None:
        ids = F.pad(segments_BT, (0, -tokens % chunk), mode="replicate") if tokens % chunk else segments_BT
        before = torch.cat([ids[:, :1], ids[:, chunk - 1 : -1 : chunk]], dim=1)[:, :, None]
        ids = ids.unflatten(1, (-1, chunk))
        same = (ids[..., :, None] == ids[..., None, :])[:, :, None]
        into = into * (ids == before)[:, :, None, :, None]
        out = out * (ids == ids[..., -1:])[:, :, None, :, None]
        total = total * (ids[..., -1:] == before)[..., None]
    pairs = _pairs_of_scalar if running.shape[-1] == 1 else _pairs_of_channels
    y = pairs(q, k, v, running, same)
    updates = (k * out).mT @ v
    state = state_BSNP
    incoming = []
    for update, kept in zip(updates.unbind(1), total.unbind(1), strict=True):
        state = torch.zeros_like(update) if state is None else state
        incoming.append(state)
        state = state * kept[..., None] + update
    y = y + (q * into[:, :, :, None]) @ torch.stack(incoming, dim=1)[:, :, :, None]
    return y.flatten(2, 3).transpose(2, 3).flatten(1, 2)[:, :tokens].to(v_BTSP.dtype), state
