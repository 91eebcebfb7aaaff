"""Distance of what a layer's mixer gives from the teacher's."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from hybridize.distill.signals import Signals, StateNorm, state_error


@dataclass(frozen=True, kw_only=True)
class MixerOutput:
    """Mixer outputs given the teacher's own input.

    Source: Zebra-Llama's enhanced intermediate layer distillation (Yang et al., arXiv 2505.17272), its mixer term; LoLCATs'
    attention transfer (Zhang et al., arXiv 2410.10254) is `at: context`, `relative: false` and a weight of 1000.
    """

    weight: float = 1.0
    """What it is multiplied by in the sum of the stage."""
    norm: StateNorm = "mse"
    """Of a token: `mse` its mean square, `l2` the root of that (RADLADS), `full_l2` the root of the sum (MOHAWK)."""
    at: Literal["output", "context"] = "output"
    """`context`: what the last projection (o_proj, out_proj) reads, [B, T, H * d], so that the projection has no part in it."""
    relative: bool = True
    """Measure against what the teacher's layer gives; False is the plain distance of the published stages."""

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"mixed" if self.at == "output" else "context"})

    def __call__(self, student: Signals, teacher: Signals, mask_BT: Tensor | None) -> Tensor:
        own, other, scale = student.mixed, teacher.mixed, teacher.mixed_scale
        if self.at == "context":
            own, other, scale = student.context, teacher.context, teacher.context_scale
        assert own is not None
        assert other is not None
        return state_error(own, other, scale if self.relative else 1.0, mask_BT, self.norm)
