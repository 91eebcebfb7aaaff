"""A gated memory unit in place of attention: what the read layer remembers, put to this layer's use.

Nothing of the layer's queries, keys and values has a place in a unit that only gates another layer's memory, so they are
dropped by name. `calibrated` is ours: the gate open and constant, so that the unit is linear in the memory, and W_out the
ridge regression of what the residual stream lacks on it, near the base's o_proj where the text says nothing. `zero`
switches the unit off: it adds nothing until training opens it. The published units are trained from random numbers
(Ren et al., arXiv 2507.06607), for which there is no method here.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from hybridize.conversions.fitting import OPEN_GATE, solve_out_proj
from hybridize.conversions.layer import LayerCalibration, materialised
from hybridize.errors import ConfigError
from hybridize.mixers.gmu import GatedMemoryUnit

LOST = frozenset(f"{name}_proj.{kind}" for name in "qkv" for kind in ("weight", "bias")) | {"q_norm.weight", "k_norm.weight"}


@dataclass(frozen=True, kw_only=True)
class GMUFromGQA:
    """How a gated memory unit is seeded."""

    method: Literal["calibrated", "zero"] = "calibrated"
    """`calibrated`: W_out solved on text behind an open gate. `zero`: adds nothing until training opens it."""

    @property
    def drops(self) -> frozenset[str]:
        return LOST if self.calibrated else LOST | {"o_proj.weight", "o_proj.bias"}

    @property
    def calibrated(self) -> bool:
        return self.method == "calibrated"

    def __call__(
        self,
        source: dict[str, Tensor],
        mixer: GatedMemoryUnit,
        config: Any,
        generator: torch.Generator,
        calibration: LayerCalibration | None,
    ) -> dict[str, Tensor]:
        """The mixer's tensors, fp32.

        Raises:
            ConfigError: a calibrated seed got no text, or not the memory of the layer it reads.
        """
        made = {name: torch.zeros(tuple(tensor.shape)) for name, tensor in mixer.state_dict().items()}
        made["in_proj.bias"] += OPEN_GATE
        if not self.calibrated:
            return made
        if calibration is None or calibration.memory is None:
            raise ConfigError("gmu method 'calibrated' needs text and the read layer's memory of it. Give text, or method zero")
        made["out_proj.weight"] = source["o_proj.weight"].float()
        if "o_proj.bias" in source:
            made["out_proj.bias"] = source["o_proj.bias"].float().clone()
        module = materialised(mixer, made)
        made["out_proj.weight"] = solve_out_proj(module, made["out_proj.weight"], made.get("out_proj.bias"), calibration)
        return made
