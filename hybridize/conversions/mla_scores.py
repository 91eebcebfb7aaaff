"""Layer scores of latent attention: the spectrum that its rank cuts, and its rank from scores."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from hybridize.conversions.mla_published import joint_spectrum
from hybridize.conversions.ranks import request_of, rows_for, step_for
from hybridize.conversions.scores.energy import least_rank
from hybridize.core import Scores
from hybridize.errors import ConfigError
from hybridize.mixers.mla import MLA, LatentAttention
from hybridize.registry import make

# X-EcoMLA rounds ranks up to it.
MULTIPLE = 8


def spectra(source: Mapping[str, Tensor], mixer: LatentAttention, config: Any) -> dict[str, Tensor]:
    """Squared singular values of what method svd truncates, under `kv`, fp64."""
    return {"kv": joint_spectrum(source, config, mixer.rope).square()}


def spectra_of(options: MLA, config: Any) -> dict[str, Any]:
    """The options that the spectrum depends on, settled for a base."""
    return {"rope_dim": options.sizes(config)[1]}


def from_scores(spec: dict[str, Any], layers: list[int], config: Any, scores: Scores | None) -> list[dict[str, Any]]:
    """Each layer's spec with `kv_rank` in numbers, where it is {energy: share} (X-EcoMLA's dynamic rank).

    Arguments and errors as in low_rank_scores.from_scores; and a ConfigError for a method that truncates something else.
    """
    request = request_of(spec.get("kv_rank"), "kv_rank", ("energy",))
    if request is None:
        return [spec] * len(layers)
    if spec.get("method") != "svd":
        raise ConfigError("kv_rank by energy follows the spectrum that method svd truncates. Set method: svd, or give a number")
    options = make(MLA, {"rope_dim": spec["rope_dim"]} if "rope_dim" in spec else {}, "mla")
    rows = rows_for(scores, request.metric, layers, ("kv",), {"name": "mla", **spectra_of(options, config)})
    full, _ = MLA(kv_rank="full", rope_dim=options.rope_dim).sizes(config)
    multiple = request.multiple or step_for(full, MULTIPLE)
    return [{**spec, "kv_rank": least_rank(row.values["kv"], request.share, multiple, full)} for row in rows]
