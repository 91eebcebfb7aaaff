"""Stage `align`: every converted layer learns alone, given the teacher's own input.

Layers do not wait for each other's mistakes to heal, and only one layer's graph is alive at a time: the teacher runs, and
on each converted layer the student's mixer runs beside it and is differentiated at once.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers.masking_utils import find_packed_sequence_indices

from hybridize.capture import LayerSignals, Projection, visit_layers
from hybridize.data import Batch
from hybridize.distill.options import StageOptions, autocast, converted_layers, reading_groups
from hybridize.distill.signals import Signals
from hybridize.errors import ConfigError
from hybridize.mixers.memory import Memories
from hybridize.mixers.windowed import attention_matrix, base_heads, has_base_heads


@dataclass(frozen=True, kw_only=True)
class Align(StageOptions):
    """Per-layer, teacher-forced alignment of mixers.

    Source: the published layer-wise stages (MOHAWK, arXiv 2408.10189; RADLADS, arXiv 2505.03005; Zebra-Llama,
    arXiv 2505.17272), with the loss of each layer relative to the size of what the teacher's layer does.
    """

    lr: float = 1e-3
    parallel: Literal["data", "layers"] = "data"
    """What several processes share out: a step's rows, or the layers. With `layers` each sees all rows, runs the teacher and
    trains its own layers: no gradient is exchanged, and gradients and moments are divided."""
    engine: Literal["memory", "disk"] = "memory"
    """Where the teacher's stream lies between layers. `memory`: whole models, all layers in each step. `disk`: one layer in
    memory, trained to its end before the next one comes, and the stream of all tokens in files; the same numbers."""
    losses: list[dict[str, Any]] = field(default_factory=lambda: [{"name": "mixer_output", "weight": 1.0}])
    """`hidden_state` beside it costs half a step more, and gained nothing before a stage with `features` (bench/quality.py)."""

    TRAINS: ClassVar[list[str]] = ["*.self_attn.*"]

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.engine == "disk" and self.parallel == "layers":
            raise ConfigError("engine is disk and parallel layers, expected one of the two: disk trains in one process")
        if self.engine == "disk" and self.lora is not None:
            raise ConfigError("engine is disk and lora is given, expected one of the two: a layer's own weights fit beside it")

    @property
    def by_layers(self) -> bool:
        return self.parallel == "layers" and dist.is_initialized() and dist.get_world_size() > 1

    def learners(self, trained: dict[str, nn.Parameter]) -> dict[str, dict[str, nn.Parameter]]:
        """Each layer is a problem of its own: no layer's gradient shortens or stops another's step."""
        found: dict[str, dict[str, nn.Parameter]] = {}
        for name, parameter in trained.items():
            found.setdefault(f"layer.{name.split('.')[2]}", {})[name] = parameter
        return found

    def candidates(self, student: Any) -> dict[str, nn.Parameter]:
        """Only parameters of converted mixers can be trained here."""
        return {
            name: parameter
            for index in aligned_layers(student)
            for name, parameter in student.named_parameters()
            if name.startswith(f"model.layers.{index}.self_attn.")
        }

    def start(self, student: Any, teacher: Any, first: Batch) -> "AlignStep":
        """The step of this stage; `first` holds the tokens that scales are measured on."""
        return AlignStep(self, student, teacher, first)


def aligned_layers(student: Any) -> list[int]:
    """Indices of the layers that no longer have the base's attention. Raises ConfigError when there is none."""
    layers = converted_layers(student)
    if not layers:
        raise ConfigError("stage 'align': every layer of the student is 'attention', expected a converted one; leave it out")
    return layers


def own_layers(student: Any, rank: int, world: int) -> list[int]:
    """The converted layers that one of several processes trains where layers are shared out; who reads goes with who is read."""
    aligned_layers(student)
    return sorted(index for group in reading_groups(student)[rank::world] for index in group)


class AlignStep:
    """One micro-batch of alignment: forward, loss and backward, layer by layer."""

    def __init__(self, options: Align, student: Any, teacher: Any, first: Batch, layers: list[int] | None = None):
        self.options, self.student, self.teacher = options, student, teacher
        self.losses = options.build_losses({"mixed", "hidden", "context", "matrix", "heads"}, "align")
        self.needs = frozenset().union(*(loss.needs for loss in self.losses.values()))
        self.layers = self.own = layers or aligned_layers(student)
        if options.by_layers:
            self.own = own_layers(student, dist.get_rank(), dist.get_world_size())
        self.scales: dict[int, dict[str, Any]] = {}
        if options.documents == "reset" and self.needs & {"matrix", "heads"}:
            raise ConfigError(
                "stage 'align': documents is reset, and a loss compares matrices over whole rows; expected documents: joined"
            )
        with autocast(first.ids.device, options):
            visit_layers(teacher, layers=self.own, visit=partial(self._measure, self._extra(first)), **self._inputs(first))
        if options.gradient_checkpointing:
            raise ConfigError("stage 'align': gradient_checkpointing is true, expected false: one layer's graph is all it keeps")

    def _inputs(self, batch: Batch) -> dict[str, Any]:
        """What the teacher's decoder gets."""
        return batch.inputs()

    def _finish(self, signals: LayerSignals, extra: dict[str, Any]) -> None:
        """Called with each layer once it is differentiated."""
        if "memories" in extra:
            extra["memories"].detach()

    def _extra(self, batch: Batch) -> dict[str, Any]:
        """What mixers get beside input, angles and mask: places in documents, and where memories are left, if one is read.

        Layers come from the bottom up, so that what a layer reads is there: the student's memory, from the teacher's input.
        """
        read = self.student.model.read_layers
        extra: dict[str, Any] = {"memories": Memories(read)} if read else {}
        if batch.positions is not None:
            extra |= {"position_ids": batch.positions, "segment_ids": find_packed_sequence_indices(batch.positions)}
        return extra

    def _measure(self, extra: dict[str, Any], signals: LayerSignals) -> None:
        """Mean square of the median token's mixer output, of its whole update, and of what the mixer's projection reads.

        The median, because a first token whose states are a hundred times the others' would set the scale alone; measured
        once, because a scale taken from each batch would make the loss depend on how a step is divided.
        """
        self._check(signals, extra)
        states = {"mixed_scale": signals.mixed, "hidden_scale": signals.output.float() - signals.hidden.float()}
        if "context" in self.needs and signals.context is not None:
            states["context_scale"] = signals.context
        scales = {name: state.float().pow(2).mean(-1).median().item() for name, state in states.items()}
        if not all(scale > 0 for scale in scales.values()):
            raise ConfigError(f"layer {signals.index} of the teacher gives zeros, so nothing can be aligned with it")
        self.scales[signals.index] = scales

    def _check(self, signals: LayerSignals, extra: dict[str, Any]) -> None:
        """Raise ConfigError for a mixer that has not got what a loss compares."""
        mixer, name = self.student.model.layers[signals.index].self_attn, self.student.config.mixers[signals.index]["name"]
        theirs = self.teacher.model.layers[signals.index].self_attn
        where = f"stage 'align': layer {signals.index}, mixer {name!r}"
        if "matrix" in self.needs and not (getattr(mixer, "mixing_matrix", None) and has_base_heads(theirs)):
            raise ConfigError(f"{where}: no matrix tells what a token weighs there; align it with mixer_output or hidden_state")
        if "heads" in self.needs and not (has_base_heads(mixer) and has_base_heads(theirs)):
            raise ConfigError(f"{where}: its queries, keys and values are not the base's; align it with mixer_output")
        if "context" in self.needs:
            _, own = self._mix(signals, extra)
            if own is None or signals.context is None or own.shape != signals.context.shape:
                raise ConfigError(f"{where}: nothing of it is like what the base's o_proj reads; use `at: output`")

    def _mix(self, signals: LayerSignals, extra: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        """The student's mixer on the teacher's input: its output, and what its last projection reads (None: no such)."""
        layer = self.student.model.layers[signals.index]
        with Projection(layer.self_attn) as projection:
            mixed, _ = layer.self_attn(
                hidden_states=layer.input_layernorm(signals.hidden), position_embeddings=signals.position_embeddings,
                attention_mask=signals.attention_mask, **extra,
            )  # fmt: skip
        return mixed, projection.context_of(mixed)

    def layer_losses(self, signals: LayerSignals, extra: dict[str, Any]) -> Iterator[tuple[str, Tensor, float]]:
        """Name, value and weight of each loss of one layer, with the student's mixer in the graph.

        Args:
            signals: the teacher's, of this layer.
            extra: what the student's mixer gets beside its input, the angles and the mask.
        """
        layer = self.student.model.layers[signals.index]
        theirs = self.teacher.model.layers[signals.index].self_attn
        own: dict[str, Any] = {}
        other: dict[str, Any] = {"mixed": signals.mixed, "hidden": signals.output, "context": signals.context}
        if self.needs & {"mixed", "hidden", "context"} or signals.index in self.student.model.read_layers:
            own["mixed"], own["context"] = self._mix(signals, extra)
        if "hidden" in self.needs:
            hidden = signals.hidden + own["mixed"]
            own["hidden"] = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        if self.needs & {"matrix", "heads"}:
            normed, angles = layer.input_layernorm(signals.hidden), signals.position_embeddings
            if "matrix" in self.needs:
                own["matrix"] = layer.self_attn.mixing_matrix(normed, angles)
                other["matrix"] = attention_matrix(theirs, signals.normed, angles)
            if "heads" in self.needs:
                own["heads"] = base_heads(layer.self_attn, normed, angles)
                other["heads"] = base_heads(theirs, signals.normed, angles)
        student, teacher = Signals(**own), Signals(**other, **self.scales[signals.index])
        for name, loss in self.losses.items():
            yield name, loss(student, teacher, None), loss.weight

    def __call__(self, batch: Batch, share: float) -> dict[str, Tensor]:
        """Add `share` times the gradient of one micro-batch to the trained parameters.

        Args:
            batch: B rows of T tokens.
            share: this micro-batch's part of the step's tokens.

        Returns:
            Losses: each loss by name as the mean over layers, and each layer's total under `layer.<index>`.
        """
        extra = self._extra(batch)
        device = batch.ids.device
        # Layers of other processes stay zero here, and all processes have the same names in the same order.
        names = [*self.losses, *(f"layer.{index}" for index in self.layers)]
        parts: dict[str, Tensor] = {name: torch.zeros((), device=device) for name in names}

        def visit(signals: LayerSignals) -> None:
            with torch.enable_grad(), autocast(device, self.options):
                total = torch.zeros((), device=device)
                for name, value, weight in self.layer_losses(signals, extra):
                    total = total + weight * value
                    parts[name] = parts[name] + value.detach() / len(self.layers)
            # A layer of which nothing is trained has a loss, but nothing to learn.
            if total.requires_grad:
                total.backward(torch.full_like(total, share))
            self._finish(signals, extra)
            parts[f"layer.{signals.index}"] = total.detach()

        with autocast(device, self.options):
            visit_layers(self.teacher, layers=self.own, visit=visit, **self._inputs(batch))
        parts["loss"] = torch.stack([parts[f"layer.{index}"] for index in self.layers]).mean()
        return parts
