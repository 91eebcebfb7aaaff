"""Attention weights -> the same weights, and which key/value heads stay full.

DuoAttention (arXiv 2410.10819) learns a gate for each head on synthetic retrieval text. Here the choice is made in closed
form on the calibration text: what turning heads to streaming changes in the layer's output is a sum of one term a head, so
the squared error of every choice follows from the terms' inner products.
"""

import itertools
import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from hybridize.conversions.fitting import ROWS
from hybridize.conversions.layer import LayerCalibration, materialised
from hybridize.errors import ConfigError
from hybridize.mixers.streaming_heads import SplitHeadsAttention, StreamingHeads
from hybridize.mixers.windowed import EVERYTHING

# Up to this many choices are all tried (16 heads have 12,870 halves); beyond, heads are swapped while that helps.
MOST_CHOICES = 20_000


@dataclass(frozen=True, kw_only=True)
class HeadsFromGQA:
    """How the full heads of a layer are chosen; every tensor of the base goes on as it is."""

    method: Literal["calibrated", "given"] = "calibrated"
    """`calibrated`: the choice with the least error on text. `given`: the mixer's full_heads."""

    drops = frozenset()

    @property
    def calibrated(self) -> bool:
        return self.method == "calibrated"

    def check(self, mixer: StreamingHeads, config: Any) -> None:
        """Raises ConfigError where method and mixer contradict each other."""
        self._check_given(mixer.full_heads)

    def _check_given(self, given: list[int] | None) -> None:
        if self.calibrated and given is not None:
            raise ConfigError("full_heads is set, but method 'calibrated' would choose. Set method given, or full_share instead")
        if not self.calibrated and given is None:
            raise ConfigError("method 'given' needs full_heads, got none. List the heads, or set method calibrated")

    def __call__(
        self,
        source: dict[str, Tensor],
        mixer: SplitHeadsAttention,
        config: Any,
        generator: torch.Generator,
        calibration: LayerCalibration | None,
    ) -> dict[str, Tensor]:
        """The base's tensors, and `alpha`.

        Raises:
            ConfigError: no text for a calibrated choice, or text too short for streaming heads to differ from full ones.
        """
        self._check_given(mixer.given)
        made = dict(source)
        if mixer.given is not None:
            return {**made, "alpha": mixer.gates(mixer.given)}
        if mixer.full_count in (0, mixer.num_groups):
            return {**made, "alpha": mixer.gates(list(range(mixer.full_count)))}
        if calibration is None:
            raise ConfigError("streaming_heads method 'calibrated' needs text to calibrate on. Give text, or method given")
        short, tokens = mixer.reach.sink + mixer.reach.window, calibration.inputs.shape[1]
        if tokens <= short:
            raise ConfigError(
                f"streaming_heads: rows of {tokens} calibration tokens, expected more than sink_tokens + window_tokens "
                f"= {short}: on shorter ones no head differs from another. Raise data.calibration_seq_tokens"
            )
        gram, lag = changes(materialised(mixer, {**made, "alpha": mixer.gates([])}), calibration)
        streaming = choose(gram, lag, mixer.num_groups - mixer.full_count)
        return {**made, "alpha": mixer.gates([head for head in range(mixer.num_groups) if head not in streaming])}


@torch.no_grad()
def changes(module: SplitHeadsAttention, calibration: LayerCalibration) -> tuple[Tensor, Tensor]:
    """Inner products over the text of what turning a key/value head to streaming adds to the layer's output.

    Args:
        module: the mixer with its weights; its alpha does not matter.
        calibration: of this layer.

    Returns:
        Of the change of head g, c_g [N, T, D], and r, the output with all heads full less the target: (<c_g, c_h> [G, G],
        <c_g, r> [G]), fp64.
    """
    module = module.float()
    weight = module.o_proj.weight.unflatten(1, (module.num_groups, -1))
    gram = torch.zeros(module.num_groups, module.num_groups, dtype=torch.float64)
    lag = torch.zeros(module.num_groups, dtype=torch.float64)
    for inputs, target in zip(calibration.inputs.split(ROWS), calibration.target.split(ROWS), strict=True):
        q, k, v = module.project(inputs, calibration.angles)
        full, near = (module.attend_part("", reach, q, k, v, None, None, None) for reach in (EVERYTHING, module.reach))
        rest = module.o_proj(full.transpose(1, 2).flatten(2)) - target
        # [n, T, G, H / G * d] -> [n, T, G, D]
        heads = (near - full).transpose(1, 2).flatten(2).unflatten(2, (module.num_groups, -1))
        change = torch.einsum("ntgc,dgc->gntd", heads, weight).flatten(1).double()
        gram += change @ change.T
        lag += change @ rest.flatten().double()
    return gram, lag


def choose(gram: Tensor, lag: Tensor, count: int) -> list[int]:
    """The `count` heads whose joint change of the output leaves the least squared error.

    Args:
        gram: <c_g, c_h>, [G, G], fp64.
        lag: <c_g, r>, [G], fp64: r is the error that is there before any change.
        count: how many heads to choose.

    Returns:
        The heads, ascending; the first in order among equals. Beyond 20,000 choices, no single swap is better.
    """
    heads = gram.shape[0]

    def error(chosen: tuple[int, ...]) -> float:
        index = torch.tensor(chosen)
        return float(gram[index][:, index].sum() + 2 * lag[index].sum())

    if math.comb(heads, count) <= MOST_CHOICES:
        return list(min(itertools.combinations(range(heads), count), key=error))
    alone = gram.diagonal() + 2 * lag
    best = tuple(sorted(alone.argsort(stable=True)[:count].tolist()))
    least = error(best)
    while True:
        swaps = [
            tuple(sorted({*best} - {out} | {into})) for out in best for into in range(heads) if into not in best
        ]  # fmt: skip
        found = min(swaps, key=error)
        if not error(found) < least:
            return list(best)
        best, least = found, error(found)
