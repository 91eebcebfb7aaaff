"""What every training stage lets one choose, and what follows from it."""

import dataclasses
import fnmatch
import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from hybridize.data import Mixture, Tokens
from hybridize.distill.adapters import Lora
from hybridize.distill.guards import OnSpike
from hybridize.distill.losses import LOSSES
from hybridize.errors import ConfigError
from hybridize.modeling import FP32_PARAMETERS
from hybridize.registry import make


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
    """Highest rate of AdamW."""
    warmup: float = 0.02
    """Share of the steps over which the rate rises from nothing."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the rate falls behind the warm-up."""
    decay: float | None = None
    """Share of the steps, the last ones, over which the rate falls; None is all after the warm-up."""
    final_ratio: float = 0.1
    """The last rate over the highest one."""
    weight_decay: float = 0.0
    """On matrices only: never on decays, biases, norms and convolutions, whatever their shape."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    """AdamW's."""
    clip: float | None = 1.0
    """Longest gradient that is not shortened."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """bf16 runs under autocast; what is trained stays in fp32."""
    gradient_checkpointing: bool = False
    """Run each layer once more in the backward pass instead of keeping what it made."""
    train: list[str] | None = None
    """Globs over the names of the parameters that may be trained; each must match one. None is all that the stage can
    train, or nothing beside the adapters where `lora` is given."""
    lora: dict[str, Any] | None = None
    """Low-rank adapters beside frozen projections, merged into them at the end of the stage: {targets, rank, alpha, dropout}."""
    lr_groups: dict[str, float] = field(default_factory=dict)
    """Glob -> rate; the first that matches a parameter sets its rate in place of `lr`."""
    save_tokens: int | None = None
    """Tokens between two saved states; None is a tenth of the budget."""
    on_spike: OnSpike = "stop"
    """What a loss of 6 sigma above the last steps does, or one that is not finite: `stop` the run, `skip` the step, or
    `ignore`, which takes a finite one and stops at what is not finite."""
    losses: list[dict[str, Any]] = field(default_factory=list)
    """What is minimised: {name, weight, ...} each."""

    TRAINS: ClassVar[list[str]] = ["*"]
    """What `train` of None means without adapters."""
    cacheable: ClassVar[bool] = False
    """Whether a cache of the teacher's logits can stand in for it."""
    follows_itself: ClassVar[bool] = False
    """Whether the teacher is the student as the stage finds it."""
    divides: ClassVar[bool] = True
    """Whether the stage runs with weights divided over processes."""
    lanes: ClassVar[int] = 1
    """Texts side by side in a row."""

    def __post_init__(self) -> None:
        if self.lora is not None:
            object.__setattr__(self, "lora", dataclasses.asdict(make(Lora, self.lora, "lora")))
        if self.train is None:
            object.__setattr__(self, "train", list(self.TRAINS) if self.lora is None else [])
        for name in ("tokens", "seq_tokens", "rows", "accumulate"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, expected at least 1")
        for name in ("warmup", "decay", "final_ratio"):
            if not 0 <= (getattr(self, name) or 0) <= 1:
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
    def needs_teacher(self) -> bool:
        return True

    @property
    def by_layers(self) -> bool:
        """Whether processes share out layers in place of rows."""
        return False

    def learners(self, trained: dict[str, nn.Parameter]) -> dict[str, dict[str, nn.Parameter]]:
        """What learns apart from the rest, by the name of its loss: each part is clipped and judged alone."""
        return {"loss": trained}

    @property
    def parts(self) -> list["StageOptions"]:
        """The stage by length of rows, in order: itself alone, but for stages that make their rows longer on the way.

        All parts have the same tokens in a step, and their steps add up to the stage's.
        """
        return [self]

    def place(self, step: int) -> tuple[int, int]:
        """(which part a step is of, its number in there), all counted from 0."""
        for index, part in enumerate(self.parts):
            if step < part.steps:
                return index, step
            step -= part.steps
        raise AssertionError(f"{step + 1} steps beyond the stage's end")

    def student_config(self, config: Any) -> Any:
        """The student's config while the stage runs and after it, of the one before it. Raises ConfigError for none that fits."""
        return config

    def teacher_config(self, config: Any) -> Any:
        """The teacher's config while the stage runs, of its own. Raises ConfigError for none that fits."""
        return config

    def check_text(self, text: Tokens | Mixture) -> None:
        """Raise ConfigError for a text that the stage can learn nothing from."""

    def check_context(self, config: Any, whose: str, next_step: str = "") -> None:
        """Raise ConfigError for rows that are longer than a model's context, where nobody asked for such."""
        if self.seq_tokens > config.max_position_embeddings and not self.beyond_context:
            raise ConfigError(
                f"seq_tokens is {self.seq_tokens}, expected at most the {whose}'s max_position_embeddings of "
                f"{config.max_position_embeddings}; {next_step}set beyond_context to true to train beyond it"
            )

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

    def expanded(self) -> list["StageOptions"]:
        """The stages that this one is short for, in order."""
        return [self]

    def prepare(self, student: Any, teacher: Any) -> None:
        """Change the student for the time of the stage; its weights are those that the stage begins with.

        What a stage adds here is saved with what it trains, and put back after this by name.
        """

    def leave(self, student: Any, trained: dict[str, Tensor]) -> dict[str, Tensor]:
        """The weights that leave the stage, by the names that a directory of the student has.

        Args:
            student: as the stage leaves it.
            trained: its trained parameters but adapters, fp32, on the CPU.
        """
        return trained

    def weight(self, batch: Any) -> float:
        """How much of a step a batch or a part of it is: its rows, which all have the same number of tokens."""
        return len(batch)

    def rate(self, step: int) -> float:
        """Share of the full learning rate at a step, counted from 0; it depends on nothing else."""
        rise = math.ceil(self.warmup * self.steps)
        if step < rise:
            return (step + 1) / rise
        if self.schedule == "constant":
            return 1.0
        if self.decay is not None:
            rise = max(rise, self.steps - math.ceil(self.decay * self.steps) - 1)
        done = max(0, step - rise) / max(1, self.steps - 1 - rise)
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
            ConfigError: a glob that matches none.
        """
        assert self.train is not None
        for glob in self.train:
            if not fnmatch.filter(candidates, glob):
                raise ConfigError(
                    f"stage {stage!r}: train has {glob!r}, which matches none of the {len(candidates)} parameters this stage "
                    f"can train; expected a glob over names such as {next(iter(candidates), 'none')!r}"
                )
        names = [name for name in candidates if any(fnmatch.fnmatchcase(name, glob) for glob in self.train)]
        return {name: candidates[name] for name in names}

    def check_rates(self, trained: dict[str, nn.Parameter], stage: str) -> None:
        """Raise ConfigError for a glob of `lr_groups` that matches none of the trained parameters, adapters included."""
        for glob in self.lr_groups:
            if not fnmatch.filter(trained, glob):
                raise ConfigError(
                    f"stage {stage!r}: lr_groups has {glob!r}, which matches none of the {len(trained)} trained parameters; "
                    f"expected a glob over names such as {next(iter(trained), 'none')!r}"
                )

    def optimizer(self, trained: dict[str, nn.Parameter]) -> torch.optim.AdamW:
        """AdamW over the trained parameters, grouped by rate and decay; each group keeps its full rate as `full_lr`."""
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for name, parameter in trained.items():
            rates = [rate for glob, rate in self.lr_groups.items() if fnmatch.fnmatchcase(name, glob)]
            key = (rates[0] if rates else self.lr, self.weight_decay if decays(name, parameter) else 0.0)
            groups.setdefault(key, []).append(parameter)
        return torch.optim.AdamW(
            [{"params": p, "lr": lr, "full_lr": lr, "weight_decay": decay} for (lr, decay), p in groups.items()],
            betas=(self.betas[0], self.betas[1]), fused=True,
        )  # fmt: skip


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay may pull a parameter to zero: matrices, and nothing that is a decay, bias, norm or convolution.

    By name as well as by shape: some mixers keep a decay or a bias of each head in more than one dimension.
    """
    parts = name.split(".")
    spared = parts[-1] in FP32_PARAMETERS or parts[-1].endswith("bias") or any("norm" in p or p == "conv1d" for p in parts)
    return parameter.ndim >= 2 and not spared


def checkpoint_gradients(model: Any) -> None:
    """Have a model forget its activations in the forward pass and make them again in the backward pass."""
    # The newer name appeared in transformers 5.23, which warns about the older one.
    newer = hasattr(model, "activation_checkpointing_enable")
    enable = model.activation_checkpointing_enable if newer else model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def converted_layers(student: Any) -> list[int]:
    """Indices of a hybrid's layers that no longer have the base's attention."""
    return [index for index, spec in enumerate(student.config.mixers) if spec["name"] != "attention"]


def reading_groups(student: Any) -> list[list[int]]:
    """The converted layers in groups that belong together, by who reads whose memory; lowest layers first."""
    groups: dict[int, list[int]] = {}
    for index in converted_layers(student):
        read = getattr(student.model.mixer_options[index], "reads", None)
        groups.setdefault(index if read is None else read, []).append(index)
    return list(groups.values())


def autocast(device: torch.device, options: StageOptions) -> torch.autocast:
    """The context that a stage's forward passes run in."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=options.dtype == "bf16")
