"""Generalised Jensen-Shannon divergence of the next-token distributions."""

from dataclasses import dataclass

import torch
from torch import Tensor

from hybridize.distill.losses.chunked import linear_divergence, softmax
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
        return linear_divergence(student, teacher, mask_BT, self._rows, self.temperature, self.chunk_tokens)

    def _rows(self, t: Tensor, s: Tensor, at: slice) -> tuple[Tensor, Tensor]:
        p, p_sum = softmax(t)
        q, q_sum = softmax(s)
        gap = t.sub_(s).sub_(p_sum - q_sum)
        # log(m / q), anchored at the larger of p and q: no exponential exceeds one, and equal ones give exactly zero. All in
        # place: a chunk's buffers are what the loss costs.
        over_q = torch.abs(gap, out=s).neg_().expm1_()
        over_q.mul_(torch.where(gap > 0, gap.new_tensor(1 - self.beta), gap.new_tensor(self.beta))).log1p_()
        over_q.add_(gap.clamp(min=0))
        from_q = torch.einsum("nv,nv->n", q, over_q)
        loss = self.beta * torch.einsum("nv,nv->n", p, gap.sub_(over_q)) - (1 - self.beta) * from_q
        # The slope is (1 - beta) q (log(q / m) - KL(q || m)).
        return loss, over_q.neg_().add_(from_q[:, None]).mul_(q).mul_(1 - self.beta)
