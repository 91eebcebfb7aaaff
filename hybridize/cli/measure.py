"""The verbs that measure quality: score, eval, gate, report."""

import os
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from hybridize.cli import shared
from hybridize.cli.shared import BaseArg, MeasuredOpt, RecipeOpt, SetOpt, SuiteOpt, TextOpt, cli
from hybridize.errors import ConfigError


@cli.command()
def score(
    base: BaseArg,
    metric: Annotated[list[str], typer.Option("--metric", help="energy, fisher, or {name: fisher, samples: 512}; repeatable.")],
    out: Annotated[Path, typer.Option("--out", help="Write the scores as JSON.")],
    data: TextOpt = None,
    recipe: Annotated[Optional[str], typer.Option(help="Its mixers are the candidates. Default: all, as they come.")] = None,  # noqa: UP045
    set_: SetOpt = [],  # noqa: B006
) -> None:
    """Measure a base layer by layer, for plans.

    Ranks of a plan can follow what weights or a text say of each layer. One layer is in memory at a time.
    """
    from hybridize.checkpoint import open_base
    from hybridize.conversions import SCORES
    from hybridize.conversions import score as run_score
    from hybridize.data import read_documents, tokenize
    from hybridize.hub import resolve_base
    from hybridize.pipeline import load_tokenizer
    from hybridize.recipe import parse_yaml
    from hybridize.storage import write_json

    specs = []
    for word in metric:
        spec = parse_yaml(word, "--metric")
        specs.append({"name": spec} if isinstance(spec, str) else spec)
        SCORES.build(specs[-1])
    if set_ and recipe is None:
        raise ConfigError("--set changes a recipe; give --recipe")
    folder = resolve_base(base)
    checkpoint = open_base(folder)
    section = None if recipe is None else shared.load(recipe, set_, checkpoint.config).plan
    text = None if data is None else tokenize(load_tokenizer(folder), read_documents(data))
    found = run_score(checkpoint, specs, text, section, progress=shared.screen.progress)
    write_json(out, found.to_dict())
    for table in found.tables:
        shown = SCORES.build(table.metric).shown
        rows = [{"layer": str(row.layer), "candidate": _candidate(row.candidate), **shown(row)} for row in table.rows]
        shared.screen.table([list(rows[0]), *(list(row.values()) for row in rows)], table.metric["name"])
    shared.screen.say(f"wrote {out}")
    shared.screen.result(found.to_dict())


def _candidate(spec: dict[str, Any] | None) -> str:
    """A candidate in a cell; nothing for the base's own layer."""
    if spec is None:
        return ""
    return " ".join([spec["name"], *(f"{key}={value}" for key, value in spec.items() if key != "name")])


@cli.command("eval")
def eval_(
    checkpoint: Annotated[str, typer.Argument(metavar="DIR", help="Directory or hub id of a base or hybrid.")],
    out: Annotated[Optional[Path], typer.Option("--out", help="Write the report as JSON.")] = None,  # noqa: UP045
    tasks: Annotated[Optional[str], typer.Option(help="lm-eval tasks, with commas between.")] = None,  # noqa: UP045
    task_data: Annotated[Optional[Path], typer.Option(help="Directory of data sets: arc_easy/test.jsonl, blimp/*.jsonl.")] = None,  # noqa: UP045
    include_path: Annotated[Optional[Path], typer.Option(help="Directory of your own lm-eval YAML tasks.")] = None,  # noqa: UP045
    recipe: RecipeOpt = None,
    suite: SuiteOpt = None,
    data: TextOpt = None,
    base: Annotated[Optional[str], typer.Option(help="For probes that compare. Default: the hybrid's own.")] = None,  # noqa: UP045
    limit: Annotated[Optional[int], typer.Option(help="At most so many items in each probe.")] = None,  # noqa: UP045
    cache: MeasuredOpt = None,
    set_: SetOpt = [],  # noqa: B006
) -> None:
    """Measure a checkpoint with probes and lm-eval tasks.

    A recipe's probes, a suite's, --tasks of lm-eval, or perplexity on --data alone. With --cache, one that was stopped goes on.

    Several processes share lm-eval's documents: torchrun --nproc_per_node N -m hybridize.eval DIR ...
    """
    from hybridize.checkpoint import open_checkpoint
    from hybridize.eval import comparison_table, evaluate
    from hybridize.hub import base_of, resolve_base
    from hybridize.lineage import origin

    folder = resolve_base(checkpoint)
    probes: list[dict[str, Any]] = []
    seed = 0
    if recipe is not None:
        chosen = shared.load(recipe, set_)
        probes, seed = list(chosen.evaluate), chosen.seed
    probes += shared.suite_of(suite, "evaluate")
    if tasks is not None:
        probes.append({"name": "lm_eval", "tasks": [t.strip() for t in tasks.split(",") if t.strip()]})
    folders = {"data_dir": task_data, "include_path": include_path}
    where = {name: str(folder) for name, folder in folders.items() if folder is not None}
    if where and not any(probe["name"] == "lm_eval" for probe in probes):
        raise ConfigError("--task-data and --include-path are for tasks of lm-eval; name some with --tasks, a suite or a recipe")
    # What a recipe says of its own task stands.
    probes = [{**where, **probe} if probe["name"] == "lm_eval" else probe for probe in probes]
    if not probes and data is not None:
        probes = [{"name": "perplexity"}]
    against = resolve_base(base) if base is not None else None
    if against is None:
        found = open_checkpoint(folder)
        against = base_of(folder) if found.is_hybrid or found.is_native else folder
    # A report of what the Hub has says so, and not where this machine's cache lies.
    known = origin(folder)
    name = f"{known['repo']}@{known['revision']}" if known else None
    main = os.environ.get("RANK", "0") == "0"
    report = evaluate(folder, probes, data, base=against, out=out, seed=seed, limit=limit,
                      progress=shared.screen.progress if main else None, cache=cache, name=name)  # fmt: skip
    if not main:
        return
    shared.screen.table(comparison_table({name or folder.name or checkpoint: report}))
    shared.screen.result(report.to_dict())


@cli.command()
def gate(
    report: Annotated[Path, typer.Argument(help="A report.json.")],
    baseline: Annotated[Optional[Path], typer.Option(help="The report to compare with.")] = None,  # noqa: UP045
    recipe: RecipeOpt = None,
    suite: SuiteOpt = None,
    rule: Annotated[list[str], typer.Option(help="Such as 'max_ratio perplexity 1.05'.")] = [],  # noqa: B006
    out: Annotated[Optional[Path], typer.Option("--out", help="Write the verdict as JSON.")] = None,  # noqa: UP045
    set_: SetOpt = [],  # noqa: B006
) -> None:
    """Judge a report against a baseline: a recipe's gates, a suite's, or --rule.

    Exit code 1 when a gate fails, 2 when there is nothing to judge by.
    """
    from hybridize.core import Report
    from hybridize.eval import gate as judge
    from hybridize.eval import parse_rule

    gates = [parse_rule(text) for text in rule]
    if recipe is not None:
        gates += shared.load(recipe, set_).gates
    gates += shared.suite_of(suite, "gates")
    verdict = judge(Report.read(report), None if baseline is None else Report.read(baseline), gates, out)
    shared.show_verdict(verdict)
    shared.screen.result(verdict.to_dict())
    if not verdict.passed:
        raise typer.Exit(1)


@cli.command()
def report(
    work: Annotated[list[Path], typer.Argument(metavar="WORKDIR...", help="The directory of a run, or of several.")],
    out: Annotated[Path, typer.Option("--out", help="The HTML file; .md and .all.json come beside it.")] = Path("report.html"),
) -> None:
    """Write the report of a run as one HTML file.

    Several runs are shown side by side. Nothing in the page comes from a network.
    """
    from hybridize.eval import report as write_report
    from hybridize.eval.report import written

    write_report(work, out)
    files = {what: str(path) for what, path in written(out).items()}
    shared.screen.say(f"wrote {', '.join(files.values())}")
    shared.screen.result({"out": str(out), **files})
