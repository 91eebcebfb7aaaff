"""Losses on logits that never exist as a whole: a few hundred tokens at a time go through the head.

The gradient is known as soon as a chunk's logits are, so it is taken in the forward pass and nothing of size tokens x
vocabulary is kept. Logits are fp32 whatever the dtype of what makes them: rounded to bf16 they would drown the gradient
of a student that is already close to its teacher.

Letters: N tokens that count, n tokens of a chunk, D width, V vocabulary.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# (student's logits of a chunk, which it may overwrite; the chunk) -> (loss of each token, its slope in those logits)
RowLoss = Callable[[Tensor, slice], tuple[Tensor, Tensor]]
# (teacher's logits, student's logits, both its own to overwrite; the chunk) -> the same
Divergence = Callable[[Tensor, Tensor, slice], tuple[Tensor, Tensor]]

HALF = (torch.bfloat16, torch.float16)
# Rows of a half-precision head that are widened at once where the products need it.
HEAD_ROWS = 4096


@dataclass(frozen=True, kw_only=True, eq=False)
class Head:
    """How final hidden states become logits: c tanh(a x W^T / c), or a x W^T where there is no cap."""

    weight: Tensor
    """W, [V, D]."""
    scale: float = 1.0
    """a, as in Cohere's logit_scale."""
    cap: float | None = None
    """c, as in Gemma2's final_logit_softcapping."""


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """What logits and sums are kept in: fp32, or fp64."""
    return torch.promote_types(dtype, torch.float32)


def operand(head_VD: Tensor, x_ND: Tensor) -> Tensor:
    """The head as it is held during the loss; on a GPU in the hidden states' own half precision, for the tensor cores."""
    if not x_ND.is_cuda:
        return head_VD.detach()
    return head_VD.detach().to(x_ND.dtype if x_ND.dtype in HALF else wide_dtype(x_ND.dtype))


def blocks(head_VD: Tensor, wide: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """The head's rows as the products take them. On a CPU a half-precision head is widened a part at a time."""
    if head_VD.dtype == wide or head_VD.is_cuda:
        yield slice(0, len(head_VD)), head_VD
        return
    for start in range(0, len(head_VD), HEAD_ROWS):
        at = slice(start, min(start + HEAD_ROWS, len(head_VD)))
        yield at, head_VD[at].to(wide)


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b with a result that was never rounded below fp32, on the tensor cores where b is of half precision."""
    if b.dtype in HALF:
        return torch.mm(a.to(b.dtype), b, out_dtype=torch.float32)
    return a.to(b.dtype) @ b


def logits_of(x_ND: Tensor, head_VD: Tensor, head: Head) -> Tensor:
    """[N, V] in fp32 (fp64 for fp64), scaled and capped."""
    wide = wide_dtype(x_ND.dtype)
    if head_VD.dtype == wide or head_VD.is_cuda:
        logits = product(x_ND, head_VD.T)
    else:
        logits = torch.empty(len(x_ND), len(head_VD), dtype=wide)
        for at, rows in blocks(head_VD, wide):
            torch.mm(x_ND.to(wide), rows.T, out=logits[:, at])
    if head.scale != 1.0:
        logits *= head.scale
    return logits if head.cap is None else logits.div_(head.cap).tanh_().mul_(head.cap)


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_ND: Tensor, head_VD: Tensor, head: Head, rows: RowLoss, chunk: int, keep_gradient: bool
    ) -> Tensor:  # fmt: skip
        need_x, need_head = (need and keep_gradient for need in ctx.needs_input_grad[:2])
        weight = operand(head_VD, x_ND)
        count = len(x_ND)
        total = torch.zeros((), dtype=wide_dtype(x_ND.dtype), device=x_ND.device)
        grad_x = torch.empty_like(x_ND) if need_x else None
        grad_head = torch.zeros(head_VD.shape, dtype=total.dtype, device=head_VD.device) if need_head else None
        for start in range(0, count, chunk):
            at = slice(start, min(start + chunk, count))
            logits = logits_of(x_ND[at], weight, head)
            # The cap's slope, before the logits may be overwritten.
            steep = None if head.cap is None else 1 - (logits / head.cap) ** 2
            loss, slope = rows(logits, at)
            total += loss.sum() / count
            if not (need_x or need_head):
                continue
            slope *= head.scale / count
            slope = slope if steep is None else slope.mul_(steep)
            if grad_x is not None:
                grad_x[at] = sum(product(slope[:, rows_at], block) for rows_at, block in blocks(weight, total.dtype))
            if grad_head is not None and x_ND.is_cuda and x_ND.dtype != total.dtype:
                grad_head += product(slope.T, x_ND[at])
            elif grad_head is not None:
                grad_head.addmm_(slope.T, x_ND[at].to(total.dtype))
        ctx.save_for_backward(grad_x, grad_head)
        ctx.head_dtype = head_VD.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # In place: a head's gradient is as large as the head. Autograd refuses a second backward through what changed.
        grad_x, grad_head = ctx.saved_tensors
        if grad_x is not None:
            grad_x = grad_x * grad.to(grad_x.dtype)
        if grad_head is not None:
            grad_head = grad_head.mul_(grad).to(ctx.head_dtype)
        return grad_x, grad_head, None, None, None, None


def head_loss(x_ND: Tensor, head: Head, rows: RowLoss, chunk: int) -> Tensor:
    """Mean of a loss over N tokens, which `rows` gives for a chunk's logits with its slope in them; scalar, fp32 or fp64."""
    # Autocast would turn the fp32 products into bf16 ones.
    with torch.autocast(x_ND.device.type, enabled=False):
        return _HeadLoss.apply(x_ND, head.weight, head, rows, chunk, torch.is_grad_enabled())


def each_logits(x_ND: Tensor, head: Head, chunk: int) -> Iterator[Tensor]:
    """Logits of `chunk` tokens at a time, [n, V], as a divergence makes them of a teacher: fp32 (fp64 for fp64), no gradient."""
    weight = operand(head.weight, x_ND)
    for start in range(0, len(x_ND), chunk):
        with torch.autocast(x_ND.device.type, enabled=False):
            yield logits_of(x_ND[start : start + chunk].detach(), weight, head)


def softmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax and log-sum-exp over the last dimension, with one exponential an element."""
    top, place = logits.max(dim=-1, keepdim=True)
    share = logits.softmax(dim=-1)
    return share, top - share.gather(-1, place).log()


def cross_entropy(s: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Of a chunk's logits [n, V] and the tokens they should predict [n]: -log p of each, and its slope in the logits."""
    place = labels[:, None]
    q, q_sum = softmax(s)
    loss = (q_sum - s.gather(-1, place)).squeeze(-1)
    return loss, q.scatter_add_(-1, place, q.new_full(place.shape, -1.0))


def divergence_loss(
    student_ND: Tensor, head: Head, teacher_ND: Tensor, teacher_head: Head, divergence: Divergence, temperature: float,
    chunk: int, labels_N: Tensor | None = None, label_weight: float = 0.0,
) -> Tensor:  # fmt: skip
    """tau^2 times the mean of a divergence of two sides' logits divided by tau; scalar, fp32 or fp64.

    With labels, that times 1 - label_weight, and label_weight times the cross-entropy of the logits themselves; a label below
    0 has none.
    """
    teacher_ND = teacher_ND.detach()
    weight = operand(teacher_head.weight, teacher_ND)

    def rows(s: Tensor, at: slice) -> tuple[Tensor, Tensor]:
        t = logits_of(teacher_ND[at], weight, teacher_head)
        told = None if labels_N is None else _told(s, labels_N[at])
        if temperature != 1.0:
            s /= temperature
            t /= temperature
        loss, slope = divergence(t, s, at)
        loss, slope = loss * temperature**2, slope.mul_(temperature)
        if told is None:
            return loss, slope
        return loss * (1 - label_weight) + told[0] * label_weight, slope.mul_(1 - label_weight).add_(told[1], alpha=label_weight)

    return head_loss(student_ND, head, rows, chunk)


def _told(s: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy and slope where there is a label, zeros elsewhere."""
    loss, slope = cross_entropy(s, labels.clamp(min=0))
    return loss.where(labels >= 0, 0.0), slope.mul_((labels >= 0)[:, None])
