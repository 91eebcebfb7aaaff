"""Low-rank adapters (LoRA) beside frozen projections, for one stage: injected, trained, merged, gone.

peft makes and runs them. They are trained and saved under peft's names in fp32; what leaves the stage is the projection's
own weight with W + alpha / rank * B A in it, so that no directory of ours holds an adapter.
"""

import fnmatch
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hybridize.errors import ConfigError, MissingDependencyError

log = logging.getLogger(__name__)

NAME = "default"


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Adapters W x + alpha / rank * B A x, with A drawn and B zero at the start (Hu et al., arXiv 2106.09685)."""

    targets: list[str]
    """Globs over the names of the decoder layers' projections, such as "*.self_attn.q_proj"; each must match one."""
    rank: int = 8
    alpha: int = 16
    dropout: float = 0.0
    """Share of an adapter's input that is dropped in training."""

    def __post_init__(self) -> None:
        if not self.targets:
            raise ConfigError("targets is empty, expected globs such as '*.self_attn.[qkvo]_proj'")
        if self.rank < 1 or self.alpha < 1 or not 0 <= self.dropout < 1:
            raise ConfigError(
                f"rank is {self.rank}, alpha {self.alpha}, dropout {self.dropout}; "
                "expected at least 1, at least 1, and from 0 to below 1"
            )


def is_adapter(name: str) -> bool:
    """Whether a parameter of that name is an adapter's."""
    return ".lora_A." in name or ".lora_B." in name


def targeted(model: nn.Module, lora: Lora, candidates: dict[str, nn.Parameter], stage: str) -> list[str]:
    """The projections that get an adapter, in the model's order.

    Args:
        model: the student.
        lora: the options.
        candidates: the parameters that the stage can train, by name.
        stage: its name, for messages.

    Raises:
        ConfigError: a glob that matches none.
    """
    known = [
        name
        for name, module in model.named_modules()
        if type(module) is nn.Linear and name.startswith("model.layers.") and f"{name}.weight" in candidates
    ]
    for glob in lora.targets:
        if not fnmatch.filter(known, glob):
            raise ConfigError(
                f"stage {stage!r}: lora.targets has {glob!r}, which matches none of the {len(known)} projections this stage "
                f"can adapt; expected a glob over names such as {next(iter(known), 'none')!r}"
            )
    return [name for name in known if any(fnmatch.fnmatchcase(name, glob) for glob in lora.targets)]


def inject(model: nn.Module, lora: Lora, names: list[str], seed: int) -> dict[str, nn.Parameter]:
    """Put an adapter beside each projection and return their parameters by name, fp32, on the CPU, requiring gradients.

    Args:
        model: the student; its projections become peft's modules with the old one inside.
        lora: the options.
        names: the projections, as `targeted` gives them.
        seed: of A; the global random numbers are left as they were.

    Raises:
        MissingDependencyError: peft is not installed.
    """
    try:
        import peft
    except ImportError as error:
        raise MissingDependencyError("lora: adapters need peft: pip install 'hybridize[train]'") from error
    # A regular expression of whole names: peft takes a list's entries for endings of names.
    pattern = "|".join(re.escape(name) for name in names)
    config = peft.LoraConfig(r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=f"({pattern})")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(config, model, NAME)
    # peft freezes what is no adapter; what `train` names is set again by the caller.
    adapters = {name: parameter for name, parameter in model.named_parameters() if is_adapter(name)}
    assert len(adapters) == 2 * len(names), "peft did not adapt exactly what was asked for"
    for parameter in adapters.values():
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)
    log.info("lora: %d projections of rank %d, %d parameters", len(names), lora.rank, sum(p.numel() for p in adapters.values()))
    return adapters


@torch.no_grad()
def merged(model: nn.Module) -> dict[str, Tensor]:
    """The weight of every adapted projection with its adapter in it, by the projection's own name; fp32, on the CPU."""
    out = {}
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and hasattr(module, "get_delta_weight"):
            delta: Any = module.get_delta_weight
            base: Any = module.base_layer
            out[f"{name}.weight"] = (base.weight.float() + delta(NAME).float()).cpu()
    return out


def watched(micro_step: Callable[..., dict[str, Tensor]], model: nn.Module, stage: str) -> Callable[..., dict[str, Tensor]]:
    """The micro-step, which refuses in its first call adapters that have no part in it.

    A mixer may read a projection's weight instead of calling it; an adapter there would train and change nothing.

    Args:
        micro_step: adds a share of the gradient.
        model: the student with its adapters.
        stage: its name, for messages.
    """
    idle = {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}

    def step(*args: Any) -> dict[str, Tensor]:
        if not idle:
            return micro_step(*args)
        # A hook that gave something back would change the module's input.
        handles = [
            module.register_forward_pre_hook(lambda *_, n=name: (idle.pop(n, None), None)[1]) for name, module in idle.items()
        ]
        try:
            return micro_step(*args)
        finally:
            for handle in handles:
                handle.remove()
            # Before an error of the step itself: with nothing to differentiate it has one.
            if idle:
                raise ConfigError(
                    f"stage {stage!r}: an adapter beside {next(iter(idle))} would do nothing, as its weight is read without "
                    "calling it; leave it out of lora.targets and name its weight under train"
                )

    return step
