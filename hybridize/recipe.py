"""Recipes: YAML in, a strict frozen Recipe out. The components named in one are checked by the pipeline, before any work.

A recipe is complete in itself: no inheritance. The probes and gates of a suite may be named among its own (`evaluate: [offline,
{name: speed}]`), and stand there once it is read. What a published method chose base by base stands under `sizes`: the
first entry whose `when` is true of the base's config.json sets its keys, and a base that none is meant for keeps the
rest of the recipe. `--set a.b=c` overrides any key, after that; a number in a path is a place in a list
(`distill.0.tokens=1000000`).
"""

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hybridize.errors import ConfigError
from hybridize.registry import suggest

MAX_BYTES = 1 << 20
Model = TypeVar("Model", bound=BaseModel)


class Section(BaseModel):
    """Strict and frozen: an unknown key or a value of another kind is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    def resolved(self) -> str:
        """With every default and every suite's part filled in, as YAML."""
        return yaml.safe_dump(self.model_dump(), sort_keys=False)


class DataSection(Section):
    """What the text is, how it is split and how much of it calibrates a seed."""

    mixture: dict[str, float] | None = None
    """Source -> its share of the training rows, up to a common factor. None takes the text that the call names."""
    held_out_share: float = Field(default=0.05, gt=0, lt=1)
    """Share of the documents, by hash, kept for evaluation where no text of its own is given for that."""
    calibration_tokens: int = Field(default=12_288, ge=1)
    calibration_seq_tokens: int = Field(default=256, ge=2)


class Suite(Section):
    """Probes, and the gates that go with them."""

    name: str
    about: str = ""
    evaluate: list[dict[str, Any]]
    gates: list[dict[str, Any]]


class SizeSection(Section):
    """What a method does to the bases of one size."""

    when: dict[str, int | float | str]
    """Field of config.json -> its value."""
    set: dict[str, Any]
    """Key of the recipe, dotted as for --set -> its value."""


class PushSection(Section):
    """Where a run that passed its gates is published; the options of `hybridize push`."""

    repo: str
    """On the Hub: owner/name."""
    public: bool = False
    license: str | None = None
    base_model: str | None = None
    teacher_license: str | None = None
    data_license: str | None = None


class Recipe(Section):
    """One method, start to end."""

    name: str
    about: str = ""
    seed: int = Field(default=0, ge=0)
    plan: dict[str, Any]
    data: DataSection = DataSection()
    distill: list[dict[str, Any]] = []
    evaluate: list[dict[str, Any]] = []
    gates: list[dict[str, Any]] = []
    push: PushSection | None = None
    sizes: list[SizeSection] = []


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice and anchors, which a recipe has no use for."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise ConfigError("anchors and aliases are not used in recipes; write the value out")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, (str, int)):
                raise ConfigError(f"line {key_node.start_mark.line + 1}: the key {key!r} is not a word")
            if key in seen:
                raise ConfigError(f"line {key_node.start_mark.line + 1}: the key {key!r} is given twice")
            seen.add(key)
        return super().construct_mapping(node, deep)


# YAML 1.1 reads 1e-4 as text; recipes are full of learning rates.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    __import__("re").compile(r"^[-+]?(\d[\d_]*)(\.[\d_]*)?[eE][-+]?\d+$"),
    list("-+0123456789"),
)


def parse_yaml(text: str, where: str) -> Any:
    """Parse YAML safely. Raises ConfigError with the place."""
    try:
        return yaml.load(text, Loader=_Loader)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f"line {mark.line + 1}: " if mark else ""
        raise ConfigError(f"{where}: {line}not valid YAML ({getattr(error, 'problem', None) or error})") from error
    except RecursionError as error:
        raise ConfigError(f"{where}: nested too deeply") from error


def builtin_recipes() -> dict[str, Path]:
    """Name -> file of the recipes that come with the package."""
    folder = Path(str(resources.files("hybridize") / "configs"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def builtin_suites() -> dict[str, Path]:
    """Name -> file of the suites that come with the package."""
    folder = Path(str(resources.files("hybridize") / "configs" / "suites"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def load_suite(source: str | Path) -> Suite:
    """Read a suite, which may name others among its probes and gates.

    Args:
        source: a file, or the name of a built-in suite.

    Raises:
        ConfigError: no such suite, bad YAML, an unknown key, a value of the wrong kind, or a suite that names itself.
    """
    return _load_suite(source, ())


def _load_suite(source: str | Path, above: tuple[str, ...]) -> Suite:
    if str(source) in above:
        raise ConfigError(f"suite {source}: names itself ({' -> '.join([*above, str(source)])}); expected other suites")
    data = _read(source, builtin_suites(), "suite", "name, evaluate, gates")
    _spread_suites(data, (*above, str(source)))
    return _validated(Suite, data, f"suite {source}")


def load_recipe(source: str | Path, overrides: list[str] | None = None, config: Any = None) -> Recipe:
    """Read a recipe.

    Args:
        source: a file, or the name of a built-in recipe.
        overrides: "a.b=value" each, the value in YAML.
        config: of the base; with it, `sizes` is settled and empty in what is returned.

    Raises:
        ConfigError: no such recipe, bad YAML, an unknown key or a value of the wrong kind.
    """
    data = _read(source, builtin_recipes(), "recipe", "name, plan, distill, ...")
    _spread_suites(data)
    if config is not None:
        _settle_sizes(data, config, parse_recipe(data, str(source)).sizes)
    for override in overrides or []:
        _override(data, override)
    _spread_suites(data)
    return parse_recipe(data, str(source))


def _read(source: str | Path, built_in: dict[str, Path], kind: str, keys: str) -> dict[str, Any]:
    """The mapping in a YAML file, or in the built-in one of that name."""
    path = Path(source)
    if str(source) in built_in:
        path = built_in[str(source)]
    elif not path.is_file():
        raise ConfigError(f"no {kind} {str(source)!r}: neither a file nor built in. {suggest(str(source), sorted(built_in))}")
    if path.stat().st_size > MAX_BYTES:
        raise ConfigError(f"{path}: has {path.stat().st_size} bytes, expected a {kind} of at most {MAX_BYTES}")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 at byte {error.start}, expected a YAML file") from error
    data = parse_yaml(text, str(path))
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: holds {type(data).__name__}, expected a mapping with {keys}")
    return data


def _spread_suites(data: dict[str, Any], above: tuple[str, ...] = ()) -> None:
    """Put the probes and gates of suites where `evaluate` and `gates` name them."""
    for key in ("evaluate", "gates"):
        asked = data.get(key)
        if isinstance(asked, str):
            asked = [asked]
        if isinstance(asked, list):
            parts = [getattr(_load_suite(one, above), key) if isinstance(one, str) else [one] for one in asked]
            data[key] = [one for part in parts for one in part]


def _settle_sizes(data: dict[str, Any], config: Any, sizes: list[SizeSection]) -> None:
    """Carry out the first entry of `sizes` that is meant for a base, and leave none."""
    data.pop("sizes", None)
    for size in sizes:
        if all(getattr(config, key, None) == value for key, value in size.when.items()):
            for path, value in size.set.items():
                _put(data, path, value, "sizes")
            return


def parse_recipe(data: dict[str, Any], where: str) -> Recipe:
    """A checked Recipe from plain data. Raises ConfigError naming the key, what was found and what is known."""
    return _validated(Recipe, data, f"recipe {where}")


def _validated(kind: type[Model], data: dict[str, Any], where: str) -> Model:
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            known = DataSection if first["loc"][0] == "data" else kind
            raise ConfigError(
                f"{where}: unknown key {place!r}. {suggest(place.split('.')[-1], sorted(known.model_fields))}"
            ) from error
        raise ConfigError(f"{where}: {place}: {first['msg'].lower()}, got {first.get('input')!r}") from error


def text_sources(recipe: Recipe, data: str | Mapping[str, float] | None) -> str | Mapping[str, float]:
    """The text to train on: what the call names, else the recipe's mixture.

    In a call a mixture is the recipe's mapping in braces, `{web/*.jsonl: 0.7, books.parquet: 0.3}`. No source that can be read
    ends with a brace, so it cannot be mistaken for one.

    Raises:
        ConfigError: neither or both name a text, or braces that hold no mapping.
    """
    if data is None and recipe.data.mixture is None:
        raise ConfigError("--data is missing, and the recipe has no data.mixture; give the text to calibrate and train on")
    if data is not None and recipe.data.mixture is not None:
        raise ConfigError("the text is given twice, by --data and by data.mixture of the recipe; leave one out")
    if data is None:
        return dict(recipe.data.mixture or {})
    if not isinstance(data, str) or not data.strip().startswith("{") or not data.strip().endswith("}"):
        return data
    try:
        found = parse_yaml(data, "--data")
    except ConfigError as error:
        raise ConfigError(f"{error}; put a source with a ? or [ in it, or a * in front, in quotes") from error
    if not isinstance(found, dict) or not all(isinstance(source, str) for source in found):
        raise ConfigError(f"--data: got {data!r}, expected {{source: weight, ...}} such as {{a.txt: 0.7, b.jsonl: 0.3}}")
    return found


def _override(data: dict[str, Any], text: str) -> None:
    """Carry out one `a.b=value` on plain data."""
    path, equals, value = text.partition("=")
    if not equals or not path:
        raise ConfigError(f"--set: got {text!r}, expected key=value such as plan.keep=all")
    _put(data, path, parse_yaml(value, f"--set {path}"), "--set")


def _put(data: dict[str, Any], path: str, value: Any, where: str) -> None:
    """Set the value at a dotted path of plain data; mappings on the way are made."""
    keys = path.split(".")
    where = f"{where} {path}"
    place: Any = data
    for key, following in zip(keys[:-1], keys[1:], strict=True):
        if isinstance(place, list):
            place = place[_index(place, key, where)]
        elif isinstance(place, dict):
            if not isinstance(place.get(key), (dict, list)):
                place[key] = [] if following.isdigit() and key in ("distill", "evaluate", "gates") else {}
            place = place[key]
        else:
            raise ConfigError(f"{where}: {key!r} is inside a plain value")
    if isinstance(place, list):
        place[_index(place, keys[-1], where)] = value
    else:
        place[keys[-1]] = value


def _index(items: list[Any], key: str, where: str) -> int:
    if not key.isdigit() or int(key) >= len(items):
        raise ConfigError(f"{where}: {key!r} is no place in a list of {len(items)}, expected 0 to {len(items) - 1}")
    return int(key)
