"""Training states of divided weights, by torch.distributed.checkpoint: every process writes its part.

A state is a folder, whole or not there: written under a hidden name by all, flushed and renamed by the main process when
all are done. Another number of processes may read it, or a run that divides nothing. The folder must be one that all
processes see. These are working files of our own run; torch writes them, its index with pickle.
"""

import dataclasses
import json
import logging
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from hybridize.distill.guards import Guard, check_saved
from hybridize.distill.saves import KEPT, Position, State, as_json, by_kind, from_json
from hybridize.distill.sharding import local
from hybridize.errors import CheckpointError
from hybridize.storage import publish_folder

log = logging.getLogger(__name__)


def latest_folder(scratch: Path) -> Path | None:
    """The latest state of divided weights, or None."""
    return max((path for path in scratch.glob("state-*") if path.is_dir()), default=None, key=lambda path: path.name)


def write_sharded(
    accelerator: Any, scratch: Path, position: Position, guards: dict[str, Guard], weights: dict[str, Tensor],
    moments: dict[str, dict[str, Tensor]],
) -> Path:  # fmt: skip
    """Write a state, called by all processes; then remove all but the latest two.

    Raises:
        TrainingError: a weight or moment of this process is not finite; nothing gets the state's name.
    """
    tensors = {f"weight/{name}": weight for name, weight in weights.items()}
    tensors |= {f"{key}/{name}": value for name, own in moments.items() for key, value in own.items()}
    check_saved({k: local(v) for k, v in tensors.items()}, f"stage {position.stage + 1}, step {position.step}")
    about = json.dumps({"position": dataclasses.asdict(position), "guards": as_json(guards)}).encode()
    tensors["about"] = torch.tensor(list(about), dtype=torch.uint8)
    final = scratch / position.file.removesuffix(".safetensors")
    temporary = scratch / f".{final.name}.tmp"
    if accelerator.is_main_process and temporary.exists():
        shutil.rmtree(temporary)
    accelerator.wait_for_everyone()
    save(tensors, checkpoint_id=temporary)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        publish_folder(temporary, final)
        for old in sorted(path for path in scratch.glob("state-*") if path.is_dir())[:-KEPT]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return final


def _shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of a state."""
    try:
        found = FileSystemReader(folder).read_metadata().state_dict_metadata
    except (OSError, EOFError, ValueError) as error:
        raise CheckpointError(
            f"{folder}: is no training state that can be read ({error}). Remove it to go on from the last"
        ) from error
    return {key: tuple(entry.size) for key, entry in found.items() if isinstance(entry, TensorStorageMetadata)}


def _load_alone(tensors: dict[str, Any], folder: Path) -> None:
    """Read into this process's whole tensors, whatever the others do."""
    with warnings.catch_warnings():
        # Without a process group torch says that it takes this process to be alone, which is what is meant.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        load(tensors, checkpoint_id=folder, no_dist=True)


def names_of(folder: Path) -> set[str]:
    """Names of the parameters that a state holds."""
    return {key.removeprefix("weight/") for key in _shapes(folder) if key.startswith("weight/")}


def read_about(folder: Path) -> tuple[Position, dict[str, Guard]]:
    """Where a state stands, and its last losses by the name of the loss."""
    held = {"about": torch.zeros(_shapes(folder)["about"], dtype=torch.uint8)}
    _load_alone(held, folder)
    about = json.loads(bytes(held["about"].tolist()))
    return Position(**about["position"]), from_json(about, folder)


def read_into(folder: Path, parameters: dict[str, Tensor], moments_for: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Put a state's weights where they belong, each process its own rows; return the moments, divided likewise.

    Args:
        folder: the state.
        parameters: by name; those that the state holds are overwritten.
        moments_for: parameters whose moments are wanted.
    """
    shapes = _shapes(folder)
    tensors = {f"weight/{name}": p.detach() for name, p in parameters.items() if f"weight/{name}" in shapes}
    moments: dict[str, dict[str, Tensor]] = {}
    for name, parameter in moments_for.items():
        if f"exp_avg/{name}" in shapes:
            own = {key: torch.zeros_like(parameter.detach()) for key in ("exp_avg", "exp_avg_sq")}
            moments[name] = {"step": torch.zeros(()), **own}
            tensors |= {f"{key}/{name}": value for key, value in moments[name].items()}
    load(tensors, checkpoint_id=folder)
    return moments


def read_whole(folder: Path) -> State:
    """A state with every tensor in full, on the CPU of this process alone."""
    position, guards = read_about(folder)
    tensors = {key: torch.zeros(shape) for key, shape in _shapes(folder).items() if key != "about"}
    _load_alone(tensors, folder)
    weights, moments = by_kind(tensors)
    return State(position=position, weights=weights, moments=moments, guards=guards)
