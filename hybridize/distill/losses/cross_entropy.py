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
    """What it is multiplied by in the sum of the stage."""
    chunk_tokens: int = 256
    """Tokens whose logits exist at once."""

    needs = frozenset({"hidden", "head", "ids"})
    of_teacher = (frozenset(),)

    def __post_init__(self) -> None:
        if self.chunk_tokens < 1:
            raise ConfigError(f"chunk_tokens is {self.chunk_tokens}, expected at least 1")

    def __call__(self, student: Signals, teacher: Signals, mask_BT: Tensor | None) -> Tensor:
        assert student.hidden is not None
        assert student.head is not None
        assert student.ids is not None
        # Position t predicts token t + 1: both must count.
        mask = None if mask_BT is None else mask_BT[:, :-1] & mask_BT[:, 1:]
        hidden, labels = student.hidden[:, :-1], student.ids[:, 1:]
        if student.positions is None:
            return linear_cross_entropy(hidden, student.head, labels, mask, self.chunk_tokens)
        # The first token of a document is not foretold by the one before. It counts as zero: were it left out of the mean,
        # the loss would depend on how a step is divided.
        within = student.positions[:, 1:] != 0
        within = within if mask is None else within & mask
        loss = linear_cross_entropy(hidden, student.head, labels, within, self.chunk_tokens)
        return loss * within.sum().to(loss.dtype) / (within.numel() if mask is None else mask.sum())
