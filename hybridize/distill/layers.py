"""Alignment with layers shared out: each process trains its own, on all rows, and no gradient is exchanged."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hybridize.distill.align import aligned_layers, own_layers
from hybridize.errors import ConfigError


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerShares:
    """Who trains what."""

    parameters: dict[str, nn.Parameter]
    """Everything that is trained, by any process."""
    owner: dict[str, int]
    """Parameter -> the process that trains it."""

    @property
    def own(self) -> dict[str, nn.Parameter]:
        """What this process trains."""
        return {name: p for name, p in self.parameters.items() if self.owner[name] == dist.get_rank()}

    def weights(self) -> dict[str, Tensor]:
        """All trained weights as their owners have them now; called by all processes."""
        for name, parameter in self.parameters.items():
            dist.broadcast(parameter.data, self.owner[name])
        return {name: parameter.detach() for name, parameter in self.parameters.items()}

    def moments(self, own: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
        """The moments of all, from what each process has of its own; called by all processes.

        Args:
            own: as `saves.moments_of` gives it; empty on all processes or on none.
        """
        found: dict[str, dict[str, Tensor]] = {}
        for name, parameter in self.parameters.items() if own else ():
            empty = {"step": torch.zeros(()), "exp_avg": torch.empty_like(parameter), "exp_avg_sq": torch.empty_like(parameter)}
            held = own.get(name, empty)
            found[name] = {key: held[key].detach().to(parameter.device) for key in empty}
            for value in found[name].values():
                dist.broadcast(value, self.owner[name])
        return found


def share_layers(student: Any, trained: dict[str, nn.Parameter], sharded: bool) -> LayerShares:
    """Share the converted layers out; what belongs to others needs no gradient here any more.

    Raises:
        ConfigError: weights are divided as well, or there are more processes than layers to share out.
    """
    if sharded:
        raise ConfigError("stage 'align': parallel is layers together with --shard, expected one of the two; use parallel: data")
    owner = {}
    for rank in range(dist.get_world_size()):
        layers = own_layers(student, rank, dist.get_world_size())
        names = [name for name in trained if any(name.startswith(f"model.layers.{index}.") for index in layers)]
        if not names:
            raise ConfigError(
                f"stage 'align': parallel is layers, of which {len(aligned_layers(student))} can be trained; process {rank} of "
                f"{dist.get_world_size()} has none of them. Start fewer processes"
            )
        owner |= dict.fromkeys(names, rank)
    for name, parameter in trained.items():
        parameter.requires_grad_(owner[name] == dist.get_rank())
    return LayerShares(parameters=trained, owner=owner)
