"""Attention weights -> keys and values of a group of layers from the latents of its lowest one: reduced-rank regression.

    minimise  sum_l E || M_l^1/2 (W_l u_l - B_l A u_0) ||^2       over A [r, D] and every B_l [2 G d, r]

u_0 is what the owner reads, W_l u_l the keys and values of each layer of its group. With F_l the regression of W_l u_l on u_0 at
full rank and L L^T = E[u_0 u_0^T], the best A is V^T L^-1, V the leading eigenvectors of L^T (sum_l F_l^T M_l F_l) L (Izenman
1975, reduced-rank regression). The owner's turn settles A on the teacher's keys and values above it. A layer above finds its
own latents as the owner does, of what the shared ones leave unexplained; and every layer its B_l, on what the student caches.

`xkv` carries the published choices over (arXiv 2503.18893, section 3): latents for keys beside latents for values, as 512 to
768, singular vectors without weights, o_proj kept. `calibrated` is ours: latents for both at once, keys weighted by the queries
that read them, keys and values of a layer worth the same, all about their means, and o_proj a ridge regression onto what the
residual stream lacks.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from hybridize.conversions.layer import LayerCalibration, materialised
from hybridize.conversions.low_rank_from_gqa import query_metric, refit
from hybridize.errors import ConfigError
from hybridize.mixers.xkv import SharedLatentAttention

# Of the mean diagonal, added where text says nothing: to what a regression is on, and to what latents are of.
DAMPING = 1e-5
FLAT = 1e-6
# xKV's 768 dimensions for values beside 512 for keys.
PUBLISHED_VALUES = 0.6


@dataclass(frozen=True, kw_only=True, eq=False)
class Wanted:
    """What a layer of a group wants of latents of the stream below, fp64, for keys and for values."""

    maps: tuple[Tensor, Tensor]
    """F, from what the latents are of to the layer's keys and to its values, [G d, D]."""
    costs: tuple[Tensor, Tensor]
    """F^T M F of each, [D, D]: what an error in the latents' source costs."""


@dataclass(frozen=True, kw_only=True)
class XKVFromGQA:
    """How keys and values shared by adjacent layers are found."""

    method: Literal["calibrated", "xkv"] = "calibrated"
    """`calibrated`: weighted, and o_proj solved. `xkv`: the published choices. Both read text."""

    drops = frozenset()
    calibrated = True

    @property
    def weighted(self) -> bool:
        return self.method == "calibrated"

    def ahead(
        self,
        source: Mapping[str, Tensor],
        mixer: SharedLatentAttention,
        config: Any,
        inputs: Tensor,
        seen: Tensor,
        angles: tuple[Tensor, Tensor],
    ) -> Wanted:
        """What a layer above the owner wants of the owner's latents.

        Args:
            source: the attention's tensors of the layer above.
            mixer: the owner; only its sizes are read.
            config: of the base.
            inputs: u_0, what the student's owner reads, [N, T, D].
            seen: u_l, what the teacher's layer above reads, [N, T, D].
            angles: cos and sin, [1, T, d].
        """
        below = moments(inputs, inputs, self.weighted)
        onto = torch.linalg.solve(damped(below, DAMPING), moments(inputs, seen, self.weighted)).T
        return self._wanted(source, mixer, config, seen, angles, onto)

    def _wanted(
        self,
        source: Mapping[str, Tensor],
        mixer: SharedLatentAttention,
        config: Any,
        seen: Tensor,
        angles: tuple[Tensor, Tensor],
        onto: Tensor | None = None,
    ) -> Wanted:
        """As `ahead`; `onto` [D, D] is from what the latents are of to what the layer reads, None where that is the same."""
        maps, costs = [], []
        second = moments(seen, seen, self.weighted)
        for name in ("k_proj.weight", "v_proj.weight"):
            weight = source[name].double()
            metric = torch.eye(mixer.width, dtype=weight.dtype).expand(mixer.kv_heads, -1, -1)
            if self.weighted and name == "k_proj.weight":
                metric = query_metric(source, mixer, config, seen, angles)
            found = weight if onto is None else weight @ onto
            whole = float((_cost(weight, metric) * second).sum()) if self.weighted else 1.0
            maps.append(found)
            # A share of what the layer's keys or values cost when all are left out; a layer without any costs nothing.
            costs.append(_cost(found, metric) / whole if whole > 0 else torch.zeros_like(second))
        return Wanted(maps=(maps[0], maps[1]), costs=(costs[0], costs[1]))

    def __call__(
        self,
        source: Mapping[str, Tensor],
        mixer: SharedLatentAttention,
        config: Any,
        generator: torch.Generator,
        calibration: LayerCalibration | None,
    ) -> dict[str, Tensor]:
        """The mixer's tensors, fp32. With all dimensions of its own, or of the owner at full rank, they are the base's attention.

        Args:
            source: q_proj, k_proj, v_proj, o_proj (weights, perhaps biases), perhaps q_norm and k_norm weights.
            mixer: the module to fill, on any device.
            config: of the base.
            generator: unused; nothing is drawn.
            calibration: of this layer; above the owner with the owner's latents as memory, in it with `ahead`.

        Raises:
            ConfigError: there is no text, or the memory of the owner is missing.
        """
        if calibration is None or (mixer.reads is not None and calibration.memory is None):
            raise ConfigError(f"xkv method {self.method!r} needs text and the latents of the layer it reads. Give text")
        made = {name: source[name] for name in source if name.split(".")[0] in ("q_proj", "o_proj", "q_norm", "k_norm")}
        weight = torch.cat([source["k_proj.weight"], source["v_proj.weight"]]).double()
        memory = calibration.inputs[..., :0] if calibration.memory is None else calibration.memory
        known = torch.cat([memory, calibration.inputs], dim=-1)
        second, shared = moments(known, known, self.weighted), memory.shape[-1]
        down, up = self._latents(source, mixer, config, calibration, second, shared, weight)
        exact = up is not None
        # What k_up and v_up read, as a map of memory and stream.
        reads = torch.block_diag(torch.eye(shared, dtype=weight.dtype), down)
        if up is None:
            cross = reads @ second
            up = torch.linalg.solve(damped(cross @ reads.T, DAMPING), cross[:, shared:] @ weight.T).T
        offset = torch.zeros(len(weight), dtype=weight.dtype)
        if self.weighted:
            mean = known.flatten(0, 1).double().mean(dim=0)
            offset = weight @ mean[shared:] - up @ (reads @ mean)
        for name, rows, shift in zip("kv", up.chunk(2), offset.chunk(2), strict=True):
            made[f"{name}_up.weight"] = rows
            made[f"{name}_up.bias"] = shift + source[f"{name}_proj.bias"] if f"{name}_proj.bias" in source else shift
        if len(down):
            made["down.weight"] = down
        made = {name: tensor.float().contiguous() for name, tensor in made.items()}
        # Where nothing is lost there is nothing to make up for: the layer stays the base's.
        if self.weighted and not exact:
            made["o_proj.weight"] = refit(materialised(mixer, made), made["o_proj.weight"], made.get("o_proj.bias"), calibration)
        return made

    def _latents(
        self,
        source: Mapping[str, Tensor],
        mixer: SharedLatentAttention,
        config: Any,
        calibration: LayerCalibration,
        second: Tensor,
        shared: int,
        weight: Tensor,
    ) -> tuple[Tensor, Tensor | None]:
        """A [r, D] of what this layer caches, fp64; and B [2 G d, shared + r] where A loses nothing of this layer, else None.

        Args:
            source: as in `__call__`.
            mixer: the same.
            config: the same.
            calibration: the same.
            second: second moments of memory and stream, [C + D, C + D].
            shared: width C of the memory.
            weight: of keys and values, [2 G d, D].
        """
        rank, stream = mixer.own if shared else mixer.shared, second[shared:, shared:]
        if rank == 0:
            return weight[:0], None
        eye = torch.eye(len(stream), dtype=weight.dtype)
        nothing = torch.zeros(len(weight), shared, dtype=weight.dtype)
        if rank == len(eye):
            return eye, torch.cat([nothing, weight], dim=1)
        if rank == len(weight) * (1 + len(calibration.ahead)):
            maps = [weight, *(part for other in calibration.ahead for part in other.maps)]
            return torch.cat(maps), torch.cat([nothing, torch.eye(len(weight), rank, dtype=weight.dtype)], dim=1)
        if shared:
            cross = second[:shared, shared:]
            stream = stream - cross.T @ torch.linalg.solve(damped(second[:shared, :shared], FLAT), cross)
            stream = stream + FLAT * second[shared:, shared:].diagonal().mean() * eye
        keys, values = self._wanted(source, mixer, config, calibration.inputs, calibration.angles).costs
        for other in calibration.ahead:
            keys, values = keys + other.costs[0], values + other.costs[1]
        if self.weighted:
            return leading(keys + values, stream, rank), None
        for_values = min(max(round(rank * PUBLISHED_VALUES), 1), rank - 1) if rank > 1 else 1
        return torch.cat([leading(keys, stream, rank - for_values), leading(values, stream, for_values)]), None


def leading(cost: Tensor, second: Tensor, rank: int) -> Tensor:
    """A [r, D], fp64: the latents of u, of unit variance, from which a linear map restores it at the least cost; signs fixed.

    Args:
        cost: C; an error e in u costs e^T C e, [D, D].
        second: E[u u^T], [D, D].
        rank: r.
    """
    root = torch.linalg.cholesky(damped(second, FLAT))
    lead = torch.linalg.eigh(root.T @ cost @ root)[1].flip(1)[:, :rank]
    largest = lead.gather(0, lead.abs().argmax(dim=0, keepdim=True))
    lead = lead * torch.where(largest < 0, -1.0, 1.0)
    return torch.linalg.solve_triangular(root.T, lead, upper=True).T


def moments(left: Tensor, right: Tensor, centred: bool) -> Tensor:
    """E[a b^T] over all tokens of [N, T, A] and [N, T, B], [A, B], fp64; about the means where `centred`."""
    total = torch.zeros(left.shape[-1], right.shape[-1], dtype=torch.float64)
    means = [side.flatten(0, 1).double().mean(dim=0) * centred for side in (left, right)]
    for a, b in zip(left, right, strict=True):
        total += (a.double() - means[0]).T @ (b.double() - means[1])
    return total / left[..., 0].numel()


def damped(matrix: Tensor, damping: float) -> Tensor:
    """Lifted by a share of the mean diagonal, and by the smallest number where that is nothing."""
    lift = damping * float(matrix.diagonal().mean()) + torch.finfo(matrix.dtype).tiny
    return matrix + lift * torch.eye(len(matrix), dtype=matrix.dtype)


def _cost(weight: Tensor, metric: Tensor) -> Tensor:
    """W^T M W, [D, D], for W [G * d, D] and the metric of each head, [G, d, d]."""
    heads = weight.unflatten(0, metric.shape[:2])
    return torch.einsum("gdi,gdj->ij", heads, metric @ heads)
