"""A report for machines: the figures of its pictures and tables, unrounded."""

import dataclasses
from typing import Any

from hybridize.eval.pictures import thinned
from hybridize.eval.report.changes import changes, decode_speedup, differences, largest, sentence, state_share
from hybridize.eval.report.folder import Run
from hybridize.eval.report.sections import MOST_SAMPLES, hashes
from hybridize.version import __version__


def as_data(runs: list[Run]) -> dict[str, Any]:
    """{"version", "hybridize", "runs": [...]}; what a run's directory does not hold is null or empty."""
    return {"version": 1, "hybridize": __version__, "runs": [_run(run) for run in runs]}


def _run(run: Run) -> dict[str, Any]:
    state, speed = state_share(run), decode_speedup(run)
    paired = changes(run.base, run.final) if run.base is not None and run.final is not None else {}
    found = differences(run)
    return {
        "name": run.name,
        "sentence": sentence(run),
        "verdict": None if run.verdict is None else run.verdict.to_dict(),
        "base": None if run.plan is None else run.base_name,
        "state": None if state is None else {"tokens": state[0], "share": state[1]},
        "decode": None if speed is None else {"tokens": speed[0], "speedup": speed[1]},
        "metrics": {
            column: {name: dataclasses.asdict(metric) for name, metric in report.metrics.items()}
            for column, report in run.reports.items()
        },
        "paired": {name: dataclasses.asdict(one) for name, one in paired.items()},
        "layers": [] if run.plan is None else [dataclasses.asdict(layer) for layer in run.plan.layers],
        "scores": None if run.scores is None else [dataclasses.asdict(table) for table in run.scores.tables],
        "losses": {stage: thinned(points) for stage, points in run.losses.items()},
        "bench": run.bench and {key: run.bench[key] for key in run.bench if key not in ("checkpoint", "against")},
        "items": {
            name: {
                "items": len(items),
                "worse": sum(item.size < 0 for item in items),
                "better": sum(item.size > 0 for item in items),
            }
            for name, items in found.items()
        },
        "samples": [dataclasses.asdict(item) for item in largest(found, MOST_SAMPLES)],
        "recipe": run.recipe,
        "versions": {column: report.versions for column, report in run.reports.items()},
        "hashes": hashes(run),
    }
