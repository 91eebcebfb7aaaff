"""Distance of inner layers' outputs from the teacher's, with the student run end to end."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hybridize.distill.signals import Signals, StateNorm, state_error
from hybridize.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Features:
    """Outputs of chosen layers, mean over them, each layer fed by the student's own layers below, not by the teacher's.

    Source: FitNets (Romero et al., arXiv 1412.6550); beside kl in MaTVLM (arXiv 2503.13440).
    """

    weight: float = 1.0
    """What it is multiplied by in the sum of the stage."""
    layers: list[int] | Literal["converted", "all"] = "converted"
    """Indices from 0, or `converted` (those without the base's attention), or `all`."""
    norm: StateNorm = "mse"
    """Of a token: `mse` its mean square, `l2` the root of that (RADLADS), `full_l2` the root of the sum (MOHAWK)."""
    relative: bool = True
    """Measure each token against the teacher's own state there, whose size differs between layers and tokens."""

    needs = frozenset({"layers"})

    def chosen(self, depth: int, converted: list[int]) -> list[int]:
        """The layers to compare. Raises ConfigError for an index outside the model, or none at all."""
        layers = {"converted": converted, "all": list(range(depth))}[self.layers] if isinstance(self.layers, str) else self.layers
        if not layers or not all(0 <= index < depth for index in layers):
            raise ConfigError(f"loss 'features': layers is {layers}, expected some of 0 to {depth - 1}")
        return sorted(set(layers))

    def __call__(self, student: Signals, teacher: Signals, mask_BT: Tensor | None) -> Tensor:
        assert student.layers is not None
        assert teacher.layers is not None
        losses = []
        for index, own in student.layers.items():
            other = teacher.layers[index]
            wide = other.detach().to(torch.promote_types(other.dtype, torch.float32))
            scale = wide.pow(2).mean(-1) if self.relative else 1.0
            losses.append(state_error(own, wide, scale, mask_BT, self.norm))
        return torch.stack(losses).mean()
