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
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hybridize.data import Batch, TrainBlocks
from hybridize.distill.options import StageOptions
from hybridize.distill.saves import Position, State, moments_of, restore_moments, write_state
from hybridize.errors import ConfigError, TrainingError
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


def gradients(run: Run, options: StageOptions, micro_step: MicroStep, trained: dict[str, nn.Parameter], batch: Batch) -> dict:
    """Gradients of one step, summed over micro-batches and processes, and its losses, {name: value}.

    A micro-batch's share is by what the stage counts, over the whole step: means do not depend on how it is divided.
    """
    accelerator = run.accelerator
    rows = own_rows(batch, accelerator.process_index, accelerator.num_processes)
    sums: dict[str, Tensor] = {}
    for part in rows.split(options.rows):
        share = options.weight(part) / options.weight(batch)
        for name, value in micro_step(part.to(accelerator.device), share).items():
            sums[name] = sums.get(name, 0) + value.float() * share
    values = torch.stack(list(sums.values()))
    if accelerator.num_processes > 1:
        dist.all_reduce(values)
        for parameter in trained.values():
            if parameter.grad is not None:
                dist.all_reduce(parameter.grad)
    return dict(zip(sums, values.tolist(), strict=True))


def check_finite(losses: dict[str, float], norm: float, trained: dict[str, nn.Parameter], where: str) -> None:
    """Raise a TrainingError, before any weight changes, when a loss or a gradient is not finite."""
    broken = [name for name, value in losses.items() if not math.isfinite(value)]
    if broken:
        layers = [name for name in broken if name.startswith("layer.")]
        raise TrainingError(f"{where}: the loss {(layers or broken)[0]!r} is {losses[(layers or broken)[0]]}, expected a number")
    if not math.isfinite(norm):
        gone = next(n for n, p in trained.items() if p.grad is not None and not bool(torch.isfinite(p.grad).all()))
        raise TrainingError(f"{where}: the gradient of {gone} is not finite, its loss is {losses['loss']:.6g}")


def train(
    run: Run, stage: int, name: str, options: StageOptions, micro_step: MicroStep, trained: dict[str, nn.Parameter],
    carried: dict[str, Tensor], blocks: TrainBlocks, start: State,
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

    Raises:
        TrainingError: a loss or gradient is not finite; nothing was updated with it.
    """
    optimizer = options.optimizer(trained)
    restore_moments(trained, optimizer, start.moments)
    last_save = f"step {start.position.step}" if start.position.step else "the start of the stage"
    for step in range(start.position.step, options.steps):
        began = time.perf_counter()
        torch.manual_seed(seed_of(run.seed, stage, step, run.accelerator.process_index))
        losses = gradients(run, options, micro_step, trained, blocks.batch(step))
        grads = [p.grad for p in trained.values() if p.grad is not None]
        norm = nn.utils.get_total_norm(grads)
        where = f"stage {stage + 1} ({name}), step {step + 1}"
        check_finite(losses, norm.item(), trained, f"{where}, stopped before the update; last saved state: {last_save}")
        if options.clip is not None:
            nn.utils.clip_grads_with_norm_(trained.values(), options.clip, norm)
        for group in optimizer.param_groups:
            group["lr"] = group["full_lr"] * options.rate(step)
        optimizer.step()
        optimizer.zero_grad()
        done = step + 1
        row = {
            "stage": stage + 1, "name": name, "step": done, "tokens": done * options.step_tokens, **losses,
            "lr": options.lr * options.rate(step), "grad_norm": norm.item(),
            "tokens_per_s": options.step_tokens / (time.perf_counter() - began),
        }  # fmt: skip
        _report(run, row, options)
        if done % options.save_steps == 0 and done < options.steps:
            last_save = f"step {done}"
            if run.accelerator.is_main_process:
                position = Position(stage=stage, step=done)
                weights = carried | {name: p.detach() for name, p in trained.items()}
                write_state(run.scratch, State(position=position, weights=weights, moments=moments_of(trained, optimizer)))


def _report(run: Run, row: dict[str, Any], options: StageOptions) -> None:
    log.debug("%s step %d of %d: loss %.6g", row["name"], row["step"], options.steps, row["loss"])
    if run.metrics is not None:
        run.metrics.add(row)
    numbers = {key: value for key, value in row.items() if isinstance(value, (int, float))}
    run.accelerator.log(numbers, step=row["step"])
    if run.progress is not None and run.accelerator.is_main_process:
        run.progress(f"distill {row['name']}", row["tokens"], options.steps * options.step_tokens)


def fork_random(device: torch.device) -> Any:
    """Keeps the caller's random numbers as they were."""
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
