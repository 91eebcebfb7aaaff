"""Attention weights -> native hybrid attention: the base's projections as they are, and gates for the slots.

Two methods. `copy` is the published start (arXiv 2510.07019): W_g is W_k, a slot for each channel of a key. `calibrated` is
ours: slots that keep what the base looks back at, and weigh as much as it gave them, solved on text (nha_search.py).
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hybridize.conversions.layer import LayerCalibration
from hybridize.conversions.nha_search import search
from hybridize.errors import ConfigError
from hybridize.mixers.nha import NativeHybridAttention


@dataclass(frozen=True, kw_only=True)
class NHAFromGQA:
    """How a layer of native hybrid attention is seeded."""

    method: Literal["calibrated", "copy"] = "calibrated"
    """`calibrated` is solved on text. `copy`: W_g is W_k, as published."""

    drops = frozenset()

    @property
    def calibrated(self) -> bool:
        return self.method == "calibrated"

    def __call__(
        self,
        source: dict[str, Tensor],
        mixer: NativeHybridAttention,
        config: object,
        generator: torch.Generator,
        calibration: LayerCalibration | None,
    ) -> dict[str, Tensor]:
        """The mixer's tensors, fp32. Raises ConfigError when a calibrated seed got no text."""
        made = carried(source, mixer)
        if self.method == "copy":
            return made
        if calibration is None:
            raise ConfigError("nha method 'calibrated' needs text to calibrate on. Give text, or method copy")
        return search(made, mixer, calibration)


def carried(source: dict[str, Tensor], mixer: NativeHybridAttention) -> dict[str, Tensor]:
    """The published start, fp32: the base's tensors under their names, gates from keys, slot biases 0.

    Slot i of a key/value head has the gate of that head's key channel i; where there are more or fewer slots than channels,
    i is taken modulo the head width. A key bias is the gate's bias too.
    """
    made = {name: source[name].float() for name in source}
    rows = torch.arange(mixer.slots) % mixer.head_dim
    for kind in ("weight", "bias"):
        if f"k_proj.{kind}" in made:
            keys = made[f"k_proj.{kind}"].unflatten(0, (mixer.num_groups, mixer.head_dim))
            made[f"gate_proj.{kind}"] = keys[:, rows].flatten(0, 1)
    made.setdefault("gate_proj.bias", torch.zeros(mixer.num_groups * mixer.slots))
    made["slot_bias"] = torch.zeros(tuple(mixer.slot_bias.shape))
    return made
