"""How much of what a rank truncates lies in its first directions, from the weights alone.

A candidate's conversion says what its ranks truncate (`spectra`: squared singular values by part). Kept of each part is the
least rank that reaches each share of SHARES: a few hundred numbers whatever the width.
Source: X-EcoMLA (arXiv 2503.11132), dynamic rank: the least r with sum_{i<=r} s_i^2 >= delta sum_i s_i^2.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hybridize.checkpoint import Checkpoint
from hybridize.conversions.plan import build_mixer, split_options
from hybridize.conversions.table import CONVERSIONS
from hybridize.core import LayerScore
from hybridize.errors import ConfigError
from hybridize.shards import OnDemand

SHARES = (*(round(0.005 * step, 3) for step in range(1, 200)), 0.996, 0.997, 0.998, 0.999)
"""Shares of the energy at which ranks are kept."""
SHOWN = (0.5, 0.9, 0.99)


@dataclass(frozen=True, kw_only=True)
class Energy:
    """Ranks that reach shares of the energy of what each candidate truncates."""

    needs_text = False

    def __call__(
        self, base: Checkpoint, text: Any, candidates: list[dict[str, Any]] | None, progress: Callable[[int, int], None]
    ) -> tuple[LayerScore, ...]:
        """One row for each layer and candidate; values are ranks, one for each of SHARES.

        Args:
            base: the validated base.
            text: not used.
            candidates: {"name": mixer, **options}; None is every mixer with ranks, at its defaults.
            progress: called with (layers done, layers).

        Raises:
            ConfigError: a candidate has no rank that truncates anything, or does not fit the base.

        Memory: the attention of one layer, and one fp64 matrix of its keys and values against themselves.
        """
        if candidates is None:
            candidates = [{"name": name} for name in CONVERSIONS.names() if hasattr(CONVERSIONS.load(name), "spectra")]
        ranked = []
        for spec in candidates:
            options, conversion = split_options(spec, "energy")
            if not hasattr(conversion, "spectra"):
                known = [name for name in CONVERSIONS.names() if hasattr(CONVERSIONS.load(name), "spectra")]
                raise ConfigError(f"energy: mixer {spec['name']!r} truncates nothing. It is for {', '.join(known)}")
            ranked.append((spec["name"], options, conversion))
        rows, count = [], base.config.num_hidden_layers
        for index in range(count):
            prefix = f"model.layers.{index}.self_attn."
            places = {name.removeprefix(prefix): info for name, info in base.tensors.items() if name.startswith(prefix)}
            done: list[dict[str, Any]] = []
            for name, options, conversion in ranked:
                candidate = {"name": name, **conversion.spectra_of(options, base.config)}
                if candidate in done:
                    continue
                done.append(candidate)
                found = conversion.spectra(OnDemand(places), build_mixer(options, base.config, index), base.config)
                values: dict[str, Any] = {part: ranks_reaching(spectrum) for part, spectrum in found.items()}
                rows.append(LayerScore(layer=index, candidate=candidate, values=values))
            progress(index + 1, count)
        return tuple(rows)

    def shown(self, row: LayerScore) -> dict[str, str]:
        """The ranks at SHOWN."""
        places = [SHARES.index(share) for share in SHOWN]
        title = "ranks for " + ", ".join(f"{share:.0%}" for share in SHOWN)
        parts = (f"{part} " + ", ".join(str(value[place]) for place in places) for part, value in row.values.items())  # pyright: ignore[reportIndexIssue]
        return {title: "; ".join(parts)}


def ranks_reaching(spectrum: Tensor) -> list[int]:
    """The least rank that reaches each of SHARES, at least 1.

    Args:
        spectrum: squared singular values, largest first, [n] fp64.
    """
    reached = spectrum.clamp(min=0).cumsum(0)
    if float(reached[-1]) <= 0:
        return [1] * len(SHARES)
    # Just below, so that a share reached exactly is not missed by a rounding.
    wanted = torch.tensor(SHARES, dtype=torch.float64) * (1 - 1e-12)
    return (torch.searchsorted(reached / reached[-1], wanted) + 1).clamp(max=len(spectrum)).tolist()


def least_rank(ranks: Any, share: float, multiple: int, size: int) -> int:
    """The rank that reaches a share of the energy, rounded up to a whole multiple, at most `size`.

    Args:
        ranks: of a row, one for each of SHARES. A share between two of these takes the higher one.
        share: up to the last of SHARES.
        multiple: what the rank is a multiple of; the full size is allowed whether it is one or not.
        size: full rank.

    Raises:
        ConfigError: a share beyond, or ranks that are no such list or beyond the full rank.
    """
    if share > SHARES[-1]:
        raise ConfigError(f"energy is {share}, expected at most {SHARES[-1]}. Use less, or full")
    fits = isinstance(ranks, (list, tuple)) and len(ranks) == len(SHARES)
    if not fits or not all(type(rank) is int and 1 <= rank <= size for rank in ranks):
        raise ConfigError(f"scores of metric energy: expected {len(SHARES)} ranks from 1 to {size}. Score again")
    rank = ranks[next(place for place, known in enumerate(SHARES) if known >= share - 1e-9)]
    return min(size, -(-rank // multiple) * multiple)
