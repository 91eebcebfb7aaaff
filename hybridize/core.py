"""The nouns that cross folder borders: Plan, Report, Verdict. Frozen, JSON in and out, nothing else."""

import dataclasses
import hashlib
import json
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
    family: str
    """model_type of the base, a key of FAMILIES."""
    recipe: str
    seed: int
    layers: tuple[LayerPlan, ...]
    kv_share: float
    """Bytes that each further token adds to the cache, over what it adds to the base's; states of fixed size count nothing."""
    base_state_bytes: dict[str, int]
    """The base's cache bytes of one sequence, by context length."""
    native: dict[str, str] = field(default_factory=dict)
    """{"target": native class or "none", "reason": ...}."""

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
        """Hash of what decides the output; where the base lies on disk does not."""
        return digest({key: value for key, value in self.to_dict().items() if key != "base"})


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One measured number."""

    value: float
    stderr: float | None = None
    unit: str = ""
    higher_is_better: bool = False
    samples: int = 0
    """How many independent items the value and its stderr come from."""


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

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @staticmethod
    def from_dict(data: Any, where: str = "verdict") -> "Verdict":
        if not isinstance(data, dict) or not isinstance(data.get("gates"), (list, tuple)):
            raise CheckpointError(f"{where}: got no gates, expected a verdict written by `hybridize gate`")
        return _from(Verdict, {**data, "gates": tuple(_from(GateResult, g, where) for g in data["gates"])}, where)
