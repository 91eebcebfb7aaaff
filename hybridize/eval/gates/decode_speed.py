"""Decoding against the base in the same run, less what the rounds differ by."""

from dataclasses import dataclass
from typing import ClassVar

from hybridize.core import GateResult, Report
from hybridize.eval.gates.paired import check_confidence, student_quantile
from hybridize.eval.lookup import metric

# Two rounds have no spread worth the name.
FEWEST_ROUNDS = 3


@dataclass(frozen=True, kw_only=True)
class DecodeSpeed:
    """Decode tokens/s over the base's must be at least `min` at the lower confidence bound over rounds.

    Base and checkpoint took turns in one run (probe `speed`), so that the report itself holds the ratio: speeds of two runs
    are of two states of a machine.
    """

    min: float
    """Tokens a second over the base's."""
    context: int | None = None
    """Tokens in the cache; None is the longest in the report."""
    confidence: float = 0.95
    """One-sided."""

    rule: ClassVar[tuple[str, ...]] = ("min",)
    compares: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_confidence(self.confidence)

    def __call__(self, report: Report, baseline: Report | None) -> GateResult:
        """Judge. Raises ConfigError when the report has no such ratio."""
        name, found = metric(report, "decode_speedup" if self.context is None else f"decode_speedup@{self.context}")
        title = "decode_speed" if self.context is None else f"decode_speed {self.context}"
        rounds = found.samples
        if found.stderr is None or rounds < FEWEST_ROUNDS:
            detail = f"{name} has {rounds} rounds, too few to decide (at least {FEWEST_ROUNDS} are needed)."
            return GateResult(name=title, passed=False, value=None, limit=self.min, detail=detail)
        reach = student_quantile(self.confidence, rounds - 1) * found.stderr
        low, high = found.value - reach, found.value + reach
        passed = low >= self.min
        spread = (
            f"at least {low:.6g}" if passed else f"at most {high:.6g}" if high < self.min else f"between {low:.6g} and {high:.6g}"
        )
        doubt = "" if passed or high < self.min else ": too few rounds to decide"
        detail = f"{name} is {found.value:.6g}, {spread} ({rounds} rounds){doubt}; the limit is {self.min:g}."
        return GateResult(name=title, passed=passed, value=low, limit=self.min, detail=detail)
