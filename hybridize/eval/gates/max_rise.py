"""How far a score that is better when low may rise above the baseline's, judged by the upper end of an interval."""

from dataclasses import dataclass
from typing import ClassVar

from hybridize.core import GateResult, Report
from hybridize.errors import ConfigError
from hybridize.eval.gates.paired import check_confidence, judge_rise, paired, summary
from hybridize.eval.lookup import resolve_all


@dataclass(frozen=True, kw_only=True)
class MaxRise:
    """The mean of (score - baseline's score) over the items must be at most `max` at the upper confidence bound.

    For scores such as -log p: of "perplexity" the items are each block's mean -log p in nats, of "kl_to_base" each block's
    mean divergence, which is 0 in the base's own report.
    """

    metric: str
    """Name in the report; without its @N, the largest N that both have; "nll_at@*" is every one that both have."""
    max: float
    """The largest mean of (score - baseline's score)."""
    confidence: float = 0.95
    """One-sided."""

    rule: ClassVar[tuple[str, ...]] = ("metric", "max")
    compares: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_confidence(self.confidence)

    def __call__(self, report: Report, baseline: Report) -> GateResult:
        """Judge; `value` is the worst upper bound, None when a metric has none.

        Raises:
            ConfigError: the metric is missing, better when high, without per-item scores, or of other items.
        """
        found = []
        for name in resolve_all(self.metric, {"report": report, "baseline": baseline}):
            if report.metrics[name].higher_is_better:
                raise ConfigError(f"gate 'max_rise': {name} is better when high; use recovery")
            ours, theirs = paired("max_rise", name, report, baseline)
            found.append(judge_rise(name, ours, theirs, self.max, self.confidence))
        bounds = [judged.bound for judged in found if judged.bound is not None]
        return GateResult(
            name=f"max_rise {self.metric}",
            passed=all(judged.state == "held" for judged in found),
            value=max(bounds) if len(bounds) == len(found) else None,
            limit=self.max,
            detail=f"{summary(found, max)}; the limit is {self.max:g} at the upper {self.confidence:.0%} bound.",
        )
