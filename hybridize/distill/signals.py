"""What a loss compares, and the mean that every loss takes.

Letters: B batch, T tokens, D width, V vocabulary.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Signals:
    """One model's side of a comparison; a stage fills in what its losses need."""

    mixed: Tensor | None = None
    """Output of one layer's mixer, [B, T, D]."""
    hidden: Tensor | None = None
    """Output of one layer, or the final hidden states that the head reads, [B, T, D]."""
    head: Tensor | None = None
    """Weight of the output head, [V, D]."""
    ids: Tensor | None = None
    """The tokens that were read, [B, T], int64."""
    mixed_scale: float = 1.0
    """Mean square that an error of `mixed` is measured against."""
    hidden_scale: float = 1.0
    """Mean square that an error of `hidden` is measured against."""


def masked_mean(values_BT: Tensor, mask_BT: Tensor | None) -> Tensor:
    """Mean over the tokens that count; a mask of None counts all."""
    if mask_BT is None:
        return values_BT.mean()
    return values_BT[mask_BT].sum() / mask_BT.sum()


def state_error(
    student_BTD: Tensor, teacher_BTD: Tensor, scale: float, mask_BT: Tensor | None, norm: Literal["mse", "l2"]
) -> Tensor:
    """Distance of two hidden states, relative to `scale`, mean per token.

    mse: mean_D (s - t)^2 / scale.  l2: sqrt(mean_D (s - t)^2 / scale), as in "L2 * d^-1/2" of the published recipes.

    Args:
        student_BTD: [B, T, D], any float dtype; the gradient goes here.
        teacher_BTD: [B, T, D].
        scale: mean square to measure against.
        mask_BT: [B, T] bool, False on tokens that do not count, or None.
        norm: which of the two.

    Returns:
        Scalar, fp32 (fp64 for fp64 input).
    """
    wide = torch.promote_types(student_BTD.dtype, torch.float32)
    square = (student_BTD.to(wide) - teacher_BTD.detach().to(wide)).pow(2).mean(-1) / scale
    if norm == "l2":
        # The root has no slope at zero, where a perfect student is; this little makes it zero there instead of NaN.
        tiny = 1e-12
        square = (square + tiny).sqrt() - tiny**0.5
    return masked_mean(square, mask_BT)
