"""A lower limit on a metric."""

from dataclasses import dataclass
from typing import ClassVar

from hybridize.core import GateResult, Report
from hybridize.eval.lookup import metric


@dataclass(frozen=True, kw_only=True)
class MinValue:
    """The metric must be at least `min`, unrounded."""

    metric: str
    """Name in the report; without its @N, the largest N there is."""
    min: float
    """The least value."""

    rule: ClassVar[tuple[str, ...]] = ("metric", "min")
    compares: ClassVar[bool] = False

    def __call__(self, report: Report, baseline: Report | None) -> GateResult:
        """Judge. Raises ConfigError when the report has no such metric."""
        name, found = metric(report, self.metric)
        passed = found.value >= self.min
        detail = f"{name} is {found.value:.6g}; {'at or above' if passed else 'below'} the limit of {self.min:g}."
        return GateResult(name=f"min_value {self.metric}", passed=passed, value=found.value, limit=self.min, detail=detail)
