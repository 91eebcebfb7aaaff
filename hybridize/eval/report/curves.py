"""The sections that are pictures: losses, recall against length, loss by position, memory and speed against context."""

from collections.abc import Iterable, Iterator
from typing import Any

from hybridize.core import Report
from hybridize.eval.lookup import family
from hybridize.eval.pictures import Axes, Line, chart, length, thinned
from hybridize.eval.report.changes import is_cost
from hybridize.eval.report.document import Block, Chart, Charts, Prose, Section, Table
from hybridize.eval.report.folder import Curve, Run
from hybridize.eval.report.sections import BY_POSITION, shared_base
from hybridize.eval.table import human_bytes, name_order

# Grey is the base's, blue the last checkpoint's; other runs follow.
COLUMN_COLOURS = {"base": 0, "converted": 2, "distilled": 1}
# What the figures of a loss have of a curve: so many rows.
FIGURE_ROWS = 12
SPEEDS = {"decode_tokens_per_s": "decode", "prefill_tokens_per_s": "prefill"}
RATIOS = {"decode_speedup": "decode speed over the base's", "prefill_speedup": "prefill speed over the base's"}
BENCHED = {
    "decode_tokens_per_s": ("Decode", "tokens/s"), "prefill_tokens_per_s": ("Prefill", "tokens/s"),
    "time_to_first_token_s": ("Time to first token", "seconds"), "peak_bytes": ("Peak memory", ""),
    "cache_bytes": ("Cache", ""),
}  # fmt: skip
BENCH_RATIOS = {
    "decode_speedup": "Decode speed over the base's", "prefill_speedup": "Prefill speed over the base's",
    "cache_ratio": "Cache over the base's", "peak_ratio": "Peak memory over the base's",
}  # fmt: skip


def compared(runs: list[Run]) -> dict[str, tuple[int, Report]]:
    """(colour, report) by the name that a picture gives it: one run's columns, or every run's last beside the bases."""
    if len(runs) == 1:
        return {column: (COLUMN_COLOURS[column], report) for column, report in runs[0].reports.items()}
    found: dict[str, tuple[int, Report]] = {}
    if (base := shared_base(runs)) is not None:
        found["base"] = (0, base)
    for place, run in enumerate(runs, 1):
        if "base" not in found and run.base is not None:
            found[f"base of {run.name}"] = (len(runs) + place, run.base)
        if run.final is not None:
            found[run.name] = (place, run.final)
    return found


def losses(runs: list[Run]) -> Section | None:
    """Loss against tokens, a picture for each stage; of several runs the stages of one name are laid over each other."""
    known = [run.losses if len(runs) == 1 else _by_name(run.losses) for run in runs]
    stages = {stage: None for one in known for stage in one}
    charts, figures = [], []
    for stage in stages:
        lines = [
            Line(label=run.name, points=tuple(thinned(one[stage])), colour=1 + place)
            for place, (run, one) in enumerate(zip(runs, known, strict=True))
            if stage in one
        ]
        about = "; ".join(f"{line.label}: from {line.points[0][1]:.4g} to {line.points[-1][1]:.4g}" for line in lines)
        charts.append(
            Chart(title=f"Loss of stage {stage}", svg=chart(lines, Axes(x="tokens", y="loss"), f"loss-{stage}"), about=about)
        )
        for line in lines:
            step = max(1, len(line.points) // FIGURE_ROWS)
            figures += [[stage, line.label, f"{tokens:,.0f}", f"{loss:.4g}"] for tokens, loss in line.points[::step]]
    if not charts:
        return None
    legend = [(1 + place, run.name) for place, run in enumerate(runs)] if len(runs) > 1 else []
    table = Table(label="Loss by tokens", rows=[["stage", "run", "tokens", "loss"], *figures])
    return Section(title="Distillation", blocks=[Charts(label="", legend=legend, charts=charts, figures=table)])


def _by_name(losses: dict[str, Curve]) -> dict[str, Curve]:
    """Curves of "1: kl", "2: kl" as "kl", "kl, again": where a stage stands differs from run to run."""
    found: dict[str, Curve] = {}
    for stage, curve in losses.items():
        name = stage.partition(": ")[2]
        while name in found:
            name += ", again"
        found[name] = curve
    return found


def against_length(runs: list[Run]) -> list[Section]:
    """Every metric NAME@N that was measured at two lengths or more: what is recalled, and how well text is predicted."""
    shown = compared(runs)
    names = sorted({name for _, report in shown.values() for name in _families(report)}, key=name_order)
    recall = [name for name in names if _recalls(name, shown)]
    others = [name for name in names if name not in recall]
    likely = [name for name in recall if name.endswith("_nll")]
    answers = [name for name in recall if name not in likely]
    sections = []
    for title, parts, x in (
        (
            "Recall against length",
            {"": answers, "Mean -log p of right answers, in nats per token": likely},
            "length, after the @",
        ),
        ("Perplexity against context", {"": others}, "context, tokens"),
    ):
        blocks: list[Block] = []
        for label, chosen in parts.items():
            charts = [found for name in chosen if (found := _family_chart(name, shown, x)) is not None]
            if charts:
                blocks.append(Charts(label=label, legend=_legend(shown, chosen), charts=charts, figures=None))
        if blocks:
            sections.append(Section(title=title, blocks=blocks))
    return sections


def _families(report: Report) -> set[str]:
    heads = (name.rpartition("@")[0] for name, metric in report.metrics.items() if not is_cost(metric))
    return {head for head in heads if head and head != BY_POSITION and len(family(report, head)) > 1}


def _recalls(name: str, shown: dict[str, tuple[int, Report]]) -> bool:
    """Whether a family is about answers: shares of them that are right, or how likely they were."""
    metrics = [report.metrics[full] for _, report in shown.values() for full in family(report, name).values()]
    return name.endswith("_nll") or any(metric.higher_is_better for metric in metrics)


def _legend(shown: dict[str, tuple[int, Report]], names: Iterable[str]) -> list[tuple[int, str]]:
    """Whose lines are in pictures of these families."""
    return [(colour, label) for label, (colour, report) in shown.items() if any(family(report, name) for name in names)]


def _lines(name: str, shown: dict[str, tuple[int, Report]]) -> Iterator[tuple[Line, str]]:
    """A line for each report that has metrics NAME@N, and their unit."""
    for label, (colour, report) in shown.items():
        points = sorted(family(report, name).items())
        metrics = [report.metrics[full] for _, full in points]
        if metrics:
            errors = [metric.stderr or 0.0 for metric in metrics]
            spread = tuple((error, error) for error in errors) if any(errors) else None
            values = tuple((tokens, metric.value) for (tokens, _), metric in zip(points, metrics, strict=True))
            yield Line(label=label, points=values, spread=spread, colour=colour), metrics[0].unit


def _family_chart(name: str, shown: dict[str, tuple[int, Report]], x: str, title: str | None = None) -> Chart | None:
    found = list(_lines(name, shown))
    if not found:
        return None
    unit = found[0][1]
    higher = any(report.metrics[full].higher_is_better for _, report in shown.values() for full in family(report, name).values())
    axes = Axes(x=x, y="" if unit == "bytes" else unit, lengths=True, bytes=unit == "bytes", from_zero=higher)
    lines = [line for line, _ in found]
    if unit == "x the base" and "base" in shown:
        ends = sorted({x for line in lines for x, _ in line.points})
        lines = [Line(label="base", points=((ends[0], 1.0), (ends[-1], 1.0))), *lines]
    return Chart(title=title or name, svg=chart(lines, axes, name), about=_in_words(lines, unit))


def _in_words(lines: list[Line], unit: str) -> str:
    """What a picture against length shows, for those who do not see it."""

    def spelled(value: float) -> str:
        return human_bytes(value) if unit == "bytes" else f"{value:.4g}"

    return "; ".join(
        f"{line.label}: " + ", ".join(f"{spelled(value)} at {length(tokens)}" for tokens, value in line.points) for line in lines
    )


def by_position(runs: list[Run]) -> Section | None:
    """Mean loss of a token by its place in a text."""
    shown = compared(runs)
    drawn = _family_chart(BY_POSITION, shown, "position, tokens", "Loss by position")
    if drawn is None:
        return None
    lines = [line for line, _ in _lines(BY_POSITION, shown)]
    places = sorted({place for line in lines for place, _ in line.points})
    known = [dict(line.points) for line in lines]
    rows: list[list[str]] = [["up to position", *(line.label for line in lines)]]
    rows += [[f"{place:,.0f}", *(f"{one[place]:.4g}" if place in one else "-" for one in known)] for place in places]
    table = Table(label="Loss by position", rows=rows)
    charts = Charts(label="", legend=_legend(shown, [BY_POSITION]), charts=[drawn], figures=table)
    return Section(title="Loss by position", blocks=[charts])


def memory_and_speed(runs: list[Run]) -> Section | None:
    """Cache, decode and prefill against the context: as the reports have them, and as `bench` measured."""
    # A conversion alone has the last checkpoint's speed. Speeds of two reports were measured at different times, so that
    # only what was measured in turns with a base can be compared.
    shown = {label: found for label, found in compared(runs).items() if len(runs) > 1 or label != "converted"}
    if not set(shown) - {"base"}:
        shown = compared(runs)
    in_turns = any(family(report, name) for _, report in shown.values() for name in RATIOS)
    wanted = {"state_bytes": "cache of one sequence"} | (RATIOS if in_turns or len(runs) > 1 else SPEEDS)
    charts = [
        found for name, title in wanted.items() if (found := _family_chart(name, shown, "context, tokens", title.capitalize()))
    ]
    blocks: list[Block] = []
    if charts:
        blocks.append(Charts(label="As measured by the reports", legend=_legend(shown, wanted), charts=charts, figures=None))
    blocks += _bench_alone(runs[0]) if len(runs) == 1 else _bench_side_by_side(runs)
    return Section(title="Memory and speed against context", blocks=blocks) if blocks else None


def _bench_alone(run: Run) -> list[Block]:
    if run.bench is None:
        return []
    rows = run.bench["rows"]
    names = {name: label for name, label in (("base", "base"), ("model", "student")) if name in rows[0]}
    blocks: list[Block] = []
    for batch in sorted({row["batch"] for row in rows}):
        own = sorted((row for row in rows if row["batch"] == batch), key=lambda row: row["context"])
        charts = []
        for key, (title, unit) in BENCHED.items():
            lines = [_bench_line(own, name, key, label, place) for place, (name, label) in enumerate(names.items())]
            charts += _bench_chart(title, batch, [line for line in lines if line.points], unit, key)
        legend = [(place, label) for place, label in enumerate(names.values())]
        blocks.append(Charts(label=f"hybridize bench, batch {batch}", legend=legend, charts=charts, figures=_figures(own, names)))
    where = ", ".join(str(run.bench[key]) for key in ("device", "dtype") if key in run.bench)
    said = _crossovers(run.bench)
    return [
        Prose(text=f"Measured by hybridize bench on {where}: medians, with bars from the least to the greatest. {said}".strip()),
        *blocks,
    ]


def _bench_line(rows: list[dict[str, Any]], name: str, key: str, label: str, colour: int) -> Line:
    known = [row for row in rows if row[name].get(key) is not None]
    spreads = [row[name].get(f"{key}_spread") for row in known]
    spread = None
    if spreads and all(spreads):
        spread = tuple((row[name][key] - low, high - row[name][key]) for row, (low, high) in zip(known, spreads, strict=True))
    return Line(label=label, points=tuple((row["context"], row[name][key]) for row in known), spread=spread, colour=colour)


def _bench_chart(title: str, batch: int, lines: list[Line], unit: str, key: str) -> list[Chart]:
    if not lines:
        return []
    held = key.endswith("_bytes")
    axes = Axes(x="context, tokens", y=unit, lengths=True, bytes=held, from_zero=unit in ("tokens/s", "x the base"))
    return [
        Chart(title=title, svg=chart(lines, axes, f"bench {batch} {title}"), about=_in_words(lines, "bytes" if held else unit))
    ]


def _figures(rows: list[dict[str, Any]], names: dict[str, str]) -> Table:
    out: list[list[str]] = [["context", "model", *(title.lower() for title, _ in BENCHED.values())]]
    for row in rows:
        for name, label in names.items():
            values = [(key, row[name].get(key)) for key in BENCHED]
            spelled = [
                "-" if value is None else human_bytes(value) if key.endswith("_bytes") else f"{value:,.4g}"
                for key, value in values
            ]
            out.append([f"{row['context']:,}", label, *spelled])
    return Table(label="Figures of bench", rows=out)


def _crossovers(bench: dict[str, Any]) -> str:
    """From which context on the hybrid is ahead, in words."""
    parts = []
    for batch, found in (bench.get("crossover") or {}).items():
        tokens = found["measured_tokens"]
        at = f"from {tokens:,} tokens on" if tokens is not None else "at no context that was measured"
        parts.append(f"At batch {batch} decoding is at least as fast as the base's {at}.")
    even = (bench.get("break_even") or {}).get("tokens")
    if even is not None:
        parts.append(f"The cache is no larger than the base's from {even:,} tokens on.")
    return " ".join(parts)


def _bench_side_by_side(runs: list[Run]) -> list[Block]:
    """What was measured in turns with each run's base, over that base."""
    found = [(place, run, run.bench["rows"]) for place, run in enumerate(runs, 1) if run.bench is not None]
    batches = sorted({row["batch"] for _, _, rows in found for row in rows if "base" in row})
    blocks: list[Block] = []
    for batch in batches:
        charts = []
        for key, title in BENCH_RATIOS.items():
            lines = [
                Line(
                    label=run.name, colour=place,
                    points=tuple(sorted((row["context"], row[key]) for row in rows if row["batch"] == batch and key in row)),
                )
                for place, run, rows in found
            ]  # fmt: skip
            charts += _bench_chart(title, batch, [line for line in lines if line.points], "x the base", key)
        legend = [(place, run.name) for place, run, _ in found]
        blocks.append(Charts(label=f"hybridize bench, batch {batch}", legend=legend, charts=charts, figures=None))
    return blocks
