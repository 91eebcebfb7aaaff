"""What every training stage lets one choose, and what follows from it."""

import fnmatch
import math
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from hybridize.distill.losses import LOSSES
from hybridize.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class StageOptions:
    """Options shared by all stages. A step sees rows * accumulate rows of seq_tokens, however many processes share it."""

    tokens: int
    """Budget; the last, partial step is left out."""
    seq_tokens: int = 2048
    """Length of a row, BOS counted."""
    beyond_context: bool = False
    """Whether rows may be longer than the student's max_position_embeddings."""
    documents: Literal["joined", "reset"] = "joined"
    """joined: a row is one stretch of text. reset: positions begin again at each document and nothing is seen across."""
    rows: int = 8
    """Most rows that a process takes through the model at once."""
    accumulate: int = 1
    """How many times `rows` make a step."""
    lr: float = 1e-4
    warmup: float = 0.02
    """Share of the steps over which the rate rises from nothing."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    final_ratio: float = 0.1
    """The last rate over the highest one."""
    weight_decay: float = 0.0
    """On matrices only: never on decays, biases, norms and convolutions."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    clip: float | None = 1.0
    """Longest gradient that is not shortened."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """bf16 runs under autocast; what is trained stays in fp32."""
    gradient_checkpointing: bool = False
    train: list[str] = field(default_factory=lambda: ["*"])
    """Globs over the names of the parameters that may be trained; each must match one."""
    lr_groups: dict[str, float] = field(default_factory=dict)
    """Glob -> rate; the first that matches a parameter sets its rate in place of `lr`."""
    save_tokens: int | None = None
    """Tokens between two saved states; None is a tenth of the budget."""
    losses: list[dict[str, Any]] = field(default_factory=list)
    """What is minimised: {name, weight, ...} each."""

    def __post_init__(self) -> None:
        for name in ("tokens", "seq_tokens", "rows", "accumulate"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, expected at least 1")
        for name in ("warmup", "final_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, expected a share between 0 and 1")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"betas is {self.betas}, expected two numbers from 0 to below 1")
        if self.lr <= 0 or self.weight_decay < 0 or (self.clip is not None and self.clip <= 0):
            raise ConfigError(
                f"lr is {self.lr}, weight_decay {self.weight_decay}, clip {self.clip}; expected > 0, >= 0, and > 0 or null"
            )
        if self.tokens < self.step_tokens:
            raise ConfigError(f"tokens is {self.tokens}, expected at least one step of {self.step_tokens}")
        if self.save_tokens is not None and self.save_tokens < 1:
            raise ConfigError(f"save_tokens is {self.save_tokens}, expected at least 1 or null")

    @property
    def step_rows(self) -> int:
        return self.rows * self.accumulate

    @property
    def step_tokens(self) -> int:
        return self.step_rows * self.seq_tokens

    @property
    def steps(self) -> int:
        return self.tokens // self.step_tokens

    @property
    def save_steps(self) -> int:
        return max(1, (self.save_tokens or self.tokens // 10) // self.step_tokens)

    def rate(self, step: int) -> float:
        """Share of the full learning rate at a step, counted from 0; it depends on nothing else."""
        rise = math.ceil(self.warmup * self.steps)
        if step < rise:
            return (step + 1) / rise
        if self.schedule == "constant":
            return 1.0
        done = (step - rise) / max(1, self.steps - 1 - rise)
        fall = (1 + math.cos(math.pi * done)) / 2 if self.schedule == "cosine" else 1 - done
        return self.final_ratio + (1 - self.final_ratio) * fall

    def build_losses(self, offered: set[str], stage: str) -> dict[str, Any]:
        """The losses by name. Raises ConfigError for none, one given twice, or one that needs what the stage has not."""
        if not self.losses:
            raise ConfigError(f"stage {stage!r}: losses is empty, expected at least one of {', '.join(LOSSES.names())}")
        built = {}
        for spec in self.losses:
            loss = LOSSES.build(spec)
            if spec["name"] in built:
                raise ConfigError(f"stage {stage!r}: the loss {spec['name']!r} is given twice, expected once")
            if missing := sorted(loss.needs - offered):
                raise ConfigError(
                    f"stage {stage!r}: the loss {spec['name']!r} needs {', '.join(missing)}; "
                    f"this stage offers {', '.join(sorted(offered))}"
                )
            built[spec["name"]] = loss
        return built

    def choose(self, candidates: dict[str, nn.Parameter], stage: str) -> dict[str, nn.Parameter]:
        """The parameters that `train` names, in the model's order.

        Raises:
            ConfigError: a glob of `train` or `lr_groups` that matches none.
        """
        for glob in self.train:
            if not fnmatch.filter(candidates, glob):
                raise ConfigError(
                    f"stage {stage!r}: train has {glob!r}, which matches none of the {len(candidates)} parameters this stage "
                    f"can train; expected a glob over names such as {next(iter(candidates), 'none')!r}"
                )
        names = [name for name in candidates if any(fnmatch.fnmatchcase(name, glob) for glob in self.train)]
        for glob in self.lr_groups:
            if not fnmatch.filter(names, glob):
                raise ConfigError(f"stage {stage!r}: lr_groups has {glob!r}, which matches none of the trained parameters")
        return {name: candidates[name] for name in names}

    def optimizer(self, trained: dict[str, nn.Parameter]) -> torch.optim.AdamW:
        """AdamW over the trained parameters, grouped by rate and decay; each group keeps its full rate as `full_lr`."""
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for name, parameter in trained.items():
            rates = [rate for glob, rate in self.lr_groups.items() if fnmatch.fnmatchcase(name, glob)]
            matrix = parameter.ndim >= 2 and "conv1d" not in name
            key = (rates[0] if rates else self.lr, self.weight_decay if matrix else 0.0)
            groups.setdefault(key, []).append(parameter)
        return torch.optim.AdamW(
            [{"params": p, "lr": lr, "full_lr": lr, "weight_decay": decay} for (lr, decay), p in groups.items()],
            betas=(self.betas[0], self.betas[1]), fused=True,
        )  # fmt: skip


def converted_layers(student: Any) -> list[int]:
    """Indices of a hybrid's layers that no longer have the base's attention."""
    return [index for index, spec in enumerate(student.config.mixers) if spec["name"] != "attention"]


def autocast(device: torch.device, options: StageOptions) -> torch.autocast:
    """The context that a stage's forward passes run in."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=options.dtype == "bf16")
