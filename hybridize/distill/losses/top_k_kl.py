"""KL divergence with what the teacher thinks of its likeliest tokens."""

from dataclasses import dataclass

import torch
from torch import Tensor

from hybridize.distill.losses.chunked import linear_divergence, softmax
from hybridize.distill.losses.kl import LogitLoss
from hybridize.distill.signals import Signals
from hybridize.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class TopKKL(LogitLoss):
    """KL(teacher || student) over the teacher's k likeliest tokens and one class for all others together.

    A lower bound of the full KL, and equal to it from k = V - 1 on. Kept as a class of its own, the residual mass tells the
    student how much to leave for the rest; left out, the teacher would look surer than it is (arXiv 2503.16870).
    Source: arcee-ai/DistillKit, sparse logits, with the missing probability as one class.
    """

    k: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.k < 1:
            raise ConfigError(f"k is {self.k}, expected at least 1")

    def __call__(self, student: Signals, teacher: Signals, mask_BT: Tensor | None) -> Tensor:
        return linear_divergence(student, teacher, mask_BT, self._rows, self.temperature, self.chunk_tokens)

    def _rows(self, t: Tensor, s: Tensor, at: slice) -> tuple[Tensor, Tensor]:
        place = t.topk(min(self.k, t.shape[-1] - 1), dim=-1).indices
        p, p_sum = softmax(t)
        q, q_sum = softmax(s)
        p_top = p.gather(-1, place)
        gap = t.gather(-1, place) - s.gather(-1, place) - (p_sum - q_sum)
        # The rest by its own log-sum-exp: one minus the others would lose a small residual to rounding.
        p_rest, q_rest = ((z.scatter(-1, place, -torch.inf).logsumexp(-1, True) - z_sum) for z, z_sum in ((t, p_sum), (s, q_sum)))
        loss = (p_top * gap).sum(-1) + (p_rest.exp() * (p_rest - q_rest)).squeeze(-1)
        # In the student's logits: q - p for the top, q (1 - P / Q) for a token of the rest.
        slope = q * -torch.expm1(p_rest - q_rest)
        return loss, slope.scatter_(-1, place, q.gather(-1, place) - p_top)
