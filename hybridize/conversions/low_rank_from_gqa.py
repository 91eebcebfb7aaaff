"""Attention weights -> low-rank keys and values: each group's rows of k_proj and v_proj become two thin factors.

    minimise  sum_u || M^1/2 (W - B A) u ||^2        over A [r, D], B [width, r]

With N^T N = M and S S^T = E[u u^T], the best A and B come from the leading left singular vectors P of N W S: A = P^T N W and
B = N^-1 P. They are eigenvectors of N W E[u u^T] W^T N^T, a matrix of the group's width. `svd` has M = 1 and E[u u^T] = 1;
`palu` whitens, E[u u^T] from text (Palu, arXiv 2407.21118, section 3.2). `calibrated` is ours: keys are also weighted by the
queries that read them, and o_proj is a ridge regression onto what the residual stream lacks.
Heads are paired as the base pairs them: query head h reads key and value head h // (n_q / n_kv).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from hybridize.conversions import low_rank_scores
from hybridize.conversions.layer import LayerCalibration, materialised
from hybridize.errors import ConfigError
from hybridize.mixers.low_rank_kv import LatentAttention, LowRankAttention, rotated

# Of the mean diagonal, added where text or queries say nothing.
INPUT_DAMPING = 1e-6
QUERY_DAMPING = 1e-4
# Sequences that the queries are measured on.
QUERY_SEQUENCES = 8
# Of o_proj's ridge, times the mean of the Gram matrix's diagonal.
DAMPINGS = (1e-4, 1e-3, 1e-2, 1e-1)


@dataclass(frozen=True, kw_only=True)
class LowRankFromGQA:
    """How low-rank keys and values are found."""

    method: Literal["calibrated", "palu", "svd"] = "calibrated"
    """`svd` of the weights; `palu`: whitened by text; `calibrated`: keys weighted by queries too, o_proj solved."""

    drops = frozenset()
    from_scores = staticmethod(low_rank_scores.from_scores)
    spectra = staticmethod(low_rank_scores.spectra)
    spectra_of = staticmethod(low_rank_scores.spectra_of)

    @property
    def calibrated(self) -> bool:
        return self.method != "svd"

    def __call__(
        self,
        source: dict[str, Tensor],
        mixer: LowRankAttention,
        config: Any,
        generator: torch.Generator,
        calibration: LayerCalibration | None,
    ) -> dict[str, Tensor]:
        """The mixer's tensors, fp32. At full rank they are the base's attention.

        Args:
            source: q_proj, k_proj, v_proj, o_proj (weights, perhaps biases), perhaps q_norm and k_norm weights.
            mixer: the module to fill, on any device.
            config: of the base.
            generator: unused; nothing is drawn.
            calibration: of this layer; None for `svd`.

        Raises:
            ConfigError: a calibrated method got no text.
        """
        if self.calibrated and calibration is None:
            raise ConfigError(f"low_rank_kv method {self.method!r} needs text to calibrate on. Give text, or method svd")
        width = mixer.kv_heads // mixer.groups * mixer.width
        inputs = None if calibration is None or self.method == "svd" else _second_moment(calibration.inputs)
        metrics: list[Tensor | None] = [None] * mixer.groups
        if self.method == "calibrated" and calibration is not None and mixer.rank < width:
            reads = query_metric(source, mixer, config, calibration.inputs, calibration.angles)
            metrics = [torch.block_diag(*part) for part in reads.chunk(mixer.groups)]
        keys, values = (source[f"{name}_proj.weight"].double().split(width) for name in ("k", "v"))
        key_parts = [factor(w, inputs, metric, mixer.rank) for w, metric in zip(keys, metrics, strict=True)]
        value_parts = [factor(w, inputs, None, mixer.v_rank) for w in values]
        made = carried(source, mixer)
        made["k_up.weight"] = torch.stack([up for up, _ in key_parts])
        made["k_down.weight"] = torch.cat([down for _, down in key_parts])
        made["v_down.weight"] = torch.cat([down for _, down in value_parts])
        made["o_proj.weight"] = fused(source["o_proj.weight"].double(), [up for up, _ in value_parts], mixer)
        made = {name: tensor.float().contiguous() for name, tensor in made.items()}
        # At full rank nothing is lost and nothing is to be made up for: the layer stays the base's to the bit.
        if self.method == "calibrated" and calibration is not None and min(mixer.rank, mixer.v_rank) < width:
            made["o_proj.weight"] = refit(materialised(mixer, made), made["o_proj.weight"], made.get("o_proj.bias"), calibration)
        return made


def carried(source: dict[str, Tensor], mixer: LowRankAttention) -> dict[str, Tensor]:
    """What every method takes over: queries, norms and biases; the values' bias goes through o_proj, fp64."""
    made = {"q_proj.weight": source["q_proj.weight"]}
    for name, place in (("q_proj.bias",) * 2, ("k_proj.bias", "k_up.bias"), ("q_norm.weight",) * 2, ("k_norm.weight",) * 2):
        if name in source:
            made[place] = source[name]
    if "v_proj.bias" in source or "o_proj.bias" in source:
        out = source["o_proj.weight"].double()
        bias = torch.zeros(out.shape[0], dtype=torch.float64)
        if "v_proj.bias" in source:
            heads = source["v_proj.bias"].double().unflatten(0, (mixer.kv_heads, -1))
            bias += out @ heads.repeat_interleave(mixer.num_heads // mixer.kv_heads, dim=0).flatten()
        if "o_proj.bias" in source:
            bias += source["o_proj.bias"].double()
        made["o_proj.bias"] = bias
    return made


def fused(out: Tensor, ups: list[Tensor], mixer: LowRankAttention) -> Tensor:
    """o_proj over latents, [D, H * r]: each query head's columns times its value head's rows of the group's up-projection."""
    per_kv_head = torch.stack(ups).view(mixer.kv_heads, mixer.width, -1)
    per_head = per_kv_head.repeat_interleave(mixer.num_heads // mixer.kv_heads, dim=0)
    return torch.einsum("ohd,hdr->ohr", out.unflatten(1, (mixer.num_heads, mixer.width)), per_head).flatten(1)


def refit(module: Any, prior: Tensor, bias: Tensor | None, calibration: LayerCalibration) -> Tensor:
    """o_proj by ridge regression of the target on what it reads, its damping chosen on sequences that it was not fitted to.

    o_proj reads H * r numbers, often about as many as there are tokens of text, so that a fixed damping fits their noise.

    Args:
        module: the mixer with its other tensors in place; its `context(inputs, angles)`, with the memory after them where it
            reads one, is what o_proj reads.
        prior: the weight to stay near, and to keep where no damping does better on the sequences held out, [D, H * r].
        bias: of the projection, which stays, or None.
        calibration: of this layer.

    Returns:
        [D, H * r], fp32.
    """
    wide, inner = prior.double(), prior.shape[1]
    # Moments of the sequences fitted to, and of every fourth, held out: E[z z^T] and E[z (target - prior z)^T], sums.
    grams = torch.zeros(2, inner, inner, dtype=torch.float64)
    lacks = torch.zeros(2, inner, prior.shape[0], dtype=torch.float64)
    with torch.no_grad():
        for place in range(len(calibration.inputs)):
            memory = () if calibration.memory is None else (calibration.memory[place : place + 1],)
            rows = module.context(calibration.inputs[place : place + 1], calibration.angles, *memory)[0]
            lack = calibration.target[place] - torch.nn.functional.linear(rows, prior, bias)
            part = int(place % 4 == 3)
            grams[part] += (rows.T @ rows).double()
            lacks[part] += (rows.T @ lack).double()
    mean = float(grams.sum(0).diagonal().mean())
    identity = torch.eye(inner, dtype=torch.float64)

    def change(gram: Tensor, lack: Tensor, damping: float) -> Tensor:
        return torch.cholesky_solve(lack, torch.linalg.cholesky(gram + damping * mean * identity))

    best, chosen = 0.0, None
    for damping in DAMPINGS if mean > 0 else ():
        step = change(grams[0], lacks[0], damping)
        worse = float((step * (grams[1] @ step)).sum() - 2 * (step * lacks[1]).sum())
        if worse < best:
            best, chosen = worse, damping
    if chosen is None:
        return prior
    return (wide + change(grams.sum(0), lacks.sum(0), chosen).T).float().contiguous()


def factor(weight: Tensor, inputs: Tensor | None, metric: Tensor | None, rank: int) -> tuple[Tensor, Tensor]:
    """The best B [width, r] and A [r, D] of the module docstring, fp64, signs fixed.

    Args:
        weight: W, [width, D], fp64.
        inputs: E[u u^T], [D, D], or None for the identity.
        metric: M, [width, width], or None for the identity.
        rank: r, at most min(width, D).
    """
    width = weight.shape[0]
    if rank == width:
        return torch.eye(width, dtype=weight.dtype), weight
    root = None if metric is None else torch.linalg.cholesky(_damped(metric, QUERY_DAMPING)).T
    weighted = weight if root is None else root @ weight
    gram = weighted @ weighted.T if inputs is None else weighted @ _damped(inputs, INPUT_DAMPING) @ weighted.T
    lead = torch.linalg.eigh(gram)[1][:, -rank:].flip(1)
    largest = lead.gather(0, lead.abs().argmax(dim=0, keepdim=True))
    lead = lead * torch.where(largest < 0, -1.0, 1.0)
    up = lead if root is None else torch.linalg.solve_triangular(root, lead, upper=True)
    return up, lead.T @ weighted


def _damped(matrix: Tensor, damping: float) -> Tensor:
    """Scaled to a mean diagonal of one, which changes no minimum, and lifted where it is flat."""
    scale = float(matrix.diagonal().mean())
    identity = torch.eye(len(matrix), dtype=matrix.dtype)
    return identity if scale <= 0 else matrix / scale + damping * identity


def _second_moment(inputs: Tensor) -> Tensor:
    """E[u u^T] over all tokens, [D, D], fp64."""
    total = torch.zeros(inputs.shape[-1], inputs.shape[-1], dtype=torch.float64)
    for rows in inputs:
        total += (rows.T @ rows).double()
    return total / inputs[..., 0].numel()


def query_metric(
    source: Mapping[str, Tensor], mixer: LatentAttention, config: Any, inputs: Tensor, angles: tuple[Tensor, Tensor]
) -> Tensor:
    """What an error in each key head costs in attention scores, [G, d, d], fp64.

    A score moves by q~_t . R_s e when the key of token s, before its rotary embedding R_s, is off by e; it matters as much as
    softmax responds, p (1 - p). Hence M = E_s[R_s^T (sum_t p_ts (1 - p_ts) q~_t q~_t^T) R_s], over the query heads of the key
    head. A k-norm enters by its weight and by the size it takes away.

    Args:
        source: the attention's tensors.
        mixer: any mixer over latents; only its sizes are read.
        config: of the base.
        inputs: what the attention reads, [N, T, D]; the first sequences are used.
        angles: cos and sin, [1, T, d].
    """
    heads, kv_heads, width = mixer.num_heads, mixer.kv_heads, mixer.width
    cos, sin = angles
    back = (cos, -sin)
    total = torch.zeros(kv_heads, width, width, dtype=torch.float64)
    for rows in inputs[:QUERY_SEQUENCES, None]:
        q, _ = _projected(source, "q", rows, heads, config.rms_norm_eps)
        k, shrink = _projected(source, "k", rows, kv_heads, config.rms_norm_eps)
        q, k = rotated(q, angles)[0], rotated(k, angles)[0]
        hidden = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool).triu(1)
        for head in range(heads):
            group = head // (heads // kv_heads)
            scores = (q[head] @ k[group].T * width**-0.5).masked_fill(hidden, -torch.inf)
            p = scores.softmax(dim=-1)
            outer = (q[head][:, :, None] * q[head][:, None, :]).flatten(1)
            reads = ((p * (1 - p)).T @ outer).view(-1, width, width)
            # R_s^T from both sides: the matrices' rows, then their columns.
            reads = rotated(reads.transpose(0, 1)[None], back)[0]
            reads = rotated(reads.permute(2, 1, 0)[None], back)[0]
            total[group] += (reads * shrink[0, group][None, :, None] ** 2).sum(dim=1).double()
    if "k_norm.weight" in source:
        weight = source["k_norm.weight"].double()
        total = total * weight[:, None] * weight
    return (total + total.transpose(1, 2)) / 2


def _projected(source: Mapping[str, Tensor], name: str, rows: Tensor, heads: int, eps: float) -> tuple[Tensor, Tensor]:
    """Queries or keys of [1, T, D] before their rotary embedding, [1, heads, T, d], and what a norm multiplied them by."""
    out = rows @ source[f"{name}_proj.weight"].float().T
    if f"{name}_proj.bias" in source:
        out = out + source[f"{name}_proj.bias"].float()
    out = out.unflatten(-1, (heads, -1)).transpose(1, 2)
    shrink = torch.ones_like(out[..., 0])
    if f"{name}_norm.weight" in source:
        shrink = torch.rsqrt(out.pow(2).mean(dim=-1) + eps)
        out = out * shrink[..., None] * source[f"{name}_norm.weight"].float()
    return out, shrink
