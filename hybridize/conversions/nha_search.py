"""The calibrated seed of native hybrid attention: which tokens a slot keeps, for how long, and what it weighs.

For each key/value head, on the text of the calibration:

1. Tokens count by the attention that they get from beyond the window. Weighted k-means over their keys makes one cluster for
   each slot.
2. A slot's gate is the linear discriminant of its cluster in the layer's input, scaled so that a token of the cluster
   halves what the slot holds every `inside` such tokens, and an average token every `outside`.
3. A slot's bias, for each query head, makes its mean weight that of the far tokens of its cluster.
4. Among a few (inside, outside), slots that are plain running means, and the published start, each key/value head takes
   what comes nearest to the teacher's context on sequences that 1 to 3 have not seen; each query head takes how loud its
   slots are, muted included.
5. o_proj is ridge regression onto what the residual stream lacks, held to the base's as far as unseen sequences ask.

Letters: N sequences, T tokens, D width of the stream, H query heads, G key/value heads, R = H / G, d head width, m slots.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, one_hot

from hybridize.conversions.layer import LayerCalibration, materialised
from hybridize.mixers.nha import GATE_DIVISOR, MUTED, NativeHybridAttention, SlotScan

# Half-lives in tokens: of a slot under tokens of its own cluster, and under average ones.
INSIDE = (0.5, 1.0, 4.0, 16.0)
OUTSIDE = (256.0, 4096.0)
# Added to the biases that match masses; the slots' share of a softmax is a matter of its other half too.
OFFSETS = (0.0, 1.0, -1.0, -2.0, -4.0, MUTED)
BIAS_LIMIT = 12.0
SEARCH_SEQUENCES = 32
# Numbers in one [N, H, T, T] of scores.
BATCH_SCORES = 1 << 23
LLOYD_STEPS = 12
RIDGE = 1e-3
DAMPINGS = (1e-3, 1e-2, 1e-1, 1.0)


@dataclass(frozen=True, kw_only=True)
class Attended:
    """Sequences through the layer's own projections, against all of their past. fp32."""

    x: Tensor
    """[N, T, D]."""
    q: Tensor
    """Rotated, [N, G, R, T, d]."""
    k: Tensor
    """Rotated, [N, G, T, d]."""
    v: Tensor
    """[N, G, T, d]."""
    near: Tensor
    """softmax over the whole past, the tokens outside window and sinks at 0, [N, G, R, T, T]."""
    far: Tensor
    """The rest of it."""
    level: Tensor
    """log of the softmax's denominator, [N, G, R, T, 1]."""


def search(made: dict[str, Tensor], mixer: NativeHybridAttention, calibration: LayerCalibration) -> dict[str, Tensor]:
    """Fill the published start with the solved values.

    Args:
        made: from `carried`; returned completed.
        mixer: the module to fill, on the meta device.
        calibration: activations of this layer.
    """
    with torch.no_grad():
        module = materialised(mixer, made)
        if calibration.inputs.shape[1] > mixer.reach.window + mixer.reach.sink:
            _slots(made, module, calibration)
        else:
            made["slot_bias"] = torch.full_like(made["slot_bias"], MUTED)
        made["o_proj.weight"] = _out_proj(materialised(mixer, made), made, calibration)
        return made


def _slots(made: dict[str, Tensor], module: NativeHybridAttention, calibration: LayerCalibration) -> None:
    """Gates and biases: solved on every other sequence, chosen on those between."""
    inputs, angles = calibration.inputs[:SEARCH_SEQUENCES], calibration.angles
    solve, check = inputs[::2], inputs[1::2] if len(inputs) > 1 else inputs
    context = calibration.context[:SEARCH_SEQUENCES][1::2] if len(inputs) > 1 else calibration.context[:1]
    labels, weights = _clusters(module, solve, angles)
    best = torch.full((module.num_groups,), math.inf, dtype=torch.float64)
    published = [made[f"gate_proj.{kind}"].unflatten(0, (module.num_groups, -1)).clone() for kind in ("weight", "bias")]
    plain = torch.zeros_like(made["slot_bias"]).unflatten(0, (module.num_groups, -1))
    candidates = [(*published, plain), *((*gate, None) for gate in _gates(solve, labels, weights, module.slots))]
    for weight, bias, loud in candidates:
        if loud is None:
            loud = _loudness(module, solve, weight, bias, labels, angles)
        loud, error = _chosen(module, check, context, weight, bias, loud, angles)
        for name, value in (("gate_proj.weight", weight), ("gate_proj.bias", bias), ("slot_bias", loud)):
            held = made[name].unflatten(0, (module.num_groups, -1))
            held[error < best] = value[error < best]
        best = torch.minimum(best, error)


def _out_proj(module: NativeHybridAttention, made: dict[str, Tensor], calibration: LayerCalibration) -> Tensor:
    """Ridge regression of the target on what o_proj reads, [D, H * d], fp32, as near to the base's as held-out rows ask.

    A seed that is close to its base has little to make up for, and a fixed damping would fit the text's noise: it is chosen
    on every fourth sequence, "leave it" included, and the fit repeated on all.
    """
    prior, bias = made["o_proj.weight"].double(), made.get("o_proj.bias")
    inner = prior.shape[1]
    sums = [[torch.zeros(inner, inner).double(), torch.zeros(inner, len(prior)).double()] for _ in range(2)]
    for row in range(len(calibration.inputs)):
        rows = module.context(calibration.inputs[row : row + 1], calibration.angles)[0]
        # What the base's own weight leaves over is what is regressed.
        lack = calibration.target[row] - rows @ made["o_proj.weight"].T - (0 if bias is None else bias)
        gram, cross = sums[row % 4 == 3]
        gram += (rows.T @ rows).double()
        cross += (rows.T @ lack).double()

    def solved(gram: Tensor, cross: Tensor, damping: float) -> Tensor:
        eye = torch.eye(inner).double() * max(float(gram.diagonal().mean()), 1e-30)
        return torch.linalg.solve(gram + damping * eye, cross)

    best, least = None, 0.0
    for damping in DAMPINGS:
        change = solved(sums[0][0], sums[0][1], damping)
        error = float((change * (sums[1][0] @ change - 2 * sums[1][1])).sum())
        if error < least:
            best, least = damping, error
    if best is None:
        return made["o_proj.weight"]
    whole = solved(sums[0][0] + sums[1][0], sums[0][1] + sums[1][1], best)
    return (prior + whole.T).float().contiguous()


def _attended(module: NativeHybridAttention, inputs: Tensor, angles: tuple[Tensor, Tensor]) -> Iterator[Attended]:
    """A few sequences at a time, so that their [N, H, T, T] are in memory."""
    tokens = torch.arange(inputs.shape[1])
    distance = tokens[:, None] - tokens
    seen = (distance < module.reach.window) | (tokens < module.reach.sink)
    rows = max(1, BATCH_SCORES // (module.q_proj.out_features // module.head_dim * len(tokens) ** 2))
    for x in inputs.split(rows):
        q, k, v = module.project(x, angles)
        q = q.unflatten(1, (module.num_groups, -1))
        scores = (q @ k[:, :, None].transpose(-1, -2) * module.head_dim**-0.5).masked_fill(distance < 0, -math.inf)
        level = scores.logsumexp(-1, keepdim=True)
        weights = torch.exp(scores - level)
        near = weights * seen
        yield Attended(x=x, q=q, k=k, v=v, near=near, far=weights - near, level=level)


def _clusters(module: Any, inputs: Tensor, angles: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The slot of each token, [G, N, T], and the attention that it gets from beyond the window, [G, N, T]."""
    weights = torch.cat([found.far.sum((2, 3)) for found in _attended(module, inputs, angles)]).transpose(0, 1)
    still = (torch.ones_like(angles[0]), torch.zeros_like(angles[1]))
    keys = torch.cat([module.project(x, still)[1] for x in inputs.split(1)]).transpose(0, 1)
    labels = [
        _k_means(points.flatten(0, 1).double(), mass.flatten().double(), module.slots)
        for points, mass in zip(keys, weights, strict=True)
    ]
    return torch.stack(labels).view(weights.shape), weights


def _k_means(points: Tensor, mass: Tensor, count: int) -> Tensor:
    """Cluster of each point, [S]: weighted Lloyd from a start without chance (the point that matters most and is farthest)."""
    centers = points[mass.argmax()][None]
    nearest = (points - centers).pow(2).sum(-1)
    while len(centers) < count:
        centers = torch.cat([centers, points[(mass * nearest).argmax()][None]])
        nearest = torch.minimum(nearest, (points - centers[-1]).pow(2).sum(-1))
    labels = torch.cdist(points, centers).argmin(-1)
    for _ in range(LLOYD_STEPS):
        total = torch.zeros(count, dtype=points.dtype).index_add_(0, labels, mass)
        sums = torch.zeros_like(centers).index_add_(0, labels, points * mass[:, None])
        centers = torch.where(total[:, None] > 0, sums / total.clamp(min=1e-30)[:, None], centers)
        labels = torch.cdist(points, centers).argmin(-1)
    return labels


def _raw_gate(half_life: Tensor) -> Tensor:
    """z with 2^(-1/half_life) = sigmoid(z)^(1/8)."""
    held = torch.exp2(-GATE_DIVISOR / half_life)
    return torch.log(held) - torch.log1p(-held)


def _gates(inputs: Tensor, labels: Tensor, weights: Tensor, slots: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Candidates for W_g [G, m, D] and b_g [G, m]."""
    x = inputs.flatten(0, 1).double()
    groups, tokens = weights.shape[0], x.shape[0]
    spread = torch.logspace(math.log10(4), math.log10(4096), slots, dtype=torch.float64)
    yield torch.zeros(groups, slots, x.shape[1]), _raw_gate(spread).float().expand(groups, -1)
    mean = x.mean(0)
    centred = x - mean
    covariance = centred.T @ centred / tokens
    covariance.diagonal().add_(RIDGE * float(covariance.diagonal().mean()))
    mass = weights.flatten(1).double()
    member = one_hot(labels.flatten(1), slots).double() * mass[:, :, None]
    # A slot that nothing falls to gets a difference of zero: a constant gate.
    away = member.transpose(1, 2) @ centred / member.sum(1).clamp(min=1e-12)[:, :, None]
    direction = torch.linalg.solve(covariance, away.flatten(0, 1).T).T.view_as(away)
    reach = (direction * away).sum(-1, keepdim=True)
    direction = direction / reach.clamp(min=1e-12)
    for outside in OUTSIDE:
        for inside in INSIDE:
            low, high = (_raw_gate(torch.tensor(h, dtype=torch.float64)) for h in (inside, outside))
            weight = (low - high) * direction
            yield weight.float(), (high - weight @ mean).float()


def _in_slots(module: Any, found: Attended, weight: Tensor, bias: Tensor) -> tuple[SlotScan, Tensor]:
    """The scan of a candidate's gates, and the slots' scores less the softmax's level, [N, G, R, T, m]."""
    raw = (found.x[:, None] @ weight.transpose(1, 2)) + bias[:, None]
    scan = SlotScan(logsigmoid(raw) / GATE_DIVISOR, None)
    return scan, scan.scores(found.q, found.k, _empty(module, found))[0] * module.head_dim**-0.5 - found.level


def _empty(module: Any, found: Attended) -> Tensor:
    return torch.zeros(len(found.x), module.num_groups, module.slots, module.head_dim)


def _loudness(module: Any, inputs: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, angles: Any) -> Tensor:
    """Slot biases [G, R, m] that give each slot, in the sum over all tokens, its cluster's share beyond the window."""
    held, wanted, row = torch.zeros(()).double(), torch.zeros(()).double(), 0
    for found in _attended(module, inputs, angles):
        member = one_hot(labels[:, row : row + len(found.x)], module.slots).float().transpose(0, 1)
        late = slice(module.reach.window + module.reach.sink, None)
        wanted = wanted + (found.far[:, :, :, late] @ member[:, :, None]).sum((0, 3)).double()
        held = held + _in_slots(module, found, weight, bias)[1][:, :, :, late].exp().sum((0, 3)).double()
        row += len(found.x)
    loud = wanted.clamp(min=1e-30).log() - held.clamp(min=1e-30).log()
    return loud.clamp(-BIAS_LIMIT, BIAS_LIMIT).float()


def _chosen(
    module: Any, inputs: Tensor, context: Tensor, weight: Tensor, bias: Tensor, loud: Tensor, angles: Any
) -> tuple[Tensor, Tensor]:
    """Slot biases [G, R, m] at each query head's best offset, and what is then left of the context's energy, [G]."""
    error, row = torch.zeros(len(OFFSETS), *loud.shape[:2]).double(), 0
    for found in _attended(module, inputs, angles):
        scan, scores = _in_slots(module, found, weight, bias)
        near = found.near @ found.v[:, :, None]
        mass = found.near.sum(-1, keepdim=True)
        target = context[row : row + len(found.x)].unflatten(-1, (*loud.shape[:2], -1)).permute(0, 2, 3, 1, 4)
        for place, offset in enumerate(OFFSETS):
            weights = torch.exp(scores + loud[:, :, None] + offset)
            out = (near + scan.read(weights, found.v, _empty(module, found))[0]) / (mass + weights.sum(-1, keepdim=True))
            error[place] += (out - target).pow(2).sum((0, -1, -2)).double()
        row += len(found.x)
    least, choice = error.min(0)
    return loud + torch.tensor(OFFSETS)[choice][:, :, None], least.sum(-1)
