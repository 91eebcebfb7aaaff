"""What two tokens of a chunk are to each other under a decay: w_ij = sum_n q_in k_jn exp(c_in - c_jn) for j <= i, else 0.

c is the running log decay. With one decay a head the exponential leaves the sum: the pairs are one masked product. With
a decay for each channel it does not, and factors such as exp(-c_jn) overflow; so the triangle j < i is cut into squares,
halving: every square lies beside a border m between its columns and its rows, and q_i exp(c_i - c_m), k_j exp(c_m - c_j) are
no larger than q and k. log2(L) products, no L x L x N tensor, nothing to overflow. From squares to those twice as wide, the
rows or the columns decay by what a neighbour of theirs decays as a whole: one exponential a token and channel, and at the end
the rows are what reads the incoming state, the columns what is written to the outgoing one.

The log decay of token t acts on each pair (i, j) with j < t <= i, on the way from the incoming state to i >= t, from
j < t to the outgoing state, and from the one to the other. Its gradient is the plain sum of these: the difference of row
and column sums that is usual cancels badly beside a strong decay. Squares give that sum on the way back.

Letters: U chunks of a block, B batch, S heads, L tokens of a chunk, K queries of a token, N key dim, M decays of a head,
n pieces of a chunk.
"""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridize.kernels.chunks import Block


class HeadPairs:
    """The pairs of a block's chunks under one decay a head, M = 1.

    Args:
        q: [U, B, S, L, K, N].
        k: [U, B, S, L, N].
        log_decay: [U, B, S, L, M], <= 0.
        block: where all this was cut out.
        segments_BT: document ids of all tokens, or None; nothing passes from one document to the next.

    Attributes:
        w: [U, B, S, L, K, L], zero above the diagonal.
        q_into: q with the decay from the incoming state to the token.
        k_out: k with the decay from the token to the outgoing state.
        total: [U, B, S, M], decay from the incoming to the outgoing state.
    """

    def __init__(self, q: Tensor, k: Tensor, log_decay: Tensor, block: Block, segments_BT: Tensor | None):
        self.q, self.k = q, k
        # A chunk that decays by e^-3000 and then by e^-0.0001 needs more digits than fp32 has: the running sum is fp64.
        running = log_decay.double().cumsum(-2)
        into, out = running.exp().to(k), (running[..., -1:, :] - running).exp().to(k)
        self.total = into[..., -1, :]
        barred = torch.ones(k.shape[-2], k.shape[-2], dtype=torch.bool, device=k.device).triu_(1)[:, None]
        if segments_BT is not None:
            same, first, last, whole = _documents(block, segments_BT)
            barred, into, out, self.total = barred | ~same, into * first, out * last, self.total * whole
        # Masked before the exponential: above the diagonal the difference is positive and may overflow.
        self.pair = (running - running.mT).to(k)[..., None, :].masked_fill(barred, -math.inf).exp_()
        self.w = (q.flatten(3, 4) @ k.mT).view(*q.shape[:5], -1).mul_(self.pair)
        self.into, self.out = into[..., None, :], out
        self.q_into, self.k_out = q * self.into, k * self.out

    def grads(self, dw: Tensor, dq_into: Tensor, dk_out: Tensor, through: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k and the log decay.

        Args:
            dw: gradient of w; above the diagonal anything finite.
            dq_into: gradient of q_into.
            dk_out: gradient of k_out.
            through: gradient of the logarithm of `total`, as if each key channel had its own, [U, B, S, N].
        """
        into, out = (dq_into * self.q_into).sum((-2, -1)), (dk_out * self.k_out).sum(-1)
        later = into.double().flip(-1).cumsum(-1).flip(-1) + through.sum(-1, keepdim=True)
        # Column t of the running row sums holds, per i, the pairs (i, j <= t); only i > t is wanted.
        before = (dw * self.w).sum(4).cumsum(-1).tril_(-1).sum(-2) + out.double().cumsum(-1)
        dlog_decay = later + F.pad(before[..., :-1], (1, 0))
        dw = (dw * self.pair).flatten(3, 4)
        dq = (dw @ self.k).view(self.q.shape).addcmul_(dq_into, self.into)
        dk = (dw.mT @ self.q.flatten(3, 4)).addcmul_(dk_out, self.out)
        return dq, dk, dlog_decay[..., None]


class ChannelPairs:
    """The pairs of a block's chunks under a decay for each key channel, M = N; arguments and results as of `HeadPairs`.

    Any length: up to the next power of two there follow tokens that do nothing.
    """

    def __init__(self, q: Tensor, k: Tensor, log_decay: Tensor, block: Block, segments_BT: Tensor | None):
        self.length = k.shape[-2]
        self.missing = -self.length % (1 << (self.length - 1).bit_length())
        self.q, self.k = self._filled(q, 3), self._filled(k, 3)
        self.decay = self._filled(log_decay.to(k), 3).exp()
        w = k.new_zeros(*self.q.shape[:5], self.k.shape[3])
        w.diagonal(dim1=3, dim2=5).copy_((self.q * self.k[..., None, :]).sum(-1).mT)
        rows, columns = self.q * self.decay[..., None, :], self.k.clone()
        for half, left, right, _ in self._squares(rows, columns):
            _square(w, half).copy_((left.flatten(4, 5) @ right.mT).view(*left.shape[:-1], half))
        self.w, self.q_into, self.k_out = self._real(self._real(w, 3), 5), self._real(rows, 3), self._real(columns, 3)
        # Summed in fp64: what a chunk loses by rounding here, a long text would lose with every chunk.
        self.total = log_decay.double().sum(-2).exp().to(k)
        self.documents = None
        if segments_BT is not None:
            self.documents = same, first, last, whole = _documents(block, segments_BT)
            self.w, self.q_into = self.w * same, self.q_into * first[..., None, :]
            self.k_out, self.total = self.k_out * last, self.total * whole

    def _filled(self, tensor: Tensor, dim: int) -> Tensor:
        return F.pad(tensor, (*(0, 0) * (tensor.dim() - 1 - dim), 0, self.missing)) if self.missing else tensor

    def _real(self, tensor: Tensor, dim: int) -> Tensor:
        return tensor.narrow(dim, 0, self.length)

    def _squares(self, rows: Tensor, columns: Tensor) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
        """From narrow to wide: width, left and right factor of all squares so wide, decay over each half [U, B, S, n, 2, N].

        `rows` decayed over their own token, and `columns`, are overwritten.
        """
        whole, half = self.decay, 1
        while half < columns.shape[3]:
            whole = whole.unflatten(3, (-1, 2))
            left, right = _second(rows, half), _first(columns, half)
            yield half, left, right, whole
            left.mul_(whole[:, :, :, :, 0, None, None])
            right.mul_(whole[:, :, :, :, 1, None])
            whole, half = whole[:, :, :, :, 0] * whole[:, :, :, :, 1], 2 * half

    def grads(self, dw: Tensor, dq_into: Tensor, dk_out: Tensor, through: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As of `HeadPairs`."""
        if self.documents is not None:
            same, first, last, _ = self.documents
            dw, dq_into, dk_out = dw * same, dq_into * first[..., None, :], dk_out * last
        dw, drows, dcolumns = self._filled(self._filled(dw, 3), 5), self._filled(dq_into, 3), self._filled(dk_out, 3)
        rows = self.q * self.decay[..., None, :]
        squares = [(half, left.clone(), right.clone(), whole) for half, left, right, whole in self._squares(rows, self.k.clone())]
        dlog = through[:, :, :, None]
        for half, left, right, whole in reversed(squares):
            dleft = _second(drows, half).mul_(whole[:, :, :, :, 0, None, None])
            dright = _first(dcolumns, half).mul_(whole[:, :, :, :, 1, None])
            # The first half's decay acted on the rows of the second, the second half's on the columns of the first.
            dlog = torch.stack([dlog + (dleft * left).sum((-3, -2)), dlog + (dright * right).sum(-2)], dim=4).flatten(3, 4)
            square = _square(dw, half).flatten(4, 5)
            dleft += (square @ right).view(left.shape)
            dright += square.mT @ left.flatten(4, 5)
        drows *= self.decay[..., None, :]
        dlog = dlog + (drows * self.q).sum(-2)
        diagonal = dw.diagonal(dim1=3, dim2=5).mT[..., None]
        dq, dk = drows.addcmul_(diagonal, self.k[..., None, :]), dcolumns.add_((diagonal * self.q).sum(-2))
        return self._real(dq, 3), self._real(dk, 3), self._real(dlog, 3)


def _second(tensor: Tensor, half: int) -> Tensor:
    """[U, B, S, L, ...] -> second halves of its pieces of 2 half tokens, [U, B, S, n, half, ...], a view."""
    return tensor.unflatten(3, (-1, 2, half))[:, :, :, :, 1]


def _first(tensor: Tensor, half: int) -> Tensor:
    """As `_second`, the first halves."""
    return tensor.unflatten(3, (-1, 2, half))[:, :, :, :, 0]


def _square(w: Tensor, half: int) -> Tensor:
    """[U, B, S, L, K, L] -> the squares that join the halves of each piece, [U, B, S, n, half, K, half], a view."""
    rows = _second(w.unflatten(5, (-1, 2, half)), half)
    return rows[..., 0, :].diagonal(dim1=3, dim2=6).movedim(-1, 3)


def _documents(block: Block, segments_BT: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What is of one document: two tokens of a chunk, a token and that before the chunk, a token and the last, these two.

    Shapes [U, B, 1, L, 1, L], twice [U, B, 1, L, 1], and [U, B, 1, 1], bool.
    """
    ids, before = block.borders(segments_BT)
    same = (ids[..., :, None] == ids[..., None, :])[:, :, None, :, None]
    first, last = ((ids == other)[:, :, None, :, None] for other in (before, ids[..., -1:]))
    return same, first, last, (ids[..., -1:] == before)[..., None]
