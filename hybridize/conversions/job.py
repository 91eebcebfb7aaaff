"""A plan against its base, settled to the byte: what each output tensor is made of, before anything is written."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from torch import Tensor

from hybridize.checkpoint import Checkpoint, group_of, open_base, skeleton, stored_dtype
from hybridize.conversions.keep import Keep
from hybridize.conversions.layer import LayerCounts, checked_outputs, convert_layer, layer_generator
from hybridize.conversions.plan import build_mixer
from hybridize.conversions.table import CONVERSIONS
from hybridize.core import Plan
from hybridize.errors import CheckpointError
from hybridize.mixers import MIXERS
from hybridize.modeling import hybrid_config
from hybridize.shards import OnDemand, Planned, new_buffer, plan_shards, read_header, read_tensor, stream_tensor, tensor_bytes


class Job:
    """What `convert` carries out.

    Attributes:
        config: of the hybrid.
        expected: name -> shape of every output tensor.
        calibrated: layers whose conversion needs text.
        counts: per layer, then for all that lies outside the layers' attention.
        shards: the files to write.

    Raises:
        CheckpointError: the plan does not fit the base.
    """

    def __init__(self, plan: Plan, base: Checkpoint):
        self.plan, self.base = plan, base
        # One computed layer at a time bounds memory; other workers go on copying meanwhile.
        self._computing = threading.Lock()
        self.config = hybrid_config(base.config, [layer.mixer for layer in plan.layers])
        self.config.dtype = base.dtype
        self.conversions = [CONVERSIONS.build(layer.conversion) for layer in plan.layers]
        self.expected = {
            name: shape
            for name, shape in skeleton(self.config).items()
            if name in base.tensors or base.stored_name(name) not in base.tensors
        }
        self.calibrated = [index for index, conversion in enumerate(self.conversions) if conversion.calibrated]
        self.counts = [self._count(index) for index in range(len(plan.layers))]
        self.counts.append(self._count_outside())
        self._balance()
        self.shards = plan_shards([self._planned(name, shape) for name, shape in self.expected.items()])

    def prefix(self, index: int) -> str:
        return f"model.layers.{index}.self_attn."

    def layer_of(self, name: str) -> int | None:
        """The layer whose conversion computes a tensor; None where it is copied."""
        parts = name.split(".")
        if not name.startswith("model.layers.") or parts[3] != "self_attn":
            return None
        index = int(parts[2])
        return None if isinstance(self.conversions[index], Keep) else index

    def _planned(self, name: str, shape: tuple[int, ...]) -> Planned:
        if self.layer_of(name) is not None:
            return Planned(name=name, dtype=stored_dtype(name, self.base.dtype), shape=shape, group=group_of(name))
        if name not in self.base.tensors or self.base.tensors[name].shape != shape:
            raise CheckpointError(f"{self.base.path}: has no {name}, which the plan keeps; the plan does not fit")
        return Planned(name=name, dtype=self.base.tensors[name].dtype, shape=shape, group=group_of(name))

    def _count(self, index: int) -> LayerCounts:
        prefix, conversion = self.prefix(index), self.conversions[index]
        source = [name.removeprefix(prefix) for name in self.base.tensors if name.startswith(prefix)]
        outputs = [name for name in self.expected if name.startswith(prefix)]
        ignored = [name.removeprefix(prefix) for name in self.base.ignored if name.startswith(prefix)]
        keeps = isinstance(conversion, Keep)
        return LayerCounts(
            index=index,
            mixer=self.plan.layers[index].mixer["name"],
            copied=len(outputs) if keeps else 0,
            computed=0 if keeps else len(outputs),
            dropped=tuple(ignored if keeps else sorted({*ignored, *(n for n in source if n in conversion.drops)})),
        )

    def _count_outside(self) -> LayerCounts:
        def outside(name: str) -> bool:
            return not (name.startswith("model.layers.") and name.split(".")[3] == "self_attn")

        ignored = tuple(name for name in self.base.ignored if outside(name))
        return LayerCounts(index=None, mixer="", copied=sum(map(outside, self.expected)), computed=0, dropped=ignored)

    def _balance(self) -> None:
        """Every source tensor is copied, goes into a conversion, or is named as dropped."""
        went = set()
        for name in self.base.tensors:
            copied = name in self.expected and self.layer_of(name) is None
            if copied or name in self.base.ignored or self.layer_of(name) is not None:
                went.add(name)
        if lost := sorted(set(self.base.tensors) - went):
            raise CheckpointError(f"{self.base.path}: {lost[0]} has no place in the hybrid; the plan does not fit this base")

    def source(self, index: int) -> OnDemand:
        """A layer's attention tensors, names without prefix."""
        prefix = self.prefix(index)
        places = self.base.tensors.items()
        return OnDemand({n.removeprefix(prefix): t for n, t in places if n.startswith(prefix) and n not in self.base.ignored})

    def compute(self, index: int, calibrated: dict[int, Path]) -> dict[str, Tensor]:
        """The tensors of a converted layer's mixer, names without prefix."""
        mixer = build_mixer(MIXERS.build(self.plan.layers[index].mixer), self.base.config, index)
        where = f"layer {index}"
        if index in calibrated:
            found, _ = read_header(calibrated[index])
            made = {name: read_tensor(info) for name, info in found.items()}
            return checked_outputs(made, mixer, self.base.dtype, where)
        return convert_layer(
            self.conversions[index], self.source(index), mixer, self.base.config, layer_generator(self.plan.seed, index),
            None, where,
        )  # fmt: skip

    def pieces(self, calibrated: dict[int, Path]) -> Callable[[Planned], Iterator[memoryview]]:
        """The bytes of each tensor of one shard; holds one buffer and one computed layer."""
        buffer = new_buffer()
        held: dict[int, dict[str, Tensor]] = {}

        def stream(tensor: Planned) -> Iterator[memoryview]:
            index = self.layer_of(tensor.name)
            if index is None:
                yield from stream_tensor(self.base.tensors[tensor.name], buffer)
                return
            if index not in held:
                held.clear()
                with self._computing:
                    held[index] = self.compute(index, calibrated)
            # Popped, so that memory is given back as the layer is written.
            yield tensor_bytes(held[index].pop(tensor.name.removeprefix(self.prefix(index))))

        return stream

    @property
    def nbytes(self) -> int:
        return sum(shard.nbytes for shard in self.shards)


def open_job(plan: Plan, location: str) -> Job:
    """Open the plan's base and settle the job. Raises CheckpointError when the base is not the plan's."""
    base = open_base(location)
    if base.config_hash != plan.base_hash:
        raise CheckpointError(f"{location}: is not the base the plan was made for (its config.json differs). Plan again")
    count = base.config.num_hidden_layers
    if plan.family != base.family or [layer.index for layer in plan.layers] != list(range(count)):
        raise CheckpointError(
            f"{location}: has {count} layers of {base.family}, the plan {len(plan.layers)} of {plan.family}. Plan again"
        )
    return Job(plan, base)
