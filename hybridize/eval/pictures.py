"""Line charts of a report, as SVG to stand inside a page: text stays text, and colours are the page's own variables.

No state is shared: each is drawn on its own figure, without pyplot. The same input gives the same bytes.
"""

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hybridize.errors import MissingDependencyError
from hybridize.eval.table import human_bytes

COLOURS = 8
"""How many line colours a page has: the variables --c0 to --c7."""
MARKS = ("o", "s", "^", "D", "v", "P", "X", "*")
SIGNS = ("●", "■", "▲", "◆", "▼", "✚", "✖", "★")
"""MARKS as characters, for a legend."""
MOST_POINTS = 200
"""A longer line is drawn as means of equal runs of its points, which a page is wide enough to show."""

# How wide a letter of a tick's label is, with room to spare.
LETTER_POINTS = 5.6
# Colours that nothing else is drawn in, to be found again in what matplotlib wrote.
INK, RULE = "#010203", "#010204"
_LINES = tuple(f"#0102{0x10 + place:02x}" for place in range(COLOURS))
_VARIABLES = {INK: "currentColor", RULE: "var(--rule)"} | {colour: f"var(--c{place})" for place, colour in enumerate(_LINES)}
SIZE = (3.7, 2.35)
"""Inches; a phone shows it at about its own size."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line of a chart."""

    label: str
    points: tuple[tuple[float, float], ...]
    """(x, y), by x."""
    spread: tuple[tuple[float, float], ...] | None = None
    """How far an error bar reaches below and above each point."""
    colour: int = 0
    """Index of its colour and its mark; they begin again when there are no more, so that no line is left out."""


@dataclass(frozen=True, kw_only=True)
class Axes:
    """What a chart's axes are."""

    x: str
    y: str
    lengths: bool = False
    """x is a number of tokens or of things, with a tick at each that was measured, and is drawn by its logarithm."""
    bytes: bool = False
    """y is bytes, by their logarithm."""
    from_zero: bool = False


def thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most MOST_POINTS points: means of equal runs of them, the last run perhaps shorter."""
    step = math.ceil(len(points) / MOST_POINTS)
    parts = [points[first : first + step] for first in range(0, len(points), step)] if step > 1 else []
    return [(sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in parts] or list(points)


def length(tokens: float) -> str:
    """A length as an axis has it: 512, 8k (8192), 128k; k is 1024."""
    return f"{tokens / 1024:g}k" if tokens >= 1024 and tokens % 1024 == 0 else f"{tokens:g}"


def count(number: float) -> str:
    """A count as an axis has it: 500, 20k (20,000), 3M."""
    size, letter = next(((size, letter) for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")) if number >= size), (1.0, ""))
    return f"{number / size:g}{letter}"


def chart(lines: Sequence[Line], axes: Axes, salt: str) -> str:
    """Lines over one x, as an <svg> without a size of its own.

    Args:
        lines: at least one, each with at least one point.
        axes: their labels and scales.
        salt: different for each chart of a page, since names inside an <svg> hold for the whole page.

    Returns:
        The element; its text has the page's font, its colours are `currentColor`, `--rule` and `--c0` to `--c7`.

    Raises:
        MissingDependencyError: matplotlib is absent.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError(f"report: pictures need matplotlib ({error}): pip install 'hybridize[eval]'") from error
    style: dict[Any, Any] = {
        "svg.fonttype": "none", "svg.hashsalt": salt, "text.parse_math": False, "font.size": 8.5, "text.color": INK,
        "axes.labelcolor": INK, "axes.edgecolor": RULE, "xtick.color": RULE, "ytick.color": RULE, "xtick.labelcolor": INK,
        "ytick.labelcolor": INK, "grid.color": RULE, "grid.linewidth": 0.6, "axes.linewidth": 0.8, "axes.spines.top": False,
        "axes.spines.right": False, "lines.markersize": 4.5, "lines.linewidth": 1.5, "axes.formatter.use_mathtext": False,
    }  # fmt: skip
    with matplotlib.rc_context(style):
        figure = Figure(figsize=SIZE)
        plot = figure.add_axes((0.1, 0.1, 0.8, 0.8))
        _paint(plot, lines, axes)
        _make_room(plot)
        stream = io.StringIO()
        figure.savefig(stream, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return _for_a_page(stream.getvalue())


def _paint(plot: Any, lines: Sequence[Line], axes: Axes) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    for line in lines:
        xs, ys = zip(*line.points, strict=True)
        colour, mark = _LINES[line.colour % COLOURS], MARKS[line.colour % len(MARKS)]
        dense = len(xs) > 24
        style = {"color": colour, "marker": "" if dense else mark, "linewidth": 1.1 if dense else 1.5}
        bars = None if line.spread is None else list(zip(*line.spread, strict=True))
        plot.errorbar(xs, ys, yerr=bars, capsize=2 if line.spread else 0, elinewidth=0.9, **style)
    plot.grid(visible=True)
    plot.set_axisbelow(True)
    plot.tick_params(length=2.5)
    plot.set(xlabel=axes.x, ylabel=axes.y)
    values = [y for line in lines for _, y in line.points]
    if axes.lengths and min(x for line in lines for x, _ in line.points) > 0:
        plot.set_xscale("log", base=2)
        ticks = _apart(sorted({x for line in lines for x, _ in line.points}))
        plot.set_xticks(ticks, [length(tick) for tick in ticks])
        plot.xaxis.set_minor_locator(NullLocator())
    else:
        plot.xaxis.set_major_locator(MaxNLocator(5))
        plot.xaxis.set_major_formatter(FuncFormatter(lambda value, _: count(value)))
    if min(values) > 0 and (axes.bytes or (not axes.from_zero and max(values) > 4 * min(values))):
        wide = max(values) > 300 * min(values)
        plot.set_yscale("log", base=2 if axes.bytes else 10)
        plot.yaxis.set_major_locator(
            LogLocator(base=2, numticks=8) if axes.bytes else LogLocator(subs=(1.0,) if wide else (1.0, 2.0, 5.0), numticks=12)
        )
        plot.yaxis.set_minor_locator(NullLocator())
    elif axes.from_zero:
        # A share that is nothing everywhere is a line at the foot, not in the middle.
        top = max([y + e for line in lines for (_, y), e in _with_spread(line)]) or 1.0
        plot.set_ylim(-0.03 * top, 1.08 * top)
    plot.yaxis.set_major_formatter(FuncFormatter(lambda value, _: human_bytes(value) if axes.bytes else f"{value:g}"))


def _make_room(plot: Any) -> None:
    """Place the axes by the length of their labels: matplotlib's own layout draws everything a second time to measure it."""
    width, height = (72 * inches for inches in SIZE)
    low, high = plot.get_ylim()
    labels = [plot.yaxis.get_major_formatter()(tick) for tick in plot.get_yticks() if low <= tick <= high]
    beside = LETTER_POINTS * max(map(len, labels), default=1) + 6
    left = beside + (15 if plot.get_ylabel() else 2)
    plot.set_position((left / width, 32 / height, (width - left - 10) / width, (height - 38) / height))
    plot.yaxis.set_label_coords(-(beside + 2) / (width - left - 10), 0.5)
    plot.yaxis.label.set_verticalalignment("bottom")


def _with_spread(line: Line) -> Any:
    return zip(line.points, [above for _, above in line.spread or ((0.0, 0.0),) * len(line.points)], strict=True)


def _apart(ticks: list[float]) -> list[float]:
    """The ticks that have room beside each other, the last always."""
    room = math.log2(ticks[-1] / ticks[0]) / 9 if len(ticks) > 1 else 0.0
    kept = [ticks[-1]]
    for tick in reversed(ticks[:-1]):
        if math.log2(kept[-1] / tick) >= room:
            kept.append(tick)
    return kept[::-1]


def _for_a_page(svg: str) -> str:
    """The element alone, without what would reach into the page: a style sheet for all of it, names, fonts and a size."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<defs>\s*<style.*?</style>\s*</defs>|<!--.*?-->", "", svg, flags=re.S)
    svg = re.sub(
        r"<svg[^>]*?viewBox=\"([^\"]*)\"[^>]*>", r'<svg viewBox="\1" aria-hidden="true" focusable="false">', svg, count=1
    )
    svg = re.sub(r'<g id="[^"]*">', "<g>", svg).replace("xlink:href", "href")
    svg = re.sub(r" ?font-family: [^;\"]*;?", "", svg)
    # matplotlib leaves black out: text that names no colour is to have the page's.
    svg = re.sub("|".join(_VARIABLES), lambda found: _VARIABLES[found[0]], svg)
    return re.sub(r"\s*\n\s*", " ", svg).replace("> <", "><").strip()
