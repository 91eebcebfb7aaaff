"""Closed forms that several seedings share."""

from typing import Any

import torch
from torch import Tensor

from hybridize.conversions.layer import LayerCalibration

# SiLU is 1 here: with zero weights in front, such a bias starts a gate open and constant.
OPEN_GATE = 1.2784645427610738
RIDGE = 1e-3
# Sequences per forward of the module whose projection is solved.
ROWS = 4


def inverse_softplus(value: Tensor) -> Tensor:
    """x with softplus(x) = value, value > 0; exact for small values too."""
    return value + torch.log(-torch.expm1(-value))


def solve_out_proj(module: Any, prior: Tensor, bias: Tensor | None, calibration: LayerCalibration) -> Tensor:
    """The weight of a mixer's last projection: ridge regression of the target on what that projection reads.

    Args:
        module: a mixer whose `context(inputs)`, or `context(inputs, memory)` where it reads one, is what its last projection
            reads, [N, T, C].
        prior: the weight to stay near where the text says nothing (the base's o_proj), [D, C].
        bias: the projection's bias, which stays, or None.
        calibration: of this layer.

    Returns:
        [D, C], fp32.
    """
    prior = prior.double()
    inner = prior.shape[1]
    gram = torch.zeros(inner, inner, dtype=torch.float64)
    cross = torch.zeros(inner, prior.shape[0], dtype=torch.float64)
    with torch.no_grad():
        read = [calibration.inputs] if calibration.memory is None else [calibration.inputs, calibration.memory]
        for target, *seen in zip(calibration.target.split(ROWS), *(t.split(ROWS) for t in read), strict=True):
            rows = module.context(*seen).flatten(0, 1)
            wanted = target.flatten(0, 1) if bias is None else target.flatten(0, 1) - bias
            gram += (rows.T @ rows).double()
            cross += (rows.T @ wanted).double()
    damping = RIDGE * float(gram.diagonal().mean())
    gram.diagonal().add_(damping)
    cross.add_(prior.T, alpha=damping)
    return torch.linalg.solve(gram, cross).T.float().contiguous()
