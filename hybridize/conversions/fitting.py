"""Closed forms that several seedings share."""

import math
from collections.abc import Callable
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
# Columns of a block of a Gram matrix.
BLOCK = 512
# Tokens for each number that o_proj reads, from which on a fixed damping does; directions that a refit on fewer corrects.
ENOUGH, DIRECTIONS = 16, 512


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
    total = torch.zeros(inner, inner, dtype=torch.float64)
    cross = torch.zeros(inner, prior.shape[0], dtype=torch.float64)
    with torch.no_grad():
        read = [calibration.inputs] if calibration.memory is None else [calibration.inputs, calibration.memory]
        for target, *seen in zip(calibration.target.split(ROWS), *(t.split(ROWS) for t in read), strict=True):
            rows = module.context(*seen).flatten(0, 1)
            wanted = target.flatten(0, 1) if bias is None else target.flatten(0, 1) - bias
            total += gram(rows)
            cross += rows.T @ wanted
    damping = RIDGE * float(total.diagonal().mean())
    total.diagonal().add_(damping)
    cross.add_(prior.T, alpha=damping)
    return torch.cholesky_solve(cross, torch.linalg.cholesky(total)).T.float().contiguous()


def gram(rows: Tensor) -> Tensor:
    """rows^T rows of [n, C], [C, C]: of many columns only the blocks on and above the diagonal are multiplied."""
    width = rows.shape[1]
    made = rows.new_empty(width, width)
    for start in range(0, width, BLOCK):
        block = slice(start, start + BLOCK)
        part = rows[:, block].T @ rows[:, start:]
        made[block, start:], made[start:, block] = part, part.T
    return made


def refit_out_proj(
    context: Callable[[Tensor], Tensor], prior: Tensor, bias: Tensor | None, target: Tensor, dampings: tuple[float, ...]
) -> Tensor:
    """o_proj by ridge regression of what it leaves over, its damping chosen on sequences that it was not fitted to.

    For text of fewer than ENOUGH tokens for each number that o_proj reads, of whose noise a fixed damping would fit too much
    (`solve_out_proj`, for more). Of many numbers the correction reads a few directions only, in which what is left over is seen.

    Args:
        context: from indices of sequences [n] to what o_proj reads of them, [n, T, C].
        prior: the weight to stay near, and to keep where no damping does better on the sequences held out, [D, C].
        bias: of the projection, which stays, or None.
        target: as in LayerCalibration, of all those sequences, [N, T, D].
        dampings: to choose from, in units of the Gram matrix's mean diagonal.

    Returns:
        [D, C], fp32.
    """
    # Every fourth sequence is held out.
    places = torch.arange(len(target))
    parts = []
    with torch.no_grad():
        for part in (places[places % 4 != 3], places[places % 4 == 3]):
            read = [prior.new_empty(0, prior.shape[1]), *(context(some).flatten(0, 1) for some in part.split(ROWS) if len(some))]
            wanted = target[part].flatten(0, 1)
            parts.append((torch.cat(read), wanted if bias is None else wanted - bias))
    basis = _basis(parts, prior)
    if basis is None:
        squares = [gram(read).double() for read, _ in parts]
        lacks = [read.T @ (wanted - read @ prior.T) for read, wanted in parts]
    else:
        few = [read @ basis for read, _ in parts]
        squares = [gram(x).double() for x in few]
        lacks = [x.T @ wanted - x.T @ read @ prior.T for x, (read, wanted) in zip(few, parts, strict=True)]
    mean = float((squares[0] + squares[1]).diagonal().mean())
    identity = torch.eye(len(squares[0]), dtype=torch.float64)

    def change(square: Tensor, lack: Tensor, damping: float) -> Tensor:
        return torch.cholesky_solve(lack, torch.linalg.cholesky(square + damping * mean * identity).float())

    best, chosen = 0.0, None
    for damping in dampings if mean > 0 else ():
        step = change(squares[0], lacks[0], damping)
        worse = float((step * (squares[1].float() @ step - 2 * lacks[1])).sum())
        if worse < best:
            best, chosen = worse, damping
    if chosen is None:
        return prior.float()
    step = change(squares[0] + squares[1], lacks[0] + lacks[1], chosen)
    if basis is not None:
        step = basis @ step
    return (prior + step.T).contiguous()


def spread(count: int, most: int) -> Tensor:
    """At most `most` of range(count), evenly, int64."""
    return torch.linspace(0, count - 1, min(most, count)).long()


def _basis(parts: list[tuple[Tensor, Tensor]], prior: Tensor) -> Tensor | None:
    """Orthonormal directions of the input in which what is left over is seen first, [C, DIRECTIONS]; None: every one.

    The range of input^T (target - prior input), by a random sketch of the outputs (Halko et al., arXiv 0909.4061): what
    partial least squares would take first.
    """
    if prior.shape[1] <= DIRECTIONS:
        return None
    sketch = torch.randn(len(prior), DIRECTIONS, generator=torch.Generator().manual_seed(0))
    before = prior.T @ sketch
    return torch.linalg.qr(sum(read.T @ (wanted @ sketch - read @ before) for read, wanted in parts))[0]


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
