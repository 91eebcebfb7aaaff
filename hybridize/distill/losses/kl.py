"""Forward KL divergence of the next-token distributions."""

from dataclasses import dataclass

from torch import Tensor

from hybridize.distill.losses.chunked import linear_kl
from hybridize.distill.signals import Signals
from hybridize.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class KL:
    """KL(teacher || student) from final hidden states. Source: Hinton et al., arXiv 1503.02531, with its T^2."""

    weight: float = 1.0
    temperature: float = 1.0
    chunk_tokens: int = 256
    """Tokens whose logits exist at once."""

    needs = frozenset({"hidden", "head"})

    def __post_init__(self) -> None:
        if self.temperature <= 0 or self.chunk_tokens < 1:
            raise ConfigError(
                f"temperature is {self.temperature} and chunk_tokens {self.chunk_tokens}, expected above 0 and at least 1"
            )

    def __call__(self, student: Signals, teacher: Signals, mask_BT: Tensor | None) -> Tensor:
        assert student.hidden is not None
        assert student.head is not None
        assert teacher.hidden is not None
        assert teacher.head is not None
        return linear_kl(student.hidden, student.head, teacher.hidden, teacher.head, mask_BT, self.temperature, self.chunk_tokens)
