"""Closed forms that several seedings share."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridize.conversions.layer import LayerCalibration

# SiLU is 1 here: with zero weights in front, such a bias starts a gate open and constant.
OPEN_GATE = 1.2784645427610738
RIDGE = 1e-3
# Sequences per forward of the module whose projection is solved.
ROWS = 4
# rms of y over sqrt(eps): from the norm's linear range to full normalisation.
SIZES = (0.05, 0.3, 1.0, 3.0, 10.0)
ALTERNATIONS = 4


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


def shifted(v: Tensor, taps: int) -> Tensor:
    """v delayed by 0 .. taps-1 tokens, [n, T, J, P]."""
    return torch.stack([F.pad(v, (0, 0, j, 0))[:, : v.shape[1]] for j in range(taps)], dim=2)


def taps_applied(v: Tensor, taps: Tensor) -> Tensor:
    """v through a causal convolution of each channel; newest tap first, [n, T, P]."""
    return torch.einsum("ntjp,pj->ntp", shifted(v, taps.shape[-1]), taps)


def solve_taps(gram: Tensor, cross: Tensor, energy: Tensor) -> dict[str, Any]:
    """Taps shared by the heads, a half-life and a per-channel gain for each: alternating least squares.

    Args:
        gram: products of the delayed mixtures, [h, L, P, J, J], fp64, L half-lives.
        cross: their products with the context, [h, L, P, J], fp64.
        energy: the context's sum of squares, [h], fp64.

    Returns:
        error (mean over heads of the unexplained share), taps [P, J] fp32, place [h] (index of the half-life).
    """
    members, lives, width, taps = cross.shape
    size = gram.diagonal(dim1=-2, dim2=-1).mean(-1).clamp(min=1e-30)
    damping = RIDGE * size[..., None, None] * torch.eye(taps, dtype=gram.dtype)
    alone = torch.linalg.solve(gram + damping, cross)
    explained = ((alone * cross).sum((2, 3))) / energy[:, None].clamp(min=1e-30)
    place = explained.argmax(dim=1)
    rows = torch.arange(members)
    gain = torch.ones(members, width, dtype=gram.dtype)
    shared = alone[rows, place].mean(0)
    for _ in range(ALTERNATIONS if members > 1 else 1):
        weight = (gain**2 / energy[:, None].clamp(min=1e-30))[..., None, None]
        left = (weight * (gram + damping)[rows, place]).sum(0)
        right = ((gain / energy[:, None].clamp(min=1e-30))[..., None] * cross[rows, place]).sum(0)
        shared = torch.linalg.solve(left + 1e-30 * torch.eye(taps, dtype=gram.dtype), right)
        quadratic = torch.einsum("pj,hlpjk,pk->hlp", shared, gram, shared)
        linear = torch.einsum("pj,hlpj->hlp", shared, cross)
        gains = linear / quadratic.clamp(min=1e-30)
        explained = (gains * linear).sum(2) / energy[:, None].clamp(min=1e-30)
        place = explained.argmax(dim=1)
        gain = gains[rows, place]
    return {"error": float(1 - explained[rows, place].mean()), "taps": shared.float(), "place": place}


def size_and_norm(y: Tensor, context: Tensor) -> tuple[float, Tensor]:
    """Gain that brings y to its best size before the norm, and the norm's weight [P] after it."""
    rms = float(y.pow(2).mean().sqrt().clamp(min=1e-20))
    best = (math.inf, 0.0, context[0, 0])
    for size in SIZES:
        scaled = y * (size / rms)
        normed = scaled * torch.rsqrt(scaled.pow(2).mean(-1, keepdim=True) + 1)
        weight = (normed * context).sum((0, 1)) / normed.pow(2).sum((0, 1)).clamp(min=1e-20)
        error = float((context - normed * weight).pow(2).sum())
        if error < best[0]:
            best = (error, size / rms, weight)
    return best[1], best[2]
