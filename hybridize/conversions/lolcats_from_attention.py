"""Attention weights -> window + linear attention: every tensor of the base goes on under its own name.

`identity` is the published start of LoLCATs (Zhang et al., arXiv 2410.10254): F the identity, gamma 0.1, all else left to
training. `calibrated` is ours: F = c times the identity, c and gamma chosen for each head on text by what brings the layer
nearest to the base's heads; last o_proj, a ridge regression onto what the residual stream lacks.
"""

import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor

from hybridize.conversions.fitting import solve_out_proj
from hybridize.conversions.layer import LayerCalibration, materialised
from hybridize.errors import ConfigError
from hybridize.mixers.lolcats import WINDOW_FACTOR, LoLCATsAttention

FEATURE_SCALES = (0.25, 0.5, 1.0, 2.0, 4.0)
GAMMAS = (0.1, 0.3, 0.6, 0.9, 0.97, 0.99, 0.997, 0.999, 0.9999)
SEARCH_SEQUENCES = 10


@dataclass(frozen=True, kw_only=True)
class LoLCATsFromAttention:
    """How a window + linear attention layer is seeded."""

    method: Literal["calibrated", "identity"] = "calibrated"
    """`calibrated`: feature scales and gamma chosen on text. `identity`: F the identity, gamma 0.1 (LoLCATs)."""

    drops = frozenset()

    @property
    def calibrated(self) -> bool:
        return self.method == "calibrated"

    def __call__(
        self,
        source: dict[str, Tensor],
        mixer: LoLCATsAttention,
        config: Any,
        generator: torch.Generator,
        calibration: LayerCalibration | None,
    ) -> dict[str, Tensor]:
        """The mixer's tensors, fp32.

        Raises:
            ConfigError: `calibrated` without text.
        """
        made = {name: tensor.float().clone() for name, tensor in source.items()}
        shape = tuple(mixer.feature_map_q.shape)
        for name in ("feature_map_q", "feature_map_k"):
            made[name] = torch.eye(*shape[1:]).expand(shape).clone()
        made["window_factors"] = torch.full((mixer.num_heads,), WINDOW_FACTOR)
        if not self.calibrated:
            return made
        if calibration is None:
            raise ConfigError("lolcats method 'calibrated' needs text to calibrate on. Give text, or method identity")
        return search(made, mixer, calibration)


def search(made: dict[str, Tensor], mixer: LoLCATsAttention, calibration: LayerCalibration) -> dict[str, Tensor]:
    """Fill an identity seed with the scale and the gamma that come nearest to the base's heads.

    Args:
        made: the base's tensors, identity feature maps and gamma; returned completed.
        mixer: the module, on any device.
        calibration: activations of this layer.
    """
    part = slice(0, min(SEARCH_SEQUENCES, calibration.inputs.shape[0]))
    context = calibration.context[part].unflatten(-1, (mixer.num_heads, -1)).transpose(1, 2)
    # Cloned: the search writes into the module's own copies.
    module = materialised(mixer, {name: tensor.clone() for name, tensor in made.items()})
    identity = made["feature_map_q"].clone()
    best = torch.full((mixer.num_heads,), math.inf, dtype=torch.float64)
    with torch.no_grad():
        q, k, v = module.project(calibration.inputs[part], calibration.angles)
        near = module.inside(q, k, v, None, None)
        for scale in FEATURE_SCALES:
            module.feature_map_q.copy_(scale * identity)
            module.feature_map_k.copy_(scale * identity)
            far, _ = module.beyond(q, k, v, None, None, None)
            if far is None:
                # No row is longer than the window: the layer is the base's attention whatever F and gamma are.
                break
            for gamma in GAMMAS:
                y = module.join(near, far, torch.full((mixer.num_heads,), gamma))
                error = (y - context).double().pow(2).sum((0, 2, 3))
                better = error < best
                best = torch.where(better, error, best)
                made["window_factors"] = torch.where(better, math.log(gamma / (1 - gamma)), made["window_factors"])
                for name in ("feature_map_q", "feature_map_k"):
                    made[name] = torch.where(better[:, None, None], scale * identity, made[name])
    module = materialised(mixer, made)
    reader = SimpleNamespace(context=lambda rows: module.context(rows, calibration.angles))
    made["o_proj.weight"] = solve_out_proj(reader, made["o_proj.weight"], made.get("o_proj.bias"), calibration)
    return made
