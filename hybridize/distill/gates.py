"""Stage `gates`: which heads stay full is learnt, and nothing else.

Every key/value head of a mixer with gates is a mixture of full and streaming attention while the stage runs; at its end the
plan's number of largest gates in each layer are 1 and the others 0, so that what leaves it is a plain checkpoint.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from hybridize.data import Batch
from hybridize.distill.kl import KLStep
from hybridize.distill.options import StageOptions
from hybridize.distill.signals import Signals
from hybridize.errors import ConfigError
from hybridize.mixers import MIXERS


@dataclass(frozen=True, kw_only=True)
class Gates(StageOptions):
    """Learning which heads stay full, all weights frozen.

    Source: DuoAttention (Xiao et al., arXiv 2410.10819) with the numbers of mit-han-lab/duo-attention (duo_attn/train.py):
    squared distance of the final hidden states, 0.05 * mean |gate|, AdamW at 0.02 without decay, 2000 steps of one row, the rate
    rising and falling over a fifth of the steps each. Theirs are texts with planted passkeys, of which answers alone count;
    here every token of any text does. They keep the largest gates of the whole model, here each layer keeps its number.
    """

    lr: float = 0.02
    warmup: float = 0.2
    schedule: Literal["cosine", "linear", "constant"] = "linear"
    decay: float | None = 0.2
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    clip: float | None = None
    losses: list[dict[str, Any]] = field(
        default_factory=lambda: [{"name": "hidden_state", "relative": False}, {"name": "gate_sparsity"}]
    )

    divides: ClassVar[bool] = False

    def prepare(self, student: Any, teacher: Any) -> None:
        """Open the gates of every layer that has a choice."""
        for _, mixer in open_mixers(student):
            mixer.soften()

    def candidates(self, student: Any) -> dict[str, nn.Parameter]:
        """The gates. Raises ConfigError when there are none."""
        found = {f"{name}.gate": mixer.gate for name, mixer in open_mixers(student)}
        if not found:
            known = ", ".join(name for name in MIXERS.names() if getattr(MIXERS.load(name), "has_gates", False))
            raise ConfigError(
                "stage 'gates': no layer of the student has heads to choose, expected one of "
                f"{known} with neither none nor all full and no heads given; leave the stage out"
            )
        return found

    def start(self, student: Any, teacher: Any, first: Batch) -> "GatesStep":
        """The step of this stage; `first` is not used. Layers whose gates are not trained keep the heads that they have."""
        for _, mixer in open_mixers(student):
            if not mixer.gate.requires_grad:
                mixer.gate = None
        return GatesStep(self, student, teacher)

    def leave(self, student: Any, trained: dict[str, Tensor]) -> dict[str, Tensor]:
        """Of each layer that learnt, which heads are full: `alpha` in place of the gates."""
        learnt = [(name, mixer) for name, mixer in open_mixers(student) if f"{name}.gate" in trained]
        return {f"{name}.{key}": value for name, mixer in learnt for key, value in mixer.hardened().items()}


def open_mixers(student: Any) -> list[tuple[str, Any]]:
    """(name, module) of each mixer that can learn which of its heads are full."""
    mixers = [(f"model.layers.{index}.self_attn", layer.self_attn) for index, layer in enumerate(student.model.layers)]
    return [(name, mixer) for name, mixer in mixers if getattr(mixer, "open_choice", False)]


class GatesStep(KLStep):
    """One micro-batch, with the gates held within [0, 1]."""

    def __init__(self, options: Gates, student: Any, teacher: Any):
        super().__init__(options, student, teacher, "gates", frozenset({"gates"}))
        self.gates = [mixer.gate for _, mixer in open_mixers(student) if mixer.gate is not None]

    def _signals(self, model: Any, batch: Batch) -> Signals:
        signals = super()._signals(model, batch)
        return dataclasses.replace(signals, gates=self.gates) if model is self.student else signals

    def __call__(self, batch: Batch, share: float) -> dict[str, Tensor]:
        """As KLStep."""
        with torch.no_grad():
            for gate in self.gates:
                gate.clamp_(0, 1)
        return super().__call__(batch, share)
