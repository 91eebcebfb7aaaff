"""Distance of hidden states from the teacher's: a layer's output when aligning, the final ones end to end."""

from dataclasses import dataclass

from torch import Tensor

from hybridize.distill.signals import Signals, StateNorm, state_error


@dataclass(frozen=True, kw_only=True)
class HiddenState:
    """Hidden states after the whole layer, MLP included; this weighs a mixer's errors by what the MLP makes of them.

    Source: MOHAWK stage 2 (Bick et al., arXiv 2408.10189); X-EcoMLA (arXiv 2503.11132).
    """

    weight: float = 1.0
    """What it is multiplied by in the sum of the stage."""
    norm: StateNorm = "mse"
    """Of a token: `mse` its mean square, `l2` the root of that (RADLADS), `full_l2` the root of the sum (MOHAWK)."""
    relative: bool = True
    """Measure against what the teacher's layer adds; False is the plain distance of the published stages."""

    needs = frozenset({"hidden"})

    def __call__(self, student: Signals, teacher: Signals, mask_BT: Tensor | None) -> Tensor:
        assert student.hidden is not None
        assert teacher.hidden is not None
        return state_error(student.hidden, teacher.hidden, teacher.hidden_scale if self.relative else 1.0, mask_BT, self.norm)
