"""Distance of a layer's mixer output from the teacher's."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from hybridize.distill.signals import Signals, state_error


@dataclass(frozen=True, kw_only=True)
class MixerOutput:
    """Mixer outputs given the teacher's own input, relative to the teacher's output.

    Source: Zebra-Llama's enhanced intermediate layer distillation (Yang et al., arXiv 2505.17272), its mixer term.
    """

    weight: float = 1.0
    norm: Literal["mse", "l2"] = "mse"

    needs = frozenset({"mixed"})

    def __call__(self, student: Signals, teacher: Signals, mask_BT: Tensor | None) -> Tensor:
        assert student.mixed is not None
        assert teacher.mixed is not None
        return state_error(student.mixed, teacher.mixed, teacher.mixed_scale, mask_BT, self.norm)
