"""What one layer hands to layers above it, for the tokens of one forward pass.

A mixer whose options have `leaves`, the kind of its memory, and `memory_width(config)` can be read: called with a `Memories`
that asks for its layer, it leaves its memory there, [B, T, memory_width], or all S tokens where it caches them anyway. A mixer
whose options have `reads`, the index of a layer below it (None where it reads none), takes that layer's memory; it must be of
the kind `takes`, `width(config)` wide, and pass `check_read(options)` where the reader has one. A plan that leaves `reads` out
has it from the reader's `settle`. Nothing of this is cached a second time.
"""

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from hybridize.errors import ConfigError
from hybridize.mixers import MIXERS


class Memories:
    """The place of one forward pass. Keeps what the asked-for layers leave, and nothing else.

    No dict on purpose: tools that move a model's inputs between devices copy dicts on the way into each layer, and what a
    copy is given is lost.

    Args:
        layers: indices of the layers that someone reads.
    """

    def __init__(self, layers: Iterable[int]):
        self._held: dict[int, Tensor | None] = dict.fromkeys(layers)

    def wants(self, layer: int) -> bool:
        """Whether somebody reads this layer."""
        return layer in self._held

    def leave(self, layer: int, memory: Tensor) -> None:
        """Keep a layer's memory, [B, T, C], where it is wanted."""
        if layer in self._held:
            self._held[layer] = memory

    def take(self, layer: int) -> Tensor:
        """A layer's memory, [B, T, C]. Raises ConfigError when it was not left."""
        memory = self._held.get(layer)
        if memory is None:
            raise ConfigError(f"layer {layer} left no memory in this forward pass; run the layers in order, from the bottom up")
        return memory

    def detach(self) -> None:
        """Cut what is held off its graph."""
        self._held = {layer: None if memory is None else memory.detach() for layer, memory in self._held.items()}


def read_layers(options: list[Any]) -> set[int]:
    """Indices of the layers that some mixer reads.

    Args:
        options: the options object of each layer.
    """
    return {own.reads for own in options if getattr(own, "reads", None) is not None}


def left_by(options: Any) -> str | None:
    """The kind of memory that a layer with these options leaves; None for none, as with a layer that reads another."""
    return None if getattr(options, "reads", None) is not None else getattr(options, "leaves", None)


def check_reads(names: list[str], options: list[Any], config: Any) -> None:
    """Check that every layer that is read exists, lies below its reader, and has a memory of the reader's kind and width.

    Args:
        names: the mixer's name of each layer.
        options: its options object.
        config: of the base or hybrid.

    Raises:
        ConfigError: it does not; the message names both layers.
    """
    for index, own in enumerate(options):
        reads = getattr(own, "reads", None)
        if reads is None:
            continue
        where = f"layer {index}: mixer {names[index]!r} reads layer {reads}"
        if not 0 <= reads < len(options):
            raise ConfigError(f"{where}, which is out of range: the base has {len(options)} layers, 0 to {len(options) - 1}")
        if reads >= index:
            raise ConfigError(f"{where}, expected a layer below it: a memory is handed upwards")
        if (left := left_by(options[reads])) != own.takes:
            known = ", ".join(name for name in MIXERS.names() if getattr(MIXERS.load(name), "leaves", None) == own.takes)
            kind = "has no memory to read" if left is None else f"leaves its {left}"
            raise ConfigError(f"{where}, which is {names[reads]!r} and {kind}, expected the {own.takes} of one of: {known}")
        if hasattr(own, "check_read"):
            try:
                own.check_read(options[reads])
            except ConfigError as error:
                raise ConfigError(f"{where}, {error}") from error
        if (found := options[reads].memory_width(config)) != (width := own.width(config)):
            raise ConfigError(f"{where}, whose memory is {found} wide, expected {width}; choose options that make it so")
