"""Paired comparison: the items that two reports share, and confidence bounds of what was kept or lost on them.

Both bounds are closed forms, so that a verdict does not depend on a seed. What they hold is measured by bench/gates.py.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import numpy as np

from hybridize.core import Report
from hybridize.errors import ConfigError

# Below this many items neither bound is worth its name.
FEWEST_ITEMS = 30


class OtherItemsError(ConfigError):
    """Report and baseline were measured on different items."""


@dataclass(frozen=True, kw_only=True)
class Judged:
    """What the items say of one metric."""

    name: str
    state: Literal["held", "lost", "undecided", "says nothing"]
    bound: float | None
    """The end of the interval that the limit is held against; None where there is no interval."""
    detail: str


def check_confidence(confidence: float) -> None:
    """Raise ConfigError unless a one-sided bound can have this confidence."""
    if not 0.5 < confidence < 1:
        raise ConfigError(f"confidence is {confidence}, expected above 0.5 and below 1")


def paired(gate: str, name: str, report: Report, baseline: Report) -> tuple[np.ndarray, np.ndarray]:
    """Per-item scores of a metric in both reports, [items] each, fp64, in one order.

    Raises:
        ConfigError: one of them has no per-item scores.
        OtherItemsError: they are of different items.
    """
    for word, one in (("report", report), ("baseline", baseline)):
        if name not in one.samples:
            raise ConfigError(f"gate {gate!r}: the {word} has no per-item scores of {name}; use max_ratio or min_value")
    hashes = [one.item_hashes.get(name) for one in (report, baseline)]
    if hashes[0] is None or hashes[0] != hashes[1] or len(report.samples[name]) != len(baseline.samples[name]):
        raise OtherItemsError(f"gate {gate!r}: {name} was measured on other items in the baseline; measure both alike")
    ours, theirs = (np.array(one.samples[name], dtype=np.float64) for one in (report, baseline))
    for word, scores in (("report", ours), ("baseline", theirs)):
        if not np.isfinite(scores).all():
            raise ConfigError(f"gate {gate!r}: {name} of the {word} has per-item scores that are not finite; measure again")
    return ours, theirs


def ratio_bounds(ours: np.ndarray, theirs: np.ndarray, chance: float, confidence: float) -> tuple[float, float] | None:
    """Lower and upper bound, one-sided each, of mean(ours) / mean(theirs), both less chance.

    Fieller's interval for a ratio of means (J. R. Statist. Soc. B 16, 1954), with two items added that stand for what was
    not seen: one only the first gets right, one only the second (Bonett and Price, J. Educ. Behav. Stat. 37, 2012, for the
    difference of paired proportions). Without them two that agree on every item would be equal beyond doubt after any
    number of items.

    Args:
        ours: scores less chance, [items], fp64.
        theirs: of the same items in the same order.
        chance: what was taken off, so that scores run from -chance to 1 - chance where the items show no others.
        confidence: of each bound.

    Returns:
        None where `theirs` is not above chance at this confidence: then no ratio is too large or too small.
    """
    low = min(-chance, ours.min(), theirs.min())
    high = max(1 - chance, ours.max(), theirs.max())
    a, b = np.append(ours, [high, low]), np.append(theirs, [low, high])
    z = NormalDist().inv_cdf(confidence)
    (aa, ab), (_, bb) = np.cov(a, b) * z * z / len(a)
    mean_a, mean_b = a.mean(), b.mean()
    lead, middle, last = mean_b**2 - bb, mean_a * mean_b - ab, mean_a**2 - aa
    if not (lead > 0 and mean_b > 0):
        return None
    root = math.sqrt(max(0.0, middle**2 - lead * last))
    return float((middle - root) / lead), float((middle + root) / lead)


def mean_bounds(values: np.ndarray, confidence: float) -> tuple[float, float]:
    """Lower and upper bound, one-sided each, of a mean: Student's, corrected for skewness (Johnson, JASA 73, 1978).

    What a conversion loses is skewed: most items lose little, a few much.

    Args:
        values: [items], fp64, at least two.
        confidence: of each bound.
    """
    count = len(values)
    spread = values.std(ddof=1)
    if spread == 0:
        return float(values[0]), float(values[0])
    mean = values.mean()
    t = student_quantile(confidence, count - 1)
    skew = ((values - mean) ** 3).mean() / (6 * spread**2 * count) * (1 + 2 * t * t)
    reach = t * spread / math.sqrt(count)
    return float(min(mean, mean + skew - reach)), float(max(mean, mean + skew + reach))


def student_quantile(confidence: float, freedom: int) -> float:
    """Quantile of Student's t by its expansion in 1 / freedom (Abramowitz and Stegun 26.7.5), good to 0.002 from 4 up."""
    z = NormalDist().inv_cdf(confidence)
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3


def judge_ratio(name: str, ours: np.ndarray, theirs: np.ndarray, chance: float, least: float, confidence: float) -> Judged:
    """Whether at least `least` of what the baseline has above chance was kept, as `ratio_bounds` tells it of the same scores.

    It says nothing where the baseline has so little above chance that the baseline itself would not be told to keep it.
    """
    count = len(ours)
    right = np.full(count, 1 - chance)
    perfect = ratio_bounds(right, right, chance, confidence) if count >= FEWEST_ITEMS else None
    if perfect is None or perfect[0] < least < 1:
        # What two that are right on every item are shown to keep is 1 - z sqrt(2) / (items (1 - chance)), nearly.
        reach = NormalDist().inv_cdf(confidence) * math.sqrt(2) / (1 - chance)
        needed = max(FEWEST_ITEMS, math.ceil(reach / (1 - least)) if least < 1 else 0)
        detail = f"{name} has {count} items, too few to decide (at least {needed} are needed)"
        return Judged(name=name, state="undecided", bound=None, detail=detail)
    bounds, own = ratio_bounds(ours, theirs, chance, confidence), ratio_bounds(theirs, theirs, chance, confidence)
    if bounds is None or own is None:
        detail = f"{name} of the baseline is not above chance ({theirs.mean():.6g} from it), so there is nothing to recover"
        return Judged(name=name, state="says nothing", bound=None, detail=detail)
    if own[0] < least < 1:
        detail = (
            f"{name} of the baseline is so little above chance ({theirs.mean():.6g}) that of {count} items "
            f"the baseline itself would be shown to recover {own[0]:.6g}"
        )
        return Judged(name=name, state="says nothing", bound=None, detail=detail)
    low, high = bounds
    value = ours.mean() / theirs.mean()
    kept = f"{name} recovers {value:.6g} of the baseline"
    if low >= least:
        return Judged(name=name, state="held", bound=low, detail=f"{kept}, at least {low:.6g} ({count} items)")
    if high < least:
        return Judged(name=name, state="lost", bound=low, detail=f"{kept}, at most {high:.6g} ({count} items)")
    doubt = _too_few(count, (high - low) / 2, 1 - least)
    return Judged(name=name, state="undecided", bound=low, detail=f"{kept}, between {low:.6g} and {high:.6g}: {doubt}")


def judge_rise(name: str, ours: np.ndarray, theirs: np.ndarray, most: float, confidence: float) -> Judged:
    """Whether the mean of `ours - theirs` is at most `most`, as `mean_bounds` tells it."""
    count = len(ours)
    if count < FEWEST_ITEMS:
        detail = f"{name} has {count} items, too few to decide (at least {FEWEST_ITEMS} are needed)"
        return Judged(name=name, state="undecided", bound=None, detail=detail)
    change = ours - theirs
    low, high = mean_bounds(change, confidence)
    rose = f"{name} rises by {change.mean():.6g}"
    if high <= most:
        return Judged(name=name, state="held", bound=high, detail=f"{rose}, at most {high:.6g} ({count} items)")
    if low > most:
        return Judged(name=name, state="lost", bound=high, detail=f"{rose}, at least {low:.6g} ({count} items)")
    doubt = _too_few(count, (high - low) / 2, most)
    return Judged(name=name, state="undecided", bound=high, detail=f"{rose}, between {low:.6g} and {high:.6g}: {doubt}")


def summary(judged: list[Judged], closest: Callable[[list[float]], float]) -> str:
    """The details that matter: of all that do not hold, and of the one that holds by the least.

    Args:
        judged: metrics held against one limit.
        closest: min or max, which of their bounds is the nearest to the limit.
    """
    parts = [one.detail for one in judged if one.state in ("lost", "undecided")]
    if held := [one for one in judged if one.state == "held"]:
        bound = closest([one.bound for one in held if one.bound is not None])
        more = f", and {len(held) - 1} no nearer to the limit" if len(held) > 1 else ""
        parts.append(next(one.detail for one in held if one.bound == bound) + more)
    silent = [one for one in judged if one.state == "says nothing"]
    if len(silent) > 2:
        parts.append(f"{', '.join(one.name for one in silent)} say nothing, since the baseline is near chance or below in them")
    else:
        parts += [f"{one.detail}: this says nothing" for one in silent]
    return "; ".join(parts)


def _too_few(count: int, reach: float, room: float) -> str:
    """What to say of an interval of half-width `reach` that holds the limit, `room` away from no change at all.

    Both errors stay at 5 % where the room is twice the reach, which falls with the root of the number of items.
    """
    needed = math.ceil(count * (2 * reach / room) ** 2) if room > 0 else count
    more = f"about {needed} would tell no loss from the limit" if needed > count else "more would be needed so near the limit"
    return f"{count} items are too few to decide, {more}"
