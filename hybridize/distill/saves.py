"""Training states on disk: one safetensors file each, whole or not there, the latest two kept.

A state holds every parameter trained so far in fp32, AdamW's moments, the last losses, and where the run stands. Random
numbers need no place in it: every step seeds its own.
"""

import dataclasses
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from hybridize.distill.guards import Guard, check_saved
from hybridize.errors import CheckpointError
from hybridize.shards import OnDemand, Planned, TensorInfo, plan_shards, read_header, read_tensor, tensor_bytes, write_shard

log = logging.getLogger(__name__)

KEPT = 2
T = TypeVar("T")
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
    weights: Mapping[str, Tensor]
    """Every parameter trained so far, fp32."""
    moments: dict[str, dict[str, Tensor]]
    """Of this stage's parameters, AdamW's own state; empty at the start of a stage."""
    guards: dict[str, Guard] = field(default_factory=dict)
    """The losses that the next ones of this stage are compared with, by the name of the loss."""


def as_json(guards: dict[str, Guard]) -> dict[str, Any]:
    """The last losses as a state holds them."""
    return {name: dataclasses.asdict(guard) for name, guard in guards.items()}


def from_json(about: dict[str, Any], where: Path) -> dict[str, Guard]:
    """What `as_json` put into a state. Raises CheckpointError for a state that has it not."""
    if "guards" not in about:
        raise CheckpointError(
            f"{where}: has no guards, expected a state of this version. Remove the unfinished run and start again"
        )
    return {name: Guard(**kept) for name, kept in about["guards"].items()}


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
    moments = {f"{key}/{name}": value for name, own in state.moments.items() for key, value in own.items()}
    about = {"position": dataclasses.asdict(state.position), "guards": as_json(state.guards)}
    moments["about"] = torch.tensor(list(json.dumps(about).encode()), dtype=torch.uint8)
    write_tensors(
        folder / state.position.file, state.weights, moments, f"stage {state.position.stage + 1}, step {state.position.step}"
    )
    for old in sorted(folder.glob("state-*.safetensors"))[:-KEPT]:
        old.unlink()
    return folder / state.position.file


def write_tensors(path: Path, weights: Mapping[str, Tensor], others: dict[str, Tensor], where: str) -> None:
    """Write one safetensors file: weights as `weight/<name>`, the others under their own names.

    Args:
        path: the file.
        weights: by name; those that lie in other files are read one at a time.
        others: by name.
        where: stage and step, for messages.

    Raises:
        TrainingError: a value is not finite; nothing is written.
        ConfigError: the disk is full.
    """
    known = weights.places if isinstance(weights, OnDemand) else weights
    check_saved({f"weight/{name}": tensor for name, tensor in weights.items()} if known is weights else {}, where)
    check_saved(others, where)
    planned = [Planned(name=f"weight/{n}", dtype=t.dtype, shape=tuple(t.shape), group="") for n, t in known.items()]
    planned += [Planned(name=n, dtype=t.dtype, shape=tuple(t.shape), group="") for n, t in others.items()]
    (shard,) = plan_shards(planned)

    def pieces(tensor: Planned) -> list[memoryview]:
        kind, _, name = tensor.name.partition("/")
        return [tensor_bytes(weights[name] if kind == "weight" else others[tensor.name])]

    write_shard(path.parent, dataclasses.replace(shard, name=path.name), pieces)


def by_kind(tensors: Mapping[str, T]) -> tuple[dict[str, T], dict[str, dict[str, T]]]:
    """What a state holds under "weight/<name>", by name, and under "<moment>/<name>", by name and moment."""
    weights: dict[str, T] = {}
    moments: dict[str, dict[str, T]] = {}
    for full_name, value in tensors.items():
        kind, name = full_name.split("/", 1)
        if kind == "weight":
            weights[name] = value
        else:
            moments.setdefault(name, {})[kind] = value
    return weights, moments


def read_latest_state(folder: Path) -> State | None:
    """The latest state in a folder, or None; its weights are read when they are asked for.

    Raises:
        CheckpointError: it was damaged since it was written.
    """
    files = sorted(folder.glob("state-*.safetensors"))
    if not files:
        return None
    headers, _ = read_header(files[-1])
    about = json.loads(bytes(read_tensor(headers.pop("about")).tolist()))
    weights, places = by_kind(headers)
    moments = {name: {kind: read_tensor(info) for kind, info in own.items()} for name, own in places.items()}
    log.info("distill: going on from %s", files[-1])
    guards = from_json(about, files[-1])
    return State(position=Position(**about["position"]), weights=OnDemand(weights), moments=moments, guards=guards)


def weights_in(path: Path) -> dict[str, TensorInfo]:
    """Where the weights of a file that `write_tensors` wrote lie, by name."""
    headers, _ = read_header(path)
    return {name.removeprefix("weight/"): info for name, info in headers.items() if name.startswith("weight/")}
