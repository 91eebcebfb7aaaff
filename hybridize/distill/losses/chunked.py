"""Losses on logits from what a stage has of its two models; `hybridize.kernels.linear_kl` makes the logits, a chunk at a time.

Letters: B batch, T tokens, N tokens that count, n tokens of a chunk, D width, V vocabulary.
"""

from torch import Tensor

from hybridize.distill.signals import Head, Signals
from hybridize.kernels.linear_kl import linear_kl
from hybridize.kernels.linear_kl.heads import Divergence, cross_entropy, divergence_loss, head_loss


def select(x_BTD: Tensor, mask_BT: Tensor | None) -> Tensor:
    """The tokens that count, [N, D]."""
    return x_BTD.flatten(0, 1) if mask_BT is None else x_BTD[mask_BT]


def linear_distance(
    student: Signals,
    teacher: Signals,
    mask_BT: Tensor | None,
    temperature: float,
    chunk_tokens: int,
    *,
    kind: str,
    beta: float = 0.5,
) -> Tensor:
    """`linear_divergence` of a kind that `hybridize.kernels.linear_kl` has, faster where that is: forward, reverse or jsd."""
    assert student.hidden is not None
    assert student.head is not None
    assert teacher.hidden is not None
    assert teacher.head is not None
    own, other = student.head, teacher.head
    return linear_kl(
        select(student.hidden, mask_BT), own.weight, select(teacher.hidden.detach(), mask_BT), other.weight,
        kind=kind, beta=beta, temperature=temperature, student_scale=own.scale, student_cap=own.cap,
        teacher_scale=other.scale, teacher_cap=other.cap, chunk=chunk_tokens,
    )  # fmt: skip


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
    own, other = select(student.hidden, mask_BT), select(teacher.hidden.detach(), mask_BT)
    return divergence_loss(own, student.head, other, teacher.head, divergence, temperature, chunk_tokens)


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
        return cross_entropy(s, labels[at])

    return head_loss(select(hidden_BTD, mask_BT), head, rows, chunk_tokens)
