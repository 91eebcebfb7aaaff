"""Attention weights -> windowed attention beside a recurrent branch: kept tensors, and the branch's own conversion.

A calibrated branch is seeded on what the window leaves over: the teacher's context and output less the windowed attention's.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hybridize.conversions.layer import LayerCalibration, materialised
from hybridize.conversions.table import CONVERSIONS
from hybridize.errors import ConfigError
from hybridize.mixers.parallel import ParallelMixer
from hybridize.mixers.windowed import WindowedAttention

# Sequences per forward of a branch.
ROWS = 4


@dataclass(frozen=True, kw_only=True)
class ParallelFromGQA:
    """How both branches and their weights are seeded."""

    recurrent_seed: dict[str, Any] = field(default_factory=lambda: {"name": "mamba2"})
    """{"name": ..., **options} of the branch's conversion; a plan fills it from the mixer's `recurrent`."""
    start: Literal["base", "fitted"] = "base"
    """`base`: the recurrent branch weighs 0. `fitted`: its least-squares weight for each channel, 0 to 1 (calibrated only)."""

    drops = frozenset()

    def __post_init__(self) -> None:
        if self.start == "fitted" and not self.calibrated:
            raise ConfigError("start: fitted needs text, which this branch's seed does not. Give it a calibrated method")

    @property
    def calibrated(self) -> bool:
        return CONVERSIONS.build(self.recurrent_seed).calibrated

    def __call__(
        self,
        source: dict[str, Tensor],
        mixer: ParallelMixer,
        config: Any,
        generator: torch.Generator,
        calibration: LayerCalibration | None,
    ) -> dict[str, Tensor]:
        """The mixer's tensors, the branch's under `recurrent.`."""
        made = {name: source[name] for name in source}
        if calibration is not None:
            calibration = left_over(made, mixer, config, calibration)
        branch = CONVERSIONS.build(self.recurrent_seed)(source, mixer.recurrent, config, generator, calibration)
        made |= {
            "attention_scale": torch.ones(tuple(mixer.attention_scale.shape)),
            "recurrent_scale": torch.zeros(tuple(mixer.recurrent_scale.shape)),
        }
        if self.start == "fitted" and calibration is not None:
            made["recurrent_scale"] = _fitted(materialised(mixer.recurrent, branch), calibration)
        return made | {f"recurrent.{name}": tensor for name, tensor in branch.items()}


def left_over(source: dict[str, Tensor], mixer: Any, config: Any, calibration: LayerCalibration) -> LayerCalibration:
    """The calibration of the recurrent branch: context and target less what the windowed attention gives."""
    with torch.device("meta"):
        attention = WindowedAttention(config, mixer.layer_idx, mixer.reach)
    attention = materialised(attention, {name: tensor.float() for name, tensor in source.items()})
    context, target = calibration.context.clone(), calibration.target.clone()
    with torch.no_grad():
        for start in range(0, len(context), ROWS):
            rows = slice(start, start + ROWS)
            near = attention.context(calibration.inputs[rows], calibration.angles)
            context[rows] -= near
            target[rows] -= attention.o_proj(near)
    return LayerCalibration(inputs=calibration.inputs, context=context, target=target, angles=calibration.angles)


def _fitted(branch: nn.Module, calibration: LayerCalibration) -> Tensor:
    """Least-squares weight of each channel of the branch's output, [D], within 0 and 1."""
    width = calibration.target.shape[-1]
    cross, energy = torch.zeros(width).double(), torch.zeros(width).double()
    with torch.no_grad():
        for inputs, target in zip(calibration.inputs.split(ROWS), calibration.target.split(ROWS), strict=True):
            out = branch(inputs, position_embeddings=calibration.angles)[0]
            cross += (out * target).sum((0, 1)).double()
            energy += out.pow(2).sum((0, 1)).double()
    return (cross / energy.clamp(min=1e-30)).clamp(0, 1).float()
