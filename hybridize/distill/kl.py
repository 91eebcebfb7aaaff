"""Stage `kl`: the whole student against the whole teacher, end to end."""

import dataclasses
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hybridize.capture import layer_outputs
from hybridize.data import Batch
from hybridize.distill.losses import LOSSES, asks_of_teacher
from hybridize.distill.options import StageOptions, autocast, checkpoint_gradients, converted_layers
from hybridize.distill.replacement import Replacement, lend_attention, lender
from hybridize.distill.sharding import final_hidden, let_go
from hybridize.distill.signals import Head, Signals
from hybridize.distill.teacher_cache import CachedSignals
from hybridize.errors import ConfigError
from hybridize.registry import make


@dataclass(frozen=True, kw_only=True)
class KLStage(StageOptions):
    """End-to-end distillation; logits are made from the final hidden states, a few hundred tokens at a time.

    Source: stage 2 of the published recipes (MambaInLlama, arXiv 2408.15237; RADLADS, arXiv 2505.03005), with the loss in
    fp32 and as a mean per token.
    """

    losses: list[dict[str, Any]] = field(default_factory=lambda: [{"name": "kl", "weight": 1.0}])
    replace: dict[str, Any] | None = None
    """Converted layers that come in step by step, {shares, order}; until then they run the teacher's attention. See
    Replacement. None is all at once."""

    NAME: ClassVar[str] = "kl"
    """The stage's, for messages."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.replace is None:
            return
        found: Replacement = make(Replacement, self.replace, "replace")
        object.__setattr__(self, "replace", dataclasses.asdict(found))
        if found.step is None and self.tokens < len(found.shares) * self.step_tokens:
            raise ConfigError(
                f"tokens is {self.tokens}, expected one step of {self.step_tokens} for each of the {len(found.shares)} shares of "
                "replace"
            )

    @property
    def replacement(self) -> Replacement | None:
        return None if self.replace is None else Replacement(**self.replace)

    def expanded(self) -> list[StageOptions]:
        """A stage for each step of `replace`, with the same part of the tokens."""
        found = self.replacement
        if found is None or found.step is not None:
            return [self]
        steps, tokens = range(1, len(found.shares) + 1), self.tokens // len(found.shares)
        return [dataclasses.replace(self, tokens=tokens, replace={**(self.replace or {}), "step": step}) for step in steps]

    def prepare(self, student: Any, teacher: Any) -> None:
        """Lend the teacher's attention to the layers that are not yet replaced."""
        if self.replacement is not None:
            lend_attention(student, teacher, self.replacement.waiting(student), self.NAME)

    @property
    def cacheable(self) -> bool:
        return self.replace is None

    @property
    def needs_teacher(self) -> bool:
        return self.replace is not None or any(frozenset() not in asks_of_teacher(LOSSES.build(spec)) for spec in self.losses)

    def candidates(self, student: Any) -> dict[str, nn.Parameter]:
        """Every parameter but those of mixers that rest and of what stands in for them."""
        waiting = [] if self.replacement is None else self.replacement.waiting(student)
        resting = tuple(f"model.layers.{index}.self_attn." for index in waiting)
        named = student.named_parameters()
        return {name: parameter for name, parameter in named if not name.startswith(resting) and lender(name) is None}

    def start(self, student: Any, teacher: Any, first: Batch) -> "KLStep":
        """The step of this stage; `teacher` is a model, CachedSignals, or None where no loss asks it. `first` is not used."""
        return KLStep(self, student, teacher, self.NAME)


def read_hidden(model: Any, batch: Batch, options: StageOptions) -> Tensor:
    """Final hidden states as the losses over logits read them, [B, T, D], in the dtype that the stage runs in."""
    with autocast(batch.ids.device, options):
        hidden = final_hidden(model, batch)
    # A residual stream in fp32 would take the head out of the tensor cores' reach.
    return hidden.to(torch.bfloat16) if options.dtype == "bf16" else hidden


class KLStep:
    """One micro-batch: teacher forward, student forward, losses, backward.

    Args:
        options: the stage's.
        student: what learns.
        teacher: what it learns from.
        stage: the stage's name, for messages.
        further: signals that a subclass offers beside those of every end-to-end stage.
    """

    def __init__(
        self, options: StageOptions, student: Any, teacher: Any, stage: str, further: frozenset[str] = frozenset()
    ):  # fmt: skip
        self.options, self.student, self.teacher, self.stage = options, student, teacher, stage
        self.losses = options.build_losses({"hidden", "head", "ids", "layers"} | further, stage)
        self.layers, self.needs_teacher = self._chosen_layers(), options.needs_teacher
        self.taught = teacher.signals if isinstance(teacher, CachedSignals) else partial(self._signals, teacher)
        if options.gradient_checkpointing:
            checkpoint_gradients(student)

    def _chosen_layers(self) -> list[int]:
        """Layers whose outputs some loss compares. Raises ConfigError when the two models have different ones."""
        asking = [loss for loss in self.losses.values() if "layers" in loss.needs]
        # Final hidden states themselves, not what the head makes of them.
        compared = [name for name, loss in self.losses.items() if "layers" in loss.needs or loss.needs == {"hidden"}]
        sizes = ("num_hidden_layers", "hidden_size") if asking else ("hidden_size",)
        for size in sizes if compared else ():
            own, other = getattr(self.student.config, size), self._size_of_teacher(size)
            if own != other:
                raise ConfigError(
                    f"stage {self.stage!r}: {size} is {own} in the student and {other} in the teacher; {compared[0]} needs them "
                    "equal"
                )
        if not asking:
            return []
        depth, converted = self.student.config.num_hidden_layers, converted_layers(self.student)
        return sorted({index for loss in asking for index in loss.chosen(depth, converted)})

    def _size_of_teacher(self, size: str) -> int:
        if isinstance(self.teacher, CachedSignals):
            return self.teacher.cache.manifest[size]
        return getattr(self.teacher.config, size)

    def _signals(self, model: Any, batch: Batch) -> Signals:
        with layer_outputs(model, self.layers) as layers:
            hidden = read_hidden(model, batch, self.options)
        weight, rows = model.lm_head.weight, self.student.config.vocab_size
        # A teacher's head may have more rows than there are tokens.
        head = Head(weight=weight if len(weight) == rows else weight[:rows])
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
            teacher = self.taught(batch) if self.needs_teacher else Signals()
        student = self._signals(self.student, batch)
        parts = {name: loss(student, teacher, None) for name, loss in self.losses.items()}
        total = torch.stack([loss.weight * parts[name] for name, loss in self.losses.items()]).sum()
        let_go(self.teacher)
        (total * share).backward()
        return {"loss": total.detach(), **{name: part.detach() for name, part in parts.items()}}
