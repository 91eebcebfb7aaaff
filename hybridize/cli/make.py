"""The verbs that make something: plan, convert, distill, teach, run, demo."""

import dataclasses
import os
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from hybridize.cli import shared
from hybridize.cli.publish import publish_run
from hybridize.cli.shared import (
    BaseArg,
    CacheOpt,
    DataOpt,
    DirArg,
    MeasuredOpt,
    MemoryOpt,
    MfuOpt,
    OutOpt,
    PeakOpt,
    RecipeOpt,
    ResumeOpt,
    ScoresOpt,
    SetOpt,
    TeacherOpt,
    cli,
)
from hybridize.errors import ConfigError


@cli.command()
def plan(
    base: BaseArg,
    recipe: RecipeOpt = None,
    scores: ScoresOpt = None,
    out: Annotated[Optional[Path], typer.Option("--out", help="Write the plan as JSON.")] = None,  # noqa: UP045
    set_: SetOpt = [],  # noqa: B006
) -> None:
    """Decide what each layer becomes, and print it. Needs config.json only; reads no weights."""
    from hybridize.checkpoint import describe_base
    from hybridize.conversions import plan as make_plan
    from hybridize.hub import resolve_base
    from hybridize.storage import write_json

    found = describe_base(resolve_base(base, weights=False))
    chosen = shared.load(recipe, set_, found.config)
    made = make_plan(found, chosen.plan, chosen.name, chosen.seed, shared.read_scores(scores))
    if out is not None:
        write_json(out, made.to_dict())
    shared.show_plan(made)
    shared.screen.result(made.to_dict())


@cli.command()
def convert(
    base: BaseArg,
    out: OutOpt,
    recipe: RecipeOpt = None,
    plan_file: Annotated[Optional[Path], typer.Option("--plan", help="A plan.json instead of a recipe.")] = None,  # noqa: UP045
    scores: ScoresOpt = None,
    data: DataOpt = None,
    token_cache: CacheOpt = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, write nothing.")] = False,
    resume: ResumeOpt = False,
    set_: SetOpt = [],  # noqa: B006
) -> None:
    """Write the hybrid, out of core. Calibrated seeds need --data."""
    from hybridize.checkpoint import open_base
    from hybridize.conversions import convert as run_convert
    from hybridize.conversions import plan as make_plan
    from hybridize.core import Plan
    from hybridize.data import read_tokens
    from hybridize.hub import resolve_base
    from hybridize.pipeline import calibrated_layers, calibration_rows, load_tokenizer, need_text
    from hybridize.recipe import parse_recipe, text_sources

    if (recipe is None) == (plan_file is None):
        raise ConfigError("convert: give either --recipe or --plan")
    folder = resolve_base(base)
    checkpoint = open_base(folder)
    if plan_file is not None:
        if set_ or scores is not None:
            raise ConfigError(f"--{'set' if set_ else 'scores'} goes with a recipe; a plan is settled. Make a new plan")
        made, chosen = Plan.read(plan_file), parse_recipe({"name": "plan", "plan": {}}, "plan")
    else:
        chosen = shared.load(recipe, set_, checkpoint.config)
        made = make_plan(checkpoint, chosen.plan, chosen.name, chosen.seed, shared.read_scores(scores))
    text = None
    if calibrated_layers(made):
        if data is None and chosen.data.mixture is None:
            raise ConfigError(need_text(made))
        tokens = read_tokens(load_tokenizer(folder), text_sources(chosen, data), token_cache, shared.screen.progress)
        text = calibration_rows(tokens, chosen, checkpoint.config)
    summary = run_convert(made, out, text, resume=resume, dry_run=dry_run, progress=shared.screen.progress, base_path=folder)
    shared.show_plan(made)
    rows = [["layer", "mixer", "copied", "computed", "dropped"]]
    for layer in summary.layers:
        place = "outside" if layer.index is None else str(layer.index)
        rows.append([place, layer.mixer, str(layer.copied), str(layer.computed), ", ".join(layer.dropped) or "0"])
    shared.screen.table(rows)
    done = "would write" if dry_run else "wrote"
    shared.screen.say(f"{done} {out}: {summary.bytes:,} bytes in {summary.shards} shards; "
               f"copied {summary.copied}, computed {summary.computed}, dropped {summary.dropped} tensors")  # fmt: skip
    shared.screen.result({"out": str(out), "dry_run": dry_run, "bytes": summary.bytes, "copied": summary.copied,
                   "computed": summary.computed, "dropped": summary.dropped, "shards": summary.shards})  # fmt: skip


@cli.command()
def distill(
    checkpoint: DirArg,
    out: OutOpt,
    recipe: RecipeOpt = None,
    data: DataOpt = None,
    teacher: TeacherOpt = None,
    track: Annotated[Optional[str], typer.Option(help="A tracker for accelerate, such as tensorboard.")] = None,  # noqa: UP045
    token_cache: CacheOpt = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it will cost, and load nothing.")] = False,
    processes: Annotated[Optional[int], typer.Option(help="With --dry-run: as if started in so many.")] = None,  # noqa: UP045
    memory_gb: MemoryOpt = None,
    mfu: MfuOpt = 0.4,
    peak_tflops: PeakOpt = 989.0,
    shard: Annotated[bool, typer.Option("--shard", help="Divide weights and moments over the processes (FSDP2).")] = False,
    resume: ResumeOpt = False,
    set_: SetOpt = [],  # noqa: B006
) -> None:
    """Train a hybrid against its teacher, stage after stage.

    What it will cost is printed first.

    Several processes: torchrun --nproc_per_node N -m hybridize.distill DIR ... or accelerate launch -m hybridize.distill.
    """
    from hybridize.checkpoint import describe
    from hybridize.distill import distill as run_distill
    from hybridize.distill.cost import refuse, run_cost
    from hybridize.distill.run import build_stages
    from hybridize.distill.sharding import asked_to_shard
    from hybridize.distill.teachers import prepare
    from hybridize.hub import resolve_base, teacher_for
    from hybridize.pipeline import fitted, recall_of
    from hybridize.recipe import text_sources

    if processes is not None and not dry_run:
        raise ConfigError("--processes is for --dry-run; start them with torchrun or accelerate launch")
    folder = resolve_base(checkpoint)
    found = describe(folder)
    teacher = teacher_for(folder, teacher)
    chosen = shared.load(recipe, set_, found.config)
    stages = fitted(chosen.distill, found.config)
    main = os.environ.get("RANK", "0") == "0"
    shown = shared.screen.progress if main else None
    machine = shared.machine(memory_gb, mfu, peak_tflops, processes, asked_to_shard(shard))
    if main:
        built = build_stages(stages)
        taught = prepare(folder, teacher, built, chosen.seed)
        costs = run_cost(folder, taught.model, built, machine, taught.cache)
        shared.show_cost(costs, machine)
        if dry_run:
            shared.screen.result(shared.plain(costs))
            return
        refuse(costs, machine)
    text = None if data is None and chosen.data.mixture is None else text_sources(chosen, data)
    result = run_distill(folder, stages, text, out, teacher=teacher, resume=resume, seed=chosen.seed, progress=shown,
                         tracker=track, token_cache=token_cache, recall=recall_of(folder, chosen.seed),
                         shard=shard)  # fmt: skip
    if main:
        shared.screen.say(f"wrote {result}")
        shared.screen.result({"out": str(result), "stages": [stage["name"] for stage in stages]})


@cli.command()
def teach(
    checkpoint: DirArg,
    out: OutOpt,
    recipe: RecipeOpt = None,
    data: DataOpt = None,
    teacher: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Directory of a model with the hybrid's tokenizer. Default: the base that its lineage names."),
    ] = None,
    keep: Annotated[
        str,
        typer.Option(help="hidden: final hidden states, lossless, for any loss over logits. top_k: the likeliest tokens."),
    ] = "hidden",
    k: Annotated[Optional[int], typer.Option("--k", help="How many of these. Default: as the recipe's losses have it.")] = None,  # noqa: UP045
    as_run: Annotated[
        bool, typer.Option("--as-run", help="Only the text that `hybridize run` trains on, as for its --data.")
    ] = False,
    held_out: Annotated[Optional[str], typer.Option(help="With --as-run: its --held-out.")] = None,  # noqa: UP045
    token_cache: CacheOpt = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it will take, and write nothing.")] = False,
    resume: ResumeOpt = False,
    set_: SetOpt = [],  # noqa: B006
) -> None:
    """Write down what a teacher says of a text.

    `distill --teacher CACHE` reads it in place of the teacher, which then is neither loaded nor run.

    A cache fits every run of the same text, seed, rows and tokenizer, whatever its hybrid. Stages that compare layers
    (align) still read the base itself. Several processes: torchrun --nproc_per_node N -m hybridize teach DIR ...
    """
    from hybridize.checkpoint import describe
    from hybridize.data import load_tokenizer
    from hybridize.distill import plan_lesson
    from hybridize.distill import teach as run_teach
    from hybridize.eval.table import human_bytes
    from hybridize.hub import resolve_base, teacher_for
    from hybridize.pipeline import fitted, split_text
    from hybridize.recipe import text_sources

    if held_out is not None and not as_run:
        raise ConfigError("--held-out goes with --as-run; without it the cache is of all of --data, as `distill` trains on it")
    folder = resolve_base(checkpoint)
    found = describe(folder)
    teacher = teacher_for(folder, teacher)
    chosen = shared.load(recipe, set_, found.config)
    stages = fitted(chosen.distill, found.config)
    lesson = plan_lesson(folder, stages, teacher, keep, k, chosen.seed)
    main = os.environ.get("RANK", "0") == "0"
    if main:
        rows = [["stage", "rows", "tokens", "bytes"]]
        rows += [[need.name, f"{need.rows:,}", f"{need.tokens:,}", human_bytes(need.bytes)] for need in lesson.needs]
        shared.screen.table(rows, f"{out} will hold {human_bytes(lesson.bytes)}")
        for line in lesson.beside:
            shared.screen.say(line)
    result = {"out": str(out), "dry_run": dry_run, "bytes": lesson.bytes,
              "stages": [dataclasses.asdict(need) for need in lesson.needs]}  # fmt: skip
    if dry_run:
        shared.screen.result(result)
        return
    text, shown = text_sources(chosen, data), shared.screen.progress if main else None
    if as_run:
        tokens = token_cache or out.with_name(f"{out.name}.tokens")
        text, _ = split_text(load_tokenizer(folder), text, held_out, chosen.data.held_out_share, tokens, shown)
    run_teach(folder, stages, text, out, teacher=teacher, keep=keep, k=k, resume=resume, seed=chosen.seed, progress=shown,
              token_cache=token_cache)  # fmt: skip
    if main:
        shared.screen.say(f"wrote {out}; `hybridize distill ... --teacher {out}` reads it")
        shared.screen.result(result)


@cli.command()
def run(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe file, or the name of a built-in one.")],
    base: Annotated[str, typer.Option(help="Directory, hub id, alias, or 'demo'.")],
    out: Annotated[Path, typer.Option("--out", help="The working directory.")],
    data: DataOpt = None,
    held_out: Annotated[Optional[str], typer.Option(help="Text to evaluate on. Default: a share of --data.")] = None,  # noqa: UP045
    scores: ScoresOpt = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it will do and cost, and write nothing.")] = False,
    memory_gb: MemoryOpt = None,
    mfu: MfuOpt = 0.4,
    peak_tflops: PeakOpt = 989.0,
    teacher: TeacherOpt = None,
    cache: MeasuredOpt = None,
    resume: ResumeOpt = False,
    set_: SetOpt = [],  # noqa: B006
) -> None:
    """Plan, convert, distill, evaluate, gate and report.

    Plan and cost are printed first. Steps whose output matches are skipped.

    --dry-run needs no text, and of a hub id it fetches config.json alone.
    """
    machine = shared.machine(memory_gb, mfu, peak_tflops)
    if dry_run:
        _preview(recipe, set_, base, scores, machine, teacher)
    else:
        _run(recipe, set_, base, data, out, held_out, resume, scores, machine, teacher, cache)


def _preview(recipe: str, set_: list[str], base: str, scores: Path | None, machine: Any, teacher: str | None) -> None:
    from hybridize.checkpoint import describe_base
    from hybridize.hub import resolve_base, teacher_for
    from hybridize.pipeline import preview

    folder, teacher = resolve_base(base, weights=False), teacher_for(None, teacher)
    chosen = shared.load(recipe, set_, describe_base(folder).config)
    made, costs = preview(chosen, folder, machine, shared.read_scores(scores), teacher)
    shared.show_plan(made)
    shared.show_cost(costs, machine)
    shared.screen.result({"dry_run": True, "plan": made.to_dict(), "cost": shared.plain(costs)})


def _run(
    recipe: str, set_: list[str], base: str, data: str | None, out: Path, held_out: str | None, resume: bool,
    scores: Path | None = None, machine: Any = None, teacher: str | None = None, cache: Path | None = None,
) -> None:  # fmt: skip
    from hybridize.checkpoint import describe_base
    from hybridize.hub import resolve_base, teacher_for
    from hybridize.pipeline import run as run_all

    machine = machine or shared.machine()
    cost: list[Any] = []

    def announce(made: Any, costs: list[Any]) -> None:
        cost.extend(shared.plain(costs))
        shared.show_plan(made)
        shared.show_cost(costs, machine)

    folder, teacher = resolve_base(base), teacher_for(None, teacher)
    chosen = shared.load(recipe, set_, describe_base(folder).config)
    result = run_all(chosen, folder, data, out, held_out=held_out, resume=resume, progress=shared.screen.progress,
                     scores=shared.read_scores(scores), machine=machine, announce=announce, teacher=teacher,
                     cache=cache)  # fmt: skip
    shared.screen.say("")
    shared.screen.table(result.table())
    shared.screen.say(f"\nreport: {result.html}")
    if result.verdict is not None:
        shared.show_verdict(result.verdict)
    passed = result.verdict is not None and result.verdict.passed
    pushed = publish_run(out, chosen.push) if chosen.push is not None and passed else None
    if chosen.push is not None and not passed:
        shared.screen.say(f"not pushed to {chosen.push.repo}: no verdict that passed")
    shared.screen.result({"out": str(out), "report": str(result.html), "cost": cost, "table": result.table(),
                   "verdict": None if result.verdict is None else result.verdict.to_dict(), "pushed": pushed})  # fmt: skip
    if result.verdict is not None and not result.verdict.passed:
        raise typer.Exit(1)


@cli.command()
def demo(
    out: Annotated[Path, typer.Option("--out", help="The working directory.")] = Path("demo-run"),
    long: Annotated[bool, typer.Option("--long", help="Train ten times longer: half an hour to an hour.")] = False,
    resume: ResumeOpt = False,
) -> None:
    """Run the whole line on the bundled model.

    Text is the standard library's; nothing is downloaded.
    """
    from hybridize.demo.stdlib_text import write_demo_text

    train, held_out = write_demo_text(out.with_name(out.name + ".text"))
    _run("demo-long" if long else "demo", [], "demo", str(train), out, str(held_out), resume)
