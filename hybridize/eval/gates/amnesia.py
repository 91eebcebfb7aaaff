"""Whether a later stage made a checkpoint forget what it could recall before."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from hybridize.core import GateResult, Report
from hybridize.errors import ConfigError
from hybridize.eval.gates.paired import check_confidence, judge_ratio, judge_rise, paired, summary
from hybridize.eval.lookup import family

RECALL = (
    "recall", "needle", "needle_multikey", "needle_multivalue", "needle_multiquery", "tracking", "threading", "passkey",
    "copying", "induction", "procedure", "shared_context",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Amnesia:
    """Recall at every length, after a stage against before it: the baseline is the report of the checkpoint before.

    Instruction tuning can destroy long recall and leave short tasks as they were (arXiv 2606.11052). Every metric NAME@N that
    both reports have must recover `min` of what was there, and every NAME_nll@N must rise by at most `max_nats`, both at
    the confidence bound. Accuracies that were at chance before say nothing and are passed over, as long as something is
    left that does.
    """

    min: float = 0.9
    """Share of the recall before that has to be left, at the lower bound."""
    max_nats: float = 0.1
    """Nats of each answer token."""
    metrics: list[str] = field(default_factory=lambda: list(RECALL))
    """NAMEs."""
    confidence: float = 0.95
    """One-sided."""

    rule: ClassVar[tuple[str, ...]] = ("min",)
    compares: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_confidence(self.confidence)

    def __call__(self, report: Report, baseline: Report) -> GateResult:
        """Judge; `value` is the worst lower bound of what was recovered, None where no accuracy has one.

        Raises:
            ConfigError: the reports share no such metric, or one of other items or without per-item scores.
        """
        ratios, rises = [], []
        for name in self.metrics:
            for length, (ours, theirs) in self._pairs(name, report, baseline):
                ratios.append(judge_ratio(f"{name}@{length}", ours, theirs, 0.0, self.min, self.confidence))
            for length, (ours, theirs) in self._pairs(f"{name}_nll", report, baseline):
                rises.append(judge_rise(f"{name}_nll@{length}", ours, theirs, self.max_nats, self.confidence))
        judged = ratios + rises
        if not judged:
            raise ConfigError(
                f"gate 'amnesia': report and baseline share none of {', '.join(self.metrics)} at any length; "
                "measure both with such a probe"
            )
        counted = [one for one in judged if one.state != "says nothing"]
        bad = [one for one in counted if one.state != "held"]
        said = [summary(ratios, min), summary(rises, max)]
        detail = (
            f"{'; '.join(part for part in said if part)}; "
            f"the limits are {self.min:g} of what was there and {self.max_nats:g} nats at the {self.confidence:.0%} bounds."
        )
        worst = min((one.bound for one in ratios if one.bound is not None), default=None)
        return GateResult(name="amnesia", passed=bool(counted) and not bad, value=worst, limit=self.min, detail=detail)

    @staticmethod
    def _pairs(name: str, report: Report, baseline: Report) -> Iterator[tuple[int, tuple[np.ndarray, np.ndarray]]]:
        """The items of `name@N` for every N that both have."""
        for length in sorted(set(family(report, name)) & set(family(baseline, name))):
            yield length, paired("amnesia", f"{name}@{length}", report, baseline)
