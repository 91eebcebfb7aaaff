"""Losses on logits that never exist as a whole: a few hundred tokens at a time go through the head.

The gradient is known as soon as a chunk's logits are, so it is taken in the forward pass and nothing of size tokens x
vocabulary is kept. Logits are fp32 whatever the dtype of what makes them: rounded to bf16 they would drown the gradient
of a student that is already close to its teacher.

Letters: B batch, T tokens, N tokens that count, n tokens of a chunk, D width, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# (student's logits of a chunk, which it may overwrite; the chunk) -> (loss of each token, its slope in those logits)
RowLoss = Callable[[Tensor, slice], tuple[Tensor, Tensor]]


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _operand(head_VD: Tensor, x_ND: Tensor) -> Tensor:
    """The head in the dtype that the matrix products below take."""
    keep = x_ND.is_cuda and x_ND.dtype in (torch.bfloat16, torch.float16)
    return head_VD.detach().to(x_ND.dtype if keep else _wide(x_ND.dtype))


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b with a result that was never rounded below fp32, on the tensor cores where b is of half precision."""
    if b.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(a.to(b.dtype), b, out_dtype=torch.float32)
    return a.to(b.dtype) @ b


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, head_VD: Tensor, rows: RowLoss, chunk: int, keep_gradient: bool) -> Tensor:
        need_x, need_head = (need and keep_gradient for need in ctx.needs_input_grad[:2])
        head = _operand(head_VD, x_ND)
        count = len(x_ND)
        total = torch.zeros((), dtype=_wide(x_ND.dtype), device=x_ND.device)
        grad_x = torch.empty_like(x_ND) if need_x else None
        grad_head = torch.zeros(head_VD.shape, dtype=total.dtype, device=head.device) if need_head else None
        for start in range(0, count, chunk):
            at = slice(start, min(start + chunk, count))
            loss, slope = rows(_product(x_ND[at], head.T), at)
            total += loss.sum() / count
            if need_x or need_head:
                slope /= count
            if grad_x is not None:
                grad_x[at] = _product(slope, head)
            if grad_head is not None and head.dtype == grad_head.dtype:
                grad_head.addmm_(slope.T, x_ND[at].to(head.dtype))
            elif grad_head is not None:
                grad_head += _product(slope.T, x_ND[at])
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
        return grad_x, grad_head, None, None, None


def _select(x_BTD: Tensor, mask_BT: Tensor | None) -> Tensor:
    return x_BTD.flatten(0, 1) if mask_BT is None else x_BTD[mask_BT]


def _head_loss(x_ND: Tensor, head_VD: Tensor, rows: RowLoss, chunk: int) -> Tensor:
    # Autocast would turn the fp32 products into bf16 ones.
    with torch.autocast(x_ND.device.type, enabled=False):
        return _HeadLoss.apply(x_ND, head_VD, rows, chunk, torch.is_grad_enabled())


def _softmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax and log-sum-exp over the last dimension, with one exponential an element."""
    top, place = logits.max(dim=-1, keepdim=True)
    share = logits.softmax(dim=-1)
    return share, top - share.gather(-1, place).log()


def linear_kl(
    student_BTD: Tensor, student_head_VD: Tensor, teacher_BTD: Tensor, teacher_head_VD: Tensor,
    mask_BT: Tensor | None = None, temperature: float = 1.0, chunk_tokens: int = 256,
) -> Tensor:  # fmt: skip
    """KL(teacher || student) of next-token distributions, mean per token, from hidden states.

    tau^2 * mean_t sum_v p_v (log p_v - log q_v),   p = softmax(W_t h_t / tau),   q = softmax(W_s h_s / tau)

    Args:
        student_BTD: final hidden states, [B, T, D], bf16 | fp16 | fp32 | fp64.
        student_head_VD: output head, [V, D]; a frozen one costs no gradient.
        teacher_BTD: final hidden states of the teacher, [B, T, D'].
        teacher_head_VD: its output head, [V, D'].
        mask_BT: bool, False on tokens that do not count; None counts all.
        temperature: tau.
        chunk_tokens: tokens whose logits exist at once.

    Returns:
        Scalar, fp32 (fp64 for fp64 input), in nats. Gradients reach the student's two tensors only.

    Numerics: logits, softmax and the head's gradient in fp32. Exactly zero, with zero gradient, for equal inputs.
    Cost: time 2 N V (3 D + D') FLOP, a D fewer for a frozen head; 4 * chunk_tokens * V numbers of memory.
    Source: Hinton et al., arXiv 1503.02531; gradient in the forward pass as in Liger-Kernel's chunked losses.
    """
    x, teacher = _select(student_BTD, mask_BT), _select(teacher_BTD.detach(), mask_BT)
    teacher_head = _operand(teacher_head_VD, teacher).T

    def rows(s: Tensor, at: slice) -> tuple[Tensor, Tensor]:
        t = _product(teacher[at], teacher_head)
        if temperature != 1.0:
            s /= temperature
            t /= temperature
        p, p_sum = _softmax(t)
        q, q_sum = _softmax(s)
        # log p - log q by differences of logits first: what is equal cancels exactly.
        t.sub_(s).sub_(p_sum - q_sum)
        loss = t.mul_(p).sum(-1) * temperature**2
        return loss, q.sub_(p).mul_(temperature)

    return _head_loss(x, student_head_VD, rows, chunk_tokens)


def linear_cross_entropy(
    hidden_BTD: Tensor, head_VD: Tensor, labels_BT: Tensor, mask_BT: Tensor | None = None, chunk_tokens: int = 256
) -> Tensor:
    """Cross-entropy, mean per token, from hidden states.

    Args:
        hidden_BTD: final hidden states, [B, T, D], bf16 | fp16 | fp32 | fp64.
        head_VD: output head, [V, D].
        labels_BT: the token each position should predict, [B, T], int64.
        mask_BT: bool, False on positions that do not count; None counts all.
        chunk_tokens: tokens whose logits exist at once.

    Returns:
        Scalar, fp32 (fp64 for fp64 input), in nats.

    Numerics: logits, softmax and the head's gradient in fp32.
    Source: gradient in the forward pass as in Liger-Kernel's fused linear cross-entropy.
    """
    labels = labels_BT.flatten() if mask_BT is None else labels_BT[mask_BT]

    def rows(s: Tensor, at: slice) -> tuple[Tensor, Tensor]:
        place = labels[at, None]
        q, q_sum = _softmax(s)
        loss = (q_sum - s.gather(-1, place)).squeeze(-1)
        return loss, q.scatter_add_(-1, place, q.new_full(place.shape, -1.0))

    return _head_loss(_select(hidden_BTD, mask_BT), head_VD, rows, chunk_tokens)
