"""The calibration pass: text through the base one layer at a time, and through the hybrid as far as it is made.

One layer's weights are in memory, and two streams of activations: the teacher's and the student's. They are one until
the first converted layer. What each calibrated conversion needs is measured on the way, and its result is written at
once, so that a killed pass only repeats the forward part.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from hybridize.checkpoint import Checkpoint, skeleton
from hybridize.conversions.layer import LayerCalibration, convert_layer, layer_generator, materialised
from hybridize.conversions.plan import build_mixer
from hybridize.conversions.table import CONVERSIONS
from hybridize.core import Plan
from hybridize.errors import ConfigError
from hybridize.families import family_of
from hybridize.mixers import MIXERS
from hybridize.mixers.memory import Memories
from hybridize.storage import write_bytes

Progress = Callable[[str, float, float], None]
# Sequences per forward: bounds the MLP's and the attention's temporaries.
ROWS = 4


@torch.no_grad()
def calibrate(plan: Plan, base: Checkpoint, sequences: Tensor, folder: Path, progress: Progress | None = None) -> dict[int, Path]:
    """Seed every calibrated layer of a plan on text.

    Args:
        plan: what each layer becomes.
        base: the validated base.
        sequences: token ids, [N, T], int64.
        folder: where each layer's tensors go, `layer-<index>.safetensors`, names without prefix.
        progress: called with ("calibrate", layers done, layers).

    Returns:
        Layer index -> file.

    Raises:
        ConfigError: token ids that the base's vocabulary does not have.

    Memory: one decoder layer in fp32, five activations of N * T * D fp32 numbers, and for each layer that a later one reads
    its memory, N * T * C of them, from that layer to its last reader. Two more activations while a conversion looks ahead.
    """
    conversions = [CONVERSIONS.build(layer.conversion) for layer in plan.layers]
    last = max(index for index, conversion in enumerate(conversions) if conversion.calibrated)
    config = base.config
    config._attn_implementation = "sdpa"
    if int(sequences.max()) >= config.vocab_size or int(sequences.min()) < 0:
        raise ConfigError(
            f"calibration text has token {int(sequences.max())}, expected 0 to {config.vocab_size - 1}: "
            "the tokenizer is not the base's"
        )
    family = family_of(config)
    positions = torch.arange(sequences.shape[1])[None]
    teacher = base.read("model.embed_tokens.weight")[sequences].float()
    angles = family.rotary(config)(teacher[:1], positions)
    student = teacher
    written: dict[int, Path] = {}
    reads = {layer.index: layer.mixer["reads"] for layer in plan.layers if layer.mixer.get("reads") is not None}
    memories: dict[int, Tensor] = {}
    for index in range(last + 1):
        layer = decoder_layer(base, index)
        spec, conversion = plan.layers[index].mixer, conversions[index]
        readers = [later for later, below in reads.items() if below == index]
        if any(later <= last for later in readers):
            memories[index] = torch.empty(*sequences.shape, MIXERS.build(spec).memory_width(config))
        wants = conversion.calibrated
        shared = student is teacher
        inputs, context, output, after = _run(layer, teacher, angles, capture=wants)
        if wants and not shared:
            inputs = layer.input_layernorm(student)
            output += teacher - student
        teacher = after
        if spec["name"] == "attention":
            student = after if shared else _run(layer, student, angles, capture=False)[3]
        else:
            # Nothing of the layer is needed while its seed is solved, which has matrices of its own.
            del layer, after
            path = folder / f"layer-{index:05d}.safetensors"
            mixer = build_mixer(MIXERS.build(spec), config, index)
            memory = memories.get(reads.get(index, -1))
            measured = None
            if wants and not path.exists():
                ahead = ()
                if hasattr(conversion, "ahead"):
                    ahead = _look_ahead(base, conversion, mixer, index, readers, inputs, teacher, angles)
                measured = LayerCalibration(
                    inputs=inputs, context=context, target=output, angles=angles, memory=memory, ahead=ahead
                )
            del inputs, context, output, memory
            if wants:
                written[index] = path
                if not path.exists():
                    write_bytes(path, save(_convert(plan, base, conversion, mixer, index, measured)))
                tensors = load_file(path)
            else:
                tensors = _convert(plan, base, conversion, mixer, index, None)
            del measured
            if index < last:
                layer = decoder_layer(base, index)
                layer.self_attn = materialised(mixer, {name: t.float() for name, t in tensors.items()})
                student = _run(layer, student, angles, capture=False, memories=memories)[3]
        for done in set(memories) - {below for later, below in reads.items() if index < later <= last}:
            del memories[done]
        if progress is not None:
            progress("calibrate", index + 1, last + 1)
    return written


def _look_ahead(
    base: Checkpoint,
    conversion: Any,
    mixer: Any,
    index: int,
    readers: list[int],
    inputs: Tensor,
    teacher: Tensor,
    angles: tuple[Tensor, Tensor],
) -> tuple[Any, ...]:
    """What a conversion wants to know of the layers that will read the one it makes, from the teacher's own stream there.

    Args:
        base: the base.
        conversion: with `ahead`.
        mixer: of layer `index`, on the meta device.
        index: the layer that is being made.
        readers: the layers that read it, upwards.
        inputs: what the student's layer `index` reads, [N, T, D].
        teacher: the teacher's stream after layer `index`, [N, T, D].
        angles: cos and sin, [1, T, d].
    """
    found = []
    for later in range(index + 1, max(readers, default=index) + 1):
        layer = decoder_layer(base, later)
        seen = layer.input_layernorm(teacher) if later in readers else None
        teacher = teacher if later == readers[-1] else _run(layer, teacher, angles, capture=False)[3]
        del layer
        if seen is not None:
            found.append(conversion.ahead(_source(base, later), mixer, base.config, inputs, seen, angles))
    return tuple(found)


def _source(base: Checkpoint, index: int) -> dict[str, Tensor]:
    """The tensors of a layer's attention, names without prefix."""
    prefix = f"model.layers.{index}.self_attn."
    names = [name for name in base.tensors if name.startswith(prefix) and name not in base.ignored]
    return {name.removeprefix(prefix): base.read(name) for name in names}


def _convert(plan: Plan, base: Checkpoint, conversion: Any, mixer: Any, index: int, measured: Any) -> dict[str, Tensor]:
    generator = layer_generator(plan.seed, index)
    return convert_layer(conversion, _source(base, index), mixer, base.config, generator, measured, f"layer {index}")


def decoder_layer(base: Checkpoint, index: int) -> Any:
    """One of the base's decoder layers with its weights, fp32, in evaluation mode."""
    with torch.device("meta"):
        layer = family_of(base.config).decoder_layer(base.config, index)
    expected = [name for name in skeleton(base.config) if name.startswith(f"model.layers.{index}.")]
    prefix = f"model.layers.{index}."
    tensors = {name.removeprefix(prefix): base.read(name).float() for name in expected}
    layer.load_state_dict(tensors, strict=True, assign=True)
    return layer.eval()


def _run(
    layer: Any, stream: Tensor, angles: tuple[Tensor, Tensor], capture: bool, memories: dict[int, Tensor] | None = None
) -> tuple[Any, Any, Any, Tensor]:
    """Forward a stream through one layer.

    Args:
        layer: a decoder layer of the family, in evaluation mode.
        stream: [N, T, D].
        angles: cos and sin, [1, T, d].
        capture: whether to keep what the layer's attention reads and makes.
        memories: what layers below left, by index, [N, T, C] each; this layer's own is filled in where it is among them.

    Returns:
        (attention's input [N, T, D], o_proj's input [N, T, H * P], attention's output [N, T, D], the stream after the
        layer); the first three None without `capture`.
    """
    kept: dict[str, Tensor] = {}
    start = 0

    def keep(name: str, piece: Tensor) -> None:
        if name not in kept:
            kept[name] = torch.empty(*stream.shape[:2], piece.shape[-1])
        kept[name][start : start + len(piece)] = piece

    hooks = []
    if capture:
        attention = layer.self_attn
        hooks = [
            layer.input_layernorm.register_forward_hook(lambda m, a, out: keep("inputs", out)),
            attention.o_proj.register_forward_pre_hook(lambda m, a: keep("context", a[0])),
            attention.register_forward_hook(lambda m, a, out: keep("output", out[0])),
        ]
    after = torch.empty_like(stream)
    try:
        for start in range(0, stream.shape[0], ROWS):
            rows = slice(start, start + ROWS)
            part = Memories(memories or ())
            for index, whole in (memories or {}).items():
                part.leave(index, whole[rows])
            extra = {"memories": part} if memories else {}
            after[rows] = layer(stream[rows], attention_mask=None, position_embeddings=angles, **extra)
            for index, whole in (memories or {}).items():
                whole[rows] = part.take(index)
    finally:
        for hook in hooks:
            hook.remove()
    return kept.get("inputs"), kept.get("context"), kept.get("output"), after
