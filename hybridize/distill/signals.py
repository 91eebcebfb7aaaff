"""What a loss compares, and the mean that every loss takes.

Letters: B batch, T tokens, D width, V vocabulary.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hybridize.kernels.linear_kl.heads import Head


@dataclass(frozen=True, kw_only=True, eq=False)
class TopK:
    """What is left of next-token distributions that were cut to their likeliest tokens."""

    ids: Tensor
    """The k likeliest tokens, the likeliest first, [..., k], int32 or int64."""
    log_probs: Tensor
    """Their log-probabilities under the whole distribution, [..., k], fp32 (fp64 for fp64 logits)."""
    log_rest: Tensor
    """Log of the probability of all other tokens together, [..., 1], like `log_probs`."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Signals:
    """One model's side of a comparison; a stage fills in what its losses need."""

    mixed: Tensor | None = None
    """Output of one layer's mixer, [B, T, D]."""
    hidden: Tensor | None = None
    """Output of one layer, or the final hidden states that the head reads, [B, T, D]."""
    context: Tensor | None = None
    """What the mixer's last projection reads, [B, T, C]."""
    matrix: Tensor | None = None
    """What each token's value weighs in each other token's output, [B, H, T, T]."""
    heads: tuple[Tensor, Tensor, Tensor] | None = None
    """Queries [B, H, T, d], keys and values [B, G, T, d], as they meet in the scores."""
    layers: dict[int, Tensor] | None = None
    """Outputs of whole layers by index, [B, T, D] each."""
    gates: list[Tensor] | None = None
    """Of each layer that has some, the gates that are being learnt, [G] each."""
    head: Head | None = None
    top_k: TopK | None = None
    """Next-token distributions, cut; [B, T, ...] each."""
    ids: Tensor | None = None
    """The tokens that were read, [B, T], int64."""
    positions: Tensor | None = None
    """[B, T], int64, from 0 at each document's start; None is one document a row."""
    mixed_scale: float = 1.0
    """Mean square that an error of `mixed` is measured against."""
    hidden_scale: float = 1.0
    """Mean square that an error of `hidden` is measured against."""
    context_scale: float = 1.0
    """Mean square that an error of `context` is measured against."""


def masked_mean(values_BT: Tensor, mask_BT: Tensor | None) -> Tensor:
    """Mean over the tokens that count; a mask of None counts all."""
    if mask_BT is None:
        return values_BT.mean()
    return values_BT[mask_BT].sum() / mask_BT.sum()


StateNorm = Literal["mse", "l2", "full_l2"]
# The root has no slope at zero, where a perfect student is; this little makes it zero there instead of NaN.
TINY = 1e-12


def root(square: Tensor) -> Tensor:
    """sqrt(x) that is 0 with slope 0 at 0."""
    return (square + TINY).sqrt() - TINY**0.5


def state_error(
    student_BTD: Tensor, teacher_BTD: Tensor, scale: float | Tensor, mask_BT: Tensor | None, norm: StateNorm
) -> Tensor:
    """Distance of two hidden states, relative to `scale`, mean per token.

    mse: mean_D (s - t)^2 / scale.  l2: sqrt(mean_D (s - t)^2 / scale), the "L2 * d^-1/2" of RADLADS (arXiv 2505.03005).
    full_l2: sqrt(sum_D (s - t)^2 / scale), as MOHAWK (arXiv 2408.10189) and Zebra-Llama (arXiv 2505.17272) have it.

    Args:
        student_BTD: [B, T, D], any float dtype; the gradient goes here.
        teacher_BTD: [B, T, D].
        scale: mean square to measure against; a number, or one for each token, [B, T].
        mask_BT: [B, T] bool, False on tokens that do not count, or None.
        norm: which of the three.

    Returns:
        Scalar, fp32 (fp64 for fp64 input).
    """
    wide = torch.promote_types(student_BTD.dtype, torch.float32)
    square = (student_BTD.to(wide) - teacher_BTD.detach().to(wide)).pow(2).mean(-1) / scale
    if norm == "mse":
        return masked_mean(square, mask_BT)
    length = student_BTD.shape[-1] ** 0.5 if norm == "full_l2" else 1.0
    return length * masked_mean(root(square), mask_BT)
