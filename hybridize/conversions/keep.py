"""The conversion that changes nothing, for mixers that have the base's own tensors."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Keep:
    """Every tensor of the base's attention goes on under its own name; `convert` moves the bytes undecoded."""

    drops = frozenset()
    calibrated = False

    def __call__(
        self, source: dict[str, Tensor], mixer: nn.Module, config: Any, generator: torch.Generator, calibration: Any
    ) -> dict[str, Tensor]:
        return dict(source)
