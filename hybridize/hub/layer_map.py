"""The picture of a model's layers on its card: which mixer each has, and what it keeps."""

import io
from typing import Any

from hybridize.core import human_bytes
from hybridize.errors import MissingDependencyError

NAME = "layers.png"
# Okabe and Ito's colours, told apart by most people; attention is the first.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#999999")


def layer_map(mixers: list[dict[str, Any]], state_bytes: list[int], base_bytes: int, tokens: int) -> bytes:
    """A PNG with a bar for each layer, as high as its cache at one length and coloured by its mixer. The same bytes each time.

    Args:
        mixers: {"name": ...} by layer.
        state_bytes: of one sequence, by layer.
        base_bytes: the same of one of the base's layers, drawn as a line.
        tokens: the length.

    Raises:
        MissingDependencyError: without matplotlib.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError as error:
        raise MissingDependencyError("the card's picture needs matplotlib: pip install 'hybridize[eval]'") from error

    names = [spec["name"] for spec in mixers]
    kinds = sorted(set(names), key=lambda name: (name != "attention", names.index(name)))
    colour = {name: COLOURS[place % len(COLOURS)] for place, name in enumerate(kinds)}
    figure = Figure(figsize=(max(4.5, min(12.0, 1.5 + 0.28 * len(names))), 2.6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    bars, strip = figure.subplots(2, 1, sharex=True, height_ratios=(5, 1))
    unit = max(base_bytes, *state_bytes, 1)
    places = range(len(names))
    bars.bar(places, [count / unit for count in state_bytes], color=[colour[name] for name in names])
    bars.axhline(base_bytes / unit, color="#444444", linewidth=1, linestyle="--")
    bars.set_yticks([0, 1], ["0", human_bytes(unit)])
    bars.set_ylim(0, 1.12)
    bars.set_title(f"cache of a layer at {tokens:,} tokens; dashed: of the base", fontsize=8, loc="left")
    strip.bar(places, [1] * len(names), width=0.9, color=[colour[name] for name in names])
    strip.set_yticks([])
    step = -(-len(names) // 24)
    strip.set_xticks(list(places)[::step])
    strip.set_xlabel("layer", fontsize=8)
    for axes in (bars, strip):
        axes.tick_params(labelsize=7)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    patches = [Patch(color=colour[name], label=f"{name} ({names.count(name)})") for name in kinds]
    figure.legend(handles=patches, loc="outside lower center", ncols=len(patches), fontsize=7, frameon=False)
    data = io.BytesIO()
    figure.savefig(data, format="png", metadata={"Software": None})
    return data.getvalue()
