"""How far a student's next-token distributions are from a teacher's, from the hidden states of both.

    loss = mean_n (1 - w) tau^2 D(p_n, q_n) + w CE(label_n, z_n)
    z = c tanh(a W h / c) of either side's own head,   p = softmax(z_teacher / tau),   q = softmax(z_student / tau)

Logits exist for a chunk of tokens at a time, in fp32, and the gradient is taken with the loss. Kept in bf16, logits would drown
the gradient of a student that is already close to its teacher.

Letters: N tokens, D student's width, E teacher's width, V vocabulary.
"""

import torch

from hybridize.errors import ConfigError
from hybridize.kernels._core.dispatch import fast_path
from hybridize.kernels.linear_kl.torch_impl import linear_kl_torch

__all__ = ["linear_kl"]

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
KINDS = ("forward", "reverse", "jsd")


def linear_kl(
    student_ND,
    student_head_VD,
    teacher_NE,
    teacher_head_VE,
    labels_N=None,
    kind="forward",
    beta=0.5,
    label_weight=0.0,
    temperature=1.0,
    student_scale=1.0,
    student_cap=None,
    teacher_scale=1.0,
    teacher_cap=None,
    chunk=256,
    impl="auto",
):
    """Mean divergence of next-token distributions from final hidden states. Differentiable once, in the student's arguments.

    forward: KL(p || q).   reverse: KL(q || p).   jsd: beta KL(p || m) + (1 - beta) KL(q || m),  m = beta p + (1 - beta) q

    Args:
        student_ND: final hidden states, [N, D], fp16 | bf16 | fp32 | fp64; the tokens that count, and no others.
        student_head_VD: output head, [V, D], floating; a frozen one costs no gradient.
        teacher_NE: the teacher's hidden states, [N, E], like the student's; no gradient goes there.
        teacher_head_VE: its head, [V, E], floating.
        labels_N: tokens for the cross-entropy, [N], integers, below 0 for none; None where label_weight is 0.
        kind: "forward", "reverse" or "jsd".
        beta: weight of the teacher in the mixture of `jsd`, between 0 and 1.
        label_weight: w, from 0 to 1.
        temperature: tau, above 0; the cross-entropy is that of the logits themselves.
        student_scale: a of the student.
        student_cap: c of the student; None has no cap.
        teacher_scale: a of the teacher.
        teacher_cap: c of the teacher.
        chunk: tokens whose logits exist at once.
        impl: "auto", "torch" or "triton"; see `hybridize.kernels._core.dispatch`.

    Returns:
        Scalar, fp32 (fp64 for fp64 states), in nats.

    Raises:
        ConfigError: a shape, a dtype, an option out of its range, or an implementation that cannot run.

    Numerics: logits, softmax, loss and the head's gradient in fp32 (fp64 for fp64 states). On a GPU the slopes that the two
        products of the gradient read are of the states' dtype, not divided by N before they are rounded.
    Cost: 2 N V (3 D + E) FLOP, 2 N V D fewer for a frozen head; for V = 128256 and half precision on a GPU 8 chunk V bytes of
        logits and 2 V bytes a token of slopes, of one chunk, or of 4096 tokens where the head learns, whose gradient is fp32.
    Source: Agarwal et al., arXiv 2306.13649 (GKD), equation 1; tau^2 from Hinton et al., arXiv 1503.02531; gradient in the
        forward pass as in Liger-Kernel's chunked losses (linkedin/Liger-Kernel ead96b6).
    """
    _check(student_ND, student_head_VD, teacher_NE, teacher_head_VE, labels_N)
    _check_options(kind, beta, label_weight, temperature, student_cap, teacher_cap, chunk, labels_N)
    arguments = (
        student_ND, student_head_VD, teacher_NE, teacher_head_VE, labels_N, kind, beta, label_weight, temperature,
        student_scale, student_cap, teacher_scale, teacher_cap, chunk,
    )  # fmt: skip
    if fast := fast_path("linear_kl", "linear_kl", impl, *arguments):
        return fast(*arguments)
    return linear_kl_torch(*arguments)


def _check(student_ND, student_head_VD, teacher_NE, teacher_head_VE, labels_N):
    sides = {"student_ND": (student_ND, student_head_VD), "teacher_NE": (teacher_NE, teacher_head_VE)}
    for name, (states, head) in sides.items():
        if states.dim() != 2 or states.dtype not in FLOATS or len(states) != len(student_ND):
            raise ConfigError(
                f"run linear_kl: {name}: got {states.dtype} {tuple(states.shape)}, expected floats [N, width], N of the student."
            )
        expected = (len(student_head_VD), states.shape[1])
        if tuple(head.shape) != expected or head.dtype not in FLOATS:
            where = name.split("_")[0]
            raise ConfigError(
                f"run linear_kl: {where}_head: got {head.dtype} {tuple(head.shape)}, expected floats {expected}: one vocabulary, "
                f"and the width of {name}."
            )
    if labels_N is not None and (labels_N.shape != student_ND.shape[:1] or labels_N.dtype.is_floating_point):
        raise ConfigError(
            f"run linear_kl: labels_N: got {labels_N.dtype} {tuple(labels_N.shape)}, expected integers ({len(student_ND)},)."
        )


def _check_options(kind, beta, label_weight, temperature, student_cap, teacher_cap, chunk, labels_N):
    if kind not in KINDS:
        raise ConfigError(f"run linear_kl: kind: got {kind!r}, expected {', '.join(KINDS)}.")
    if kind == "jsd" and not 0 < beta < 1:
        raise ConfigError(f"run linear_kl: beta: got {beta}, expected between 0 and 1; for the ends take forward or reverse.")
    if not 0 <= label_weight <= 1 or (labels_N is None) != (label_weight == 0):
        raise ConfigError(f"run linear_kl: label_weight: got {label_weight}, expected above 0 up to 1 with labels, 0 without.")
    if temperature <= 0:
        raise ConfigError(f"run linear_kl: temperature: got {temperature}, expected above 0.")
    for name, cap in (("student_cap", student_cap), ("teacher_cap", teacher_cap)):
        if cap is not None and cap <= 0:
            raise ConfigError(f"run linear_kl: {name}: got {cap}, expected above 0, or None.")
    if chunk < 1:
        raise ConfigError(f"run linear_kl: chunk: got {chunk}, expected at least 1.")
