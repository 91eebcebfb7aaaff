"""The pictures of a report, as PNG bytes. No state is shared: each is drawn on its own figure, without pyplot."""

import io
from collections.abc import Callable
from typing import Any

from hybridize.core import Plan, Report
from hybridize.errors import MissingDependencyError
from hybridize.eval.lookup import family
from hybridize.eval.table import human_bytes

# Okabe and Ito's palette, which the colour-blind can tell apart.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#999999")


def nth_colour(place: int) -> str:
    """The palette over and over: nothing is left out of a picture for want of a colour."""
    return COLOURS[place % len(COLOURS)]


def draw(paint: Callable[[Any], None], width: float, height: float) -> bytes:
    """A figure of `width` x `height` inches that `paint` draws on, as PNG; the same input gives the same bytes."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError(f"report: pictures need matplotlib ({error}): pip install 'hybridize[eval]'") from error
    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    paint(figure)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", metadata={"Software": None})
    return stream.getvalue()


def layer_map(plan: Plan) -> bytes:
    """One strip for each layer, coloured by mixer, its width the cache bytes at the longest context of the plan."""
    names = sorted({layer.mixer["name"] for layer in plan.layers}, key=lambda name: (name != "attention", name))
    colour = {name: nth_colour(place) for place, name in enumerate(names)}
    longest = max((int(tokens) for layer in plan.layers for tokens in layer.state_bytes), default=0)
    held = [layer.state_bytes.get(str(longest), 0) for layer in plan.layers]
    top = max([*held, 1])

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        for layer, count in zip(plan.layers, held, strict=True):
            name = layer.mixer["name"]
            axes.barh(layer.index, 1.0, height=0.86, color=colour[name], alpha=0.22)
            axes.barh(layer.index, count / top, height=0.86, color=colour[name], alpha=0.65)
            axes.text(0.01, layer.index, f"{layer.index}  {name}", va="center", fontsize=8, fontweight="bold")
            axes.text(0.99, layer.index, human_bytes(count), va="center", ha="right", fontsize=8)
        axes.set(xlim=(0, 1), ylim=(len(plan.layers) - 0.4, -0.6), xticks=[], yticks=[])
        axes.set_title(f"Layers and their cache at {longest:,} tokens of one sequence", fontsize=10, loc="left")
        axes.spines[:].set_visible(False)

    return draw(paint, 7.2, 0.55 + 0.27 * len(plan.layers))


def loss_curves(stages: dict[str, list[tuple[float, float]]]) -> bytes:
    """Loss against tokens, one panel for each stage; `stages` holds (tokens, loss) by stage name."""

    def paint(figure: Any) -> None:
        panels = figure.subplots(1, len(stages), squeeze=False)[0]
        for place, (axes, (name, points)) in enumerate(zip(panels, stages.items(), strict=True)):
            tokens, losses = zip(*points, strict=True)
            axes.plot(tokens, losses, color=nth_colour(place), linewidth=1.2)
            if min(losses) > 0:
                axes.set_yscale("log")
            axes.set_title(name, fontsize=10, loc="left")
            axes.set_xlabel("tokens")
            axes.grid(alpha=0.25)
        panels[0].set_ylabel("loss")

    return draw(paint, 4.4 * len(stages), 3.2)


def against_context(reports: dict[str, Report], name: str, label: str, log_y: bool) -> bytes | None:
    """A metric `name@T` against T, one line for each report; None when no report has it at any T."""
    lines = {word: sorted(family(report, name).items()) for word, report in reports.items()}
    lines = {word: points for word, points in lines.items() if points}
    if not lines:
        return None

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        for place, (word, points) in enumerate(lines.items()):
            values = [reports[word].metrics[full].value for _, full in points]
            axes.plot([tokens for tokens, _ in points], values, "o-", color=nth_colour(place), label=word)
        lengths = sorted({tokens for points in lines.values() for tokens, _ in points})
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, [f"{tokens:,}" for tokens in lengths])
        axes.minorticks_off()
        if log_y:
            axes.set_yscale("log")
        else:
            axes.set_ylim(0, 1.1 * axes.get_ylim()[1])
        axes.set(xlabel="context, tokens", ylabel=label)
        axes.grid(alpha=0.25)
        axes.legend(frameon=False)

    return draw(paint, 5.2, 3.2)
