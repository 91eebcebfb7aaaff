"""What the commands share: the application, the screen, the options, and how a recipe, plan or verdict is shown."""

import dataclasses
import os
from pathlib import Path
from typing import Annotated, Any, Literal, Optional

import typer

from hybridize.console import Screen
from hybridize.errors import ConfigError

# Nothing here may start a download behind the user's back, and no library may draw over our progress.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

cli = typer.Typer(
    name="hybridize", no_args_is_help=True, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False,
    help="Turn a pretrained transformer into a hybrid that costs a fraction of the memory, distil it against the "
    "original, and prove it.\n\nGlobal: --json (one JSON document on stdout), --quiet, -v.",
)  # fmt: skip
# Replaced as a whole by `app` when the global flags are known.
screen = Screen()

BaseArg = Annotated[
    str, typer.Argument(metavar="BASE", help="Directory, hub id, also id@revision, alias such as llama-3-8b, or 'demo'.")
]
DirArg = Annotated[str, typer.Argument(metavar="DIR", help="Directory of a checkpoint, or a hub id, also id@revision.")]
RecipeOpt = Annotated[Optional[str], typer.Option("--recipe", help="A recipe file, or the name of a built-in one.")]  # noqa: UP045
SuiteOpt = Annotated[Optional[str], typer.Option("--suite", help="Probes and gates: offline, standard, or a file.")]  # noqa: UP045
SetOpt = Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help="Override a recipe key: plan.keep=all.")]
DataOpt = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--data", metavar="TEXT", help=".txt, .jsonl, .parquet, glob, hub id, or {a.txt: 0.7, b.jsonl: 0.3}."),
]
TextOpt = Annotated[Optional[str], typer.Option("--data", metavar="TEXT", help=".txt, .jsonl, .parquet, glob or hub id.")]  # noqa: UP045
CacheOpt = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("--token-cache", help="Folder that keeps the tokens of texts, for other runs to use."),
]
MeasuredOpt = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("--cache", help="Folder that keeps reports and answers, so that the same is measured once."),
]
ScoresOpt = Annotated[Optional[Path], typer.Option("--scores", help="A scores.json, for ranks that follow it.")]  # noqa: UP045
MemoryOpt = Annotated[Optional[float], typer.Option(help="GB of a process's device. Default: what is here.")]  # noqa: UP045
MfuOpt = Annotated[float, typer.Option(help="Share of the peak that hours are given at.")]
PeakOpt = Annotated[float, typer.Option(help="The peak: dense bf16 of an H100 or H200.")]
TeacherOpt = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        "--teacher", metavar="DIR|CACHE", help="A model, also a hub id, or what `teach` wrote. Default: the base of the lineage."
    ),
]
OutOpt = Annotated[Path, typer.Option("--out", help="Where to write; must not exist yet.")]
ResumeOpt = Annotated[bool, typer.Option("--resume", help="Go on with what a killed run left.")]


def load(source: str | None, overrides: list[str], config: Any = None) -> Any:
    """A recipe with its overrides, settled for a base's config where one is given, every component checked.

    Raises:
        ConfigError: the recipe or an override cannot be used.
    """
    from hybridize.pipeline import check_components
    from hybridize.recipe import load_recipe

    if source is None:
        raise ConfigError("--recipe is missing; give a recipe file or a name that `hybridize recipes ls` lists")
    recipe = load_recipe(source, overrides, config)
    check_components(recipe)
    return recipe


def suite_of(source: str | None, part: Literal["evaluate", "gates"]) -> list[dict[str, Any]]:
    """The probes or gates of a suite, none for no suite. Raises ConfigError when it cannot be used."""
    from hybridize.recipe import load_suite

    return [] if source is None else list(getattr(load_suite(source), part))


def read_scores(path: Path | None) -> Any:
    """The layer scores of a file, None for none. Raises CheckpointError when they cannot be used."""
    from hybridize.core import Scores

    return None if path is None else Scores.read(path)


def show_plan(plan: Any) -> None:
    """Print a plan layer by layer, the sums, and its native verdict."""
    from hybridize.core import plan_table
    from hybridize.eval.table import human_bytes

    lengths = {"1024": "state @1k", "4096": "@4k", "32768": "@32k", "131072": "@128k"}
    rows = [["layers", "mixer", "options", "method", "parameters", *lengths.values()]]
    for row in plan_table(plan):
        options = ", ".join(f"{key}={value}" for key, value in row["options"].items() if value is not None)
        method = str(row["conversion"].get("method", "keep"))
        states = [human_bytes(row["state_bytes"][t]) for t in lengths]
        rows.append([row["layers"], row["mixer"], options, method, f"{row['parameters']:,}", *states])
    total = {t: sum(layer.state_bytes[t] for layer in plan.layers) for t in lengths}
    parameters = sum(layer.parameters for layer in plan.layers)
    rows.append(["all", "", "", "", f"{parameters:,}", *(human_bytes(total[t]) for t in lengths)])
    rows.append(["base", "", "", "", "", *(human_bytes(plan.base_state_bytes[t]) for t in lengths)])
    rows.append(["all / base", "", "", "", "", *(f"{total[t] / plan.base_state_bytes[t]:.2%}" for t in lengths)])
    screen.table(rows, f"{plan.recipe} on {plan.family}")
    screen.say(f"KV per token: {plan.kv_share:.2%} of the base's (recurrent states and windows aside, which do not grow)")
    show_engines(plan.native)


def show_engines(verdict: dict[str, Any]) -> None:
    """Print the native class of a plan or checkpoint, and what each engine makes of it."""
    screen.say(f"native class: {verdict['target']} ({verdict['reason']})")
    way = {"none": "no", "itself": "as it is"}
    for engine, said in verdict["engines"].items():
        screen.say(f"  {engine}: {way.get(said['target'], 'export --to ' + said['target'])}: {said['reason']}")


def show_verdict(verdict: Any) -> None:
    """Print the gates with their values and limits, what each found, then PASS or FAIL."""
    rows = [["gate", "value", "limit", ""]]
    for result in verdict.gates:
        numbers = ["" if number is None else f"{number:.6g}" for number in (result.value, result.limit)]
        rows.append([result.name, *numbers, "pass" if result.passed else "FAIL"])
    screen.table(rows)
    for result in verdict.gates:
        screen.say(f"{'pass' if result.passed else 'FAIL'}  {result.name}: {result.detail}")
    screen.say("PASS" if verdict.passed else "FAIL")


def machine(
    memory_gb: float | None = None, mfu: float = 0.4, peak_tflops: float = 989.0, processes: int | None = None,
    sharded: bool = False,
) -> Any:  # fmt: skip
    """What this runs on, or would. Raises ConfigError for figures that cannot be."""
    from hybridize.distill.cost import Machine, device_bytes

    return Machine(
        processes=processes or int(os.environ.get("WORLD_SIZE", "1")), sharded=sharded,
        bytes_each=device_bytes() if memory_gb is None else memory_gb * 1e9, mfu=mfu, peak_flops=peak_tflops * 1e12,
    )  # fmt: skip


def plain(costs: list[Any]) -> list[dict[str, Any]]:
    """The costs of stages as JSON has them."""
    return [{**dataclasses.asdict(cost), "total_bytes": cost.total_bytes} for cost in costs]


def show_cost(costs: list[Any], machine: Any) -> None:
    """Print what each stage will cost, and whether it fits; nothing where nothing is trained."""
    import torch

    if not costs:
        return
    parts = list(costs[0].memory)
    rows = [["stage", "tokens", "steps", "trained", "FLOP", "GPU-hours", *parts, "all"]]
    for cost in costs:
        sizes = [f"{cost.memory[part] / 1e9:.3f} GB" for part in parts]
        rows.append([cost.name, f"{cost.tokens:,}", f"{cost.steps:,}", f"{cost.trained_parameters:,}", f"{cost.flops:.3g}",
                     f"{cost.gpu_hours:.3g}", *sizes, f"{cost.total_bytes / 1e9:.3f} GB"])  # fmt: skip
    screen.table(rows, f"memory of each of {machine.processes} process(es){', sharded' if machine.sharded else ''}")
    screen.say(f"GPU-hours at {machine.mfu:.0%} of {machine.peak_flops / 1e12:g} TFLOP/s, all GPUs together")
    if not torch.cuda.is_available():
        screen.say("there is no GPU here: the hours above are that machine's, how long it takes on this one is not known")
    for cost in costs:
        if cost.disk_bytes:
            screen.say(f"{cost.name}: one layer in memory, {cost.disk_bytes / 1e9:.3f} GB of files beside the output meanwhile")
        if cost.advice:
            screen.say(f"{cost.name}: {cost.advice}")
    if machine.bytes_each is not None and not any(cost.advice for cost in costs):
        screen.say(f"fits: the most a process needs is {max(cost.total_bytes for cost in costs) / 1e9:.3f} GB of "
                   f"{machine.bytes_each / 1e9:.3f} GB")  # fmt: skip
