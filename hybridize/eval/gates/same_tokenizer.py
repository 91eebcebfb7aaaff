"""Whether report and baseline read text with one tokenizer."""

from dataclasses import dataclass
from typing import ClassVar

from hybridize.core import GateResult, Report
from hybridize.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class SameTokenizer:
    """The tokenizer must give the ids that the baseline's gives: with another one the model reads other words than it learnt."""

    rule: ClassVar[tuple[str, ...]] = ()
    compares: ClassVar[bool] = True

    def __call__(self, report: Report, baseline: Report) -> GateResult:
        """Judge by the hash of what decides ids. Raises ConfigError when one of the reports names no tokenizer."""
        ours, theirs = (one.versions.get("tokenizer") for one in (report, baseline))
        for word, found, other in (("report", ours, theirs), ("baseline", theirs, ours)):
            if found is None and other is not None:
                raise ConfigError(f"gate 'same_tokenizer': the {word} names no tokenizer; measure {word} again")
        passed = ours == theirs
        if ours is None:
            detail = "neither checkpoint has a tokenizer."
        elif passed:
            detail = f"both read text with tokenizer {ours[:12]}."
        else:
            detail = f"the tokenizer is {ours[:12]}, expected the baseline's {str(theirs)[:12]}: the same text gives other ids."
        return GateResult(name="same_tokenizer", passed=passed, value=None, limit=None, detail=detail)
