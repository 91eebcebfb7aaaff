"""Distance of a mixer's materialised matrix from the teacher's attention matrix."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hybridize.distill.signals import Signals, masked_mean, root


@dataclass(frozen=True, kw_only=True)
class MixingMatrix:
    """Matrix orientation: M [T, T] of each head, y = M v, against softmax(q k^T), given the teacher's own input.

    Memory grows with the square of seq_tokens; 512 is plenty. Only mixers with a `mixing_matrix` can be aligned so.
    Source: MOHAWK stage 1 (Bick et al., arXiv 2408.10189, equation 9; repository goombalab/phi-mamba).
    """

    weight: float = 1.0
    """What it is multiplied by in the sum of the stage."""
    norm: Literal["frobenius", "squared"] = "frobenius"
    """`frobenius`: the published ||M - A||_F of each row of text and head. `squared`: |M_t - A_t|^2, mean per token and head."""

    needs = frozenset({"matrix"})

    def __call__(self, student: Signals, teacher: Signals, mask_BT: Tensor | None) -> Tensor:
        assert student.matrix is not None
        assert teacher.matrix is not None
        wide = torch.promote_types(student.matrix.dtype, torch.float32)
        square_BHT = (student.matrix.to(wide) - teacher.matrix.detach().to(wide)).pow(2).sum(-1)
        if self.norm == "squared":
            return masked_mean(square_BHT.mean(1), mask_BT)
        if mask_BT is not None:
            square_BHT = square_BHT * mask_BT[:, None]
        return root(square_BHT.sum(-1)).mean()
