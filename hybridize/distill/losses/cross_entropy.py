"""Cross-entropy with the text itself."""

from dataclasses import dataclass

from torch import Tensor

from hybridize.distill.losses.chunked import linear_cross_entropy
from hybridize.distill.signals import Signals
from hybridize.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class CrossEntropy:
    """Next-token cross-entropy from final hidden states; the teacher has no part in it."""

    weight: float = 1.0
    chunk_tokens: int = 256
    """Tokens whose logits exist at once."""

    needs = frozenset({"hidden", "head", "ids"})

    def __post_init__(self) -> None:
        if self.chunk_tokens < 1:
            raise ConfigError(f"chunk_tokens is {self.chunk_tokens}, expected at least 1")

    def __call__(self, student: Signals, teacher: Signals, mask_BT: Tensor | None) -> Tensor:
        assert student.hidden is not None
        assert student.head is not None
        assert student.ids is not None
        # Position t predicts token t + 1: both must count.
        mask = None if mask_BT is None else mask_BT[:, :-1] & mask_BT[:, 1:]
        return linear_cross_entropy(student.hidden[:, :-1], student.head, student.ids[:, 1:], mask, self.chunk_tokens)
