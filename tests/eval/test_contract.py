"""What holds for every probe and every gate, by looping over the tables."""

import dataclasses
import inspect

import pytest

from hybridize.errors import ConfigError
from hybridize.eval import GATES, PROBES
from hybridize.recipe import builtin_suites, load_recipe, load_suite

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


@pytest.mark.parametrize("name", builtin_suites())
def test_suites_name_what_there_is(name):
    suite = load_suite(name)
    assert suite.name == name
    assert suite.about
    for probe in suite.evaluate:
        assert PROBES.build(probe)
    for gate in suite.gates:
        assert GATES.build(gate)


def test_suites_stand_among_a_recipes_own_and_in_each_other(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("name: r\nplan: {keep: all}\nevaluate: [{name: speed}, offline]\ngates: offline\n")
    offline, recipe = load_suite("offline"), load_recipe(path)
    assert recipe.evaluate == [{"name": "speed"}, *offline.evaluate]
    assert recipe.gates == offline.gates
    assert load_recipe(path, ["gates.1.max=7.5"]).gates[1]["max"] == 7.5
    assert load_recipe(path, ["evaluate=[offline]"]).evaluate == offline.evaluate
    standard = load_suite("standard")
    assert standard.gates[: len(offline.gates)] == offline.gates
    assert {"mmlu", "gsm8k"} <= {task for probe in standard.evaluate for task in probe.get("tasks", [])}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name: s\nevaluate: [SELF]\ngates: []\n", "names itself"),
        ("name: s\nevaluate: []\ngates: []\nabuot: x\n", "unknown key 'abuot'. Did you mean 'about'"),
        ("name: s\nevaluate: [ofline]\ngates: []\n", "no suite 'ofline'.*Did you mean 'offline'"),
        ("name: s\ngates: []\n", "suite .*: evaluate: field required"),
    ],
)
def test_a_suite_that_cannot_be_used_is_one_line(text, words, tmp_path):
    path = tmp_path / "s.yaml"
    path.write_text(text.replace("SELF", str(path)))
    with pytest.raises(ConfigError, match=words) as caught:
        load_suite(path)
    assert "\n" not in str(caught.value)
