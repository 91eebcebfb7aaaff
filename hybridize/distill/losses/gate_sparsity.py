"""How far gates are open, so that only what matters stays open."""

from dataclasses import dataclass

import torch
from torch import Tensor

from hybridize.distill.signals import Signals


@dataclass(frozen=True, kw_only=True)
class GateSparsity:
    """mean |gate| over all gates of the student; the text and the teacher have no part in it.

    Source: DuoAttention (Xiao et al., arXiv 2410.10819), L_reg with its weight of 0.05; a mean as in mit-han-lab/duo-attention,
    so that the weight means the same at any depth.
    """

    weight: float = 0.05
    """What it is multiplied by in the sum of the stage."""

    needs = frozenset({"gates"})

    def __call__(self, student: Signals, teacher: Signals, mask_BT: Tensor | None) -> Tensor:
        assert student.gates is not None
        return torch.cat(student.gates).abs().mean()
