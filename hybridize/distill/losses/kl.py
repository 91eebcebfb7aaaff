"""KL divergence of the next-token distributions, in either direction."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from hybridize.distill.losses.chunked import linear_distance
from hybridize.distill.signals import Signals
from hybridize.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class LogitLoss:
    """Options of every loss that compares next-token distributions; tau^2 keeps the gradient's size at any tau."""

    weight: float = 1.0
    """What it is multiplied by in the sum of the stage."""
    temperature: float = 1.0
    """tau, which divides both sides' logits."""
    chunk_tokens: int = 256
    """Tokens whose logits exist at once."""

    needs = frozenset({"hidden", "head"})

    def __post_init__(self) -> None:
        if self.temperature <= 0 or self.chunk_tokens < 1:
            raise ConfigError(
                f"temperature is {self.temperature} and chunk_tokens {self.chunk_tokens}, expected above 0 and at least 1"
            )


@dataclass(frozen=True, kw_only=True)
class KL(LogitLoss):
    """KL divergence from final hidden states, in nats.

    Source: Hinton et al., arXiv 1503.02531 (forward); MiniLLM, arXiv 2306.08543 (reverse).
    """

    direction: Literal["forward", "reverse"] = "forward"
    """`forward`: KL(teacher || student). `reverse`: KL(student || teacher), which lets the student leave modes out."""
    reduction: Literal["token_mean", "published_batchmean"] = "token_mean"
    """`published_batchmean` is for comparison with MambaInLlama and Zebra-Llama: the sum over a row's tokens, mean over rows,
    as kl_div's `batchmean` gives for [B, T, V]. It is token_mean times the length of a row, so it outweighs other losses, and
    gradient clipping, by a factor that changes with seq_tokens."""

    def __call__(self, student: Signals, teacher: Signals, mask_BT: Tensor | None) -> Tensor:
        loss = linear_distance(student, teacher, mask_BT, self.temperature, self.chunk_tokens, kind=self.direction)
        if self.reduction == "token_mean":
            return loss
        assert student.hidden is not None
        rows, tokens = student.hidden.shape[:2]
        return loss * (tokens if mask_BT is None else mask_BT.sum() / rows)
