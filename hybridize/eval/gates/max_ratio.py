"""A metric against the baseline's."""

from dataclasses import dataclass
from typing import ClassVar

from hybridize.core import GateResult, Metric, Report
from hybridize.errors import ConfigError
from hybridize.eval.lookup import resolve
from hybridize.eval.table import human_bytes


@dataclass(frozen=True, kw_only=True)
class MaxRatio:
    """The metric divided by the baseline's must be at most `max`, unrounded."""

    metric: str
    """Name in the report; without its @N, the largest N that report and baseline share."""
    max: float
    """The largest value over the baseline's."""

    rule: ClassVar[tuple[str, ...]] = ("metric", "max")
    compares: ClassVar[bool] = True

    def __call__(self, report: Report, baseline: Report) -> GateResult:
        """Judge. Raises ConfigError when the metric is in one of them only, or the baseline's is not above 0."""
        name = resolve(self.metric, {"report": report, "baseline": baseline})
        ours, theirs = report.metrics[name], baseline.metrics[name]
        value, base = ours.value, theirs.value
        if not base > 0:
            raise ConfigError(f"gate 'max_ratio': {name} of the baseline is {base:.6g}, expected above 0; use max_value")
        ratio = value / base
        passed = ratio <= self.max
        detail = (
            f"{name} is {_spelled(ours)}, {ratio:.6g} times the baseline's {_spelled(theirs)}; "
            f"{'within' if passed else 'above'} the limit of {self.max:g}."
        )
        return GateResult(name=f"max_ratio {self.metric}", passed=passed, value=ratio, limit=self.max, detail=detail)


def _spelled(metric: Metric) -> str:
    return human_bytes(metric.value) if metric.unit == "bytes" else f"{metric.value:.6g}"
