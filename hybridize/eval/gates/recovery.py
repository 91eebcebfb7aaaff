"""How much of the baseline's accuracy is left, judged by the lower end of a confidence interval."""

import zlib
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from hybridize.core import GateResult, Report
from hybridize.errors import ConfigError
from hybridize.eval.lookup import resolve

RESAMPLES = 4000
# Below this many items the bootstrap's interval is not worth its name.
FEWEST_ITEMS = 30
# A task stands for one of these, the first it has.
TASK_METRICS = ("acc_norm", "acc", "exact_match", "exact_match,strict-match")


@dataclass(frozen=True, kw_only=True)
class Recovery:
    """(value - chance) / (baseline - chance) must be at least `min` at the lower confidence bound, for every metric.

    The bound is of a paired bootstrap over the items, which report and baseline must share (Efron and Tibshirani, 1993,
    chapter 13). The point estimate alone would pass a coin's toss.
    """

    tasks: list[str] = field(default_factory=list)
    """lm-eval tasks, each by its acc_norm, acc or exact_match (the first there is); or names of metrics."""
    metrics: list[str] = field(default_factory=list)
    """Names of metrics, such as "arc_easy/acc" or "recall@8"."""
    min: float
    confidence: float = 0.95
    """One-sided."""
    chance: float | dict[str, float] = 0.0
    """What guessing gives: for all, or by the names used in `tasks` and `metrics` (0 for those not there)."""

    rule: ClassVar[tuple[str, ...]] = ("tasks", "min")

    def __post_init__(self) -> None:
        if not self.tasks and not self.metrics:
            raise ConfigError("tasks and metrics are empty, expected at least one name")
        if not 0.5 <= self.confidence < 1:
            raise ConfigError(f"confidence is {self.confidence}, expected at least 0.5 and below 1")
        names = {*self.tasks, *self.metrics}
        if isinstance(self.chance, dict) and (unknown := sorted(set(self.chance) - names)):
            raise ConfigError(f"chance names {unknown[0]!r}, expected one of {', '.join(sorted(names))}")

    def __call__(self, report: Report, baseline: Report) -> GateResult:
        """Judge; `value` is the worst lower bound, None when a metric cannot be decided (which fails).

        Raises:
            ConfigError: a metric is missing, better when low, without per-item scores, or of other items.
        """
        bounds: dict[str, float | None] = {}
        details = []
        for asked in [*self.tasks, *self.metrics]:
            name = self._resolve(asked, report, baseline)
            chance = self.chance.get(asked, 0.0) if isinstance(self.chance, dict) else self.chance
            bounds[name], detail = self._judge(name, chance, report, baseline)
            details.append(detail)
        decided = [bound for bound in bounds.values() if bound is not None]
        worst = min(decided) if len(decided) == len(bounds) else None
        passed = worst is not None and worst >= self.min
        detail = f"{'; '.join(details)}; the limit is {self.min:g} at the lower {self.confidence:.0%} bound."
        asked = ",".join([*self.tasks, *self.metrics])
        return GateResult(name=f"recovery {asked}", passed=passed, value=worst, limit=self.min, detail=detail)

    def _resolve(self, name: str, report: Report, baseline: Report) -> str:
        if name in self.tasks:
            for metric in TASK_METRICS:
                if f"{name}/{metric}" in report.metrics:
                    name = f"{name}/{metric}"
                    break
        name = resolve(name, {"report": report, "baseline": baseline})
        if not report.metrics[name].higher_is_better:
            raise ConfigError(f"gate 'recovery': {name} is better when low; use max_ratio")
        for word, one in (("report", report), ("baseline", baseline)):
            if name not in one.samples:
                raise ConfigError(f"gate 'recovery': the {word} has no per-item scores of {name}; use min_value")
        hashes = [one.item_hashes.get(name) for one in (report, baseline)]
        if hashes[0] is None or hashes[0] != hashes[1] or len(report.samples[name]) != len(baseline.samples[name]):
            raise ConfigError(f"gate 'recovery': {name} was measured on other items in the baseline; measure both alike")
        return name

    def _judge(self, name: str, chance: float, report: Report, baseline: Report) -> tuple[float | None, str]:
        ours, theirs = np.array(report.samples[name]) - chance, np.array(baseline.samples[name]) - chance
        count = len(ours)
        if count < FEWEST_ITEMS:
            return None, f"{name} has {count} items, too few to decide (at least {FEWEST_ITEMS} are needed)"
        bound, base_bound = paired_bounds(ours, theirs, 1 - self.confidence, seed=zlib.crc32(name.encode()))
        if not base_bound > 0:
            return None, f"{name} of the baseline is not above chance ({chance:g}), so there is nothing to recover"
        ratio = ours.mean() / theirs.mean()
        return bound, f"{name} recovers {ratio:.6g} of the baseline, at least {bound:.6g} ({count} items)"


def paired_bounds(ours: np.ndarray, theirs: np.ndarray, quantile: float, seed: int) -> tuple[float, float]:
    """Lower bounds of mean(ours) / mean(theirs) and of mean(theirs), from the same resampled items for both.

    Args:
        ours: scores less chance, [items], fp64.
        theirs: the baseline's, of the same items in the same order.
        quantile: share of the bootstrap's mass below the bounds.
        seed: of the resampling.

    Returns:
        (bound of the ratio, -inf where the baseline vanishes; bound of the baseline's mean).
    """
    generator = np.random.default_rng(seed)
    count = len(ours)
    both = np.stack([ours, theirs], axis=1)
    # A few resamples at a time, so that memory stays small for any number of items.
    step = max(1, 1_000_000 // count)
    sizes = [min(step, RESAMPLES - done) for done in range(0, RESAMPLES, step)]
    means = np.concatenate([both[generator.integers(count, size=(size, count))].mean(axis=1) for size in sizes])
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(means[:, 1] > 0, means[:, 0] / means[:, 1], -np.inf)
    lowest = np.quantile(ratio, quantile, method="inverted_cdf")
    return float(lowest), float(np.quantile(means[:, 1], quantile))
