"""The nouns that cross folder borders: Scores, Plan, Report, Verdict. Frozen, JSON in and out, nothing else."""

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hybridize.errors import CheckpointError


def canonical(value: Any) -> str:
    """One spelling of a JSON value, for hashing."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def digest(value: Any) -> str:
    """sha256 of a JSON value's canonical spelling."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()


def read_json(path: Path, what: str) -> Any:
    """Parse a JSON file of ours, or raise a CheckpointError that names it."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file; expected {what}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error}); expected {what}") from error


def _from(cls: type, data: Any, where: str) -> Any:
    names = {f.name for f in dataclasses.fields(cls)}
    if not isinstance(data, dict) or set(data) - names:
        unknown = sorted(set(data) - names) if isinstance(data, dict) else data
        raise CheckpointError(f"{where}: got unknown {unknown!r}, expected the fields {', '.join(sorted(names))}")
    try:
        return cls(**data)
    except TypeError as error:
        raise CheckpointError(f"{where}: {error}") from error


@dataclass(frozen=True, kw_only=True)
class LayerScore:
    """What one metric found for one layer, and for one candidate in its place where the metric is about that."""

    layer: int
    candidate: dict[str, Any] | None
    """{"name": mixer, **the options that the score depends on}; None where it is about the base's own layer."""
    values: dict[str, float | list[float]]
    """By part: a number, or a curve that the metric's file explains."""
    stderr: dict[str, float] = field(default_factory=dict)
    """Standard errors of the numbers that are estimates."""


@dataclass(frozen=True, kw_only=True)
class ScoreTable:
    """One metric over the layers."""

    metric: dict[str, Any]
    """{"name": ..., **every option}."""
    text: str | None
    """Hash of tokenizer and text where text was used."""
    rows: tuple[LayerScore, ...]


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Layer scores of a base: what `plan` may know of weights and text, without reading either."""

    base: str
    """Local path of the base checkpoint, as given."""
    base_hash: str
    """sha256 of the base's config.json."""
    tables: tuple[ScoreTable, ...]
    version: int = 1
    """Of this document's form."""

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def table(self, metric: str) -> ScoreTable | None:
        """The table of a metric, None where there is none."""
        return next((table for table in self.tables if table.metric["name"] == metric), None)

    @staticmethod
    def from_dict(data: Any, where: str = "scores") -> "Scores":
        if not isinstance(data, dict) or not isinstance(data.get("tables"), (list, tuple)):
            raise CheckpointError(f"{where}: got no tables, expected scores written by `hybridize score`")
        if type(data.get("version")) is not int or data["version"] != Scores.version:
            raise CheckpointError(f"{where}: version is {data.get('version')!r}, expected {Scores.version}. Score again")
        tables = tuple(_score_table(table, f"{where}: tables.{i}") for i, table in enumerate(data["tables"]))
        names = [table.metric["name"] for table in tables]
        if twice := [name for name in names if names.count(name) > 1]:
            raise CheckpointError(f"{where}: metric {twice[0]!r} is there twice, expected one table of each")
        for key in ("base", "base_hash"):
            _expect(data.get(key), isinstance(data.get(key), str), f"{where}: {key}", "text")
        return _from(Scores, {**data, "tables": tables}, where)

    @staticmethod
    def read(path: Path) -> "Scores":
        return Scores.from_dict(read_json(path, "scores written by `hybridize score`"), str(path))


def _expect(value: Any, holds: bool, where: str, what: str) -> None:
    if not holds:
        raise CheckpointError(f"{where} is {value!r}, expected {what}")


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _score_table(data: Any, where: str) -> ScoreTable:
    """A checked table. Raises CheckpointError naming the place."""
    _expect(data, isinstance(data, dict) and isinstance(data.get("rows"), (list, tuple)), where, "a mapping with rows")
    metric, text = data.get("metric"), data.get("text")
    named = isinstance(metric, dict) and isinstance(metric.get("name"), str)
    _expect(metric, named, f"{where}: metric", "a mapping with a name")
    _expect(text, text is None or isinstance(text, str), f"{where}: text", "a hash or null")
    rows = tuple(_from(LayerScore, row, f"{where}: rows.{i}") for i, row in enumerate(data["rows"]))
    for i, row in enumerate(rows):
        place = f"{where}: rows.{i}"
        _expect(row.layer, type(row.layer) is int and row.layer >= 0, f"{place}: layer", "an integer >= 0")
        known = row.candidate is None or (isinstance(row.candidate, dict) and isinstance(row.candidate.get("name"), str))
        _expect(row.candidate, known, f"{place}: candidate", "null or a mapping with a name")
        _expect(row.values, isinstance(row.values, dict) and bool(row.values), f"{place}: values", "numbers by part")
        for name, value in row.values.items():
            curve = isinstance(value, (list, tuple)) and bool(value) and all(map(_is_number, value))
            _expect(value, curve or _is_number(value), f"{place}: values.{name}", "a finite number or a list of them")
        fits = isinstance(row.stderr, dict) and set(row.stderr) <= set(row.values)
        _expect(row.stderr, fits and all(map(_is_number, row.stderr.values())), f"{place}: stderr", "numbers by part")
    keys = [canonical([row.layer, row.candidate]) for row in rows]
    if twice := [key for key in keys if keys.count(key) > 1]:
        raise CheckpointError(f"{where}: layer and candidate {twice[0]} are there twice, expected one row of each")
    return _from(ScoreTable, {**data, "rows": rows}, where)


@dataclass(frozen=True, kw_only=True)
class LayerPlan:
    """What one layer becomes."""

    index: int
    mixer: dict[str, Any]
    """{"name": ..., **every option}: what the saved config's `mixers` holds."""
    conversion: dict[str, Any]
    """{"name": ..., **every option}: how the mixer's weights come from the base's."""
    parameters: int
    """Parameters of the mixer."""
    state_bytes: dict[str, int]
    """Cache bytes of one sequence, by context length in tokens (JSON keys are text)."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything `convert` needs to know; it has no options of its own."""

    base: str
    """Local path of the base checkpoint, as given."""
    base_hash: str
    """sha256 of the base's config.json: a plan is for one architecture, and needs no weights."""
    origin: dict[str, str] = field(default_factory=dict)
    """{"repo", "revision"} of a base that came from the Hub: its id and the commit."""
    family: str
    """model_type of the base, a key of FAMILIES."""
    recipe: str
    seed: int
    layers: tuple[LayerPlan, ...]
    kv_share: float
    """Bytes that each further token adds to the cache, over what it adds to the base's; states of fixed size count nothing."""
    base_state_bytes: dict[str, int]
    """The base's cache bytes of one sequence, by context length."""
    native: dict[str, Any] = field(default_factory=dict)
    """{"target": native class or "none", "reason": ..., "engines": {engine: {"target", "reason"}}}."""

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @staticmethod
    def from_dict(data: Any, where: str = "plan") -> "Plan":
        if not isinstance(data, dict) or not isinstance(data.get("layers"), (list, tuple)):
            raise CheckpointError(f"{where}: got no list of layers, expected a plan written by `hybridize plan`")
        layers = tuple(_from(LayerPlan, layer, f"{where}: layer {i}") for i, layer in enumerate(data["layers"]))
        return _from(Plan, {**data, "layers": layers}, where)

    @staticmethod
    def read(path: Path) -> "Plan":
        return Plan.from_dict(read_json(path, "a plan written by `hybridize plan`"), str(path))

    def digest(self) -> str:
        """Hash of what decides the output; where the base lies or came from does not."""
        return digest({key: value for key, value in self.to_dict().items() if key not in ("base", "origin")})


def plan_table(plan: Plan) -> list[dict[str, Any]]:
    """Rows to print, one for each kind of layer: equal ones are merged; parameters and cache bytes are of them all."""
    kinds: list[list[LayerPlan]] = []
    for layer in plan.layers:
        equal = next((kind for kind in kinds if (kind[0].mixer, kind[0].conversion) == (layer.mixer, layer.conversion)), None)
        if equal is None:
            kinds.append([layer])
        else:
            equal.append(layer)
    return [
        {
            "layers": ranges([layer.index for layer in kind]),
            "mixer": kind[0].mixer["name"],
            "options": {key: value for key, value in kind[0].mixer.items() if key != "name"},
            "conversion": {key: value for key, value in kind[0].conversion.items() if key != "name"},
            "parameters": sum(layer.parameters for layer in kind),
            "state_bytes": {t: sum(layer.state_bytes[t] for layer in kind) for t in kind[0].state_bytes},
        }
        for kind in kinds
    ]


def ranges(numbers: list[int]) -> str:
    """Ascending numbers as people write them: 0, 2-4, 7."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One measured number."""

    value: float
    stderr: float | None = None
    unit: str = ""
    higher_is_better: bool = False
    samples: int = 0
    """How many independent items the value and its stderr come from."""


def human_bytes(count: float) -> str:
    """Such as "1.5 MiB"; exact below 1 KiB."""
    if count < 1024:
        return f"{count:g} B"
    for unit in ("KiB", "MiB", "GiB"):
        count /= 1024
        if count < 1024 or unit == "GiB":
            break
    return f"{count:.4g} {unit}"


def show(metric: Metric) -> str:
    """A metric as text, with its standard error where it has one."""
    if metric.unit == "bytes":
        return human_bytes(metric.value)
    if metric.unit == "x the base":
        return f"{metric.value:.2f}x"
    if metric.unit == "tokens/s":
        return f"{metric.value:,.0f}"
    text = f"{metric.value:.4g}"
    return text if not metric.stderr else f"{text} ± {metric.stderr:.2g}"


@dataclass(frozen=True, kw_only=True)
class Report:
    """What was measured on one checkpoint."""

    checkpoint: str
    checkpoint_hash: str
    metrics: dict[str, Metric]
    samples: dict[str, list[float]] = field(default_factory=dict)
    """Per-item scores behind a metric, in item order, for paired comparison."""
    item_hashes: dict[str, str] = field(default_factory=dict)
    """Per metric with samples: hash of the items, so that only equal items are paired."""
    versions: dict[str, str] = field(default_factory=dict)
    weights: str = ""
    """`fingerprint.weights_hash` of what was measured: config.json and every byte of the weights."""

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @staticmethod
    def from_dict(data: Any, where: str = "report") -> "Report":
        if not isinstance(data, dict) or not isinstance(data.get("metrics"), dict):
            raise CheckpointError(f"{where}: got no metrics, expected a report written by `hybridize eval`")
        metrics = {name: _from(Metric, value, f"{where}: {name}") for name, value in data["metrics"].items()}
        return _from(Report, {**data, "metrics": metrics}, where)

    @staticmethod
    def read(path: Path) -> "Report":
        return Report.from_dict(read_json(path, "a report written by `hybridize eval`"), str(path))


@dataclass(frozen=True, kw_only=True)
class GateResult:
    """One gate's answer."""

    name: str
    passed: bool
    value: float | None
    limit: float | None
    detail: str


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """All gates' answers; passed when every one did."""

    passed: bool
    gates: tuple[GateResult, ...]
    weights: str = ""
    """Of the report: which weights were judged."""

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @staticmethod
    def from_dict(data: Any, where: str = "verdict") -> "Verdict":
        if not isinstance(data, dict) or not isinstance(data.get("gates"), (list, tuple)):
            raise CheckpointError(f"{where}: got no gates, expected a verdict written by `hybridize gate`")
        return _from(Verdict, {**data, "gates": tuple(_from(GateResult, g, where) for g in data["gates"])}, where)

    @staticmethod
    def read(path: Path) -> "Verdict":
        return Verdict.from_dict(read_json(path, "a verdict written by `hybridize gate`"), str(path))
