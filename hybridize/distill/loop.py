"""The training loop that every stage runs in.

A step is a pure function of the seed, the step's number and the state before it: data order, learning rate and random
numbers all follow from the number, so that a resumed run ends with the same bytes as one that was never stopped. Each
process takes its share of a step's rows and gradients are summed, so that the number of processes changes nothing but time.
"""

import hashlib
import json
import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from hybridize.data import Batch, TrainBlocks
from hybridize.distill.guards import Guard, StopSignals, judge, worst_rows
from hybridize.distill.layers import LayerShares
from hybridize.distill.options import StageOptions
from hybridize.distill.saves import Position, State, moments_of, restore_moments, write_state
from hybridize.distill.sharded_saves import write_sharded
from hybridize.errors import ConfigError
from hybridize.storage import append_stream, disk_errors, write_text

log = logging.getLogger(__name__)

MicroStep = Callable[[Batch, float], dict[str, Tensor]]
Progress = Callable[[str, float, float], None]


class Metrics:
    """metrics.jsonl: one line a step. A log: it holds times, so it lies beside the output and not in it. A context manager.

    Args:
        path: the file.
        position: lines of steps after it are dropped: the resumed run takes those steps again.
    """

    def __init__(self, path: Path, position: Position):
        self.path = path
        kept = []
        if path.exists() and position != Position(stage=0, step=0):
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    row = json.loads(line)
                except json.JSONDecodeError:
                    # A kill can leave half a line at the end; the step it tells of is taken again.
                    break
                if (row["stage"] - 1, row["step"]) <= (position.stage, position.step):
                    kept.append(line + "\n")
        write_text(path, "".join(kept))
        self.stream: IO[str] = append_stream(path)

    def add(self, row: dict[str, Any]) -> None:
        with disk_errors(self.path):
            self.stream.write(json.dumps(row) + "\n")
            self.stream.flush()

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *error: object) -> None:
        self.stream.close()


@dataclass(frozen=True, kw_only=True, eq=False)
class Run:
    """What all stages of one run share."""

    accelerator: Any
    seed: int
    scratch: Path
    """Folder of the training states; only the main process writes to it."""
    metrics: Metrics | None
    """None on all processes but the main one."""
    progress: Progress | None
    mesh: DeviceMesh | None = None
    """The processes that weights are divided over; None where each holds them whole."""

    before_save: Callable[[], None] | None = None
    """Puts on disk what a state counts on, before it is written."""

    def save(
        self, position: Position, guards: dict[str, Guard], weights: Mapping[str, Tensor], moments: dict[str, dict[str, Tensor]]
    ) -> None:  # fmt: skip
        """Write a training state; called by all processes."""
        if self.before_save is not None:
            self.before_save()
        if self.mesh is not None:
            write_sharded(self.accelerator, self.scratch, position, guards, dict(weights), moments)
        elif self.accelerator.is_main_process:
            write_state(self.scratch, State(position=position, weights=weights, moments=moments, guards=guards))


def seed_of(*parts: int) -> int:
    """A seed that any change of any part changes, below 2**63."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


def own_rows(batch: Batch, rank: int, world: int) -> Batch:
    """The rows of a step's batch that one process works on. Raises ConfigError when they cannot be shared out evenly."""
    if len(batch) % world:
        raise ConfigError(
            f"a step has rows * accumulate = {len(batch)} rows, expected a multiple of the {world} processes. Change either"
        )
    share = len(batch) // world
    return batch[rank * share : (rank + 1) * share]


@dataclass(frozen=True, kw_only=True, eq=False)
class StepLosses:
    """What the processes agree on after a step's backward passes."""

    losses: dict[str, float]
    by_row: list[float]
    """Of each row of the batch, the loss of the micro-batch it was in."""
    stop: int
    """The signal that asked some process to stop, 0 for none."""


def gradients(
    run: Run, options: StageOptions, micro_step: MicroStep, trained: dict[str, nn.Parameter], batch: Batch, asked: int | None
) -> StepLosses:
    """Gradients of one step, summed over micro-batches and processes, and its losses.

    A micro-batch's share is by what the stage counts, over the whole step: means do not depend on how it is divided.
    """
    accelerator = run.accelerator
    if options.by_layers:
        rows, at = batch, 0
    else:
        rows = own_rows(batch, accelerator.process_index, accelerator.num_processes)
        at = accelerator.process_index * len(rows)
    sums: dict[str, Tensor] = {}
    by_row = torch.zeros(len(batch), device=accelerator.device)
    whole = options.weight(batch)
    for part in rows.split(options.rows):
        share = options.weight(part) / whole
        values = micro_step(part.to(accelerator.device), share)
        for name, value in values.items():
            sums[name] = sums.get(name, 0) + value.float() * share
        by_row[at : at + len(part)] = values["loss"].float()
        at += len(part)
    values = torch.cat([torch.stack(list(sums.values())), by_row])
    signals = torch.tensor([float(asked or 0)], device=values.device)
    if accelerator.num_processes > 1:
        dist.all_reduce(values)
        dist.all_reduce(signals, op=dist.ReduceOp.MAX)
        for parameter in () if options.by_layers else trained.values():
            # Those of divided weights were summed in the backward pass.
            if parameter.grad is not None and not isinstance(parameter.grad, DTensor):
                dist.all_reduce(parameter.grad)
    found = values.tolist()
    losses = dict(zip(sums, found[: len(sums)], strict=True))
    return StepLosses(losses=losses, by_row=found[len(sums) :], stop=int(signals.item()))


def norms_of(parts: dict[str, dict[str, nn.Parameter]], device: torch.device, shared_out: bool) -> Tensor:
    """The norm of each part's gradient, in order; the same on all processes.

    Args:
        parts: parameters by the loss they learn from.
        device: of the result.
        shared_out: whether processes have parts of their own, and gradients of those alone.
    """
    found = []
    for part in parts.values():
        norm = nn.utils.get_total_norm(p.grad for p in part.values() if p.grad is not None)
        found.append((norm.full_tensor() if isinstance(norm, DTensor) else norm).to(device))
    norms = torch.stack(found)
    if shared_out:
        # To judge and to log alike; each part is clipped by its own.
        dist.all_reduce(norms)
    return norms


def train(
    run: Run, stage: int, name: str, options: StageOptions, micro_step: MicroStep, trained: dict[str, nn.Parameter],
    carried: dict[str, Tensor], blocks: TrainBlocks, start: State, shares: LayerShares | None = None,
    passes: tuple[int, int] = (0, 1),
) -> None:  # fmt: skip
    """Run one stage from where `start` stands to its end, saving on the way; the weights are changed in place.

    Args:
        run: what the stages share.
        stage: the stage's number, from 0.
        name: its name, for logs and messages.
        options: its options.
        micro_step: takes (batch, share) and adds that share of the gradient.
        trained: the parameters to train, fp32, already holding `start`'s weights.
        carried: weights that earlier stages trained, to be saved along.
        blocks: the batches.
        start: where to begin.
        shares: who trains what where layers are shared out; `trained` is this process's own then.
        passes: (which, of how many) through the stage's steps this is, where a stage takes them layer after layer; a position
            counts the steps of all.

    Raises:
        TrainingError: a loss or gradient is not finite or a spike, and the stage is to stop at it; nothing was updated
            with it.
        StoppedError: SIGTERM or Ctrl-C; the step was finished and the state is saved.
    """
    optimizer = options.optimizer(trained)
    restore_moments(trained, optimizer, start.moments)
    learners = options.learners(trained if shares is None else shares.parameters)
    guards = {loss: start.guards.get(loss, Guard()) for loss in learners}
    parts, before = options.parts, passes[0] * options.steps
    last_save = f"step {start.position.step}" if start.position.step else "the start of the stage"
    with StopSignals() as signals:
        for step in range(start.position.step - before, options.steps):
            began = time.perf_counter()
            torch.manual_seed(seed_of(run.seed, stage, step, run.accelerator.process_index))
            number, first = options.place(step)
            part = parts[number]
            if first == 0:
                # Rows of another length have other losses.
                guards = {loss: Guard() for loss in learners}
            found = gradients(run, part, micro_step, trained, blocks.batch(step), signals.asked)
            norms = norms_of(learners, run.accelerator.device, shares is not None)
            where = f"stage {stage + 1} ({name}), step {before + step + 1}"
            skipped = 0
            for (loss, own), norm in zip(learners.items(), norms, strict=True):
                taken = judge(
                    guards[loss], options.on_spike, loss, found.losses if loss == "loss" else {loss: found.losses[loss]},
                    worst_rows(found.by_row, part.rows), norm.item(),
                    {key: p.grad for key, p in own.items() if p.grad is not None},
                    f"{where}, stopped before the update; last saved state: {last_save}",
                )  # fmt: skip
                if not taken:
                    # Without a gradient AdamW leaves weight, moments and count alone.
                    skipped += 1
                    for parameter in own.values():
                        parameter.grad = None
                    continue
                if options.clip is not None:
                    nn.utils.clip_grads_with_norm_(own.values(), options.clip, norm)
                guards[loss].taken(found.losses[loss])
            for group in optimizer.param_groups:
                group["lr"] = group["full_lr"] * options.rate(step)
            optimizer.step()
            optimizer.zero_grad()
            done = before + step + 1
            row = {
                "stage": stage + 1, "name": name, "step": done, "tokens": done * options.step_tokens, **found.losses,
                "lr": options.lr * options.rate(step), "grad_norm": norms.norm().item(),
                **({"skipped": skipped} if skipped else {}),
                "seq_tokens": part.seq_tokens,
                "tokens_per_s": options.step_tokens / (time.perf_counter() - began),
            }  # fmt: skip
            _report(run, row, passes[1] * options.steps * options.step_tokens)
            if ((step + 1) % options.save_steps == 0 and step + 1 < options.steps) or found.stop:
                last_save = f"step {done}"
                moments = moments_of(trained, optimizer)
                weights = {name: p.detach() for name, p in trained.items()}
                if shares is not None:
                    moments, weights = shares.moments(moments), shares.weights()
                run.save(Position(stage=stage, step=done), guards, carried | weights, moments)
            if found.stop:
                run.accelerator.wait_for_everyone()
                signals.leave(found.stop, where)


def _report(run: Run, row: dict[str, Any], tokens: int) -> None:
    log.debug("%s step %d: loss %.6g", row["name"], row["step"], row["loss"])
    # NaN is no JSON, and no tracker draws it.
    row = {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()}
    if run.metrics is not None:
        run.metrics.add(row)
    numbers = {key: value for key, value in row.items() if isinstance(value, (int, float))}
    run.accelerator.log(numbers, step=row["step"])
    if run.progress is not None and run.accelerator.is_main_process:
        run.progress(f"distill {row['name']}", row["tokens"], tokens)


def fork_random(device: torch.device) -> Any:
    """Keeps the caller's random numbers as they were."""
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
