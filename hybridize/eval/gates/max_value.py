"""An upper limit on a metric."""

from dataclasses import dataclass
from typing import ClassVar

from hybridize.core import GateResult, Report
from hybridize.eval.lookup import metric


@dataclass(frozen=True, kw_only=True)
class MaxValue:
    """The metric must be at most `max`, unrounded."""

    metric: str
    """Name in the report; without its @N, the largest N there is."""
    max: float
    """The largest value."""

    rule: ClassVar[tuple[str, ...]] = ("metric", "max")
    compares: ClassVar[bool] = False

    def __call__(self, report: Report, baseline: Report | None) -> GateResult:
        """Judge. Raises ConfigError when the report has no such metric."""
        name, found = metric(report, self.metric)
        passed = found.value <= self.max
        detail = f"{name} is {found.value:.6g}; {'within' if passed else 'above'} the limit of {self.max:g}."
        return GateResult(name=f"max_value {self.metric}", passed=passed, value=found.value, limit=self.max, detail=detail)
