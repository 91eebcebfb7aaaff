"""Divergences of a chunk's logits with their slopes, in PyTorch; `heads.py` makes the logits."""

from functools import partial

import torch
from torch import Tensor

from hybridize.kernels.linear_kl.heads import Divergence, Head, divergence_loss, softmax


def forward_kl(t: Tensor, s: Tensor, at: slice) -> tuple[Tensor, Tensor]:
    """KL(p || q) of the teacher's p and the student's q, and its slope q - p in the student's logits."""
    p, p_sum = softmax(t)
    q, q_sum = softmax(s)
    # log p - log q by differences of logits first: what is equal cancels exactly.
    t.sub_(s).sub_(p_sum - q_sum)
    return t.mul_(p).sum(-1), q.sub_(p)


def reverse_kl(t: Tensor, s: Tensor, at: slice) -> tuple[Tensor, Tensor]:
    """KL(q || p) and its slope q (log(q / p) - KL)."""
    _, p_sum = softmax(t)
    q, q_sum = softmax(s)
    s.sub_(t).sub_(q_sum - p_sum)
    loss = (q * s).sum(-1)
    return loss, s.sub_(loss[:, None]).mul_(q)


def jsd(t: Tensor, s: Tensor, at: slice, beta: float) -> tuple[Tensor, Tensor]:
    """beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q, and its slope."""
    p, p_sum = softmax(t)
    q, q_sum = softmax(s)
    gap = t.sub_(s).sub_(p_sum - q_sum)
    # log(m / q), anchored at the larger of p and q: no exponential exceeds one, and equal ones give exactly zero. All in
    # place: a chunk's buffers are what the loss costs.
    over_q = torch.abs(gap, out=s).neg_().expm1_()
    over_q.mul_(torch.where(gap > 0, gap.new_tensor(1 - beta), gap.new_tensor(beta))).log1p_()
    over_q.add_(gap.clamp(min=0))
    from_q = torch.einsum("nv,nv->n", q, over_q)
    loss = beta * torch.einsum("nv,nv->n", p, gap.sub_(over_q)) - (1 - beta) * from_q
    # The slope is (1 - beta) q (log(q / m) - KL(q || m)).
    return loss, over_q.neg_().add_(from_q[:, None]).mul_(q).mul_(1 - beta)


def linear_kl_torch(
    student_ND, student_head_VD, teacher_NE, teacher_head_VE, labels_N, kind, beta, label_weight, temperature,
    student_scale, student_cap, teacher_scale, teacher_cap, chunk,
):  # fmt: skip
    """Run `hybridize.kernels.linear_kl.linear_kl` in PyTorch; same arguments and result. Differentiable once.

    Args, Returns: as `hybridize.kernels.linear_kl.linear_kl`, without its checks.
    Source: as there.
    """
    divergence: Divergence = {"forward": forward_kl, "reverse": reverse_kl, "jsd": partial(jsd, beta=beta)}[kind]
    return divergence_loss(
        student_ND, Head(weight=student_head_VD, scale=student_scale, cap=student_cap),
        teacher_NE, Head(weight=teacher_head_VE, scale=teacher_scale, cap=teacher_cap),
        divergence, temperature, chunk, labels_N, label_weight,
    )  # fmt: skip
