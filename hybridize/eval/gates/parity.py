"""Whether two checkpoints are one function: item by item, not on average."""

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from hybridize.core import GateResult, Report
from hybridize.errors import ConfigError
from hybridize.eval.gates.paired import paired
from hybridize.eval.lookup import resolve_all


@dataclass(frozen=True, kw_only=True)
class Parity:
    """The mean of |score - baseline's score| over the items must be at most `max`, for every metric.

    For an exported checkpoint against the hybrid it was made from, or a hybrid that keeps everything against its base. Losses
    on some items cannot make up for gains on others. An equal function is equal on any items, so there are none too few.
    """

    max: float
    """In the scores' own units: 1e-4 nats is far above fp32's rounding, bf16's is some 1e-2."""
    metrics: list[str] = field(default_factory=list)
    """Names of metrics ("needle@*" is at every length that both have); none is all that both have per-item scores of."""

    rule: ClassVar[tuple[str, ...]] = ("max",)
    compares: ClassVar[bool] = True

    def __call__(self, report: Report, baseline: Report) -> GateResult:
        """Judge; `value` is the largest of the metrics' means.

        Raises:
            ConfigError: a metric is missing, without per-item scores or of other items, or the reports share none.
        """
        both = {"report": report, "baseline": baseline}
        names = [full for name in self.metrics for full in resolve_all(name, both)]
        if not self.metrics:
            names = [name for name in report.samples if name in baseline.samples]
        if not names:
            raise ConfigError("gate 'parity': report and baseline share no metric with per-item scores; measure both alike")
        apart = {}
        for name in names:
            ours, theirs = paired("parity", name, report, baseline)
            apart[name] = float(np.abs(ours - theirs).mean())
        worst = max(apart, key=lambda name: apart[name])
        passed = apart[worst] <= self.max
        detail = (
            f"of {len(apart)} metrics {worst} differs most, by {apart[worst]:.6g} in the mean item; "
            f"{'within' if passed else 'above'} the limit of {self.max:g}."
        )
        return GateResult(name="parity", passed=passed, value=apart[worst], limit=self.max, detail=detail)
