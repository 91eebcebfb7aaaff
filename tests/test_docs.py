"""The documentation's text: everything that can be named in a recipe has its place, and what pages say is there is there.

The site itself is built by `make docs`, which CI runs; here no Sphinx is needed.
"""

import dataclasses
import re
from pathlib import Path

import pytest
import typer

from hybridize.cli.shared import cli
from hybridize.kernels._core.table import specs
from hybridize.mixers.mamba2 import Mamba2
from hybridize.recipe import builtin_recipes, builtin_suites, load_recipe
from scripts import build_docs, docs_messages, docs_parts, docs_text

ROOT = Path(__file__).parents[1]
PAGES = {str(path.relative_to(ROOT / "docs")): path.read_text(encoding="utf-8") for path in (ROOT / "docs").rglob("*.md")}
KINDS = {kind: table.names() for kind, table in docs_parts.TABLES.items()} | {"suite": list(builtin_suites())}


@pytest.mark.parametrize("kind", KINDS)
def test_everything_in_a_table_has_its_place(kind):
    assert build_docs.without_page(kind, KINDS[kind]) == []
    # A new one would be missed.
    assert build_docs.without_page(kind, ["no_such_thing"]) == ["no_such_thing"]


@pytest.mark.parametrize("name", docs_parts.MIXERS.names())
def test_a_mixers_page_says_it_all(name):
    page = PAGES[f"mixers/{name}.md"]
    for heading in (f"# {name}", "## What it computes", "## Cost", "## When to use it", "## Proof"):
        assert f"{heading}\n" in page
    asked = build_docs.asked(page)
    for part in (("options", f"mixer {name}"), ("options", f"conversion {name}"), ("native", name)):
        assert part in asked
    assert next(spec for part, spec in asked if part == "costs")
    assert f"\n{name}\n" in PAGES["mixers/index.md"]


def test_pages_ask_for_parts_that_there_are():
    asked = [(page, part) for page, text in PAGES.items() for part, _ in build_docs.asked(text)]
    assert {part for _, part in asked} == set(build_docs.PARTS)
    # A comment that is written wrongly would stay in the page.
    assert sum(text.count("<!-- make") for text in PAGES.values()) == len(asked)


def test_every_page_is_in_the_menu():
    """But for recipes' pages, whose list is made."""
    listed = set()
    for page, text in PAGES.items():
        for menu in re.findall(r"```{toctree}\n(.*?)```", text, re.S):
            entries = [line for line in menu.splitlines() if line and not line.startswith(":")]
            listed |= {str(Path(page).parent / f"{entry}.md") for entry in entries}
    assert listed == set(PAGES) - {"index.md"}


@pytest.mark.parametrize(("kind", "table"), docs_parts.TABLES.items(), ids=docs_parts.TABLES)
def test_every_option_has_a_text(kind, table):
    for name in table.names():
        cls = table.load(name)
        texts = docs_text.field_texts(cls)
        # Every loss has a weight, and a weight is a weight.
        assert [field.name for field in dataclasses.fields(cls) if not texts.get(field.name) and field.name != "weight"] == []


def test_options_are_those_of_the_class():
    rows = [line.split(" | ") for line in docs_text.options(Mamba2).splitlines()[2:]]
    assert [row[0].strip("| `") for row in rows] == [field.name for field in dataclasses.fields(Mamba2)]
    assert rows[0][1:3] == ["`int`", "`4`"]
    assert rows[1][1] == "`'grouped' \\| 'expanded'`"
    assert "Taps of the causal convolution" in rows[0][3]


def test_text_of_docstrings_is_text():
    assert docs_text.plain("a*b of `x|y` <z> n_kv") == r"a\*b of `x\|y` \<z\> n\_kv"
    assert (
        docs_text.prose("One.\n\n    y = x | z\n\nTwo:\n    w\n")
        == "One.\n\n```text\ny = x | z\n```\n\nTwo:\n\n```text\nw\n```\n"
    )


def test_costs_are_the_formula():
    """The state of Mamba2 as its page has it: 4 n_h d^2 + 3 (n_h + 2 n_kv) d b."""
    made = docs_parts.costs([{"name": "mamba2"}]).splitlines()
    assert "530 KiB" in next(line for line in made if "`mamba2`" in line)
    assert 4 * 32 * 64**2 + 3 * (32 + 2 * 8) * 64 * 2 == 530 * 1024
    assert "| `attention` | 10,485,760 | 2 MiB | 64 MiB | 256 MiB | 100.00% |" in made


def test_verdicts_are_the_plans():
    table = docs_parts.native("mamba2").splitlines()
    assert any(line.startswith("| every second layer | Llama, Mistral, Qwen2 | `granitemoehybrid` |") for line in table)
    assert any("Qwen3 | none |" in line and "q/k-norms" in line for line in table)
    # An engine is a column, and what it says a note.
    engines = {"A": {"target": "bamba", "reason": "runs"}, "B": {"target": "none", "reason": "no"}}
    found = docs_parts.Verdicts("plan")
    for family in docs_parts.FAMILIES:
        found.add("x", family, {"target": "bamba", "reason": "r", "engines": engines})
    shown = found.shown()
    assert "| plan | base | native class | A | B | why |" in shown
    assert "| x | any | `bamba` | `bamba` | none | r |" in shown
    assert shown.endswith("\nA:\n\n- `bamba`: runs\n\nB:\n\n- none: no\n")


def test_the_page_of_a_recipe():
    page = docs_parts.recipe_page("mla")
    recipe = load_recipe("mla")
    for part in (recipe.distill, recipe.evaluate, recipe.gates):
        assert part
        assert all(f"[{spec['name']}](#" in page for spec in part)
    assert "| 0-15 | [mla](../mixers/mla.md) |" in page
    assert all("\nabout:" in path.read_text(encoding="utf-8") for path in builtin_recipes().values())
    assert "arXiv 2505.17272" in docs_parts._head_comment(builtin_recipes()["zebra-llama"].read_text())


def test_messages_that_are_explained_are_raised():
    entries = [entry for group in docs_messages.entries().values() for entry in group]
    assert len(entries) >= 60
    assert all(set(entry) == {"message", "cause", "do"} and all(entry.values()) for entry in entries)
    assert docs_messages.gone() == []
    assert not any(docs_messages.fits("has … no such words", text) for text in docs_messages.strings())
    assert docs_messages.fits("got …, expected", "x: got … of …, expected …")
    assert not docs_messages.fits("expected … got", "x: got …, expected …")


def test_every_other_message_is_listed():
    raised = docs_messages.messages()
    assert len(raised) > 500
    page = docs_messages.page() + docs_messages.others()
    said = [entry["message"] for group in docs_messages.entries().values() for entry in group]
    for text in raised:
        assert text in page or any(docs_messages.fits(fragment, text) for fragment in said), text


def test_tests_that_pages_name_are_there():
    named = {found for text in PAGES.values() for found in re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", text)}
    assert len(named) > 50
    for file, test in named:
        source = (ROOT / file).read_text(encoding="utf-8")
        assert f"def {test}(" in source if test else source, (file, test)


def test_commands_that_pages_name_are_there():
    """Every `hybridize VERB --flag` in a block of code is one of the command line's."""
    group = typer.main.get_command(cli)
    lines = [
        line.split("#")[0]
        for text in PAGES.values()
        for line in text.splitlines()
        if re.match(r"(.*\| |.*run: )?hybridize ", line)
    ]
    lines = [line for line in lines if not line.startswith("hybridize turns")]
    assert len(lines) > 14
    for line in lines:
        words = line[line.index("hybridize ") :].split()[1:]
        command = group.commands[words[0]]
        if hasattr(command, "commands"):
            command = command.commands[words[1]]
        flags = {flag for parameter in command.params for flag in parameter.opts} | {"--json", "--quiet", "--long"}
        assert {word.split("=")[0] for word in words if word.startswith("--")} <= flags, line


def test_what_comes_from_elsewhere_is_seen(tmp_path):
    (tmp_path / "a.html").write_text(
        '<a href="https://x.org">x</a><script src="https://cdn.x/y.js"></script><img src="_static/a.png">'
    )
    (tmp_path / "a.css").write_text("a { background: url(//x/y.woff2) } b { background: url(data:image/png;base64,//) }")
    assert build_docs.from_outside(tmp_path) == ["a.css: //x/y.woff2", "a.html: https://cdn.x/y.js"]


def test_pins_are_of_what_the_site_needs():
    needed = re.search(r"^docs = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(), re.M)[1]
    pinned = {line.split("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines()}
    assert {re.match(r'"([\w-]+)', word)[1].lower() for word in needed.split(", ")} <= pinned


def test_every_function_of_a_kernel_is_in_the_reference():
    for spec in specs():
        assert f"autofunction:: hybridize.kernels.{spec.op}.{spec.name}\n" in PAGES["api.md"]
