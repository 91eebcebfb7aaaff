"""What a run will cost, known before anything is loaded: tokens, FLOP, GPU-hours, and memory of each process.

Weights, gradients and moments are exact; activations are those that the backward pass keeps, so that a fit which is only
just one may not be. FLOP are of matrix products; see counting.py.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from hybridize.checkpoint import Described, describe, stored_dtype
from hybridize.distill.adapters import Lora, targeted
from hybridize.distill.align import aligned_layers
from hybridize.distill.counting import Beside, Known, LayerCounter, Work, fake_tensors
from hybridize.distill.job import configs_of
from hybridize.distill.losses import LOSSES, asks_of_teacher
from hybridize.distill.options import StageOptions
from hybridize.distill.streams import on_disk, scratch_bytes
from hybridize.distill.teacher_cache import TeacherCache
from hybridize.distill.teachers import runs_model
from hybridize.errors import ConfigError

H100_FLOPS = 989e12
"""Dense bf16 products of an H100 or H200 in a second, as its data sheet has them."""
MOST_PROCESSES = 1024


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What it runs on."""

    processes: int = 1
    sharded: bool = False
    bytes_each: float | None = None
    """Memory of one process's device; None is not known."""
    mfu: float = 0.4
    """Share of the peak that is reached."""
    peak_flops: float = H100_FLOPS

    def __post_init__(self) -> None:
        if self.processes < 1 or not 0 < self.mfu <= 1 or self.peak_flops <= 0:
            raise ConfigError(
                f"processes is {self.processes}, mfu {self.mfu}, peak {self.peak_flops:g} FLOP/s; expected at least 1, "
                "above 0 and at most 1, above 0"
            )


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What the memory of a stage follows from, in bytes for one whole model and one row."""

    frozen: int
    """Frozen weights, the teacher's and those of the student's that are not the same tensors."""
    trained: int
    """Trained weights in fp32."""
    largest_unit: int
    """Weights of the largest part that is gathered at once where weights are sharded."""
    saved_row: float
    """What the backward pass keeps of a row, all layers."""
    saved_row_checkpointed: float
    """The same with gradient checkpointing."""
    fixed: float
    """Whatever the rows: logits of a chunk, the head's gradient, casts of weights."""


@dataclass(frozen=True, kw_only=True)
class StageCost:
    """One stage of a run, or its rows of one length."""

    name: str
    tokens: int
    steps: int
    trained_parameters: int
    flops: float
    """Of all its tokens."""
    gpu_hours: float
    memory: dict[str, float]
    """Bytes of one process: weights, gradients, moments, frozen, gathered, activations."""
    disk_bytes: float = 0.0
    """Of files in the output's scratch folder at their most, training states aside; 0 where the stage has none else."""
    advice: str = ""
    """Why it will not fit and what would; empty when it fits or nothing is known."""
    stage: int = 1
    """Its number in the run, from 1."""

    @property
    def certain_bytes(self) -> float:
        """What is there whatever the rows: all but activations."""
        return sum(value for key, value in self.memory.items() if key != "activations")

    @property
    def total_bytes(self) -> float:
        return sum(self.memory.values())


def device_bytes() -> float:
    """Memory of this process's device: the GPU's, or this process's part of the RAM that is free."""
    if torch.cuda.is_available():
        return float(torch.cuda.get_device_properties(int(os.environ.get("LOCAL_RANK", "0"))).total_memory)
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if Path("/proc/meminfo").exists():
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    return free / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def memory(sizes: Sizes, options: StageOptions, machine: Machine, checkpointing: bool) -> dict[str, float]:
    """Bytes of one process by what they hold.

    trained weights 4 N, gradients 4 N, AdamW's moments 8 N, all fp32; sharded, each is divided, and the largest part of
    student and teacher is there in full while it is at work.
    """
    parts = machine.processes if machine.sharded else 1
    # Layers that are shared out: each process has the gradients and moments of its own.
    learners = machine.processes if getattr(options, "parallel", "data") == "layers" else parts
    saved = sizes.saved_row_checkpointed if checkpointing else sizes.saved_row
    return {
        "weights": sizes.trained / parts,
        "gradients": sizes.trained / learners,
        "moments": 2 * sizes.trained / learners,
        "frozen": sizes.frozen / parts,
        "gathered": float(sizes.largest_unit) if machine.sharded and parts > 1 else 0.0,
        "activations": options.lanes * options.rows * saved + sizes.fixed,
    }


def advise(sizes: Sizes, options: StageOptions, machine: Machine, can_checkpoint: bool) -> str:
    """One line for a stage that will not fit: what it needs, what is there, and the least change that would fit."""
    needed = sum(memory(sizes, options, machine, options.gradient_checkpointing).values())
    if machine.bytes_each is None or needed <= machine.bytes_each:
        return ""
    if getattr(options, "engine", "memory") == "disk":
        return (
            f"will not fit: needs {needed / 1e9:.2f} GB for one layer, have {machine.bytes_each / 1e9:.2f} GB; fewer rows "
            f"(now {options.rows}) or shorter ones would help"
        )
    said = f"will not fit: needs {needed / 1e9:.2f} GB a process, have {machine.bytes_each / 1e9:.2f} GB; "
    counts = [machine.processes]
    while counts[-1] * 2 <= MOST_PROCESSES:
        counts.append(counts[-1] * 2)
    for processes in counts:
        for sharded in (False, True) if processes == machine.processes else (True,):
            for checkpointing in (False, True) if can_checkpoint else (False,):
                other = Machine(processes=processes, sharded=sharded)
                if sum(memory(sizes, options, other, checkpointing).values()) <= machine.bytes_each:
                    words = []
                    if processes != machine.processes or (sharded and not machine.sharded):
                        words.append(f"--shard over {processes} processes")
                    if checkpointing and not options.gradient_checkpointing:
                        words.append("gradient_checkpointing=true")
                    if words:
                        return f"{said}would fit with {' and '.join(words)}"
    return (
        f"{said}not even shards on {MOST_PROCESSES} processes would; fewer rows (now {options.rows}) or shorter ones would help"
    )


def _numbers(parameters: Any) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _bytes(parameters: Any) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters)


def _fake(described: Any, options: StageOptions) -> Any:
    """A model of fake tensors in the dtypes that it is trained in."""
    model = AutoModelForCausalLM.from_config(described.config, attn_implementation="sdpa")
    dtype = torch.float32 if options.dtype == "fp32" else described.dtype
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(stored_dtype(name, dtype))
        parameter.requires_grad_(False)
    return model.train()


def stage_cost(
    student: Any,
    teacher: Any,
    name: str,
    options: Any,
    trained_before: set[str],
    machine: Machine,
    known: Known | None = None,
    cache: TeacherCache | None = None,
) -> tuple[StageCost, set[str]]:
    """The cost of one stage, and the names of the weights that it changes.

    Args:
        student: as `checkpoint.describe` gives it.
        teacher: the same.
        name: the stage's.
        options: its options.
        trained_before: names that earlier stages trained, which are fp32 and no longer the teacher's.
        machine: what it runs on.
        known: what was counted for other stages of the run; added to.
        cache: what stands in the teacher's place; then nothing of the teacher runs, and its head at most is in memory.

    Raises:
        ConfigError: as the stage itself does for globs that match nothing.
    """
    with fake_tensors():
        own, other = _fake(student, options), _fake(student if options.follows_itself else teacher, options)
        options.prepare(own, other)
        candidates = options.candidates(own)
        trained = options.choose(candidates, name)
        for parameter in trained.values():
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
        cache = cache if options.cacheable and options.needs_teacher else None
        runs_teacher = options.needs_teacher and cache is None
        theirs = dict(other.named_parameters(remove_duplicate=False)) if runs_teacher else {}
        apart, lent = [], {id(parameter) for parameter in other.parameters()}
        for key, parameter in own.named_parameters():
            twin = theirs.get(key)
            if id(parameter) in lent:
                continue
            if key in trained_before:
                parameter.data = parameter.data.float()
                if twin is not None and options.follows_itself:
                    twin.data = twin.data.float()
            changed = key in trained_before and not options.follows_itself
            if key not in trained and (
                changed or twin is None or twin.shape != parameter.shape or twin.dtype != parameter.dtype
            ):  # fmt: skip
                apart.append(parameter)
        frozen = (_bytes(other.parameters()) if runs_teacher else 0) + _bytes(apart)
        if cache is not None:
            frozen += cache.head_numbers * (4 if options.dtype == "fp32" else cache.head_dtype.itemsize)
        changes = set(trained)
        if options.lora is not None:
            lora = Lora(**options.lora)
            targets = targeted(own, lora, candidates, name)
            for target in targets:
                own.set_submodule(target, Beside(own.get_submodule(target), lora.rank))
            adapters = {key: p for key, p in own.named_parameters() if ".adapter." in key}
            # What leaves the stage is the projection with its adapter in it.
            trained, changes = trained | adapters, changes | {f"{target}.weight" for target in targets}
        counted = {} if known is None else known
        if name == "align":
            sizes, per_token = _align_sizes(own, other, options, counted)
        else:
            sizes, per_token = _whole_sizes(own, other, options, counted, cache)
        sizes = Sizes(**{**sizes, "frozen": frozen, "trained": _bytes(trained.values())})
        count = _numbers(trained.values())
        disk = 0.0
        if on_disk(options):
            sizes, disk = _one_layer(own, other, options, trained, apart, sizes)
    tokens = options.steps * options.step_tokens
    cost = StageCost(
        name=name, tokens=tokens, steps=options.steps, trained_parameters=count, flops=per_token * tokens,
        gpu_hours=per_token * tokens / (machine.mfu * machine.peak_flops) / 3600,
        memory=memory(sizes, options, machine, options.gradient_checkpointing), disk_bytes=disk,
        advice=advise(sizes, options, machine, name != "align"),
    )  # fmt: skip
    return cost, changes


def _units(model: Any) -> list[int]:
    """Bytes of what is gathered at once: each layer, and what lies outside of them."""
    layers = [_bytes(layer.parameters()) for layer in model.model.layers]
    return [*layers, _bytes(model.parameters()) - sum(layers)]


def _one_layer(
    own: Any, other: Any, options: Any, trained: dict[str, Any], apart: list[Any], sizes: Sizes
) -> tuple[Sizes, float]:  # fmt: skip
    """What alignment from disk holds: the layer with the most weights, gradients and moments; and the bytes of its files."""

    def counted(model: Any, index: int, chosen: Callable[[str, Any], bool]) -> list[Any]:
        named = model.named_parameters()
        return [p for key, p in named if key.startswith(f"model.layers.{index}.") and chosen(key, p)]

    counts = {index: _numbers(counted(own, index, lambda key, _: key in trained)) for index in aligned_layers(own)}
    apart_ids = {id(parameter) for parameter in apart}
    frozen = {
        index: _bytes(counted(other, index, lambda *_: True)) + _bytes(counted(own, index, lambda _, p: id(p) in apart_ids))
        for index in range(len(other.model.layers))
    }
    at = max(frozen, key=lambda index: frozen[index] + 16 * counts.get(index, 0))
    itemsize = other.model.embed_tokens.weight.element_size()
    counts = {index: count for index, count in counts.items() if count}
    disk = scratch_bytes(options, own.config, own.model.mixer_options, counts, itemsize)
    return replace(sizes, frozen=frozen[at], trained=4 * counts.get(at, 0)), disk


def _align_sizes(own: Any, other: Any, options: Any, known: Known) -> tuple[dict[str, Any], float]:
    losses = [LOSSES.build(spec) for spec in options.losses]
    with_mlp = any("hidden" in loss.needs for loss in losses)
    layers = aligned_layers(own)
    autocast = options.dtype == "bf16"
    counter, teacher = (LayerCounter(model, options.seq_tokens, autocast, known) for model in (own, other))
    works = [counter.mixer(index, with_mlp) for index in layers]
    # The teacher runs up to the last layer that learns.
    forward = sum(teacher.layer(index, False).forward for index in range(layers[-1] + 1))
    flops = forward + sum(work.forward + work.backward for work in works)
    saved = max(work.saved for work in works)
    sizes = {
        "saved_row": saved, "saved_row_checkpointed": saved, "fixed": max(work.casts for work in works),
        "largest_unit": max(_units(own)[:-1]) + max(_units(other)),
    }  # fmt: skip
    return sizes, flops / options.seq_tokens


def _whole_sizes(own: Any, other: Any, options: Any, known: Known, cache: TeacherCache | None) -> tuple[dict[str, Any], float]:
    autocast, tokens = options.dtype == "bf16", options.seq_tokens
    counter, teacher = (LayerCounter(model, tokens, autocast, known) for model in (own, other))
    works: list[Work] = []
    gradient = own.model.embed_tokens.weight.requires_grad
    for index, layer in enumerate(own.model.layers):
        works.append(counter.layer(index, gradient))
        gradient = gradient or any(parameter.requires_grad for parameter in layer.parameters())
    flops = sum(work.forward + work.backward for work in works) / tokens
    if options.gradient_checkpointing:
        flops += sum(work.forward for work in works) / tokens
    losses = {spec["name"]: LOSSES.build(spec) for spec in options.losses}
    # (tokens of a chunk of logits, whether the teacher has logits too), for each loss over logits.
    heads = [
        (loss.chunk_tokens, frozenset() not in asks_of_teacher(loss))
        for loss in losses.values() if "head" in loss.needs
    ]  # fmt: skip
    with_teacher = options.needs_teacher
    if not losses:
        heads = [(options.chunk_tokens, with_teacher)]
    their_head, told = other.lm_head.weight.numel(), other.config.hidden_size * (2 if autocast else 4)
    if cache is not None:
        their_head, told = cache.head_numbers, cache.token_bytes(options)
    elif with_teacher:
        flops += sum(teacher.layer(index, False).forward for index in range(len(other.model.layers))) / tokens
    head = own.lm_head.weight
    fixed = 0.0
    for chunk, of_teacher in heads:
        # Logits, the gradient of what made them, and the head's own: 2 V D each; the teacher's logits.
        flops += 2 * head.numel() * (2 + head.requires_grad) + (2 * their_head if of_teacher else 0)
        fixed = max(fixed, 4 * 4.0 * min(chunk, options.rows * tokens) * head.shape[0])
    fixed += (4.0 * head.numel() if head.requires_grad else 0.0) + sum(work.casts for work in works)
    hidden = tokens * own.config.hidden_size * (2 if autocast else 4)
    stream = tokens * own.config.hidden_size * counter.dtype.itemsize
    final = 3.0 * hidden + (tokens * told if with_teacher else 0)
    saved = [work.saved for work in works]
    sizes = {
        "saved_row": sum(saved) + final, "saved_row_checkpointed": len(saved) * stream + max(saved) + final, "fixed": fixed,
        "largest_unit": sum(max(_units(model)[:-1]) + _units(model)[-1] for model in ((own, other) if cache is None else (own,))),
    }  # fmt: skip
    return sizes, flops


def run_cost(
    student: Described | Path | str,
    teacher: Described | Path | str,
    stages: list[tuple[str, Any]],
    machine: Machine,
    cache: TeacherCache | None = None,
) -> list[StageCost]:
    """The cost of every stage of a run, of one whose rows grow by their length; reads config.json and headers only.

    Args:
        student: the hybrid's directory, or what a plan says of one that is not there yet.
        teacher: its teacher, the same; not read where no stage runs it.
        stages: (name, options) each.
        machine: what it runs on.
        cache: what stands in for the teacher where it can.

    Raises:
        CheckpointError: a directory cannot be read.
        ConfigError: a stage does not fit the student.
    """
    student = student if isinstance(student, Described) else describe(student)
    if not any(runs_model(options, cache) for _, options in stages):
        teacher = student
    teacher = teacher if isinstance(teacher, Described) else describe(teacher)
    costs, before, known = [], set(), {}
    configs = configs_of(student.config, teacher.config, stages, cache)
    for number, ((name, options), (own, other)) in enumerate(zip(stages, configs, strict=True), 1):
        models = replace(student, config=own), replace(teacher, config=other)
        trained: set[str] = set()
        for part in options.parts:
            label = name if len(options.parts) == 1 else f"{name} at {part.seq_tokens}"
            cost, trained = stage_cost(*models, name, part, before, machine, known, cache)
            costs.append(replace(cost, name=label, stage=number))
        before |= trained
    return costs


def refuse(costs: list[StageCost], machine: Machine) -> None:
    """Raise a ConfigError for a stage whose weights, gradients and moments alone are more than there is."""
    for cost in costs:
        if machine.bytes_each is not None and cost.certain_bytes > machine.bytes_each:
            raise ConfigError(f"stage {cost.stage} ({cost.name}): {cost.advice}")
