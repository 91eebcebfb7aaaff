"""Seeds of latent attention from the weights alone, or nearly: X-EcoMLA's and MHA2MLA's layouts.

`svd` is X-EcoMLA's (arXiv 2503.11132; as in Zebra-Llama, arXiv 2505.17272): the rotary key is the mean over key heads of a
few rows, the rest of keys and values is one truncated decomposition of the weights. `partial_rope` is MHA2MLA's
(arXiv 2502.14837): each key head keeps rotary pairs of its own. Letters as in mla_parts.py.
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from hybridize.conversions.layer import LayerCalibration
from hybridize.conversions.mla_parts import Heads, Rotary, principal
from hybridize.errors import ConfigError
from hybridize.families import head_dim
from hybridize.mixers.mla import MLA, LatentAttention, strided_pairs

Selection = Literal["2-norm", "high", "low", "uniform"]


def mean_key(heads: Heads, mixer: LatentAttention) -> Rotary:
    """X-EcoMLA: one rotary key, the mean over heads at strided frequencies; of whole pairs, where Zebra-Llama takes last rows."""
    G, d = heads.groups, heads.width
    pairs = mixer.default_pairs()
    rows = torch.cat([pairs, pairs + d // 2])
    pick = torch.eye(d, dtype=torch.float64)[rows]
    plain = torch.ones(d, dtype=torch.float64)
    plain[rows] = 0
    return Rotary(
        pairs=pairs, rope_key=(pick / G).repeat(1, G), rope_query=pick.expand(heads.count, -1, -1), plain=plain.repeat(G).diag()
    )


def own_pairs(heads: Heads, chosen: Tensor) -> Rotary:
    """MHA2MLA: the pairs `chosen` [R/2, 2] (head, frequency) stay rotary in their own head."""
    G, d = heads.groups, heads.width
    group, pair = chosen.T
    places = torch.cat([group * d + pair, group * d + pair + d // 2])
    rope_key = torch.eye(G * d, dtype=torch.float64)[places]
    queries = rope_key.view(-1, G, d).transpose(0, 1).repeat_interleave(heads.count // G, dim=0)
    plain = torch.ones(G * d, dtype=torch.float64)
    plain[places] = 0
    return Rotary(pairs=pair, rope_key=rope_key, rope_query=queries, plain=plain.diag())


def joint_svd(heads: Heads, rank: int, plain: Tensor) -> dict[str, Tensor]:
    """`down`, `up_keys` and `up_values` of the truncated decomposition of [plain rows of W_k; W_v], fp64.

    Through the small Gram matrix of the rows. Where keys are normed, their rows get the size the norm gives them on
    inputs without a preferred direction.

    Args:
        heads: the base's.
        rank: r.
        plain: as in Rotary, diagonal.
    """
    G, d = heads.groups, heads.width
    kept = torch.cat([plain.diagonal() > 0, torch.ones(G * d, dtype=torch.bool)])
    rows = _rows(heads.weights["k"], heads.weights["v"], heads.norms.get("k"), d)[kept]
    _, vectors = principal((rows @ rows.T).double())
    basis = torch.zeros(2 * G * d, rank, dtype=torch.float64)
    basis[kept, : vectors.shape[1]] = vectors[:, :rank]
    up_keys, up_values = basis.view(2, G, d, rank)
    return {"down": basis.T, "up_keys": up_keys.repeat_interleave(heads.count // G, dim=0), "up_values": up_values}


def joint_spectrum(source: Mapping[str, Tensor], config: Any, rope_dim: int | Literal["full"] | None = None) -> Tensor:
    """What kv_rank cuts: singular values of the [plain rows of W_k; W_v] that method svd decomposes, largest first.

    X-EcoMLA (arXiv 2503.11132) gives a layer the least rank r with sum(s[:r]^2) at a wanted share of sum(s^2).

    Args:
        source: an attention's tensors, names without prefix; k_proj.weight, v_proj.weight and k_norm.weight if any are read.
        config: of the base.
        rope_dim: as in MLA; its strided frequencies of every key head are left out. More than head_dim but not all has no
            such layout.

    Returns:
        [n], fp64, n = the rows that are left: 2 * n_kv * d less n_kv * rope_dim, or n_kv * d at full.

    Raises:
        ConfigError: a rope_dim that the base's heads do not have.
    """
    d, groups = head_dim(config), config.num_key_value_heads
    _, rope = MLA(rope_dim=rope_dim).sizes(config)
    if d < rope < groups * d:
        raise ConfigError(f"rope_dim is {rope}, expected at most head_dim = {d}, or full: method svd has one rotary key")
    plain = torch.ones(groups, 2, d // 2, dtype=torch.bool)
    plain[:, :, strided_pairs(d, rope)] = False
    norm = source["k_norm.weight"] if "k_norm.weight" in source else None
    rows = _rows(source["k_proj.weight"], source["v_proj.weight"], norm, d, torch.float64)
    rows = rows[torch.cat([plain.flatten(), torch.ones(groups * d, dtype=torch.bool)])]
    return torch.linalg.eigvalsh(rows @ rows.T).flip(0).clamp(min=0).sqrt()


def _rows(keys: Tensor, values: Tensor, norm: Tensor | None, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """[W_k; W_v], [2E, D]; normed keys' rows at the size the norm gives them on inputs without a preferred direction."""
    keys, values = keys.to(dtype), values.to(dtype)
    if norm is not None:
        size = keys.unflatten(0, (-1, width)).pow(2).sum((1, 2)) / width
        keys = keys * (norm.to(dtype).repeat(len(size)) * torch.rsqrt(size).repeat_interleave(width))[:, None]
    return torch.cat([keys, values])


def choose_pairs(heads: Heads, mixer: LatentAttention, how: Selection, calibration: LayerCalibration | None) -> Tensor:
    """Which (head, frequency) pairs stay rotary, [R/2, 2], in the order of the mixer's frequencies where those are set.

    `2-norm` scores a pair by the sum over its query heads of E||q|| E||k||, and gives each key head as many as the others
    where that comes out even (MHA2MLA's appendix); the others are a head's highest, lowest or evenly strided frequencies.
    """
    G, half, count = heads.groups, heads.width // 2, mixer.rope // 2
    frequency = torch.arange(half).expand(G, half)
    if how == "2-norm":
        assert calibration is not None
        inputs = calibration.inputs.flatten(0, 1)
        size = [heads.rows(name, inputs).unflatten(-1, (2, half)).norm(dim=-2).double().mean(0) for name in "qk"]
        score = size[0].view(G, -1, half).sum(1) * size[1]
    elif how == "uniform":
        score = torch.zeros(G, half, dtype=torch.float64)
        score.view(-1)[torch.arange(count) * (G * half) // count] = 1
    else:
        score = frequency.double() * (1 if how == "low" else -1)
    if not mixer.chosen:
        # Set frequencies: each pair goes to the best head that has not been given it.
        order = score.argsort(dim=0, descending=True, stable=True)
        pairs = mixer.default_pairs()
        turn = torch.arange(count) // min(count, half)
        return torch.stack([order[turn, pairs], pairs], dim=1)
    if count % G == 0:
        best = score.argsort(dim=1, descending=True, stable=True)[:, : count // G].sort(dim=1).values
        return torch.stack([torch.arange(G)[:, None].expand_as(best).flatten(), best.flatten()], dim=1)
    best = score.flatten().argsort(descending=True, stable=True)[:count].sort().values
    return torch.stack([best // half, best % half], dim=1)
