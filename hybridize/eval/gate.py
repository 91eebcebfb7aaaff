"""The gate verb: a report against a baseline."""

from pathlib import Path
from typing import Any

from hybridize.core import GateResult, Report, Verdict
from hybridize.errors import ConfigError
from hybridize.eval.gates import GATES
from hybridize.eval.gates.paired import OtherItemsError
from hybridize.storage import write_json


def gate(report: Report, baseline: Report | None, gates: list[dict[str, Any]], out: Path | None = None) -> Verdict:
    """Judge a report.

    Args:
        report: of the checkpoint under test.
        baseline: of what it is compared with, usually the base; None when no gate compares.
        gates: {"name": ..., **options} of each gate.
        out: where to write the verdict as JSON; None is nowhere.

    Returns:
        The verdict: passed when every gate did.

    Raises:
        ConfigError: no gate, an unknown gate or option, a missing metric, or no baseline for a gate that compares.
    """
    if not gates:
        raise ConfigError("gate: got no gates, expected at least one. Give a recipe with gates, or --rule")
    built = [(spec, GATES.build(spec)) for spec in gates]
    results = []
    for spec, check in built:
        name = spec["name"]
        if baseline is None and check.compares:
            raise ConfigError(f"gate {name!r} compares with a baseline, got none. Name it with --baseline")
        try:
            results.append(check(report, baseline))
        except OtherItemsError:
            # Another tokenizer makes other items of the same text: that is a finding. Without one it is a mistake.
            if baseline is None or report.versions.get("tokenizer") == baseline.versions.get("tokenizer"):
                raise
            detail = "not judged: the tokenizer is not the baseline's, so that the same text gives other items."
            metrics = [*([spec["metric"]] if "metric" in spec else []), *spec.get("tasks", []), *spec.get("metrics", [])]
            name = f"{name} {','.join(metrics)}".strip()
            results.append(GateResult(name=name, passed=False, value=None, limit=None, detail=detail))
    verdict = Verdict(passed=all(result.passed for result in results), gates=tuple(results), weights=report.weights)
    if out is not None:
        write_json(Path(out), verdict.to_dict())
    return verdict


def parse_rule(text: str) -> dict[str, Any]:
    """A gate from one line, such as "max_ratio perplexity 1.05" or "recovery arc_easy,hellaswag 0.97".

    Raises:
        ConfigError: an unknown gate, too few or too many words, or a limit that is not a number.
    """
    words = text.split()
    if not words:
        raise ConfigError(f"--rule: got {text!r}, expected a gate and its options, such as 'max_ratio perplexity 1.05'")
    name, *values = words
    keys = GATES.load(name).rule
    if len(values) != len(keys):
        raise ConfigError(f"--rule: got {text!r}, expected '{name} {' '.join(key.upper() for key in keys)}'")
    spec: dict[str, Any] = {"name": name}
    for key, value in zip(keys, values, strict=True):
        if key == "metric":
            spec[key] = value
        elif key == "tasks":
            spec[key] = value.split(",")
        else:
            try:
                spec[key] = float(value)
            except ValueError as error:
                raise ConfigError(f"--rule: {key} of {name!r} is {value!r}, expected a number") from error
    return spec
