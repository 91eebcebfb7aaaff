"""What the site computes from the package: options, costs, verdicts, recipes. Nothing of it is written by hand."""

import dataclasses
import io
import sys
from contextlib import redirect_stdout
from functools import cache
from typing import Any

import torch
import yaml

from hybridize.checkpoint import Described, describe_base
from hybridize.conversions import CONVERSIONS, SCORES
from hybridize.conversions import plan as make_plan
from hybridize.core import Plan, plan_table
from hybridize.distill import LOSSES, STAGES
from hybridize.distill.options import StageOptions
from hybridize.errors import ConfigError
from hybridize.eval import GATES, PROBES
from hybridize.eval.table import human_bytes
from hybridize.hub import shape_of
from hybridize.kernels._core.table import specs
from hybridize.mixers import MIXERS
from hybridize.recipe import builtin_recipes, builtin_suites, load_recipe, load_suite
from scripts.docs_text import code, options, plain, prose, table

TABLES = {
    "mixer": MIXERS, "conversion": CONVERSIONS, "metric": SCORES, "stage": STAGES, "loss": LOSSES, "probe": PROBES, "gate": GATES,
}  # fmt: skip
SHAPES = ("llama-3.2-1b", "llama-3-8b")
# One shape of each family, for what depends on it.
FAMILIES = {"Llama": "llama-3-8b", "Mistral": "mistral-7b", "Qwen2": "qwen2.5-7b", "Qwen3": "qwen3-8b"}
LENGTHS = {"1k": 1024, "32k": 32768, "128k": 131072}
# A layer below that leaves what this mixer reads, where it reads another layer.
BELOW: dict[str, dict[str, Any]] = {"gmu": {"name": "mamba2"}}
SHARED = frozenset(field.name for field in dataclasses.fields(StageOptions))


@cache
def base_of(shape: str) -> Described:
    return describe_base(shape_of(shape))


def component(kind: str, name: str) -> str:
    """A section of a component: what its class says, and its options."""
    cls = TABLES[kind].load(name)
    # What the methods of a seed are stands at the head of its file.
    about = sys.modules[cls.__module__].__doc__ if kind == "conversion" else cls.__doc__
    shared = SHARED if kind == "stage" else frozenset()
    rule = getattr(cls, "rule", None)
    words = f"As a rule: `{name} {' '.join(part.upper() for part in rule)}`.\n\n" if kind == "gate" and rule else ""
    return f"{prose(about or '')}\n{words}{options(cls, shared)}"


def stage_options() -> str:
    """What all stages share."""
    return options(StageOptions)


def conversion_of(mixer: str) -> str:
    """The seed of a mixer: what it says of itself, and its options."""
    return component("conversion", mixer)


def _parameters(config: Any, spec: dict[str, Any]) -> int:
    """Of one layer's mixer; the base's attention where it stays."""
    with torch.device("meta"):
        module = MIXERS.build(spec).build(config, int(spec.get("reads") or 0) + 1 if "reads" in spec else 0)
    if module is None:
        from transformers.models.llama.modeling_llama import LlamaAttention

        with torch.device("meta"):
            module = LlamaAttention(config, 0)
    return sum(parameter.numel() for parameter in module.parameters())


def _spec(spec: dict[str, Any]) -> str:
    rest = ", ".join(f"{key}: {value}" for key, value in spec.items() if key != "name")
    return f"{spec['name']} {rest}".strip()


def costs(specs: list[dict[str, Any]]) -> str:
    """Parameters and state of one layer at two shapes, attention's first."""
    out = []
    for shape in SHAPES:
        config = base_of(shape).config
        kept = MIXERS.build({"name": "attention"})
        rows = [["one layer", "parameters", *(f"state at {name}" for name in LENGTHS), "of attention's at 32k"]]
        for spec in [{"name": "attention"}, *(spec for spec in specs if spec["name"] != "attention")]:
            made = MIXERS.build(spec)
            states = [made.state_bytes(config, tokens) for tokens in LENGTHS.values()]
            share = made.state_bytes(config, LENGTHS["32k"]) / kept.state_bytes(config, LENGTHS["32k"])
            rows.append([code(_spec(spec)), f"{_parameters(config, spec):,}", *map(human_bytes, states), f"{share:.2%}"])
        out.append(f"Shape of `{shape}` ({str(config.dtype).removeprefix('torch.')}):\n\n{table(rows)}")
    return "\n".join(out)


def all_costs() -> str:
    """One row a mixer at its defaults, and the state of the whole model for each recipe."""
    specs = [{"name": name, **({"reads": 0} if name in BELOW else {})} for name in MIXERS.entries]
    return costs(specs)


def recipe_costs() -> str:
    """Cache of the whole model under each recipe, against the base's."""
    out = []
    for shape in SHAPES:
        rows = [["recipe", *(f"state at {name}" for name in LENGTHS), *(f"of the base's at {name}" for name in LENGTHS)]]
        for name in builtin_recipes():
            made = plan_of(name, shape)
            total = [sum(layer.state_bytes[str(tokens)] for layer in made.layers) for tokens in LENGTHS.values()]
            shares = [f"{mine / made.base_state_bytes[str(t)]:.1%}" for mine, t in zip(total, LENGTHS.values(), strict=True)]
            rows.append([f"[{name}](recipes/{name}.md)", *map(human_bytes, total), *shares])
        out.append(f"## Recipes at the shape of {shape}\n\n{table(rows)}")
    return "\n".join(out)


@cache
def plan_of(recipe: str, shape: str) -> Plan:
    base = base_of(shape)
    chosen = load_recipe(recipe, [], base.config)
    return make_plan(base, chosen.plan, chosen.name, chosen.seed)


@cache
def section_plan(shape: str, section: str) -> Plan | None:
    """A plan of a section, which is YAML; None where it cannot be."""
    try:
        return make_plan(base_of(shape), yaml.safe_load(section), "docs", 0)
    except ConfigError:
        return None


class Verdicts:
    """Rows of plans with what the native table says of them, and notes on how each engine runs them, or why it does not."""

    def __init__(self, first: str):
        self.rows: list[list[str]] = []
        self.notes: dict[str, list[str]] = {}
        self.first = first

    def add(self, what: str, family: str, verdict: dict[str, Any]) -> None:
        engines: dict[str, dict[str, str]] = verdict.get("engines", {})
        if not self.rows:
            self.rows.append([self.first, "base", "native class", *engines, "why"])
        why = plain(verdict["reason"].partition("; the hybrid loads through this package")[0])
        self.rows.append([what, family, _class_of(verdict), *(_class_of(said) for said in engines.values()), why])
        for engine, said in engines.items():
            note = f"{_class_of(said)}: {plain(said['reason'])}"
            if said["reason"] not in verdict["reason"] and note not in self.notes.setdefault(engine, []):
                self.notes[engine].append(note)

    def shown(self) -> str:
        notes = "".join(
            f"\n{engine}:\n\n" + "".join(f"- {note}\n" for note in found) for engine, found in self.notes.items() if found
        )
        return table(_merged(self.rows)) + notes


def _class_of(said: dict[str, Any]) -> str:
    return {"none": "none", "itself": "as it is"}.get(said["target"]) or code(said["target"])


def sections_of(name: str) -> dict[str, dict[str, Any]]:
    """Plans in which a mixer's verdict is asked: in every second layer, and in all of them."""
    if name in BELOW:
        return {"above a layer that it reads": {"layers": {0: BELOW[name], 1: {"name": name}, "default": {"name": "attention"}}}}
    if name == "attention":
        return {"all layers": {"keep": "all"}}
    return {
        "every second layer": {"keep": {"every": 2}, "mixer": {"name": name}},
        "all layers": {"keep": {"layers": []}, "mixer": {"name": name}},
    }


def verdicts(sections: dict[str, dict[str, Any]]) -> str:
    """What the native table says of plans, for one base of each family."""
    found = Verdicts("plan")
    for what, section in sections.items():
        for family, shape in FAMILIES.items():
            made = section_plan(shape, yaml.safe_dump(section))
            if made is not None:
                found.add(what, family, dict(made.native))
    return found.shown()


def _merged(rows: list[list[str]]) -> list[list[str]]:
    """Rows that differ in the family alone as one."""
    out: list[list[str]] = []
    for row in rows:
        equal = next((other for other in out if other[0] == row[0] and other[2:] == row[2:]), None)
        if equal is None:
            out.append(list(row))
        else:
            equal[1] += f", {row[1]}"
    return [[row[0], "any" if row[1] == ", ".join(FAMILIES) else row[1], *row[2:]] for row in out]


def native(mixer: str) -> str:
    return verdicts(sections_of(mixer))


def all_natives() -> str:
    return verdicts({f"`{name}`, {what}": section for name in MIXERS.names() for what, section in sections_of(name).items()})


def recipe_natives() -> str:
    """The verdict of each recipe's plan, for two families that differ most; a base that the recipe refuses has no row."""
    found = Verdicts("recipe")
    for name in builtin_recipes():
        for family in ("Llama", "Qwen3"):
            try:
                made = plan_of(name, FAMILIES[family])
            except ConfigError:
                continue
            found.add(f"[{name}](recipes/{name}.md)", family, dict(made.native))
    return found.shown()


def kernels() -> str:
    """Every function of every op: which implementations it has, and what it is timed beside."""
    rows = [["function", "implementations beside PyTorch", "gradients", "writes in place", "timed beside"]]
    for spec in specs():
        rows.append([
            code(f"{spec.op}.{spec.name}"), ", ".join(map(code, spec.impls)) or "none",
            "yes" if spec.grads else "no", ", ".join(map(code, spec.in_place)) or "nothing",
            ", ".join(spec.anchors) or "PyTorch alone",
        ])  # fmt: skip
    return table(rows)


def _head_comment(text: str) -> str:
    """The comment that a recipe's file begins with: its source."""
    lines = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").removeprefix(" "))
    # A command in a comment is indented.
    out, block = [], []
    for line in [*lines, ""]:
        if line.startswith("  "):
            block.append(line.strip())
            continue
        if block:
            out.append("\n```\n" + "\n".join(block) + "\n```\n")
            block = []
        out.append(plain(line))
    return "\n".join(out).strip()


def _cell(value: Any) -> str:
    if type(value) is int:
        return code(f"{value:,}")
    return code(yaml.safe_dump(value, default_flow_style=True, width=10_000, sort_keys=False).removesuffix("\n...\n").strip())


def _components(kind: str, specs: list[dict[str, Any]], page: str) -> str:
    rows = [[kind, "options"]]
    for spec in specs:
        rest = {key: value for key, value in spec.items() if key != "name"}
        said = ", ".join(f"{code(key)} {_cell(value)}" for key, value in rest.items())
        rows.append([f"[{spec['name']}](#{kind}-{spec['name'].replace('_', '-')})", said or "as they come"])
    return table(rows) if specs else "None.\n"


def recipe_page(name: str) -> str:
    """The whole page of a recipe."""
    path = builtin_recipes()[name]
    text = path.read_text(encoding="utf-8")
    recipe, raw = load_recipe(name), yaml.safe_load(text)
    parts = [f"# {name}\n", f"{plain(recipe.about)}\n"]
    if comment := _head_comment(text):
        parts.append(f"## Source and notes\n\n{comment}\n")
    parts.append(f"""## Run it

```
hybridize plan {SHAPES[0]} --recipe {name}
hybridize run {name} --base DIR --data text.jsonl --out work --dry-run
hybridize run {name} --base DIR --data text.jsonl --out work
```

`hybridize recipes show {name}` prints it with every default; any key is changed with `--set`.
""")
    parts.append("## Plan\n")
    for shape in SHAPES:
        made = plan_of(name, shape)
        rows = [["layers", "mixer", "options", "seed", "parameters", "state at 32k"]]
        for row in plan_table(made):
            said = ", ".join(f"{key}={value}" for key, value in row["options"].items() if value is not None)
            link = f"[{row['mixer']}](../mixers/{row['mixer']}.md)"
            method = str(row["conversion"].get("method", "keep"))
            state = human_bytes(row["state_bytes"]["32768"])
            rows.append([row["layers"], link, plain(said), method, f"{row['parameters']:,}", state])
        whole = sum(layer.state_bytes["32768"] for layer in made.layers) / made.base_state_bytes["32768"]
        parts.append(f"On the shape of `{shape}`, with {whole:.1%} of the base's cache at 32k tokens; native class: "
                     f"{made.native['target']} ({plain(made.native['reason'])}).\n\n{table(rows)}")  # fmt: skip
    if recipe.sizes:
        parts.append("What the method chose base by base stands under `sizes` in the file below.\n")
    parts.append(f"## Stages\n\n{_components('stage', recipe.distill, 'stages.md')}")
    suites = [entry for part in ("evaluate", "gates") for entry in raw.get(part, []) if isinstance(entry, str)]
    named = sorted(set(suites))
    note = f"Of these, some come with the suite {', '.join(f'[{s}](#suite-{s})' for s in named)}.\n\n" if named else ""
    parts.append(f"## Probes\n\n{note}{_components('probe', recipe.evaluate, 'probes.md')}")
    parts.append(f"## Gates\n\n{_components('gate', recipe.gates, 'gates.md')}")
    parts.append(f"## The file\n\n```yaml\n{text.rstrip()}\n```\n")
    return "\n".join(parts)


def recipe_list() -> str:
    """A table of all recipes, and the list that the site's menu is made of."""
    rows = [["recipe", "what it does"]]
    rows += [[f"[{name}]({name}.md)", plain(load_recipe(name).about)] for name in builtin_recipes()]
    menu = "\n".join(builtin_recipes())
    return f"{table(rows)}\n```{{toctree}}\n:hidden:\n\n{menu}\n```\n"


def suite(name: str) -> str:
    """What a suite measures and judges."""
    found = load_suite(name)
    text = builtin_suites()[name].read_text(encoding="utf-8").rstrip()
    return f"{plain(found.about)}\n\n{_head_comment(text)}\n\n```yaml\n{text}\n```\n"


def commands() -> str:
    """What --help says of every command."""
    import click
    import typer

    from hybridize.cli.shared import cli

    out = []

    def add(command: click.Command, words: list[str]) -> None:
        if isinstance(command, click.Group) or hasattr(command, "commands"):
            for name, inner in getattr(command, "commands").items():  # noqa: B009
                add(inner, [*words, name])
            return
        context = command.make_context(words[-1], [], resilient_parsing=True)
        context.info_name = " ".join(words)
        context.max_content_width = 110
        context.terminal_width = 110
        with redirect_stdout(io.StringIO()) as shown:
            said = command.get_help(context)
        out.append(f"## {' '.join(words[1:])}\n\n```text\n{(said or shown.getvalue()).strip()}\n```\n")

    add(typer.main.get_command(cli), ["hybridize"])
    return "\n".join(sorted(out))
