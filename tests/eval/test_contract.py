"""What holds for every probe and every gate, by looping over the tables."""

import dataclasses
import inspect

import pytest

from hybridize.errors import ConfigError
from hybridize.eval import GATES, PROBES

EVERY = [(PROBES, name) for name in PROBES.names()] + [(GATES, name) for name in GATES.names()]
NEEDED = {"lm_eval": {"tasks": ["arc_easy"]}, "recovery": {"tasks": ["a"], "min": 1.0}}
NEEDED |= {"max_ratio": {"metric": "a", "max": 1.0}, "max_value": {"metric": "a", "max": 1.0}}
NEEDED |= {"min_value": {"metric": "a", "min": 1.0}, "max_rise": {"metric": "a", "max": 1.0}}
NEEDED |= {"parity": {"max": 1e-4}, "decode_speed": {"min": 1.0}}


@pytest.mark.parametrize(("table", "name"), EVERY)
def test_is_a_frozen_dataclass_of_documented_options(table, name):
    cls = table.load(name)
    assert dataclasses.is_dataclass(cls)
    assert cls.__doc__
    assert inspect.getdoc(cls.__call__)
    built = table.build({"name": name, **NEEDED.get(name, {})})
    with pytest.raises(dataclasses.FrozenInstanceError):
        built.anything = 1
    assert table.build(table.spec(name, built)) == built


@pytest.mark.parametrize(("table", "name"), EVERY)
def test_unknown_options_are_refused(table, name):
    with pytest.raises(ConfigError, match="unknown option 'nonsense'. Known: "):
        table.build({"name": name, **NEEDED.get(name, {}), "nonsense": 1})


def test_every_gate_can_be_written_as_a_rule():
    for name in GATES.names():
        cls = GATES.load(name)
        assert set(cls.rule) <= {field.name for field in dataclasses.fields(cls)}
        assert isinstance(cls.compares, bool)
