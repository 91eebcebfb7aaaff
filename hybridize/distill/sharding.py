"""Weights divided over processes by torch's FSDP2, the same code on CPUs with gloo and on GPUs with nccl.

Accelerate's own FSDP turns into plain data parallelism on a CPU without a word; here it only starts the processes and says
which device is whose. Every process reads only its own rows of each tensor. Trained weights are gathered in fp32 and cast by
autocast as in a run without shards, because the decays must not pass through bf16.

Stage `kl` gathers a layer at a time, and embedding and head once a micro-batch, not once a chunk of the loss. Stage `align`
gathers the teacher's layers and, beside each, the student's mixer and MLP, which is differentiated and let go before the
next one comes; what it does not use is not read at all.
"""

import copy
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.distributed import HashStore  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard
from transformers import AutoModelForCausalLM

from hybridize.checkpoint import Checkpoint, open_checkpoint, stored_dtype
from hybridize.data import Batch
from hybridize.distill.losses import LOSSES
from hybridize.distill.options import converted_layers
from hybridize.distill.replacement import lender
from hybridize.distill.teachers import check_vocabulary
from hybridize.errors import ConfigError

log = logging.getLogger(__name__)


def asked_to_shard(shard: bool) -> bool:
    """Whether weights are to be divided: by our own option, or by a launch config of accelerate for FSDP.

    Raises:
        ConfigError: that config asks for something of FSDP that is not done here, or for DeepSpeed.
    """
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false") == "true":
        raise ConfigError(
            "distill: started with a launch config for DeepSpeed, which is not supported; "
            "use accelerate/fsdp2.yaml, which divides weights, gradients and moments as ZeRO-3 does"
        )
    if os.environ.get("ACCELERATE_USE_FSDP", "false") != "true":
        return shard
    for key, wanted in (("FSDP_VERSION", "2"), ("FSDP_OFFLOAD_PARAMS", "false"), ("FSDP_RESHARD_AFTER_FORWARD", "true")):
        if (found := os.environ.get(key, wanted)).lower() != wanted:
            raise ConfigError(f"launch config: {key.lower()} is {found}, expected {wanted}; use accelerate/fsdp2.yaml")
    return True


def check_divisible(name: str, options: Any) -> None:
    """Raise ConfigError for a stage that does not run with divided weights.

    Args:
        name: the stage's.
        options: its options.
    """
    where = f"stage {name!r}: --shard divides its weights, and"
    if not options.divides or options.lora is not None:
        what = "an adapter of it" if options.divides else "it"
        raise ConfigError(f"{where} {what} needs them whole; run it without --shard")
    for spec in options.losses:
        if missing := sorted(LOSSES.build(spec).needs - {"mixed", "hidden", "head", "ids"}):
            raise ConfigError(
                f"{where} the loss {spec['name']!r} needs {', '.join(missing)}, from whole ones; run it without --shard"
            )


def make_mesh(device: torch.device) -> DeviceMesh:
    """All processes in one row; a single one that nobody launched makes a group of itself."""
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    return init_device_mesh(device.type, (dist.get_world_size(),))


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor, the tensor itself where it is not divided."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class Decoder(nn.Module):
    """A causal LM without its head's product, as one module: what gathers embedding, last norm and head around a pass."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def forward(self, **inputs: Tensor) -> Tensor:
        """Final hidden states, [B, T, D], of a batch's inputs."""
        return self.model.model(**inputs, use_cache=False).last_hidden_state


def final_hidden(model: Any, batch: Batch) -> Tensor:
    """Final hidden states of a causal LM, [B, T, D]; of one with shards, its head is there in full until `let_go`."""
    decoder = getattr(model, "sharded_decoder", None)
    if decoder is not None:
        return decoder[0](**batch.inputs())
    return model.model(**batch.inputs(), use_cache=False).last_hidden_state


def let_go(model: Any) -> None:
    """Divide again what a pass without a backward pass has left gathered."""
    decoder = getattr(model, "sharded_decoder", None)
    if decoder is not None:
        decoder[0].reshard()


def empty_model(found: Checkpoint, dtype: torch.dtype | None, config: Any = None) -> Any:
    """A model whose parameters have shape and dtype and no memory; its buffers are as the config (None: its own) makes them."""
    used = found.config if config is None else copy.deepcopy(config)
    with init_empty_weights(include_buffers=False):
        model: Any = AutoModelForCausalLM.from_config(used, attn_implementation="sdpa")
    # Parameters that lost their memory one by one are no longer the same where the config ties them.
    model.tie_weights()
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(stored_dtype(name, dtype or found.dtype))
        parameter.requires_grad_(False)
    return model


def shard_whole(model: Any, mesh: DeviceMesh) -> None:
    """Divide a model that runs end to end."""
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    # In a list, so that the model does not become a part of itself.
    model.sharded_decoder = [fully_shard(Decoder(model), mesh=mesh, reshard_after_forward=False)]


def shard_for_align(student: Any, teacher: Any, options: Any, mesh: DeviceMesh) -> None:
    """Divide what alignment runs: the teacher's embedding and layers, the student's mixers and, if read, their MLPs."""
    fully_shard(teacher.model.embed_tokens, mesh=mesh, reshard_after_forward=True)
    for layer in teacher.model.layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    with_mlp = any("hidden" in LOSSES.build(spec).needs for spec in options.losses)
    for index in converted_layers(student):
        layer = student.model.layers[index]
        for part in (layer.self_attn, layer.mlp) if with_mlp else (layer.self_attn,):
            fully_shard(part, mesh=mesh, reshard_after_forward=True)


def own_rows_of(rows: int, mesh: DeviceMesh) -> tuple[int, int]:
    """First and last-but-one row of this process's part of a tensor, as torch.chunk divides it."""
    each = -(-rows // mesh.size())
    start = min(rows, mesh.get_local_rank() * each)
    return start, min(rows, start + each)


def divided(rows: Tensor, like: Tensor, mesh: DeviceMesh) -> DTensor:
    """A tensor of `like`'s shape of which this process has `rows`."""
    stride = torch.empty(like.shape, device="meta").stride()
    return DTensor.from_local(rows, mesh, [Shard(0)], run_check=False, shape=like.shape, stride=stride)


def fill(
    model: Any, found: Checkpoint, mesh: DeviceMesh | None, device: torch.device, used: Callable[[str], bool], kept: set[str],
    twins: dict[str, Tensor], teacher: Checkpoint | None = None,
) -> int:  # fmt: skip
    """Give parameters their memory and their stored values, each process its own rows; return the bytes that were shared.

    Args:
        model: as `empty_model` made it, perhaps with parts divided.
        found: the directory it is of.
        mesh: the processes; None is this one alone, which divides nothing.
        device: where the values go.
        used: whether a parameter that is not divided is needed (in full); the others stay without memory.
        kept: names whose values a training state will bring; they get memory in any case, divided.
        twins: another model's parameters by name; frozen equal ones share their memory.
        teacher: the directory of what a stage lends the model.
    """
    made: dict[int, nn.Parameter] = {}
    saved = 0
    for path, module in model.named_modules():
        for leaf, parameter in list(module.named_parameters(recurse=False)):
            name = f"{path}.{leaf}"
            if id(parameter) in made:
                setattr(module, leaf, made[id(parameter)])
                continue
            split = mesh is not None and (isinstance(parameter, DTensor) or name in kept)
            if not split and not used(name):
                continue
            start, stop = own_rows_of(parameter.shape[0], mesh) if split and mesh else (0, parameter.shape[0])
            lent = lender(name)
            source = found if lent is None or teacher is None else teacher
            rows = source.read_rows(lent or name, start, stop).to(device, parameter.dtype)
            twin = twins.get(lent or name)
            if not parameter.requires_grad and name not in kept and twin is not None and not twin.is_meta:
                theirs = local(twin).detach()
                if twin.shape == parameter.shape and theirs.dtype == rows.dtype and torch.equal(theirs, rows):
                    rows, saved = theirs, saved + rows.numel() * rows.element_size()
            value = divided(rows, parameter, mesh) if split and mesh else rows
            made[id(parameter)] = nn.Parameter(value, requires_grad=parameter.requires_grad)
            setattr(module, leaf, made[id(parameter)])
    buffers = dict(model.named_buffers())
    for name, buffer in buffers.items():
        if name in found.shapes:
            buffer.copy_(found.read(name))
    for module in model.modules():
        for leaf, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, leaf, buffer.to(device))
    return saved


def load_sharded_pair(
    student_dir: Path, teacher_dir: Path | None, options: Any, name: str, kept: set[str], device: torch.device, mesh: DeviceMesh,
    configs: tuple[Any, Any] = (None, None),
) -> tuple[Any, Any, dict[str, nn.Parameter]]:  # fmt: skip
    """As run.load_pair, divided over the processes of `mesh`; the values of `kept` are for the training state to bring.

    Raises:
        CheckpointError: a directory cannot be trusted.
        ConfigError: a glob of `train` matches nothing.
    """
    dtype = torch.float32 if options.dtype == "fp32" else None
    opened = open_checkpoint(student_dir)
    found = None if teacher_dir is None or not options.needs_teacher else open_checkpoint(teacher_dir)
    student, teacher = empty_model(opened, dtype, configs[0]), None
    if teacher_dir is not None and found is not None:
        teacher = empty_model(found, dtype, configs[1])
        if teacher.config.vocab_size != student.config.vocab_size:
            check_vocabulary(student_dir, teacher_dir)
    options.prepare(student, teacher)
    trained = options.choose(options.candidates(student), name)
    options.check_rates(trained, name)
    for key, parameter in student.named_parameters():
        if key in kept or key in trained:
            parameter.data = parameter.data.float()
        parameter.requires_grad_(key in trained)
    if name == "align":
        shard_for_align(student, teacher, options, mesh)
    else:
        for model in (student,) if teacher is None else (student, teacher):
            shard_whole(model, mesh)
    for module in student.modules():
        if isinstance(module, FSDPModule):
            _sum_gradients(module)
    if name != "align":
        _sum_gradients(student.sharded_decoder[0])
    layers = [f"model.layers.{index}." for index in converted_layers(student)] if name == "align" else []
    norms = ("input_layernorm.weight", "post_attention_layernorm.weight")
    twins: dict[str, Tensor] = {}
    if teacher is not None and found is not None:
        fill(teacher, found, mesh, device, lambda key: name != "align", set(), {})
        twins = dict(teacher.eval().named_parameters(remove_duplicate=False))
    saved = fill(
        student, opened, mesh, device, lambda key: any(key.startswith(p) and key.endswith(norms) for p in layers), kept, twins,
        found,
    )  # fmt: skip
    log.info("distill: %.1f MB of this process's frozen weights are shared with the teacher", saved / 1e6)
    own = dict(student.named_parameters())
    return student.train(), teacher, {key: own[key] for key in trained}


def _sum_gradients(module: FSDPModule) -> None:
    """Gradients are shares of the whole step's already: they are summed, where FSDP would take their mean."""
    module.set_gradient_divide_factor(1.0)
    module.set_force_sum_reduction_for_comms(True)
