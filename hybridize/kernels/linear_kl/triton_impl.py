"""The divergences of a chunk's rows in Triton: one program reads a row of both sides' fp32 logits and writes loss and slopes.

The logits are made by the library's matrix product. A row is read once for the maxima and the sums of exponentials, for `jsd`
once more for the sums under the mixture, and once for the slopes; scale, cap and temperature are applied as it is read. For
fp32 states the slopes take the place of the student's logits. For half precision they are collected, for up to 4096 tokens
where the head learns, so that the head's gradient, which is as large as the head, is read and written once for that many.

Slopes are not divided by N before they are rounded; in fp16 they are multiplied by a power of two, which is taken out again
after the products, so that slopes of unlikely tokens do not become zero.

Letters: N tokens, n tokens of a chunk, D student's width, E teacher's width, V vocabulary.
"""

import math

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from hybridize.kernels._core.launch import DEVICES, empty, launch, tiles
from hybridize.kernels._core.library import registered
from hybridize.kernels.linear_kl.heads import HALF

__all__ = ["DEVICES", "linear_kl", "refuses_linear_kl"]

# Tokens whose slopes meet in one product where the head learns, and rows of the head whose gradient is added at once.
GROUP = 4096
HEAD_ROWS = 16384
FLOATS = (torch.float16, torch.bfloat16, torch.float32)
KINDS = ("forward", "reverse", "jsd")


@triton.jit
def _tanh(x):
    """tanh to some 1e-7 of its value: a series near zero, where exponentials would cancel."""
    square = x * x
    series = x * (1.0 + square * (-1.0 / 3 + square * (2.0 / 15 + square * (-17.0 / 315 + square * (62.0 / 2835)))))
    small = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - small) / (1.0 + small)
    return tl.where(tl.abs(x) < 0.3, series, tl.where(x < 0, -far, far))


@triton.jit
def _log_mixture(gap, beta):
    """log(m / q) of m = beta p + (1 - beta) q for gap = log(p / q), anchored at the larger of p and q; 0 for equal ones."""
    x = -tl.abs(gap)
    series = x * (1.0 + x * (0.5 + x * (1.0 / 6 + x * (1.0 / 24 + x * (1.0 / 120 + x * (1.0 / 720 + x * (1.0 / 5040)))))))
    less = tl.where(x > -0.3, series, tl.exp(x) - 1.0) * tl.where(gap > 0, 1.0 - beta, beta)
    # log(1 + y) as log(u) y / (u - 1) with u = 1 + y as it is rounded.
    u = 1.0 + less
    even = u == 1.0
    return tl.where(even, less, tl.log(u) * less / tl.where(even, 1.0, u - 1.0)) + tl.maximum(gap, 0.0)


@triton.jit
def _read(logits, at, inside, scale, cap, CAPPED: tl.constexpr):
    """Logits, scaled and capped."""
    z = tl.load(logits + at, mask=inside, other=0.0) * scale
    if CAPPED:
        z = _tanh(z * (1.0 / cap)) * cap
    return z


@triton.jit
def linear_kl_rows(
    student, teacher, labels, loss, slopes, V, student_stride, teacher_stride, slopes_stride,
    student_scale, student_cap, teacher_scale, teacher_cap, temperature, beta, label_weight, factor,
    KIND: tl.constexpr, STUDENT_CAPPED: tl.constexpr, TEACHER_CAPPED: tl.constexpr, SLOPES: tl.constexpr,
    HALF_SLOPES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    student += row * student_stride
    teacher += row * teacher_stride
    # Divisions cost as much as the rest of an element: each is taken once.
    per_tau = 1.0 / temperature
    s_top = float("-inf")
    s_sum = 0.0
    t_top = float("-inf")
    t_sum = 0.0
    ahead = 0.0
    z_top = float("-inf")
    z_sum = 0.0
    for start in range(0, V, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < V
        z = _read(student, at, inside, student_scale, student_cap, STUDENT_CAPPED)
        t = _read(teacher, at, inside, teacher_scale, teacher_cap, TEACHER_CAPPED)
        s, t = z * per_tau, t * per_tau
        s_far, t_far = tl.where(inside, s, float("-inf")), tl.where(inside, t, float("-inf"))
        top = tl.maximum(s_top, tl.max(s_far, 0))
        kept = tl.exp(s_top - top)
        share = tl.exp(s_far - top)
        s_sum = s_sum * kept + tl.sum(share, 0)
        if KIND == 1:
            ahead = ahead * kept + tl.sum(share * (s - t), 0)
        s_top = top
        top = tl.maximum(t_top, tl.max(t_far, 0))
        t_sum = t_sum * tl.exp(t_top - top) + tl.sum(tl.exp(t_far - top), 0)
        t_top = top
        if labels is not None:
            z_far = tl.where(inside, z, float("-inf"))
            top = tl.maximum(z_top, tl.max(z_far, 0))
            z_sum = z_sum * tl.exp(z_top - top) + tl.sum(tl.exp(z_far - top), 0)
            z_top = top
    # log(Z_teacher / Z_student): what is equal cancels exactly.
    shift = (t_top - s_top) + (tl.log(t_sum) - tl.log(s_sum))
    s_unit, t_unit, z_unit = 1.0 / s_sum, 1.0 / t_sum, 0.0
    total = 0.0
    if KIND == 1:
        total = ahead * s_unit + shift
    told = 0.0
    label = -1
    if labels is not None:
        z_unit = 1.0 / z_sum
        label = tl.load(labels + row).to(tl.int32)
        z_label = _read(student, label, label >= 0, student_scale, student_cap, STUDENT_CAPPED)
        told = tl.where(label >= 0, z_top - z_label + tl.log(z_sum), 0.0)
    from_q = 0.0
    if KIND == 2:
        from_p = 0.0
        for start in range(0, V, BLOCK):
            at = start + tl.arange(0, BLOCK)
            inside = at < V
            z = _read(student, at, inside, student_scale, student_cap, STUDENT_CAPPED)
            t = _read(teacher, at, inside, teacher_scale, teacher_cap, TEACHER_CAPPED)
            s, t = z * per_tau, t * per_tau
            gap = t - s - shift
            over_q = _log_mixture(gap, beta)
            from_q += tl.sum(tl.where(inside, tl.exp(s - s_top) * s_unit * over_q, 0.0), 0)
            from_p += tl.sum(tl.where(inside, tl.exp(t - t_top) * t_unit * (gap - over_q), 0.0), 0)
        total = beta * from_p - (1.0 - beta) * from_q
    if KIND == 0 or SLOPES:
        slopes += row * slopes_stride
        for start in range(0, V, BLOCK):
            at = start + tl.arange(0, BLOCK)
            inside = at < V
            z = _read(student, at, inside, student_scale, student_cap, STUDENT_CAPPED)
            t = _read(teacher, at, inside, teacher_scale, teacher_cap, TEACHER_CAPPED)
            s, t = z * per_tau, t * per_tau
            gap = t - s - shift
            q = tl.exp(s - s_top) * s_unit
            if KIND == 0:
                p = tl.exp(t - t_top) * t_unit
                total += tl.sum(tl.where(inside, p * gap, 0.0), 0)
                slope = q - p
            elif KIND == 1:
                slope = q * (-gap - total)
            else:
                slope = (1.0 - beta) * q * (from_q - _log_mixture(gap, beta))
            slope = slope * temperature
            if labels is not None:
                hard = tl.exp(z - z_top) * z_unit - tl.where(at == label, 1.0, 0.0)
                slope = slope * (1.0 - label_weight) + tl.where(label >= 0, hard * label_weight, 0.0)
            if STUDENT_CAPPED:
                slope = slope * (1.0 - z * z * (1.0 / (student_cap * student_cap)))
            slope = slope * (student_scale * factor)
            if HALF_SLOPES:
                slope = tl.minimum(tl.maximum(slope, -65504.0), 65504.0)
            if SLOPES:
                tl.store(slopes + at, slope.to(slopes.dtype.element_ty), mask=inside)
    total = total * temperature * temperature
    if labels is not None:
        total = total * (1.0 - label_weight) + told * label_weight
    tl.store(loss + row, total)


def _product(a, b):
    """a @ b with a result that was never rounded below fp32; without a GPU by widening."""
    if a.is_cuda and b.dtype in HALF:
        return torch.mm(a.to(b.dtype), b, out_dtype=torch.float32)
    return a.to(torch.float32) @ b.to(torch.float32)


def _operand(head_VD, x_ND):
    """The head in the dtype of the states it is multiplied with."""
    return head_VD.to(x_ND.dtype)


def _factor(dtype, kind, temperature, scale):
    """What slopes are multiplied by before they are rounded to fp16: a power of two that leaves the largest below 2^14.

    A slope of the forward KL is at most tau a; one of the reverse is so for each nat between the two, of which 128 are left room.
    """
    if dtype != torch.float16:
        return 1.0
    largest = max(1.0, temperature) * abs(scale) * (128.0 if kind == "reverse" else 1.0)
    return 2.0 ** math.floor(14 - math.log2(largest))


def _launch(
    student, student_head, teacher, teacher_head, labels, kind, beta, label_weight, temperature,
    student_scale, student_cap, teacher_scale, teacher_cap, chunk, need_x, need_head,
):  # fmt: skip
    (N, D), V, device = student.shape, len(student_head), student.device
    half, slopes_needed = student.dtype in HALF, need_x or need_head
    own, other = _operand(student_head, student), _operand(teacher_head, teacher)
    factor = _factor(student.dtype, kind, temperature, student_scale)
    group = max(chunk, GROUP // chunk * chunk) if half and need_head else chunk
    loss = empty((N,), torch.float32, device)
    grad_x = empty((N, D) if need_x else (0,), student.dtype, device)
    grad_head = empty((V, D) if need_head else (0,), torch.float32, device)
    if need_head and not N:
        grad_head.zero_()
    kept = empty((min(group, N), V), student.dtype, device) if half and slopes_needed else None
    unit = 1.0 / (factor * max(N, 1))
    for first in range(0, N, group):
        last = min(first + group, N)
        slopes = None if kept is None else kept[: last - first]
        for start in range(first, last, chunk):
            at = slice(start, min(start + chunk, last))
            s, t = _product(student[at], own.T), _product(teacher[at], other.T)
            out = s if slopes is None else slopes[start - first : at.stop - first]
            launch(
                linear_kl_rows, (at.stop - start,), s, t, None if labels is None else labels[at], loss[at], out,
                V, s.stride(0), t.stride(0), out.stride(0), student_scale, student_cap or 1.0, teacher_scale, teacher_cap or 1.0,
                temperature, beta, label_weight, factor, KIND=KINDS.index(kind), STUDENT_CAPPED=student_cap is not None,
                TEACHER_CAPPED=teacher_cap is not None, SLOPES=slopes_needed, HALF_SLOPES=student.dtype == torch.float16,
                **tiles("linear_kl_rows", device, CAPPED=int(student_cap is not None or teacher_cap is not None)),
            )  # fmt: skip
            if slopes is None:
                slopes = s
        if need_x:
            grad_x[first:last] = _product(slopes, own).mul_(unit)
        if need_head:
            _add(grad_head, slopes, student[first:last], first == 0)
    return loss.sum() / max(N, 1), grad_x, grad_head.mul_(unit)


def _add(grad_head, slopes, states, first):
    """Add slopes^T @ states, a part of the head's rows at a time: the product is as large as they are."""
    for start in range(0, len(grad_head), HEAD_ROWS):
        rows = slice(start, start + HEAD_ROWS)
        part = _product(slopes[:, rows].T, states)
        if first:
            grad_head[rows] = part
        else:
            grad_head[rows] += part


def _fake(student, student_head, *rest):
    need_x, need_head = rest[-2:]
    return (
        student.new_empty((), dtype=torch.float32), student.new_empty(student.shape if need_x else (0,)),
        student_head.new_empty(student_head.shape if need_head else (0,), dtype=torch.float32),
    )  # fmt: skip


both = registered(
    "linear_kl",
    "(Tensor student, Tensor student_head, Tensor teacher, Tensor teacher_head, Tensor? labels, str kind, float beta,"
    " float label_weight, float temperature, float student_scale, float? student_cap, float teacher_scale, float? teacher_cap,"
    " int chunk, bool need_x, bool need_head) -> (Tensor, Tensor, Tensor)",
    _launch,
    _fake,
)


class _LinearKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student, student_head, keep_gradient, *rest):
        need_x, need_head = (need and keep_gradient for need in ctx.needs_input_grad[:2])
        loss, grad_x, grad_head = both(student, student_head, *rest, need_x, need_head)
        ctx.save_for_backward(grad_x if need_x else None, grad_head if need_head else None)
        ctx.head_dtype, ctx.more = student_head.dtype, len(rest)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        # In place: a head's gradient is as large as the head. Autograd refuses a second backward through what changed.
        grad_x, grad_head = ctx.saved_tensors
        if grad_x is not None:
            grad_x = grad_x * grad.to(grad_x.dtype)
        if grad_head is not None:
            grad_head = grad_head.mul_(grad).to(ctx.head_dtype)
        return grad_x, grad_head, *[None] * (ctx.more + 1)


def refuses_linear_kl(student, student_head, teacher, *rest):
    """Why the kernel cannot run these arguments, or None."""
    for states in (student, teacher):
        if states.dtype not in FLOATS:
            return f"got {str(states.dtype).removeprefix('torch.')}, expected fp16, bf16 or fp32"
    return None


def linear_kl(student, student_head, teacher, teacher_head, *rest):
    """As `hybridize.kernels.linear_kl.linear_kl`, unchecked."""
    # Autocast would turn fp32 products into bf16 ones; tensors without memory have none.
    device = "cpu" if student.is_meta else student.device.type
    with torch.autocast(device, enabled=False):
        arguments = teacher.detach(), teacher_head.detach(), *rest
        return _LinearKL.apply(student, student_head, torch.is_grad_enabled(), *arguments)
