"""Stage `align`: every converted layer learns alone, given the teacher's own input.

Layers do not wait for each other's mistakes to heal, and only one layer's graph is alive at a time: the teacher runs, and
on each converted layer the student's mixer runs beside it and is differentiated at once.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hybridize.capture import LayerSignals, visit_layers
from hybridize.distill.options import StageOptions, autocast
from hybridize.distill.signals import Signals
from hybridize.errors import ConfigError
from hybridize.mixers.memory import Memories


@dataclass(frozen=True, kw_only=True)
class Align(StageOptions):
    """Per-layer, teacher-forced alignment of mixers.

    Source: the published layer-wise stages (MOHAWK, arXiv 2408.10189; RADLADS, arXiv 2505.03005; Zebra-Llama,
    arXiv 2505.17272), with the loss of each layer relative to the size of what the teacher's layer does.
    """

    lr: float = 1e-3
    train: list[str] = field(default_factory=lambda: ["*.self_attn.*"])
    """As in every stage, but only parameters of converted mixers can be trained here."""
    losses: list[dict[str, Any]] = field(
        default_factory=lambda: [{"name": "mixer_output", "weight": 1.0}, {"name": "hidden_state", "weight": 1.0}]
    )

    def candidates(self, student: Any) -> dict[str, nn.Parameter]:
        return {
            name: parameter
            for index in converted_layers(student)
            for name, parameter in student.named_parameters()
            if name.startswith(f"model.layers.{index}.self_attn.")
        }

    def start(self, student: Any, teacher: Any, first_ids: Tensor) -> "AlignStep":
        """The step of this stage; `first_ids` [B, T] are the tokens that scales are measured on."""
        return AlignStep(self, student, teacher, first_ids)


def converted_layers(student: Any) -> list[int]:
    """Indices of the layers that no longer have the base's attention. Raises ConfigError when there is none."""
    layers = [index for index, spec in enumerate(student.config.mixers) if spec["name"] != "attention"]
    if not layers:
        raise ConfigError("stage 'align': every layer of the student is 'attention', expected a converted one; leave it out")
    return layers


class AlignStep:
    """One micro-batch of alignment: forward, loss and backward, layer by layer."""

    def __init__(self, options: Align, student: Any, teacher: Any, first_ids: Tensor):
        self.options, self.student, self.teacher = options, student, teacher
        self.losses = options.build_losses({"mixed", "hidden"}, "align")
        self.layers = converted_layers(student)
        self.scales: dict[int, tuple[float, float]] = {}
        with autocast(first_ids.device, options):
            visit_layers(teacher, first_ids, self.layers, self._measure)
        if options.gradient_checkpointing:
            raise ConfigError("stage 'align': gradient_checkpointing is true, expected false: one layer's graph is all it keeps")

    def _measure(self, signals: LayerSignals) -> None:
        """Mean square of the median token's mixer output and of its whole update.

        The median, because a first token whose states are a hundred times the others' would set the scale alone; measured
        once, because a scale taken from each batch would make the loss depend on how a step is divided.
        """
        mixed = signals.mixed.float().pow(2).mean(-1).median().item()
        update = (signals.output.float() - signals.hidden.float()).pow(2).mean(-1).median().item()
        if not (mixed > 0 and update > 0):
            raise ConfigError(f"layer {signals.index} of the teacher gives zeros, so nothing can be aligned with it")
        self.scales[signals.index] = (mixed, update)

    def layer_losses(self, signals: LayerSignals, extra: dict[str, Any]) -> Iterator[tuple[str, Tensor, float]]:
        """Name, value and weight of each loss of one layer, with the student's mixer in the graph.

        Args:
            signals: the teacher's, of this layer.
            extra: what the student's mixer gets beside its input and the angles.
        """
        layer = self.student.model.layers[signals.index]
        mixed_scale, hidden_scale = self.scales[signals.index]
        mixed, _ = layer.self_attn(
            hidden_states=layer.input_layernorm(signals.hidden), position_embeddings=signals.position_embeddings, **extra
        )
        hidden = None
        if any("hidden" in loss.needs for loss in self.losses.values()):
            hidden = signals.hidden + mixed
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        student = Signals(mixed=mixed, hidden=hidden)
        teacher = Signals(mixed=signals.mixed, hidden=signals.output, mixed_scale=mixed_scale, hidden_scale=hidden_scale)
        for name, loss in self.losses.items():
            yield name, loss(student, teacher, None), loss.weight

    def __call__(self, ids: Tensor, share: float) -> dict[str, Tensor]:
        """Add `share` times the gradient of one micro-batch to the trained parameters.

        Args:
            ids: [B, T], int64.
            share: this micro-batch's part of the step's tokens.

        Returns:
            Losses: each loss by name as the mean over layers, and each layer's total under `layer.<index>`.
        """
        parts: dict[str, Tensor] = {}
        # Layers come from the bottom up, so that what a layer reads is there: the student's memory, from the teacher's input.
        memories = Memories(self.student.model.read_layers)
        extra = {"memories": memories} if self.student.model.read_layers else {}

        def visit(signals: LayerSignals) -> None:
            with torch.enable_grad(), autocast(ids.device, self.options):
                total = torch.zeros((), device=ids.device)
                for name, value, weight in self.layer_losses(signals, extra):
                    total = total + weight * value
                    parts[name] = parts.get(name, 0) + value.detach() / len(self.layers)
            total.backward(torch.full_like(total, share / len(self.layers)))
            memories.detach()
            parts[f"layer.{signals.index}"] = total.detach()

        with autocast(ids.device, self.options):
            visit_layers(self.teacher, ids, self.layers, visit)
        parts["loss"] = torch.stack([parts[f"layer.{index}"] for index in self.layers]).mean()
        return parts
