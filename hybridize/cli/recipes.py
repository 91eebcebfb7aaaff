"""The recipes: list, show, validate, schema."""

import dataclasses
from typing import Annotated, Optional

import typer

from hybridize.cli import shared
from hybridize.cli.shared import SetOpt, cli

recipes = typer.Typer(no_args_is_help=True, help="The recipes: list, show, validate, or print their schema; the suites.")
cli.add_typer(recipes, name="recipes")


@recipes.command("ls")
def recipes_ls() -> None:
    """List the built-in recipes."""
    from hybridize.recipe import builtin_recipes, load_recipe

    found = {name: load_recipe(name).about for name in builtin_recipes()}
    shared.screen.table([["recipe", "what it does"], *([name, about] for name, about in found.items())])
    shared.screen.result(found)


@recipes.command("show")
def recipes_show(name: Annotated[str, typer.Argument(help="A built-in recipe or a file.")], set_: SetOpt = []) -> None:  # noqa: B006
    """Print a recipe with every default filled in."""
    recipe = shared.load(name, set_)
    shared.screen.say(recipe.resolved().rstrip())
    shared.screen.result(recipe.model_dump())


@recipes.command("validate")
def recipes_validate(file: Annotated[str, typer.Argument(help="A recipe file.")], set_: SetOpt = []) -> None:  # noqa: B006
    """Check a recipe: keys, component names and their options."""
    recipe = shared.load(file, set_)
    shared.screen.say(f"{file}: valid ({len(recipe.distill)} stages, {len(recipe.evaluate)} probes, {len(recipe.gates)} gates)")
    shared.screen.result({"valid": True, "name": recipe.name})


@recipes.command("suites")
def recipes_suites(name: Annotated[Optional[str], typer.Argument(help="Print this one.")] = None) -> None:  # noqa: UP045
    """List the suites of probes and gates that recipes, eval and gate may name, or print one."""
    from hybridize.recipe import builtin_suites, load_suite

    if name is not None:
        suite = load_suite(name)
        shared.screen.say(suite.resolved().rstrip())
        shared.screen.result(suite.model_dump())
        return
    found = {name: load_suite(name).about for name in builtin_suites()}
    shared.screen.table([["suite", "what it measures and judges"], *([name, about] for name, about in found.items())])
    shared.screen.result(found)


@recipes.command("schema")
def recipes_schema() -> None:
    """Print the JSON schema of a recipe, and the options of every component."""
    import json

    from hybridize.conversions import CONVERSIONS, SCORES
    from hybridize.distill import LOSSES, STAGES
    from hybridize.eval import GATES, PROBES
    from hybridize.mixers import MIXERS
    from hybridize.recipe import Recipe

    schema = Recipe.model_json_schema()
    tables = {
        "mixers": MIXERS,
        "conversions": CONVERSIONS,
        "metrics": SCORES,
        "stages": STAGES,
        "losses": LOSSES,
        "probes": PROBES,
        "gates": GATES,
    }
    schema["components"] = {
        kind: {
            name: {f.name: str(f.type) for f in dataclasses.fields(table.load(name))} for name in table.names()
        }
        for kind, table in tables.items()
    }  # fmt: skip
    if shared.screen.as_json:
        shared.screen.result(schema)
    else:
        shared.screen.say(json.dumps(schema, indent=1))
