"""Ranks from layer scores: what a recipe may ask for, and the whole numbers that a plan holds."""

import math
from dataclasses import dataclass
from typing import Any

from hybridize.conversions.scores import SCORES
from hybridize.core import LayerScore, Scores
from hybridize.errors import ConfigError
from hybridize.registry import suggest


@dataclass(frozen=True, kw_only=True)
class Request:
    """A rank that follows scores: {metric: share}, perhaps with `multiple`."""

    metric: str
    share: float
    multiple: int | None
    """Ranks are whole multiples of it; None is what suits the width."""


def is_request(value: Any) -> bool:
    """Whether an option's value asks for layer scores; a mixer inside a mixer is a mapping too, with a name."""
    return isinstance(value, dict) and "name" not in value


def request_of(value: Any, option: str, metrics: tuple[str, ...]) -> Request | None:
    """The request in an option's value, None where it is an ordinary one.

    Args:
        value: of the option, as the recipe gives it.
        option: its name, for messages.
        metrics: those it can follow.

    Raises:
        ConfigError: a metric it cannot follow, a share out of range, a bad multiple, or an unknown key.
    """
    if not is_request(value):
        return None
    named = [key for key in value if key != "multiple"]
    if len(named) != 1:
        example = f"{{{metrics[0]}: 0.5}}"
        raise ConfigError(f"{option} is {value!r}, expected one metric with a share, such as {example}")
    metric, share, multiple = named[0], value[named[0]], value.get("multiple")
    if metric not in metrics:
        raise ConfigError(f"{option} cannot follow {metric!r}. {suggest(str(metric), [*metrics, 'multiple'])}")
    if type(share) not in (int, float) or not 0 < share < 1:
        raise ConfigError(f"{option}.{metric} is {share!r}, expected a share between 0 and 1")
    if "multiple" in value and (type(multiple) is not int or multiple < 1):
        raise ConfigError(f"{option}.multiple is {multiple!r}, expected an integer >= 1")
    return Request(metric=metric, share=float(share), multiple=multiple)


def rows_for(
    scores: Scores | None, metric: str, layers: list[int], parts: tuple[str, ...], candidate: dict[str, Any] | None
) -> list[LayerScore]:
    """A metric's row of each layer.

    Args:
        scores: of the base, or None.
        metric: its name.
        layers: numbers of the layers.
        parts: that each row must have.
        candidate: what the score is about, None for the base's own layer.

    Raises:
        ConfigError: no scores, or not these; the message says which command makes them.
    """
    text = " --data TEXT" if SCORES.load(metric).needs_text else ""
    command = f"hybridize score BASE --metric {metric}{text} --out scores.json"
    if scores is None or (table := scores.table(metric)) is None:
        have = f" (have {', '.join(t.metric['name'] for t in scores.tables)})" if scores is not None else ""
        raise ConfigError(f"needs layer scores of metric {metric}{have}: {command}, then --scores scores.json")
    found = {row.layer: row for row in table.rows if row.candidate == candidate}
    for layer in layers:
        if layer not in found or not set(parts) <= set(found[layer].values):
            about = f" for {candidate}" if candidate is not None else ""
            recipe = " --recipe RECIPE" if candidate is not None else ""
            raise ConfigError(f"scores of metric {metric} have none{about} in layer {layer}. Score again: {command}{recipe}")
    return [found[layer] for layer in layers]


def step_for(width: int, published: int) -> int:
    """What ranks below `width` are multiples of: the published number, less where a sixteenth of the width is less."""
    return min(published, 1 << max(0, int(math.log2(max(1, width / 16)))))


def share_out(weights: list[float], size: int, share: float, multiple: int) -> list[int]:
    """Ranks that share a total in proportion to weights, as Palu does (section 3.3; palu/rank_search.py).

    Each is a whole multiple, at least one and at most the full size. What the full ones leave goes to the others in turn,
    those first that lost most by rounding. Palu rounds at the end, so that its total drifts; here it holds.

    Args:
        weights: one for each rank, >= 0.
        size: full rank of each.
        share: of all full ranks together, between 0 and 1.
        multiple: what ranks are multiples of; the full size is allowed whether it is one or not.

    Raises:
        ConfigError: the share is too little for one multiple each.
    """
    most = -(-size // multiple)
    total = math.floor(share * size * len(weights) / multiple + 1e-9)
    if total < len(weights):
        raise ConfigError(f"share {share} of {size} dimensions is less than {multiple} each. Use a larger share or multiple: 1")
    whole = sum(weights)
    targets = [total * (weight / whole if whole > 0 else 1 / len(weights)) for weight in weights]
    chosen = [max(1, min(most, math.floor(target + 1e-9))) for target in targets]
    order = sorted(range(len(weights)), key=lambda i: (chosen[i] - targets[i], i))
    while (left := total - sum(chosen)) > 0 and min(chosen) < most:
        for i in [i for i in order if chosen[i] < most][:left]:
            chosen[i] += 1
    while sum(chosen) > total:
        # Those raised to one multiple were paid for by nobody yet.
        chosen[max(range(len(weights)), key=lambda i: (chosen[i] > 1, chosen[i] - targets[i], chosen[i]))] -= 1
    return [min(size, count * multiple) for count in chosen]
