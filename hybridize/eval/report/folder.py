"""What lies in the directory of a run, read and checked; parts that are not there yet are absent."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybridize.core import Plan, Report, Scores, Verdict, read_json
from hybridize.errors import CheckpointError, ConfigError
from hybridize.eval.evaluate import items_path
from hybridize.lineage import is_complete, origin, read_lineage

Curve = list[tuple[float, float]]
ITEM_KEYS = {"metric", "score", "prompt", "expected", "given"}
STEP_KEYS = {"stage": int, "name": str, "tokens": (int, float), "loss": (int, float)}


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run's directory."""

    name: str
    plan: Plan | None
    verdict: Verdict | None
    reports: dict[str, Report]
    """By column: base, converted, distilled, as far as they are there."""
    items: dict[str, dict[str, list[dict[str, Any]]]]
    """By column and metric, in item order."""
    losses: dict[str, Curve]
    """(tokens, loss) by stage."""
    scores: Scores | None
    bench: dict[str, Any] | None
    """What `bench` wrote."""
    recipe: str | None
    lineages: dict[str, dict[str, Any]]
    """By column."""

    @property
    def base(self) -> Report | None:
        return self.reports.get("base")

    @property
    def final(self) -> Report | None:
        """The last checkpoint's; None where only the base was measured."""
        last = list(self.reports)[-1:] or ["base"]
        return None if last == ["base"] else self.reports[last[0]]

    @property
    def base_name(self) -> str:
        """The base by its last name: a report does not say where on a machine it lay."""
        if self.plan is None:
            return ""
        return origin(self.plan.base).get("repo") or Path(self.plan.base).name


def read_runs(folders: list[Path]) -> list[Run]:
    """The runs of directories, each under a name of its own: the directory's, or the path as given where two are alike.

    Raises:
        ConfigError: a directory is there twice.
        CheckpointError: one holds nothing of a run, or something that cannot be read.
    """
    resolved = [folder.resolve() for folder in folders]
    for place, folder in enumerate(resolved):
        if folder in resolved[:place]:
            raise ConfigError(f"report: {folders[place]} is there twice, expected each directory once")
    names = [folder.name for folder in resolved]
    return [
        _read_run(folder, str(folder) if names.count(name) > 1 else name) for folder, name in zip(folders, names, strict=True)
    ]


def _read_run(folder: Path, name: str) -> Run:
    def there(file: str) -> Path | None:
        return folder / file if (folder / file).is_file() else None

    # A run without stages measures what it converted, once, and last.
    trained = (folder / "distilled").is_dir() or there("report-converted.json") is not None
    final = "distilled" if trained else "converted"
    files = {"base": "report-base.json", "converted": "report-converted.json", final: "report.json"}
    found = {column: folder / file for column, file in files.items() if there(file)}
    reports = {column: Report.read(path) for column, path in found.items()}
    plan, verdict = there("plan.json"), there("verdict.json")
    if plan is None and verdict is None and not reports:
        raise CheckpointError(f"{folder}: holds no plan, report or verdict; expected a directory of `hybridize run`")
    scores, bench, recipe = there("scores.json"), there("bench.json"), there("recipe.yaml")
    complete = [column for column in ("converted", "distilled") if is_complete(folder / column)]
    return Run(
        name=name,
        plan=None if plan is None else Plan.read(plan),
        verdict=None if verdict is None else Verdict.read(verdict),
        reports=reports,
        items={column: _items(items_path(path)) for column, path in found.items() if items_path(path).is_file()},
        losses=_losses(folder),
        scores=None if scores is None else Scores.read(scores),
        bench=None if bench is None else _bench(bench),
        recipe=None if recipe is None else recipe.read_text(encoding="utf-8"),
        lineages={column: read_lineage(folder / column) for column in complete},
    )  # fmt: skip


def _bench(path: Path) -> dict[str, Any]:
    found = read_json(path, "figures written by `hybridize bench`")
    rows = found.get("rows") if isinstance(found, dict) else None
    whole = isinstance(rows, list) and rows and all(
        isinstance(row, dict) and isinstance(row.get("model"), dict) and {"batch", "context"} <= set(row) for row in rows
    )  # fmt: skip
    if not whole:
        raise CheckpointError(f"{path}: got no rows with batch, context and model, expected figures of `hybridize bench`")
    return found


def _lines(path: Path, part_at_end: bool) -> list[Any]:
    """Objects of a file with one a line; the last line of a run that was killed may be half written."""
    found = []
    # Not splitlines: a text in JSON may hold other characters that end a line.
    lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    for number, line in enumerate(lines if lines != [""] else [], 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            if part_at_end and number == len(lines):
                break
            raise CheckpointError(f"{path}: line {number} is not JSON ({error.msg}); expected one object a line") from error
        if not isinstance(row, dict):
            raise CheckpointError(f"{path}: line {number} is {row!r}, expected one object a line")
        found.append(row)
    return found


def _items(path: Path) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for number, row in enumerate(_lines(path, part_at_end=False), 1):
        texts = all(isinstance(row.get(key), str) for key in ITEM_KEYS - {"score"})
        if set(row) != ITEM_KEYS or not texts or type(row["score"]) not in (int, float):
            raise CheckpointError(f"{path}: line {number} has {sorted(row)}, expected {', '.join(sorted(ITEM_KEYS))} of an item")
        found.setdefault(row["metric"], []).append(row)
    return found


def _losses(folder: Path) -> dict[str, Curve]:
    found: dict[str, Curve] = {}
    for path in sorted(folder.glob("*.metrics.jsonl")):
        for number, row in enumerate(_lines(path, part_at_end=True), 1):
            # A loss that was not finite is written as null.
            if row.get("loss", None) is None:
                continue
            if wrong := [key for key, kind in STEP_KEYS.items() if not isinstance(row.get(key), kind)]:
                raise CheckpointError(f"{path}: line {number}: {wrong[0]} is {row.get(wrong[0])!r}, expected a line of `distill`")
            found.setdefault(f"{row['stage']}: {row['name']}", []).append((row["tokens"], row["loss"]))
    return found
