"""Divergences of two linear heads with all logits at once: the text of the mathematics and the float64 oracle."""

import torch


def linear_kl_reference(
    student_ND, student_head_VD, teacher_NE, teacher_head_VE, labels_N=None, kind="forward", beta=0.5, label_weight=0.0,
    temperature=1.0, student_scale=1.0, student_cap=None, teacher_scale=1.0, teacher_cap=None, chunk=256,
):  # fmt: skip
    """Run `hybridize.kernels.linear_kl.linear_kl` on dense logits; same arguments and result, gradients by autograd.

    Args, Returns: as `hybridize.kernels.linear_kl.linear_kl`, without its checks.
    Source: Agarwal et al., arXiv 2306.13649 (GKD), equation 1; tau^2 from Hinton et al., arXiv 1503.02531.
    """
    z_s = _logits(student_ND, student_head_VD, student_scale, student_cap)
    z_t = _logits(teacher_NE.detach(), teacher_head_VE.detach(), teacher_scale, teacher_cap)
    log_q, log_p = (torch.log_softmax(z / temperature, -1) for z in (z_s, z_t))
    if kind == "forward":
        each = _kl(log_p, log_q)
    elif kind == "reverse":
        each = _kl(log_q, log_p)
    else:
        log_m = torch.log(beta * log_p.exp() + (1 - beta) * log_q.exp())
        each = beta * _kl(log_p, log_m) + (1 - beta) * _kl(log_q, log_m)
    each = each * temperature**2
    if labels_N is not None:
        told = torch.stack(
            [-torch.log_softmax(z_s, -1)[n, y] if y >= 0 else 0 * each[n] for n, y in enumerate(labels_N.tolist())]
        )
        each = (1 - label_weight) * each + label_weight * told
    return each.sum() / max(len(each), 1)


def _logits(x, head, scale, cap):
    z = scale * x @ head.T
    return z if cap is None else cap * torch.tanh(z / cap)


def _kl(log_a, log_b):
    return (log_a.exp() * (log_a - log_b)).sum(-1)
