"""Layer scores of low-rank keys and values: which spectra its ranks cut, and its ranks from scores."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hybridize.conversions.ranks import request_of, rows_for, share_out, step_for
from hybridize.conversions.scores.energy import least_rank
from hybridize.core import Scores
from hybridize.families import head_dim
from hybridize.mixers.low_rank_kv import LowRankAttention, LowRankKV
from hybridize.registry import make

PARTS = ("k_proj", "v_proj")
# Palu rounds ranks to it.
MULTIPLE = 32


def spectra(source: Mapping[str, Tensor], mixer: LowRankAttention, config: Any) -> dict[str, Tensor]:
    """Squared singular values of k_proj and v_proj, each group's largest added up, then the second ones and so on, fp64.

    Ranks are the same in all groups of a layer, hence the sum.
    """
    width = mixer.kv_heads // mixer.groups * mixer.width
    found = {}
    for name in PARTS:
        groups = source[f"{name}.weight"].double().unflatten(0, (-1, width))
        short = groups.transpose(1, 2) if width > groups.shape[2] else groups
        found[name] = torch.linalg.eigvalsh(short @ short.transpose(1, 2)).flip(-1).sum(0)
    return found


def spectra_of(options: LowRankKV, config: Any) -> dict[str, Any]:
    """The options that the spectra depend on, settled for a base."""
    return {"group_heads": options.heads_per_group(config)}


def from_scores(spec: dict[str, Any], layers: list[int], config: Any, scores: Scores | None) -> list[dict[str, Any]]:
    """Each layer's spec with `rank` and `v_share` in numbers, where `rank` is {energy: share} or {fisher: share}.

    energy: the least ranks of keys and of values that reach the share of each layer's energy. fisher: the share of all ranks
    of these layers, in proportion to the scores (Palu, section 3.3). Where the spec has a v_share it stays, and scores decide
    a layer's mean rank alone.

    Args:
        spec: of these layers, as the recipe gives it.
        layers: their numbers.
        config: of the base.
        scores: of the base, or None.

    Raises:
        ConfigError: a request that cannot be followed, or no scores for it.
    """
    request = request_of(spec.get("rank"), "rank", ("energy", "fisher"))
    if request is None:
        return [spec] * len(layers)
    options = make(LowRankKV, {key: spec[key] for key in ("v_share", "group_heads") if key in spec}, "low_rank_kv")
    full = min(options.heads_per_group(config) * head_dim(config), config.hidden_size)
    multiple = request.multiple or step_for(full, MULTIPLE)
    by_energy = request.metric == "energy"
    candidate = {"name": "low_rank_kv", **spectra_of(options, config)} if by_energy else None
    values = [row.values[part] for row in rows_for(scores, request.metric, layers, PARTS, candidate) for part in PARTS]
    if by_energy:
        flat = [least_rank(value, request.share, multiple, full) for value in values]
    else:
        flat = share_out([float(value) for value in values], full, request.share, multiple)  # pyright: ignore[reportArgumentType]
    pairs = _evened(list(zip(flat[::2], flat[1::2], strict=True)), full, by_energy)
    # Six digits give the same whole number of dimensions back.
    return [{"v_share": round(v / (k + v), 6), **spec, "rank": (k + v) // 2} for k, v in pairs]


def _evened(pairs: list[tuple[int, int]], full: int, up: bool) -> list[tuple[int, int]]:
    """Pairs whose sums are even, as `rank` is their mean: of odd ones, each first loses a dimension and each second gains one.

    With `up` all of them gain.
    """
    made, gains = [], False
    for keys, values in pairs:
        if (keys + values) % 2:
            if up or gains:
                keys, values = (keys, values + 1) if values < full else (keys + 1, values)
            else:
                keys, values = (keys - 1, values) if keys > 1 else (keys, values - 1)
            gains = not gains
        made.append((keys, values))
    return made
