"""KL divergence with what the teacher thinks of its likeliest tokens."""

from dataclasses import dataclass

import torch
from torch import Tensor

from hybridize.distill.losses.chunked import linear_divergence, select
from hybridize.distill.losses.kl import LogitLoss
from hybridize.distill.signals import Signals, TopK
from hybridize.errors import ConfigError
from hybridize.kernels.linear_kl.heads import head_loss, softmax


@dataclass(frozen=True, kw_only=True)
class TopKKL(LogitLoss):
    """KL(teacher || student) over the teacher's k likeliest tokens and one class for all others together.

    A lower bound of the full KL, and equal to it from k = V - 1 on. Kept as a class of its own, the residual mass tells the
    student how much to leave for the rest; left out, the teacher would look surer than it is (arXiv 2503.16870). The teacher
    may be its logits, or no more of them than this loss reads: its `top_k`, of the same k and at a temperature of 1.
    Source: arcee-ai/DistillKit, sparse logits, with the missing probability as one class.
    """

    k: int = 128
    """The likeliest tokens that count one by one; the others count together."""

    of_teacher = (LogitLoss.needs, frozenset({"top_k"}))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.k < 1:
            raise ConfigError(f"k is {self.k}, expected at least 1")

    def check_top_k(self, k: int) -> None:
        """Raise ConfigError when the teacher's k likeliest tokens are not what this loss reads."""
        if self.k != k:
            raise ConfigError(
                f"the loss has k = {self.k}, expected the {k} tokens that are kept; set its k to {k}, or keep other"
            )
        if self.temperature != 1:
            raise ConfigError(
                f"the loss has temperature {self.temperature}, expected 1: that of the tokens left out is not known; "
                "set it to 1, or keep hidden states"
            )

    def __call__(self, student: Signals, teacher: Signals, mask_BT: Tensor | None) -> Tensor:
        if teacher.top_k is None:
            return linear_divergence(student, teacher, mask_BT, self._rows, self.temperature, self.chunk_tokens)
        assert student.hidden is not None
        assert student.head is not None
        kept = teacher.top_k
        ids, log_probs, log_rest = (select(x, mask_BT) for x in (kept.ids, kept.log_probs, kept.log_rest))

        def rows(s: Tensor, at: slice) -> tuple[Tensor, Tensor]:
            return _divergence(TopK(ids=ids[at], log_probs=log_probs[at], log_rest=log_rest[at]), s)

        return head_loss(select(student.hidden, mask_BT), student.head, rows, self.chunk_tokens)

    def _rows(self, t: Tensor, s: Tensor, at: slice) -> tuple[Tensor, Tensor]:
        return _divergence(likeliest(t, self.k), s)


def likeliest(logits: Tensor, k: int) -> TopK:
    """The k likeliest tokens of each row of logits [n, V], at most V - 1."""
    place = logits.topk(min(k, logits.shape[-1] - 1), dim=-1).indices
    _, log_sum = softmax(logits)
    # The rest by its own log-sum-exp: one minus the others would lose a small residual to rounding.
    return TopK(ids=place, log_probs=logits.gather(-1, place) - log_sum, log_rest=_rest(logits, place) - log_sum)


def _rest(logits: Tensor, place: Tensor) -> Tensor:
    """Log-sum-exp of all logits but those at `place`, [n, 1]."""
    return logits.scatter(-1, place, -torch.inf).logsumexp(-1, True)


def _divergence(p: TopK, s: Tensor) -> tuple[Tensor, Tensor]:
    """Of a chunk: what each token loses, [n], and the slope in the student's logits `s`, [n, V]."""
    place = p.ids.long()
    q, q_sum = softmax(s)
    p_top, gap = p.log_probs.exp(), p.log_probs - (s.gather(-1, place) - q_sum)
    log_less = p.log_rest - (_rest(s, place) - q_sum)
    loss = (p_top * gap).sum(-1) + (p.log_rest.exp() * log_less).squeeze(-1)
    # In the student's logits: q - p for the top, q (1 - P / Q) for a token of the rest.
    slope = q * -torch.expm1(log_less)
    return loss, slope.scatter_(-1, place, q.gather(-1, place) - p_top)
