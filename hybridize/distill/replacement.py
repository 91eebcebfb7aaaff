"""Layers replaced in steps: some converted layers run their mixers, the others still the teacher's attention.

A stage with `replace` is as many stages one after the other, each with a schedule and moments of its own, so that saves, resume
and lineage know nothing of it. The student's directory holds all its mixers from the start.
"""

import copy
import logging
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from hybridize.distill.options import converted_layers, reading_groups
from hybridize.errors import ConfigError
from hybridize.families import head_dim

log = logging.getLogger(__name__)

LENT = "teacher_attention"
"""Where a decoder layer keeps the attention that it is lent."""
SIZES = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "rope_parameters")


@dataclass(frozen=True, kw_only=True)
class Replacement:
    """Which converted layers run their mixers in which step.

    Source: MambaInLlama's stepwise distillation (Wang et al., arXiv 2408.15237; jxiw/MambaInLlama): a quarter of the layers, then
    half, by `prev_checkpoint_path` of mamba2_llama/llama3_0.50_mamba2.yaml, or one more layer at a time from the bottom, a chunk
    of the data each (mamba2_llama_stepwise); every step has a warm-up, schedule and moments of its own, and trains all mixers
    that are in. Apriel-H1 (arXiv 2511.02651) replaces the least important layers first: an `order` of indices.
    """

    shares: list[float]
    """Of the converted layers, those that run their mixers in each step, rounded half up; rising, the last one 1."""
    order: Literal["bottom", "top", "spread"] | list[int] = "bottom"
    """Who comes first: the lowest, the highest, every second one and then those between (spread), or a list of all
    converted layers. Layers that read each other's memory come together, with the first of them."""
    step: int | None = None
    """Which step a stage is, from 1; None is all of them, one after the other, each with the same part of the tokens."""

    def __post_init__(self) -> None:
        rising = all(low < high for low, high in pairwise([0.0, *self.shares]))
        if not self.shares or not rising or self.shares[-1] != 1:
            raise ConfigError(f"shares is {self.shares}, expected rising shares above 0 of which the last is 1")
        if self.step is not None and not 1 <= self.step <= len(self.shares):
            raise ConfigError(f"step is {self.step}, expected 1 to {len(self.shares)}, the number of shares")

    def active(self, student: Any) -> list[int]:
        """Indices of the converted layers that run their mixers in this step. Raises ConfigError for an order that is none."""
        assert self.step is not None
        converted, groups = converted_layers(student), reading_groups(student)
        wanted = max(1, int(len(converted) * self.shares[self.step - 1] + 0.5))
        chosen: list[int] = []
        for group in self._ordered(groups, converted):
            if len(chosen) < wanted:
                chosen += group
        return sorted(chosen)

    def _ordered(self, groups: list[list[int]], converted: list[int]) -> list[list[int]]:
        if self.order == "bottom":
            return groups
        if self.order == "top":
            return sorted(groups, key=max, reverse=True)
        if self.order == "spread":
            # By the largest power of two in the place: 0, then 8, 4 and 12, then all even ones, then the odd ones.
            places = sorted(range(len(groups)), key=lambda place: (-(place & -place) if place else -len(groups), place))
            return [groups[place] for place in places]
        order = list(self.order)
        if sorted(order) != converted:
            raise ConfigError(f"replace.order is {order}, expected each converted layer of the student once: {converted}")
        return sorted(groups, key=lambda group: min(order.index(layer) for layer in group))

    def waiting(self, student: Any) -> list[int]:
        """Indices of the converted layers that still run the teacher's attention in this step."""
        active = self.active(student)
        return [index for index in converted_layers(student) if index not in active]


def lend_attention(student: Any, teacher: Any, layers: list[int], stage: str) -> None:
    """Have the teacher's own attention run in place of the student's mixers, which stay where they are and rest.

    Args:
        student: a hybrid.
        teacher: what it learns from. Where its weights are in memory they serve both; where they are still to come, `lender` of
            a name says whose they are.
        layers: indices.
        stage: the stage's name, for messages.

    Raises:
        ConfigError: the teacher's attention does not fit into the student.
    """
    if not layers:
        return
    where = f"stage {stage!r}: replace runs the teacher's attention in layers of the student;"
    for what, own, other in (
        ("model_type", student.config.model_type.removeprefix("hybrid_"), teacher.config.model_type.removeprefix("hybrid_")),
        ("head_dim", head_dim(student.config), head_dim(teacher.config)),
        *((size, getattr(student.config, size, None), getattr(teacher.config, size, None)) for size in SIZES),
    ):
        if own != other:
            raise ConfigError(f"{where} {what} is {own} in the student and {other} in the teacher, expected equal. Leave it out")
    for index in converted_layers(teacher) if hasattr(teacher.config, "mixers") else ():
        if index in layers:
            name = teacher.config.mixers[index]["name"]
            raise ConfigError(
                f"{where} layer {index} of the teacher is {name!r}, expected attention. Give the base as the teacher"
            )
    for index in layers:
        theirs, layer = teacher.model.layers[index].self_attn, student.model.layers[index]
        to_come = any(parameter.is_meta for parameter in theirs.parameters())
        # A module of its own in any case: one of the two is in training mode and the other is not.
        lent = copy.deepcopy(theirs) if to_come else copy.copy(theirs)
        layer.add_module(LENT, lent)
        layer.self_attn.forward = lent.forward
    log.info("stage %s: layers %s run the teacher's attention, the other converted ones their mixers", stage, layers)


def lender(name: str) -> str | None:
    """The teacher's name of a parameter that it lends; None for the student's own."""
    layer, lent, rest = name.partition(f".{LENT}.")
    return f"{layer}.self_attn.{rest}" if lent else None
