"""How much of the baseline's accuracy is left, judged by the lower end of a confidence interval."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np

from hybridize.core import GateResult, Report
from hybridize.errors import ConfigError
from hybridize.eval.gates.paired import check_confidence, judge_ratio, paired, summary
from hybridize.eval.lookup import resolve_all

# A task stands for one of these, the first it has.
TASK_METRICS = ("acc_norm", "acc", "exact_match", "exact_match,strict-match")


@dataclass(frozen=True, kw_only=True)
class Recovery:
    """(value - chance) / (baseline - chance) must be at least `min` at the lower confidence bound, for every metric.

    The bound is paired, over the items that report and baseline share (`gates/paired.py`). The point estimate alone would
    pass a coin's toss.
    """

    tasks: list[str] = field(default_factory=list)
    """lm-eval tasks, each by its acc_norm, acc or exact_match (the first there is); or names of metrics."""
    metrics: list[str] = field(default_factory=list)
    """Names of metrics, such as "arc_easy/acc" or "recall@8"; "needle@*" is at every length that both have."""
    min: float
    """Share of what the baseline has above chance."""
    confidence: float = 0.95
    """One-sided."""
    chance: float | dict[str, float] = 0.0
    """What guessing gives: for all, or by the names used in `tasks` and `metrics` (0 for those not there)."""
    together: bool = False
    """All items as one set, each less its own chance: where each metric alone has too few."""
    at_chance: Literal["fail", "pass"] = "fail"
    """What becomes of a metric that the baseline is so near chance in that the items can say nothing of it."""

    rule: ClassVar[tuple[str, ...]] = ("tasks", "min")
    compares: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.tasks and not self.metrics:
            raise ConfigError("tasks and metrics are empty, expected at least one name")
        check_confidence(self.confidence)
        names = {*self.tasks, *self.metrics}
        if isinstance(self.chance, dict) and (unknown := sorted(set(self.chance) - names)):
            raise ConfigError(f"chance names {unknown[0]!r}, expected one of {', '.join(sorted(names))}")

    def __call__(self, report: Report, baseline: Report) -> GateResult:
        """Judge; `value` is the worst lower bound, None when a metric has none.

        Raises:
            ConfigError: a metric is missing, better when low, without per-item scores, or of other items.
        """
        sets = []
        for asked in [*self.tasks, *self.metrics]:
            chance = self.chance.get(asked, 0.0) if isinstance(self.chance, dict) else self.chance
            for name in self._resolve(asked, report, baseline):
                ours, theirs = paired("recovery", name, report, baseline)
                sets.append((name, ours - chance, theirs - chance, chance))
        if self.together:
            names, ours, theirs, chances = zip(*sets, strict=True)
            sets = [(", ".join(names), np.concatenate(ours), np.concatenate(theirs), max(chances))]
        found = [judge_ratio(*one, self.min, self.confidence) for one in sets]
        if self.at_chance == "pass":
            counted = [judged for judged in found if judged.state != "says nothing"]
        else:
            counted = found
        bounds = [judged.bound for judged in counted if judged.bound is not None]
        detail = f"{summary(found, min)}; the limit is {self.min:g} at the lower {self.confidence:.0%} bound."
        return GateResult(
            name=f"recovery {','.join([*self.tasks, *self.metrics])}",
            passed=all(judged.state == "held" for judged in counted),
            value=min(bounds) if bounds and len(bounds) == len(counted) else None,
            limit=self.min, detail=detail,
        )  # fmt: skip

    def _resolve(self, name: str, report: Report, baseline: Report) -> list[str]:
        if name in self.tasks:
            for metric in TASK_METRICS:
                if f"{name}/{metric}" in report.metrics:
                    name = f"{name}/{metric}"
                    break
        names = resolve_all(name, {"report": report, "baseline": baseline})
        for full in names:
            if not report.metrics[full].higher_is_better:
                raise ConfigError(f"gate 'recovery': {full} is better when low; use max_rise")
        return names
