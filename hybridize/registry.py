"""One table per kind of component: name -> "module:class", loaded when first used, options checked strictly.

A component is a frozen dataclass of its own options. `build({"name": "mamba2", "conv_tokens": 4})` returns it, or an
error that names the unknown key and lists the known ones.
"""

import dataclasses
import difflib
import importlib
import types
import typing
from typing import Any

from hybridize.errors import ConfigError


def suggest(word: str, known: list[str]) -> str:
    """Text such as "Did you mean 'gdn'? Known: attention, gdn" for an unknown word."""
    near = difflib.get_close_matches(word, known, n=1)
    hint = f"Did you mean {near[0]!r}? " if near else ""
    return f"{hint}Known: {', '.join(known)}"


def _matches(value: Any, kind: Any) -> bool:
    origin = typing.get_origin(kind)
    if kind is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(_matches(value, arm) for arm in typing.get_args(kind))
    if origin is typing.Literal:
        return any(value is arm or (type(value) is type(arm) and value == arm) for arm in typing.get_args(kind))
    if origin in (list, tuple):
        inner = typing.get_args(kind)
        return isinstance(value, (list, tuple)) and (not inner or all(_matches(item, inner[0]) for item in value))
    if origin is dict:
        return isinstance(value, dict)
    if kind is type(None):
        return value is None
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, kind)


def _name_of(kind: Any) -> str:
    if typing.get_origin(kind) is typing.Literal:
        return "one of " + ", ".join(repr(arm) for arm in typing.get_args(kind))
    return kind.__name__ if isinstance(kind, type) else str(kind).replace("typing.", "")


def make(cls: type, options: dict[str, Any], where: str) -> Any:
    """Build the options dataclass `cls`, or raise a ConfigError that names `where`, the key and what was expected."""
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for key in options:
        if key not in fields:
            raise ConfigError(f"{where}: unknown option {key!r}. {suggest(str(key), sorted(fields))}")
    hints = typing.get_type_hints(cls)
    for key, value in options.items():
        if not _matches(value, hints[key]):
            raise ConfigError(f"{where}: {key} is {value!r}, expected {_name_of(hints[key])}")
    missing = [
        name
        for name, field in fields.items()
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING and name not in options
    ]
    if missing:
        raise ConfigError(f"{where}: {missing[0]!r} is missing; it has no default")
    try:
        return cls(**options)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error


class Registry:
    """A table of components of one kind.

    Args:
        kind: what an entry is, for messages ("mixer", "gate").
        entries: name -> "module:attribute".
    """

    def __init__(self, kind: str, entries: dict[str, str]):
        self.kind = kind
        self.entries = entries

    def names(self) -> list[str]:
        return sorted(self.entries)

    def load(self, name: str) -> type:
        """The options dataclass behind a name. Raises ConfigError for an unknown one."""
        if name not in self.entries:
            raise ConfigError(f"unknown {self.kind} {name!r}. {suggest(str(name), self.names())}")
        module, attribute = self.entries[name].split(":")
        return getattr(importlib.import_module(module), attribute)

    def build(self, spec: dict[str, Any]) -> Any:
        """Build a component from {"name": ..., **options}."""
        if not isinstance(spec, dict) or not isinstance(spec.get("name"), str):
            raise ConfigError(f"{self.kind}: got {spec!r}, expected a mapping with a 'name'")
        options = {key: value for key, value in spec.items() if key != "name"}
        return make(self.load(spec["name"]), options, f"{self.kind} {spec['name']!r}")

    def spec(self, name: str, component: Any) -> dict[str, Any]:
        """The full {"name": ..., **options} of a built component, every default filled in."""
        return {"name": name, **dataclasses.asdict(component)}
