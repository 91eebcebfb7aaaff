"""Stage `kl`: the whole student against the whole teacher, end to end."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hybridize.capture import layer_outputs
from hybridize.data import Batch
from hybridize.distill.options import StageOptions, autocast, checkpoint_gradients, converted_layers
from hybridize.distill.sharding import final_hidden, let_go
from hybridize.distill.signals import Head, Signals
from hybridize.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class KLStage(StageOptions):
    """End-to-end distillation; logits are made from the final hidden states, a few hundred tokens at a time.

    Source: stage 2 of the published recipes (MambaInLlama, arXiv 2408.15237; RADLADS, arXiv 2505.03005), with the loss in
    fp32 and as a mean per token.
    """

    losses: list[dict[str, Any]] = field(default_factory=lambda: [{"name": "kl", "weight": 1.0}])

    @property
    def needs_teacher(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Cross-entropy is with the text alone."""
        return {spec.get("name") for spec in self.losses} != {"cross_entropy"}

    def candidates(self, student: Any) -> dict[str, nn.Parameter]:
        return dict(student.named_parameters())

    def start(self, student: Any, teacher: Any, first: Batch) -> "KLStep":
        """The step of this stage; `first` is not used: nothing is measured beforehand."""
        return KLStep(self, student, teacher, "kl")


class KLStep:
    """One micro-batch: teacher forward, student forward, losses, backward."""

    def __init__(self, options: KLStage, student: Any, teacher: Any, name: str):
        self.options, self.student, self.teacher = options, student, teacher
        self.losses = options.build_losses({"hidden", "head", "ids", "layers"}, name)
        self.layers = self._chosen_layers(name)
        if options.gradient_checkpointing:
            checkpoint_gradients(student)

    def _chosen_layers(self, name: str) -> list[int]:
        """Layers whose outputs some loss compares. Raises ConfigError when the two models have different ones."""
        asking = [loss for loss in self.losses.values() if "layers" in loss.needs]
        if not asking:
            return []
        for size in ("num_hidden_layers", "hidden_size"):
            own, other = (getattr(model.config, size) for model in (self.student, self.teacher))
            if own != other:
                raise ConfigError(
                    f"stage {name!r}: {size} is {own} in the student and {other} in the teacher; features needs them equal"
                )
        depth, converted = self.student.config.num_hidden_layers, converted_layers(self.student)
        return sorted({index for loss in asking for index in loss.chosen(depth, converted)})

    def _signals(self, model: Any, batch: Batch) -> Signals:
        with layer_outputs(model, self.layers) as layers, autocast(batch.ids.device, self.options):
            hidden = final_hidden(model, batch)
        # A residual stream in fp32 would take the head out of the tensor cores' reach.
        hidden = hidden.to(torch.bfloat16) if self.options.dtype == "bf16" else hidden
        head = Head(weight=model.lm_head.weight)
        return Signals(hidden=hidden, head=head, ids=batch.ids, positions=batch.positions, layers=layers)

    def __call__(self, batch: Batch, share: float) -> dict[str, Tensor]:
        """Add `share` times the gradient of one micro-batch to the trained parameters.

        Args:
            batch: B rows of T tokens.
            share: this micro-batch's part of the step's tokens.

        Returns:
            Losses: each by name, and their weighted sum under `loss`.
        """
        with torch.no_grad():
            teacher = self._signals(self.teacher, batch) if self.options.needs_teacher else Signals()
        student = self._signals(self.student, batch)
        parts = {name: loss(student, teacher, None) for name, loss in self.losses.items()}
        total = torch.stack([loss.weight * parts[name] for name, loss in self.losses.items()]).sum()
        let_go(self.teacher)
        (total * share).backward()
        return {"loss": total.detach(), **{name: part.detach() for name, part in parts.items()}}
