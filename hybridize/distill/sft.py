"""Stage `sft`: supervised fine-tuning on what the assistant says."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from hybridize.distill.chat import Examples, read_chats
from hybridize.distill.losses.chunked import linear_cross_entropy
from hybridize.distill.options import checkpoint_gradients
from hybridize.distill.posttrain import PostTraining
from hybridize.distill.rows import ChatBatch
from hybridize.distill.signals import Head


@dataclass(frozen=True, kw_only=True)
class Sft(PostTraining):
    """Cross-entropy with the answers, mean over all their tokens of a step; of plain text, over every token.

    Source: the last stages of the published recipes (LightTransfer, arXiv 2410.13846; MambaInLlama, arXiv 2408.15237).
    """

    lr: float = 1e-5
    packed: bool = True
    """Several texts in a row, which do not see each other; else one, padded to the longest of its step."""

    packs: ClassVar[bool] = True

    def read(self, tokenizer: Any, source: str | Path) -> Examples:
        """Chats, or plain text."""
        return read_chats(tokenizer, source, self.seq_tokens)

    def weight(self, batch: ChatBatch) -> float:
        """Tokens that are learnt."""
        return int(batch.learnt.sum())

    def start(self, student: Any, teacher: Any, first: ChatBatch) -> "SftStep":
        """The step of this stage, which needs neither a teacher nor a first batch."""
        if self.gradient_checkpointing:
            checkpoint_gradients(student)
        return SftStep(self, student)


class SftStep:
    """One micro-batch: forward, cross-entropy, backward."""

    def __init__(self, options: Sft, student: Any):
        self.options, self.student = options, student

    def __call__(self, batch: ChatBatch, share: float) -> dict[str, Tensor]:
        """Add `share` times the gradient of one micro-batch; `share` is its part of the step's learnt tokens.

        Returns:
            The cross-entropy under `loss`, mean per learnt token of the micro-batch, in nats.
        """
        hidden = self.options.hidden_states(self.student, batch).flatten(0, 1)
        ids, learnt = batch.ids.flatten(0, 1), batch.learnt.flatten(0, 1)
        loss = linear_cross_entropy(
            hidden[:, :-1], Head(weight=self.student.lm_head.weight), ids[:, 1:], learnt[:, 1:], self.options.chunk_tokens
        )
        (loss * share).backward()
        return {"loss": loss.detach()}
