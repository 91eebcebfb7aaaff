"""The report verb: the directories of runs as one HTML page that needs nothing beside it, and as text and JSON."""

from collections.abc import Sequence
from pathlib import Path

from hybridize.errors import ConfigError
from hybridize.eval.report import curves, sections
from hybridize.eval.report.data import as_data
from hybridize.eval.report.document import Document
from hybridize.eval.report.folder import Run, read_runs
from hybridize.eval.report.markdown import markdown
from hybridize.eval.report.page import page
from hybridize.eval.table import comparison_table
from hybridize.storage import write_json, write_text

__all__ = ["comparison_table", "report", "written"]


def report(work: Path | Sequence[Path], out: Path) -> Path:
    """Write the report of a run, or of several side by side; parts that are not there yet are left out.

    Args:
        work: a directory of `hybridize run`, or several: plan.json, scores.json, report-base.json, report-converted.json,
            report.json and the items beside them, verdict.json, distilled.metrics.jsonl (any `*.metrics.jsonl`),
            bench.json, recipe.yaml, and the lineages of converted/ and distilled/.
        out: the HTML file. The same as text lies beside it under its name with .md, the figures unrounded with .all.json:
            report.json is a run's own.

    Returns:
        `out`.

    Raises:
        ConfigError: `out` does not end in .html, no directory, or one that is there twice.
        CheckpointError: a directory holds nothing of a run, or something that cannot be read.
        MissingDependencyError: matplotlib is absent.
    """
    folders = [Path(work)] if isinstance(work, (str, Path)) else [Path(folder) for folder in work]
    if not folders:
        raise ConfigError("report: got no directory, expected at least one of `hybridize run`")
    out = Path(out)
    if out.suffix.lower() not in (".html", ".htm"):
        raise ConfigError(f"report: the page is to be {out}, expected a name that ends in .html")
    runs = read_runs(folders)
    made = _document(runs)
    files = written(out)
    write_text(files["markdown"], markdown(made))
    write_json(files["json"], as_data(runs))
    write_text(out, page(made))
    return out


def written(out: Path) -> dict[str, Path]:
    """The files of a report by what they are: html, markdown, json."""
    return {"html": out, "markdown": out.with_suffix(".md"), "json": out.with_suffix(".all.json")}


def _document(runs: list[Run]) -> Document:
    alone = len(runs) == 1
    made = [
        sections.before_and_after(runs),
        sections.layers(runs),
        sections.scores(runs),
        curves.losses(runs),
        *curves.against_length(runs),
        curves.by_position(runs),
        curves.memory_and_speed(runs),
        sections.samples(runs),
        sections.recipe(runs),
        sections.environment(runs),
    ]
    first = runs[0]
    title, subtitle = f"{len(runs)} runs side by side", ", ".join(run.name for run in runs)
    if alone:
        title, subtitle = first.name, ""
    if alone and first.plan is not None:
        title = first.plan.recipe
        subtitle = f"{first.plan.family}, base {first.base_name}, {len(first.plan.layers)} layers; run {first.name}"
    return Document(
        title=f"hybridize: {title}",
        subtitle=subtitle,
        banners=[sections.banner(run, alone) for run in runs],
        sections=[section for section in made if section is not None],
    )
