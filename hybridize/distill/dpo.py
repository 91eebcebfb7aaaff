"""Stage `dpo`: preferences, by the log-probabilities of two answers under the student and under a frozen reference."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridize.distill.chat import Examples, read_pairs
from hybridize.distill.losses.token_nll import linear_token_nll
from hybridize.distill.options import checkpoint_gradients
from hybridize.distill.posttrain import PostTraining
from hybridize.distill.rows import ChatBatch
from hybridize.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Dpo(PostTraining):
    """Direct preference optimisation with the sigmoid loss; a row is a pair.

    With r = log pi(y | x) - log pi_ref(y | x) of each answer and d = beta * (r_chosen - r_rejected):
    loss = -(1 - s) log sigmoid(d) - s log sigmoid(-d), mean over pairs.

    Source: Rafailov et al., arXiv 2305.18290, equation 7; s is the label smoothing of conservative DPO (Mitchell, 2023).
    """

    lr: float = 5e-7
    beta: float = 0.1
    """How strongly answers are held to the reference (Rafailov et al., arXiv 2305.18290)."""
    label_smoothing: float = 0.0
    """Share of pairs that are taken to be labelled the wrong way round, below a half."""
    length_normalised: bool = False
    """Divide each r by the number of the answer's tokens, so that long answers do not weigh more."""
    reference: Literal["student", "teacher"] = "student"
    """What the reference is: the student as the stage finds it, or the teacher. It runs in every step."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.beta <= 0 or not 0 <= self.label_smoothing < 0.5:
            raise ConfigError(
                f"beta is {self.beta} and label_smoothing {self.label_smoothing}, expected above 0, and from 0 to below a half"
            )

    lanes: ClassVar[int] = 2

    @property
    def needs_teacher(self) -> bool:
        return True

    @property
    def follows_itself(self) -> bool:
        return self.reference == "student"

    @property
    def step_tokens(self) -> int:
        return self.lanes * self.step_rows * self.seq_tokens

    def read(self, tokenizer: Any, source: str | Path) -> Examples:
        """Preference pairs."""
        return read_pairs(tokenizer, source, self.seq_tokens)

    def start(self, student: Any, teacher: Any, first: ChatBatch) -> "DpoStep":
        """The step of this stage; `teacher` is the reference."""
        if self.gradient_checkpointing:
            checkpoint_gradients(student)
        return DpoStep(self, student, teacher)


def dpo_loss(logratios_B2: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """The loss of each pair, [B], from log pi - log pi_ref of the chosen and the rejected answer, [B, 2]."""
    margin = beta * (logratios_B2[:, 0] - logratios_B2[:, 1])
    return -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)


class DpoStep:
    """One micro-batch: the reference's forward pass, the student's, loss, backward."""

    def __init__(self, options: Dpo, student: Any, reference: Any):
        self.options, self.student, self.reference = options, student, reference

    def log_probs(self, model: Any, batch: ChatBatch) -> Tensor:
        """log p of each answer given its prompt, [B, 2]: the sum over the answer's tokens."""
        hidden = self.options.hidden_states(model, batch)[..., :-1, :]
        labels, learnt = batch.ids[..., 1:], batch.learnt[..., 1:]
        nll = linear_token_nll(hidden[learnt], model.lm_head.weight, labels[learnt], self.options.chunk_tokens)
        by_token = torch.zeros(learnt.shape, dtype=nll.dtype, device=nll.device).masked_scatter(learnt, -nll)
        return by_token.sum(-1)

    def __call__(self, batch: ChatBatch, share: float) -> dict[str, Tensor]:
        """Add `share` times the gradient of one micro-batch; `share` is its part of the step's pairs.

        Returns:
            `loss`; `accuracy`, the share of pairs whose chosen answer gained more; `margin`, `reward_chosen` and
            `reward_rejected`, the means of d and of beta * r.
        """
        with torch.no_grad():
            reference = self.log_probs(self.reference, batch)
        ratios = self.log_probs(self.student, batch) - reference
        if self.options.length_normalised:
            ratios = ratios / batch.learnt.sum(-1)
        loss = dpo_loss(ratios, self.options.beta, self.options.label_smoothing).mean()
        (loss * share).backward()
        rewards = self.options.beta * ratios.detach()
        margin = rewards[:, 0] - rewards[:, 1]
        return {
            "loss": loss.detach(), "accuracy": (margin > 0).float().mean(), "margin": margin.mean(),
            "reward_chosen": rewards[:, 0].mean(), "reward_rejected": rewards[:, 1].mean(),
        }  # fmt: skip
