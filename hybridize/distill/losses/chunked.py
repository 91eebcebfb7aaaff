"""Losses on logits that never exist as a whole: a few hundred tokens at a time go through the head.

The gradient is known as soon as a chunk's logits are, so it is taken in the forward pass and nothing of size tokens x
vocabulary is kept. Logits are fp32 whatever the dtype of what makes them: rounded to bf16 they would drown the gradient
of a student that is already close to its teacher.

Letters: B batch, T tokens, N tokens that count, n tokens of a chunk, D width, V vocabulary.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hybridize.distill.signals import Head, Signals

# (student's logits of a chunk, which it may overwrite; the chunk) -> (loss of each token, its slope in those logits)
RowLoss = Callable[[Tensor, slice], tuple[Tensor, Tensor]]
# (teacher's logits, student's logits, both its own to overwrite; the chunk) -> the same
Divergence = Callable[[Tensor, Tensor, slice], tuple[Tensor, Tensor]]

HALF = (torch.bfloat16, torch.float16)
# Rows of a half-precision head that are widened at once where the products need it.
HEAD_ROWS = 4096


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _operand(head_VD: Tensor, x_ND: Tensor) -> Tensor:
    """The head as it is held during the loss; on a GPU in the hidden states' own half precision, for the tensor cores."""
    if not x_ND.is_cuda:
        return head_VD.detach()
    return head_VD.detach().to(x_ND.dtype if x_ND.dtype in HALF else _wide(x_ND.dtype))


def _blocks(head_VD: Tensor, wide: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """The head's rows as the products take them. On a CPU a half-precision head is widened a part at a time."""
    if head_VD.dtype == wide or head_VD.is_cuda:
        yield slice(0, len(head_VD)), head_VD
        return
    for start in range(0, len(head_VD), HEAD_ROWS):
        at = slice(start, min(start + HEAD_ROWS, len(head_VD)))
        yield at, head_VD[at].to(wide)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b with a result that was never rounded below fp32, on the tensor cores where b is of half precision."""
    if b.dtype in HALF:
        return torch.mm(a.to(b.dtype), b, out_dtype=torch.float32)
    return a.to(b.dtype) @ b


def _logits(x_ND: Tensor, head_VD: Tensor, head: Head) -> Tensor:
    """[N, V] in fp32 (fp64 for fp64), scaled and capped."""
    wide = _wide(x_ND.dtype)
    if head_VD.dtype == wide or head_VD.is_cuda:
        logits = _product(x_ND, head_VD.T)
    else:
        logits = torch.empty(len(x_ND), len(head_VD), dtype=wide)
        for at, rows in _blocks(head_VD, wide):
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
        weight = _operand(head_VD, x_ND)
        count = len(x_ND)
        total = torch.zeros((), dtype=_wide(x_ND.dtype), device=x_ND.device)
        grad_x = torch.empty_like(x_ND) if need_x else None
        grad_head = torch.zeros(head_VD.shape, dtype=total.dtype, device=head_VD.device) if need_head else None
        for start in range(0, count, chunk):
            at = slice(start, min(start + chunk, count))
            logits = _logits(x_ND[at], weight, head)
            # The cap's slope, before the logits may be overwritten.
            steep = None if head.cap is None else 1 - (logits / head.cap) ** 2
            loss, slope = rows(logits, at)
            total += loss.sum() / count
            if not (need_x or need_head):
                continue
            slope *= head.scale / count
            slope = slope if steep is None else slope.mul_(steep)
            if grad_x is not None:
                grad_x[at] = sum(_product(slope[:, rows_at], block) for rows_at, block in _blocks(weight, total.dtype))
            if grad_head is not None and x_ND.is_cuda and x_ND.dtype != total.dtype:
                grad_head += _product(slope.T, x_ND[at])
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


def select(x_BTD: Tensor, mask_BT: Tensor | None) -> Tensor:
    """The tokens that count, [N, D]."""
    return x_BTD.flatten(0, 1) if mask_BT is None else x_BTD[mask_BT]


def head_loss(x_ND: Tensor, head: Head, rows: RowLoss, chunk: int) -> Tensor:
    """Mean of a loss over N tokens, which `rows` gives for a chunk's logits with its slope in them; scalar, fp32 or fp64."""
    # Autocast would turn the fp32 products into bf16 ones.
    with torch.autocast(x_ND.device.type, enabled=False):
        return _HeadLoss.apply(x_ND, head.weight, head, rows, chunk, torch.is_grad_enabled())


def each_logits(x_ND: Tensor, head: Head, chunk: int) -> Iterator[Tensor]:
    """Logits of `chunk` tokens at a time, [n, V], as a divergence makes them of a teacher: fp32 (fp64 for fp64), no gradient."""
    weight = _operand(head.weight, x_ND)
    for start in range(0, len(x_ND), chunk):
        with torch.autocast(x_ND.device.type, enabled=False):
            yield _logits(x_ND[start : start + chunk].detach(), weight, head)


def softmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax and log-sum-exp over the last dimension, with one exponential an element."""
    top, place = logits.max(dim=-1, keepdim=True)
    share = logits.softmax(dim=-1)
    return share, top - share.gather(-1, place).log()


def linear_divergence(
    student: Signals, teacher: Signals, mask_BT: Tensor | None, divergence: Divergence, temperature: float, chunk_tokens: int
) -> Tensor:  # fmt: skip
    """A divergence of next-token distributions, mean per token, from hidden states.

    tau^2 * mean_t divergence(z_t / tau, z_s / tau),   z = c tanh(a h W^T / c) of either side's own head

    Args:
        student: `hidden` [B, T, D], bf16 | fp16 | fp32 | fp64, and `head`; a frozen head costs no gradient.
        teacher: `hidden` [B, T, D'] and `head` of the same V; no gradient goes there.
        mask_BT: bool, False on tokens that do not count; None counts all.
        divergence: of a chunk's logits [n, V] (divided by tau): what each token loses, and the slope in the student's.
        temperature: tau.
        chunk_tokens: tokens whose logits exist at once.

    Returns:
        Scalar, fp32 (fp64 for fp64 input), in nats.

    Numerics: logits, softmax and the head's gradient in fp32.
    Cost: time 2 N V (3 D + D') FLOP, a D fewer for a frozen head; 4 to 6 * chunk_tokens * V numbers of memory.
    Source: tau^2 from Hinton et al., arXiv 1503.02531; gradient in the forward pass as in Liger-Kernel's chunked losses.
    """
    assert student.hidden is not None
    assert student.head is not None
    assert teacher.hidden is not None
    assert teacher.head is not None
    teacher_ND, teacher_head = select(teacher.hidden.detach(), mask_BT), teacher.head
    weight = _operand(teacher_head.weight, teacher_ND)

    def rows(s: Tensor, at: slice) -> tuple[Tensor, Tensor]:
        t = _logits(teacher_ND[at], weight, teacher_head)
        if temperature != 1.0:
            s /= temperature
            t /= temperature
        loss, slope = divergence(t, s, at)
        return loss * temperature**2, slope.mul_(temperature)

    return head_loss(select(student.hidden, mask_BT), student.head, rows, chunk_tokens)


def linear_cross_entropy(
    hidden_BTD: Tensor, head: Head, labels_BT: Tensor, mask_BT: Tensor | None = None, chunk_tokens: int = 256
) -> Tensor:
    """Cross-entropy, mean per token, from hidden states.

    Args:
        hidden_BTD: final hidden states, [B, T, D], bf16 | fp16 | fp32 | fp64.
        head: output head of V tokens.
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
        q, q_sum = softmax(s)
        loss = (q_sum - s.gather(-1, place)).squeeze(-1)
        return loss, q.scatter_add_(-1, place, q.new_full(place.shape, -1.0))

    return head_loss(select(hidden_BTD, mask_BT), head, rows, chunk_tokens)
