"""TransMLA's seed of latent attention, with every error weighted by what it does to the layer's output.

Meng et al., arXiv 2502.07864 (repository MuLabPKU/TransMLA): rotate the key heads at each frequency so that few components
carry most of them (RoRoPE), leave rotary only those, and keep the rest of the keys and the values in one joint PCA. A
rotation that treats both halves of a pair alike commutes with the rotary embedding; with frequencies folded together
(FreqFold) it does so approximately, and packs more into a component.

Published, keys count by their energy and values by their balance with keys. Ours (`weigh: output`) counts a key's error as
the queries see it, at the tokens attention goes to, and a value's as o_proj does; and a component that loses its rotary
embedding keeps the mean turn it had under attention.

Letters as in mla_parts.py; h = d/2 frequencies, M frequencies folded into one.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from hybridize.conversions.fitting import gram, spread
from hybridize.conversions.mla_parts import Factors, Heads, Projected, Rotary, every_pair, leading, principal
from hybridize.mixers.mla import LatentAttention

# Sequences whose attention is looked at.
ROWS = 8
# Floors, relative to the mean: of a metric's directions, and of how much a pair's queries count.
RIDGE, LEAST = 1e-2, 0.1
# TransMLA's own, on each rotation's covariance.
DAMPING = 0.01


@dataclass(kw_only=True)
class Weights:
    """How much an error counts at the output, fp64."""

    keys: Tensor
    """Quadratic form of a plain key's error, [G, d, d]."""
    values: Tensor
    """Quadratic form of a value's error, [G, d, d]."""
    sizes: Tensor
    """Size of the queries that read a rotary pair, [G, h]."""
    turns: Tensor
    """Mean factor that the rotary embedding puts on a pair's score where attention goes, [H, h] complex."""


def _turned(x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """[N, T, heads, d] at its positions; angles [1, T, d]."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = (angle[:, :, None] for angle in angles)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class Sample:
    """The base's queries, keys, values and attention on a few sequences."""

    def __init__(self, projected: Projected):
        self.heads, self.angles = projected.heads, projected.angles
        some = spread(len(projected.places), ROWS)
        self.q, self.k, self.v = projected.q[some], projected.k[some], projected.v[some]
        self.length = self.q.shape[1]
        self.q_turned, self.k_turned = (_turned(x, self.angles) for x in (self.q, self.k))
        self.out = self.heads.weights["o"].float().unflatten(1, (self.heads.count, self.heads.width))

    def attention(self, scores: Tensor) -> Tensor:
        """Causal softmax of raw scores [N, T, T]."""
        later = torch.ones(self.length, self.length, dtype=torch.bool).triu(1)
        return (scores * self.heads.width**-0.5).masked_fill(later, float("-inf")).softmax(-1)

    def head(self, index: int) -> tuple[Tensor, Tensor]:
        """(attention weights [N, T, T], values [N, T, d]) of a query head."""
        group = index // (self.heads.count // self.heads.groups)
        return self.attention(self.q_turned[:, :, index] @ self.k_turned[:, :, group].mT), self.v[:, :, group]

    def weights(self) -> Weights:
        """The first-order effect of errors: of a score, p ||W_o (v_s - o_t)||; of a value, p W_o."""
        G, d, H = self.heads.groups, self.heads.width, self.heads.count
        half = d // 2
        keys, values = (torch.zeros(G, d, d, dtype=torch.float64) for _ in range(2))
        turns = torch.zeros(H, half, dtype=torch.complex128)
        cos, sin = (angle[0, :, :half].double() for angle in self.angles)
        phase = torch.complex(cos, sin)
        for head in range(H):
            group = head // (H // G)
            p, v = self.head(head)
            metric = self.out[:, head].T @ self.out[:, head]
            mean = p @ v
            seen, held = v @ metric, mean @ metric
            spread = (seen * v).sum(-1)[:, None] + (held * mean).sum(-1)[..., None] - 2 * held @ v.mT
            effect = p.square() * spread.clamp(min=0)
            queries = self.q[:, :, head].flatten(0, 1)
            felt = effect.sum(-1).flatten()[:, None]
            keys[group] += ((queries * felt).T @ queries).double() / (len(queries) * d)
            values[group] += float(p.square().sum(-1).mean()) * metric.double()
            by_place = effect.sum(0).double()
            turns[head] = ((by_place.to(phase.dtype) @ phase) * phase.conj()).sum(0) / by_place.sum().clamp(min=1e-300)
        halves = keys.view(G, 2, half, 2, half)
        sizes = torch.einsum("gphph->gh", halves).clamp(min=0).sqrt()
        return Weights(keys=keys, values=values, sizes=sizes + LEAST * sizes.mean() + 1e-12, turns=turns)

    def rotary_error(self, rotary: Rotary) -> float:
        """What taking the rotary embedding off the plain part does to the layer's output, mean square."""
        half = self.heads.width // 2
        cos, sin = (torch.cat([angle[..., :half][..., rotary.pairs]] * 2, dim=-1) for angle in self.angles)
        angles = (cos, sin)
        flat = self.k.flatten(2)
        key = _turned((flat @ rotary.rope_key.float().T)[:, :, None], angles)[:, :, 0]
        # cos of position 0 is what the rotary embedding lengthens by; the mixer gives plain scores the same.
        plain = (flat @ rotary.plain.float().T).unflatten(-1, (-1, self.heads.width)) * self.angles[0][0, 0, 0].square()
        wrong = []
        for head in range(self.heads.count):
            group = head // (self.heads.count // self.heads.groups)
            query = self.q[:, :, head]
            turned = _turned((query @ rotary.rope_query[head].float().T)[:, :, None], angles)[:, :, 0]
            p, v = self.head(head)
            mine = self.attention(turned @ key.mT + query @ plain[:, :, group].mT)
            wrong.append((mine - p) @ v)
        total = torch.cat(wrong, dim=-1) @ self.out.flatten(1).T
        return float(total.square().mean())


def rotate_keys(heads: Heads, mixer: LatentAttention, keys: Tensor, fold: int, weights: Weights | None) -> Rotary:
    """RoRoPE and FreqFold, and the choice of R/2 components that stay rotary.

    Args:
        heads: the base's.
        mixer: says R, and whether frequencies are set.
        keys: before the rotary embedding, [n, G, d].
        fold: M; divides h.
        weights: how much errors count; None counts keys by their energy alone.
    """
    G, d, H = heads.groups, heads.width, heads.count
    E, half, count = G * d, d // 2, mixer.rope // 2
    stride = 1 if mixer.chosen else max(1, d // mixer.rope)
    fold = fold if fold % stride == 0 else stride
    blocks, parts = half // fold, G * fold
    sizes = torch.ones(G, half, dtype=torch.float64) if weights is None else weights.sizes
    paired = keys.unflatten(-1, (2, half)) * sizes.float()[:, None]
    paired = paired.unflatten(-1, (blocks, fold)).permute(3, 0, 2, 1, 4).reshape(blocks, -1, parts)
    covariance = (paired.mT @ paired).double() / len(keys)
    level = DAMPING * covariance.diagonal(dim1=1, dim2=2).mean(-1)
    energy, turn = principal(covariance + level[:, None, None] * torch.eye(parts, dtype=torch.float64))
    # A folded component turns at the one frequency that has most of it.
    share = turn.view(blocks, G, fold, parts).square().sum(1)
    frequency = share.argmax(1) + torch.arange(blocks)[:, None] * fold
    if not mixer.chosen:
        pairs = mixer.default_pairs()
        place = pairs % fold // stride + torch.arange(count) // half * fold
        rotary = pairs // fold * parts + place
    else:
        # The first component of every rotation goes before the second of any.
        score = energy / energy.max() / 2 - torch.arange(parts)
        rotary = score.flatten().argsort(descending=True, stable=True)[:count].sort().values
        pairs = frequency.flatten()[rotary]
    rest = torch.ones(blocks * parts, dtype=torch.bool)
    rest[rotary] = False

    def rows(which: Tensor, scale: Tensor) -> Tensor:
        """Components as rows over the keys' coordinates, first halves then second halves, [2 * len(which), E]."""
        block, part = which // parts, which % parts
        made = torch.zeros(len(which), G, 2, blocks, fold, dtype=torch.float64)
        made[torch.arange(len(which)), :, 0, block] = turn[block, :, part].view(-1, G, fold)
        made = made.flatten(3) * scale[:, None]
        return torch.cat([made.flatten(1), made.flip(2).flatten(1)])

    others = rest.nonzero()[:, 0]
    queries = rows(rotary, 1 / sizes).view(-1, G, d).transpose(0, 1)
    return Rotary(
        pairs=pairs, rope_key=rows(rotary, sizes), rope_query=queries.repeat_interleave(H // G, dim=0),
        plain=(rows(others, 1 / sizes).T @ rows(others, sizes)).view(E, E),
    )  # fmt: skip


def search_fold(heads: Heads, mixer: LatentAttention, keys: Tensor, sample: Sample, weights: Weights | None) -> Rotary:
    """The rotary part with M = 1, 2, 4, ... until doubling raises the error of this layer's output."""
    fold, best = 1, rotate_keys(heads, mixer, keys, 1, weights)
    error = sample.rotary_error(best)
    while heads.width // 2 % (2 * fold) == 0:
        fold *= 2
        found = rotate_keys(heads, mixer, keys, fold, weights)
        # Equal where set frequencies fold as much already.
        if (worse := sample.rotary_error(found)) > error:
            break
        best, error = found, worse
    return best


def joint_pca(
    heads: Heads, mixer: LatentAttention, keys: Tensor, values: Tensor, plain: Tensor, weights: Weights | None
) -> dict[str, Tensor]:
    """`down`, `up_keys` and `up_values` of the principal components of [plain keys | values], fp64.

    Args:
        heads: the base's.
        mixer: says r.
        keys: [n, G, d].
        values: [n, G, d].
        plain: as in Rotary.
        weights: metrics of both; None makes the mean sizes of their columns equal, TransMLA's balance.
    """
    G, d, H = heads.groups, heads.width, heads.count
    keys = (keys.flatten(1) @ plain.float().T).unflatten(-1, (G, d))
    if weights is None:
        ratio = values.flatten(1).norm(dim=0).mean() / keys.flatten(1).norm(dim=0).mean().clamp(min=1e-30)
        eye = torch.eye(d, dtype=torch.float64).expand(G, d, d)
        metrics = [eye * float(ratio) ** 2, eye]
    else:
        metrics = [weights.keys, weights.values]
    roots, inverses = zip(*(_roots(metric) for metric in metrics), strict=True)
    rows = torch.cat(
        [
            (part.transpose(0, 1) @ root.float()).transpose(0, 1).flatten(1)
            for part, root in zip((keys, values), roots, strict=True)
        ],
        dim=1,
    )
    total = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64)
    for chunk in rows.split(2048):
        total += gram(chunk)
    vectors = leading(total, mixer.rank).reshape(2, G, d, -1)
    down = [(root @ part).flatten(0, 1).T for root, part in zip(roots, vectors, strict=True)]
    up = [inverse @ part for inverse, part in zip(inverses, vectors, strict=True)]
    up_keys = up[0].repeat_interleave(H // G, dim=0)
    if weights is not None:
        real, imaginary = weights.turns.real[..., None], weights.turns.imag[..., None]
        first, second = up_keys.chunk(2, dim=1)
        up_keys = torch.cat([real * first - imaginary * second, imaginary * first + real * second], dim=1)
    return {"down": torch.cat([down[0] @ plain, down[1]], dim=1), "up_keys": up_keys, "up_values": up[1]}


def _roots(metric: Tensor) -> tuple[Tensor, Tensor]:
    """Square root of [G, d, d] symmetric matrices and its inverse, after a floor under their directions."""
    d = metric.shape[-1]
    floor = RIDGE * metric.diagonal(dim1=1, dim2=2).mean() + 1e-30
    values, vectors = torch.linalg.eigh(metric + floor * torch.eye(d, dtype=torch.float64))
    return (vectors * values.sqrt()[:, None]) @ vectors.mT, (vectors * values.rsqrt()[:, None]) @ vectors.mT


def transmla(projected: Projected, mixer: LatentAttention, fold: int | str, weigh: str) -> Factors:
    """The whole seed; see the module docstring.

    Args:
        projected: the base's heads and what they make of the text.
        mixer: says r, R and whether frequencies are set.
        fold: M, or "search".
        weigh: "output" or "activations".
    """
    heads = projected.heads
    keys, values = projected.k.flatten(0, 1), projected.v.flatten(0, 1)
    sample = Sample(projected) if weigh == "output" or fold == "search" else None
    weights = sample.weights() if sample is not None and weigh == "output" else None
    if mixer.full_rope:
        rotary = every_pair(heads)
    elif fold == "search":
        assert sample is not None
        rotary = search_fold(heads, mixer, keys, sample, weights)
    else:
        rotary = rotate_keys(heads, mixer, keys, int(fold), weights)
    latent = joint_pca(heads, mixer, keys, values, rotary.plain, weights)
    return Factors(pairs=rotary.pairs, rope_key=rotary.rope_key, rope_query=rotary.rope_query, **latent)
