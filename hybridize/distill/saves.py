"""Training states on disk: one safetensors file each, whole or not there, the latest two kept.

A state holds every parameter trained so far in fp32, AdamW's moments, the last losses, and where the run stands. Random
numbers need no place in it: every step seeds its own.
"""

import dataclasses
import json
import logging
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from hybridize.distill.guards import Guard, check_saved
from hybridize.shards import Planned, plan_shards, read_header, read_tensor, tensor_bytes, write_shard

log = logging.getLogger(__name__)

KEPT = 2
MOMENTS = ("step", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True, kw_only=True)
class Position:
    """How far a run has come: `step` steps of stage `stage` (both from 0) are done."""

    stage: int
    step: int

    @property
    def file(self) -> str:
        return f"state-{self.stage:02d}-{self.step:09d}.safetensors"


@dataclass(frozen=True, kw_only=True, eq=False)
class State:
    """What a resumed run starts from."""

    position: Position
    weights: dict[str, Tensor]
    """Every parameter trained so far, fp32."""
    moments: dict[str, dict[str, Tensor]]
    """Of this stage's parameters, AdamW's own state; empty at the start of a stage."""
    guard: Guard = field(default_factory=Guard)
    """The losses that the next ones of this stage are compared with."""


def moments_of(trained: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
    """AdamW's moments by parameter name; parameters that were not stepped yet have none."""
    return {name: {key: optimizer.state[p][key] for key in MOMENTS} for name, p in trained.items() if p in optimizer.state}


def restore_moments(
    trained: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, moments: dict[str, dict[str, Tensor]]
) -> None:
    """Put saved moments back where `moments_of` found them."""
    for name, own in moments.items():
        parameter = trained[name]
        optimizer.state[parameter] = {key: value.to(parameter.device) for key, value in own.items()}


def write_state(folder: Path, state: State) -> Path:
    """Write a state, then remove all but the latest two.

    Raises:
        TrainingError: a weight or moment is not finite; nothing is written.
        ConfigError: the disk is full.
    """
    tensors = {f"weight/{name}": weight for name, weight in state.weights.items()}
    tensors |= {f"{key}/{name}": value for name, own in state.moments.items() for key, value in own.items()}
    check_saved(tensors, f"stage {state.position.stage + 1}, step {state.position.step}")
    about = {"position": dataclasses.asdict(state.position), "guard": dataclasses.asdict(state.guard)}
    tensors["about"] = torch.tensor(list(json.dumps(about).encode()), dtype=torch.uint8)
    planned = [Planned(name=n, dtype=t.dtype, shape=tuple(t.shape), group="") for n, t in tensors.items()]
    (shard,) = plan_shards(planned)
    shard = dataclasses.replace(shard, name=state.position.file)
    write_shard(folder, shard, lambda tensor: [tensor_bytes(tensors[tensor.name])])
    for old in sorted(folder.glob("state-*.safetensors"))[:-KEPT]:
        old.unlink()
    return folder / shard.name


def read_latest_state(folder: Path) -> State | None:
    """The latest state in a folder, or None. Raises CheckpointError when it was damaged since it was written."""
    files = sorted(folder.glob("state-*.safetensors"))
    if not files:
        return None
    headers, _ = read_header(files[-1])
    about = json.loads(bytes(read_tensor(headers.pop("about")).tolist()))
    weights: dict[str, Tensor] = {}
    moments: dict[str, dict[str, Tensor]] = {}
    for full_name, info in headers.items():
        kind, name = full_name.split("/", 1)
        if kind == "weight":
            weights[name] = read_tensor(info)
        else:
            moments.setdefault(name, {})[kind] = read_tensor(info)
    log.info("distill: going on from %s", files[-1])
    return State(
        position=Position(**about["position"]), weights=weights, moments=moments, guard=Guard(**about["guard"])
    )  # fmt: skip
