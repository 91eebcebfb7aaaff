"""One layer's conversion and its books: every source tensor is used or named in `drops`, every output is expected."""

import copy
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hybridize.checkpoint import is_finite, stored_dtype
from hybridize.errors import CheckpointError


class Watched(Mapping):
    """Tensors by name that notes which of them were looked at."""

    def __init__(self, source: Mapping[str, Tensor]):
        self.source = source
        self.used: set[str] = set()

    def __getitem__(self, name: str) -> Tensor:
        tensor = self.source[name]
        self.used.add(name)
        return tensor

    def __contains__(self, name: object) -> bool:
        return name in self.source

    def __iter__(self) -> Iterator[str]:
        return iter(self.source)

    def __len__(self) -> int:
        return len(self.source)


@dataclass(frozen=True, kw_only=True)
class LayerCounts:
    """What became of the tensors of one layer's attention, or (index None) of all outside the layers' attention."""

    index: int | None
    mixer: str
    copied: int
    computed: int
    dropped: tuple[str, ...]

    def __str__(self) -> str:
        place = "outside the mixers" if self.index is None else f"layer {self.index} {self.mixer}"
        names = f" ({', '.join(self.dropped)})" if self.dropped else ""
        return f"{place}: copied {self.copied}, computed {self.computed}, dropped {len(self.dropped)}{names}"


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerCalibration:
    """What the calibration pass gives a conversion, all fp32. N sequences, T tokens, D the stream's width, H heads of P."""

    inputs: Tensor
    """What the student's layer reads (after the input norm), [N, T, D]."""
    context: Tensor
    """What the teacher's o_proj reads, [N, T, H * P]."""
    target: Tensor
    """What the student's mixer should add to its stream: the teacher's attention output and the stream's lag, [N, T, D]."""
    angles: tuple[Tensor, Tensor]
    """cos and sin of the base's rotary embedding, [1, T, P]."""
    memory: Tensor | None = None
    """What the student's layer that this one reads left, [N, T, C]; None where the mixer reads none."""
    ahead: tuple[Any, ...] = ()
    """What the conversion's `ahead` made of each layer that reads this one, in order; none where it has no such method."""


def layer_generator(seed: int, index: int) -> torch.Generator:
    """A generator of its own for each layer, so that order and workers do not change what is drawn."""
    digest = hashlib.sha256(f"{seed}:model.layers.{index}.self_attn".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def convert_layer(
    conversion: Any,
    source: Mapping[str, Tensor],
    mixer: nn.Module,
    config: Any,
    generator: torch.Generator,
    calibration: Any,
    where: str,
) -> dict[str, Tensor]:
    """Call a conversion and check what it did.

    Args:
        conversion: its options object.
        source: the attention's tensors, names without prefix, stored dtype. The conversion gets them read-only.
        mixer: the module to fill, on the meta device.
        config: of the base.
        generator: the layer's own.
        calibration: what the calibration pass measured, None where the conversion is not calibrated.
        where: for messages, such as "layer 3".

    Returns:
        The mixer's tensors, in the dtype they are stored in.

    Raises:
        CheckpointError: a source tensor was neither used nor dropped, or an output is missing, extra, misshapen or not
            finite.
    """
    watched = Watched(source)
    made = conversion(watched, mixer, config, generator, calibration)
    if lost := sorted(set(source) - watched.used - set(conversion.drops)):
        raise CheckpointError(f"{where}: {type(conversion).__name__} neither used nor dropped {', '.join(lost)}")
    return checked_outputs(made, mixer, config.dtype, where)


def checked_outputs(made: dict[str, Tensor], mixer: nn.Module, dtype: torch.dtype, where: str) -> dict[str, Tensor]:
    """The mixer's tensors in its own order and their stored dtypes; `made` is emptied. Raises as convert_layer."""
    expected = {name: tuple(tensor.shape) for name, tensor in mixer.state_dict().items()}
    if odd := sorted(set(expected) ^ set(made)):
        raise CheckpointError(f"{where}: {odd[0]} is {'extra' if odd[0] in made else 'missing'} in what the conversion made")
    result = {}
    for name, shape in expected.items():
        if (found := tuple(made[name].shape)) != shape:
            raise CheckpointError(f"{where}: {name} came out as {list(found)}, expected {list(shape)}")
        # Popped, so that each wide copy is gone before the next one is narrowed.
        result[name] = made.pop(name).to(stored_dtype(name, dtype)).contiguous()
        if not is_finite(result[name]):
            raise CheckpointError(f"{where}: {name} came out with values that are not finite; look at the base's weights")
    return result


def materialised(mixer: Any, tensors: dict[str, Tensor]) -> Any:
    """A working copy of a meta module with these tensors, in evaluation mode."""
    module = copy.deepcopy(mixer)
    module.load_state_dict(tensors, strict=True, assign=True)
    return module.eval()
