"""The sections that are tables and text: verdict, before and after, layers, scores, samples, recipe, environment."""

import dataclasses
import re
import statistics
from collections.abc import Iterator
from pathlib import PurePath
from typing import Any

from hybridize.core import LayerScore, Plan, Report, ScoreTable, plan_table
from hybridize.eval.report.changes import Change, Difference, changes, differences, is_cost, largest, sentence, with_metrics
from hybridize.eval.report.document import (
    Banner,
    Block,
    Cell,
    Code,
    Entry,
    Fold,
    LayerMap,
    Prose,
    Quotes,
    Section,
    Table,
)
from hybridize.eval.report.folder import Run
from hybridize.eval.table import comparison_table, human_bytes, name_order, over, show

BY_POSITION = "nll_at"
MOST_SAMPLES = 12
# Sixteen of sixty-four hexadecimal digits tell two checkpoints of one page apart.
HASH_DIGITS = 16
# A longer table of second thoughts is shown when asked for.
LONG_TABLE = 10


def banner(run: Run, alone: bool) -> Banner:
    """The verdict, and in one sentence what was made, what it costs and what it lost."""
    word, tone, gates = "No verdict yet", "", ()
    if run.verdict is not None:
        word, tone = ("Pass", "good") if run.verdict.passed else ("Fail", "bad")
        gates = run.verdict.gates
        failed = sum(not gate.passed for gate in gates)
        word += f": {failed} of {len(gates)} gates failed" if failed else f": {len(gates)} of {len(gates)} gates" if gates else ""
    return Banner(run="" if alone else run.name, word=word, tone=tone, sentence=sentence(run), gates=gates)


def before_and_after(runs: list[Run]) -> Section | None:
    """Every metric side by side; loss by position has a section of its own."""
    blocks: list[Block] = []
    for label, keep in (
        ("How well it does", lambda name, metric: not is_cost(metric) and not _is_nll(name)),
        ("How likely right answers were", lambda name, metric: not is_cost(metric) and _is_nll(name)),
        ("What it costs", lambda _, metric: is_cost(metric)),
    ):
        table = _one_run(runs[0], label, _shown(keep)) if len(runs) == 1 else _several(runs, label, _shown(keep))
        if table is not None:
            folded = any(_is_nll(_text_of(row[0])) for row in table.rows) and len(table.rows) > LONG_TABLE
            blocks.append(Fold(title=f"{label}: mean -log p of their tokens", blocks=[table]) if folded else table)
    notes = list(_notes(runs))
    if blocks and notes:
        blocks.append(Prose(text=" ".join(notes)))
    return Section(title="Before and after" if len(runs) == 1 else "Side by side", blocks=blocks) if blocks else None


def _shown(keep: Any) -> Any:
    return lambda name, metric: keep(name, metric) and not name.startswith(f"{BY_POSITION}@")


def _is_nll(name: str) -> bool:
    return "_nll@" in name


def _text_of(cell: str | Cell) -> str:
    return cell.text if isinstance(cell, Cell) else cell


def _notes(runs: list[Run]) -> Iterator[str]:
    """What the numbers mean, where there are such."""
    metrics = [metric for run in runs if run.final is not None for metric in run.final.metrics.values()]
    if any(metric.stderr for metric in metrics):
        yield "± is one standard error."
    if len(runs) == 1 and runs[0].base is not None and runs[0].final is not None and changes(runs[0].base, runs[0].final):
        yield (
            "A paired difference is the mean over the same items, last checkpoint less base, in the unit of the metric; it is "
            "coloured where it is more than two standard errors from nothing."
        )
    if any(metric.unit == "tokens/s" for metric in metrics):
        yield "Tokens/s of two columns were measured at different times and are not divided; speedups were measured in turns."
    if shared_base(runs) is not None and len(runs) > 1:
        yield "Each run is divided by its own measurement of the base; one that is not alike in all runs is said to differ."


def _better(reports: list[Report], name: str) -> str:
    metric = next(report.metrics[name] for report in reports if name in report.metrics)
    return "higher" if metric.higher_is_better else "lower"


def _one_run(run: Run, label: str, keep: Any) -> Table | None:
    reports = with_metrics(run.reports, keep)
    heading, *rows = comparison_table(reports)
    if not rows:
        return None
    paired = changes(run.base, run.final) if run.base is not None and run.final is not None else {}
    paired = {name: one for name, one in paired.items() if one.in_unit and any(row[0] == name for row in rows)}
    out: list[list[str | Cell]] = [[*heading, *(["paired difference"] if paired else []), "better"]]
    for row in rows:
        cells: list[str | Cell] = [*row]
        if paired:
            one = paired.get(row[0])
            tone = "" if one is None else "bad" if one.worse else "good" if one.better else ""
            cells.append("-" if one is None else Cell(text=_spelled(one), tone=tone))
        out.append([*cells, _better(list(reports.values()), row[0])])
    return Table(label=label, rows=out)


def _spelled(one: Change) -> str:
    return f"{one.mean:+.3g} ± {one.stderr:.2g}" if one.mean or one.stderr else "0"


def shared_base(runs: list[Run]) -> Report | None:
    """What was measured on the base that all runs began with, by whichever of them; None where they did not begin alike."""
    bases = [run.base for run in runs if run.base is not None]
    if len(bases) < len(runs) or len({base.checkpoint_hash for base in bases}) > 1:
        return None
    metrics = {name: metric for base in reversed(bases) for name, metric in base.metrics.items()}
    return dataclasses.replace(bases[0], metrics=metrics)


def _several(runs: list[Run], label: str, keep: Any) -> Table | None:
    """Each run's last checkpoint, and over the base that was measured with it."""
    finals = [run.final for run in runs if run.final is not None]
    names = sorted({name for final in finals for name, metric in final.metrics.items() if keep(name, metric)}, key=name_order)
    if not names:
        return None
    one_base = shared_base(runs) is not None
    heading = ["metric", *(["base"] if one_base else [])]
    heading += [word for run in runs for word in (run.name, f"{run.name} / base")]
    rows: list[list[str | Cell]] = [[*heading, "better"]]
    for name in names:
        found = [tuple(report and report.metrics.get(name) for report in (run.base, run.final)) for run in runs]
        row: list[str | Cell] = [name]
        if one_base:
            known = sorted({show(base) for base, _ in found if base is not None})
            # What differs was measured at different times, or on different items.
            row.append(known[0] if len(known) == 1 else "differs" if known else "-")
        for base, final in found:
            row += ["-" if final is None else show(final), over(base, final)]
        rows.append([*row, _better(finals, name)])
    return Table(label=label, rows=rows)


def layers(runs: list[Run]) -> Section | None:
    """What each layer became and the cache that it keeps."""
    plans = [(run, run.plan) for run in runs if run.plan is not None]
    names = sorted(
        {layer.mixer["name"] for _, plan in plans for layer in plan.layers}, key=lambda name: (name != "attention", name)
    )
    colour = {name: place for place, name in enumerate(names)}
    blocks: list[Block] = []
    for run, plan in plans:
        longest = max((int(tokens) for layer in plan.layers for tokens in layer.state_bytes), default=0)
        held = [layer.state_bytes.get(str(longest), 0) for layer in plan.layers]
        of = "" if len(runs) == 1 else f" of {run.name}"
        entries = [
            Entry(
                number=layer.index, name=layer.mixer["name"], colour=colour[layer.mixer["name"]], bar=size / max([*held, 1]),
                note=human_bytes(size),
            )
            for layer, size in zip(plan.layers, held, strict=True)
        ]  # fmt: skip
        blocks.append(LayerMap(label=f"Layers{of}, with their cache of {longest:,} tokens of one sequence", entries=entries))
        blocks.append(Fold(title=f"Options and sizes{of}", blocks=[_kinds(plan, f"Kinds of layers{of}")]))
    return Section(title="Layers", blocks=blocks) if blocks else None


def _kinds(plan: Plan, label: str) -> Table:
    lengths = sorted({int(tokens) for layer in plan.layers for tokens in layer.state_bytes})
    rows: list[list[str | Cell]] = [["layers", "mixer", "options", "seed", "parameters", *(f"cache at {n:,}" for n in lengths)]]
    for kind in plan_table(plan):
        options = ", ".join(f"{key}={value}" for key, value in kind["options"].items() if value is not None)
        seed = ", ".join(str(value) for value in kind["conversion"].values() if value is not None) or "kept"
        sizes = [human_bytes(kind["state_bytes"].get(str(n), 0)) for n in lengths]
        rows.append([kind["layers"], kind["mixer"], options, seed, f"{kind['parameters']:,}", *sizes])
    return Table(label=label, rows=rows)


def scores(runs: list[Run]) -> Section | None:
    """A heat map of layer scores: one column for each metric, part and candidate, shaded within itself."""
    blocks: list[Block] = []
    seen = []
    for run in runs:
        if run.scores is None or run.scores.tables in seen:
            continue
        seen.append(run.scores.tables)
        columns = [column for table in run.scores.tables for column in _columns(table)]
        found = sorted({row.layer for table in run.scores.tables for row in table.rows})
        if not columns:
            continue
        rows: list[list[str | Cell]] = [["layer", *(title for title, _ in columns)]]
        for layer in found:
            rows.append([str(layer), *(_heat(values, layer) for _, values in columns)])
        blocks.append(Table(label=f"Scores of the layers of {run.base_name}".removesuffix(" of "), rows=rows))
    if not blocks:
        return None
    about = "Each column is shaded from its least to its greatest score. Of a score that is a curve its mean is shown."
    return Section(title="Scores of the layers", blocks=[Prose(text=about), *blocks])


def _columns(table: ScoreTable) -> list[tuple[str, dict[int, float]]]:
    """(title, score by layer) of every part and candidate."""
    found: dict[str, dict[int, float]] = {}
    for row in table.rows:
        for part, value in row.values.items():
            number = statistics.fmean(value) if isinstance(value, (list, tuple)) else value
            found.setdefault(f"{table.metric['name']}: {part}{_candidate(row)}", {})[row.layer] = number
    return list(found.items())


def _candidate(row: LayerScore) -> str:
    if row.candidate is None:
        return ""
    options = (f"{key}={value}" for key, value in row.candidate.items() if key != "name")
    return f", {' '.join([row.candidate['name'], *options])}"


def _heat(values: dict[int, float], layer: int) -> str | Cell:
    if layer not in values:
        return "-"
    least, most = min(values.values()), max(values.values())
    return Cell(text=f"{values[layer]:.4g}", shade=(values[layer] - least) / (most - least) if most > least else 0.0)


def samples(runs: list[Run]) -> Section | None:
    """How many items got worse or better, and the ones on which base and last checkpoint differ most."""
    blocks: list[Block] = []
    for run in runs:
        found = differences(run)
        chosen = largest(found, MOST_SAMPLES if len(runs) == 1 else MOST_SAMPLES // 3)
        if not found:
            continue
        rows: list[list[str | Cell]] = [["metric", "items", "worse", "better", "alike"]]
        for name, items in found.items():
            worse, better = sum(item.size < 0 for item in items), sum(item.size > 0 for item in items)
            rows.append([name, f"{len(items)}", f"{worse}", f"{better}", f"{len(items) - worse - better}"])
        table = Table(label="Items by how base and last checkpoint score", rows=rows)
        own: list[Block] = [_sample(item, place == 0) for place, item in enumerate(chosen)]
        own.append(Fold(title="How many items differ", blocks=[table]))
        blocks += own if len(runs) == 1 else [Fold(title=run.name, blocks=own)]
    return Section(title="Where base and student differ most", blocks=blocks) if blocks else None


def _sample(item: Difference, first: bool) -> Fold:
    way = "worse" if item.size < 0 else "better"
    entries = [
        ("shown", item.prompt), ("expected", item.expected), ("the base", item.base[0]), ("the student", item.student[0]),
    ]  # fmt: skip
    return Fold(
        title=f"{item.metric}: {way}, {item.base[1]:.4g} to {item.student[1]:.4g}", open=first,
        blocks=[Quotes(entries=[(name, text) for name, text in entries if text])],
    )  # fmt: skip


def recipe(runs: list[Run]) -> Section | None:
    """The recipes, as they were resolved."""
    blocks: list[Block] = []
    for run in runs:
        if run.recipe is not None:
            label = "recipe.yaml" if len(runs) == 1 else f"recipe.yaml of {run.name}"
            blocks.append(Fold(title=label, blocks=[Code(label=label, text=run.recipe)]))
    return Section(title="Recipe", blocks=blocks) if blocks else None


def environment(runs: list[Run]) -> Section | None:
    """Versions, machine and hashes: what the numbers depend on."""
    alone = len(runs) == 1
    reports = {
        column if alone else f"{run.name}, {column}": report
        for run in runs
        for column, report in run.reports.items()
        if alone or report is run.final
    }
    blocks: list[Block] = []
    if reports:
        rows: list[list[str | Cell]] = [["", *reports]]
        for key in sorted({key for report in reports.values() for key in report.versions}):
            rows.append([key, *(_brief(report.versions.get(key, "-")) for report in reports.values())])
        rows.append(["checkpoint", *(PurePath(report.checkpoint).name for report in reports.values())])
        rows.append(["checkpoint hash", *(_brief(report.checkpoint_hash) for report in reports.values())])
        blocks.append(Table(label="What was measured, and on what", rows=rows))
    for run in runs:
        if found := hashes(run):
            of = "" if alone else f" of {run.name}"
            every: list[list[str | Cell]] = [["of", "sha256"], *([what, value] for what, value in found.items())]
            blocks.append(Fold(title=f"Every hash{of}", blocks=[Table(label=f"Hashes{of}", rows=every)]))
    return Section(title="Environment and hashes", blocks=blocks) if blocks else None


def _brief(value: str) -> str:
    """A hash by its beginning, which all its digits under "Every hash" follow; other values as they are."""
    return value[:HASH_DIGITS] if re.fullmatch("[0-9a-f]{64}", value) else value


def hashes(run: Run) -> dict[str, str]:
    """By what they are of: the plan, the checkpoints, their files, the items."""
    found: dict[str, str] = {}
    if run.plan is not None:
        found |= {"base, config.json": run.plan.base_hash, "plan": run.plan.digest()}
    for column, report in run.reports.items():
        known = {"checkpoint": report.checkpoint_hash} | report.versions
        found |= {f"{column}, {name}": value for name, value in known.items() if _brief(value) != value}
    for column, lineage in run.lineages.items():
        found |= {f"{column}/{name}": sha for name, sha in sorted(lineage["files"].items())}
    if run.final is not None:
        found |= {
            f"items of {name}": sha for name, sha in sorted(run.final.item_hashes.items(), key=lambda pair: name_order(pair[0]))
        }
    return found
