"""What a run changed: base and last checkpoint compared metric by metric, and item by item where the items are the same."""

import itertools
import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

from hybridize.core import Metric, Report
from hybridize.eval.lookup import family
from hybridize.eval.report.folder import Run
from hybridize.eval.table import compares_with_base, head_of, name_order

BEYOND = 2.0
"""Standard errors of a mean difference beyond which it is called more than noise."""
COSTS = ("bytes", "tokens/s", "x the base")
"""Units of what a model costs; all others say how well it does."""
KEPT = "attention"
# Of what got worse a sentence names so many.
MOST_TOLD = 2


@dataclass(frozen=True, kw_only=True)
class Change:
    """The paired difference of one metric's items, last checkpoint less base."""

    metric: str
    items: int
    mean: float
    stderr: float
    in_unit: bool
    """Whether the items' mean is the metric itself, so that `mean` is in its unit."""
    worse: bool
    """More than BEYOND standard errors worse."""
    better: bool


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One item on which base and last checkpoint do not score alike."""

    metric: str
    prompt: str
    expected: str
    base: tuple[str, float]
    """What it answered and its score."""
    student: tuple[str, float]
    size: float
    """Student less base, positive where the student is better, over the range of both's scores in this metric: -1 to 1."""


def is_cost(metric: Metric) -> bool:
    """Whether a metric says what a model costs, and not how well it does."""
    return metric.unit in COSTS


def with_metrics(reports: dict[str, Report], keep: Any) -> dict[str, Report]:
    """The reports with those metrics alone that `keep(name, metric)` holds for."""
    return {
        column: Report(
            checkpoint=report.checkpoint, checkpoint_hash=report.checkpoint_hash,
            metrics={name: metric for name, metric in report.metrics.items() if keep(name, metric)},
        )
        for column, report in reports.items()
    }  # fmt: skip


def changes(base: Report, final: Report) -> dict[str, Change]:
    """By name, the metrics whose items can be paired; at least two items each."""
    found = {}
    for name in sorted(set(base.samples) & set(final.samples) & set(base.metrics) & set(final.metrics), key=name_order):
        before, after = base.samples[name], final.samples[name]
        same = base.item_hashes.get(name) is not None and base.item_hashes.get(name) == final.item_hashes.get(name)
        if (
            compares_with_base(name)
            or not same
            or len(before) != len(after)
            or len(before) < 2
            or not all(map(math.isfinite, [*before, *after]))
        ):
            continue
        differences = [b - a for a, b in zip(before, after, strict=True)]
        mean = math.fsum(differences) / len(differences)
        spread = math.fsum((d - mean) ** 2 for d in differences) / (len(differences) - 1)
        stderr = math.sqrt(spread / len(differences))
        gain = mean if final.metrics[name].higher_is_better else -mean
        own = math.fsum(after) / len(after)
        found[name] = Change(
            metric=name, items=len(differences), mean=mean, stderr=stderr,
            in_unit=math.isclose(own, final.metrics[name].value, rel_tol=1e-6, abs_tol=1e-9),
            worse=gain < -BEYOND * stderr, better=gain > BEYOND * stderr,
        )  # fmt: skip
    return found


def differences(run: Run) -> dict[str, list[Difference]]:
    """By metric, every item that base and last checkpoint were both asked: the same prompts with the same answers, in order."""
    if run.final is None:
        return {}
    base, final = (run.items.get(column, {}) for column in ("base", list(run.reports)[-1]))
    found = {}
    for name in sorted(set(base) & set(final), key=name_order):
        metric = run.final.metrics.get(name)
        before, after = base[name], final[name]
        alike = len(before) == len(after) and all(
            (a["prompt"], a["expected"]) == (b["prompt"], b["expected"]) for a, b in zip(before, after, strict=True)
        )
        scores = [row["score"] for row in [*before, *after]]
        if metric is None or not alike or not all(map(math.isfinite, scores)):
            continue
        width = (max(scores) - min(scores)) * (1 if metric.higher_is_better else -1) or 1.0
        found[name] = [
            Difference(
                metric=name, prompt=a["prompt"], expected=a["expected"], base=(a["given"], a["score"]),
                student=(b["given"], b["score"]), size=(b["score"] - a["score"]) / width,
            )
            for a, b in zip(before, after, strict=True)
        ]  # fmt: skip
    return found


def largest(found: dict[str, list[Difference]], most: int) -> list[Difference]:
    """The items that differ most, losses and gains alike: the one of each family, the largest first, then each one's second..."""
    families: dict[str, list[Difference]] = {}
    for name, items in found.items():
        families.setdefault(head_of(name), []).extend(item for item in items if item.size)
    # Equal ones stay in the order of the table, where shares come before how likely the answers were.
    ranked = [sorted(items, key=lambda item: -abs(item.size)) for items in families.values()]
    rounds = itertools.zip_longest(*ranked)
    chosen = [item for one in rounds for item in sorted(filter(None, one), key=lambda item: -abs(item.size))]
    return chosen[:most]


def state_share(run: Run) -> tuple[int, float] | None:
    """(tokens, share of the base's cache bytes) at the longest context measured, or else planned."""
    if run.base is not None and run.final is not None:
        shared = sorted(set(family(run.base, "state_bytes")) & set(family(run.final, "state_bytes")))
        if shared and (before := run.base.metrics[f"state_bytes@{shared[-1]}"].value):
            return shared[-1], run.final.metrics[f"state_bytes@{shared[-1]}"].value / before
    if run.plan is not None and run.plan.base_state_bytes:
        tokens = max(run.plan.base_state_bytes, key=int)
        return int(tokens), sum(layer.state_bytes[tokens] for layer in run.plan.layers) / run.plan.base_state_bytes[tokens]
    return None


def decode_speedup(run: Run) -> tuple[int, float] | None:
    """(tokens, decode speed over the base's measured in turns with it) at the longest context, of one sequence."""
    found = {}
    if run.final is not None:
        names = family(run.final, "decode_speedup")
        found = {tokens: run.final.metrics[name].value for tokens, name in names.items()}
    if run.bench is not None:
        rows = [row for row in run.bench["rows"] if row["batch"] == 1 and "decode_speedup" in row]
        found |= {row["context"]: row["decode_speedup"] for row in rows}
    return max(found.items()) if found else None


def sentence(run: Run) -> str:
    """In one sentence what was made, what it costs and what it lost; of what is known."""
    made, costs = _made(run), _costs(run)
    parts = [part for part in (made + (": " if made and costs else "") + " and ".join(costs), _lost(run)) if part]
    text = "; ".join(parts)
    return text[:1].upper() + text[1:] + "." if text else ""


def _made(run: Run) -> str:
    if run.plan is None:
        return ""
    names = Counter(layer.mixer["name"] for layer in run.plan.layers if layer.mixer["name"] != KEPT)
    where = f"of the base's {len(run.plan.layers)} layers"
    if not names:
        return f"none {where} was changed"
    (name, count), *others = names.most_common()
    return " and ".join([f"{count} {where} became {name}", *(f"{count} {name}" for name, count in others)])


def _costs(run: Run) -> list[str]:
    found = []
    if (state := state_share(run)) is not None:
        found.append(f"the hybrid's cache of {state[0]:,} tokens takes {state[1]:.1%} of the base's")
    if (speed := decode_speedup(run)) is not None:
        found.append(f"it decodes at {speed[1]:.2f}x the base's speed after {speed[0]:,} tokens")
    return found


def _lost(run: Run) -> str:
    if run.base is None or run.final is None:
        return ""
    parts = []
    shared = [name for name in sorted(set(run.base.metrics) & set(run.final.metrics), key=name_order)]
    quality = [name for name in shared if not is_cost(run.final.metrics[name]) and not compares_with_base(name)]
    if quality:
        # The first in the table's order, at its longest length.
        headline = [name for name in quality if head_of(name) == head_of(quality[0]) and "_nll@" not in name][-1]
        before, after = run.base.metrics[headline].value, run.final.metrics[headline].value
        ratio = f" ({after / before - 1:+.1%})" if before else ""
        parts.append(f"{headline} went from {before:.4g} to {after:.4g}{ratio}")
    paired = changes(run.base, run.final)
    if paired:
        worse = [one for one in paired.values() if one.worse]
        # Shares of right answers can be told from each other by size; one length of each is enough to say.
        shares = [one for one in worse if one.in_unit and run.final.metrics[one.metric].higher_is_better]
        told: list[str] = []
        for one in sorted(shares, key=lambda one: -abs(one.mean)):
            if len(told) < MOST_TOLD and head_of(one.metric) not in map(head_of, told):
                told.append(one.metric)
        share = "all" if len(worse) == len(paired) else f"{len(worse) or 'none'} of"
        count = f"{share} {len(paired)} metrics compared item by item got worse beyond two standard errors"
        named = (
            f"{name} ({run.base.metrics[name].value:.4g} to {run.final.metrics[name].value:.4g})" for name in told
        )  # fmt: skip
        parts.append(count + (f", most of all {' and '.join(named)}" if told else ""))
    return ", and ".join(parts)
