"""What one layer hands to layers above it, for the tokens of one forward pass.

A mixer whose options have `memory_width(config)` can be read: called with a `Memories` that asks for its layer, it leaves
its memory there, [B, T, memory_width]. A mixer whose options have `reads`, the index of a layer below it, takes that
layer's memory. Both sides see the new tokens only, so nothing of it belongs in a cache.
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
    return {own.reads for own in options if hasattr(own, "reads")}


def nearest_memory(options: list[Any]) -> int | None:
    """Index of the last of these layers that has a memory; None where none has."""
    return next((index for index in reversed(range(len(options))) if hasattr(options[index], "memory_width")), None)


def check_reads(names: list[str], options: list[Any], config: Any) -> None:
    """Check that every layer that is read exists, lies below its reader, and has a memory of the reader's width.

    Args:
        names: the mixer's name of each layer.
        options: its options object.
        config: of the base or hybrid.

    Raises:
        ConfigError: it does not; the message names both layers.
    """
    for index, own in enumerate(options):
        if not hasattr(own, "reads"):
            continue
        where, reads = f"layer {index}: mixer {names[index]!r} reads layer {own.reads}", own.reads
        if not 0 <= reads < len(options):
            raise ConfigError(f"{where}, which is out of range: the base has {len(options)} layers, 0 to {len(options) - 1}")
        if reads >= index:
            raise ConfigError(f"{where}, expected a layer below it: a memory is handed upwards")
        if not hasattr(options[reads], "memory_width"):
            known = ", ".join(name for name in MIXERS.names() if hasattr(MIXERS.load(name), "memory_width"))
            raise ConfigError(f"{where}, which is {names[reads]!r} and has no memory to read, expected one of: {known}")
        if (found := options[reads].memory_width(config)) != (width := own.width(config)):
            raise ConfigError(f"{where}, whose memory is {found} wide, expected {width}; choose options that make it so")
