"""Generalised Jensen-Shannon divergence of the next-token distributions."""

from dataclasses import dataclass

from torch import Tensor

from hybridize.distill.losses.chunked import linear_distance
from hybridize.distill.losses.kl import LogitLoss
from hybridize.distill.signals import Signals
from hybridize.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class JSD(LogitLoss):
    """beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q, of teacher p and student q; bounded.

    Over beta it tends to the forward KL as beta goes to 0, over 1 - beta to the reverse KL as beta goes to 1.
    Source: Agarwal et al., arXiv 2306.13649 (GKD), equation 1.
    """

    beta: float = 0.5
    """Weight of the teacher's distribution in the mixture; in the limits 0 and 1 it is one of the two directions of KL."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.beta < 1:
            raise ConfigError(f"beta is {self.beta}, expected between 0 and 1; for the ends use kl with its direction")

    def __call__(self, student: Signals, teacher: Signals, mask_BT: Tensor | None) -> Tensor:
        return linear_distance(student, teacher, mask_BT, self.temperature, self.chunk_tokens, kind="jsd", beta=self.beta)
