"""Attention weights -> gated linear attention: every tensor of the base goes on under its own name.

`copy` is Liger's start (Lan et al., arXiv 2503.01496), which adds nothing. `calibrated` is ours: on text, for each state
head the softmax scale and (with its own gates) the half-life with which window and recurrent branch together explain most of
what the base's heads made; for each query head the two branches' scales, a least-squares problem; last o_proj, a ridge
regression onto what the residual stream lacks.
"""

import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor

from hybridize.conversions.fitting import solve_out_proj
from hybridize.conversions.layer import LayerCalibration, materialised
from hybridize.errors import ConfigError
from hybridize.mixers.gla import UNIT_STEP, GatedLinearAttention

FEATURE_SCALES = (0.5, 1.0, 2.0, 4.0)
HALF_LIVES = (0.5, 1, 2, 4, 8, 16, 32, 64, 128, 256, 1024)
RIDGE = 1e-4
SEARCH_SEQUENCES = 10


@dataclass(frozen=True, kw_only=True)
class GLAFromAttention:
    """How a gated linear attention layer is seeded."""

    method: Literal["calibrated", "copy"] = "calibrated"
    """`calibrated` is solved on text. `copy`: nothing is added (Liger)."""

    drops = frozenset()

    @property
    def calibrated(self) -> bool:
        return self.method == "calibrated"

    def __call__(
        self,
        source: dict[str, Tensor],
        mixer: GatedLinearAttention,
        config: Any,
        generator: torch.Generator,
        calibration: LayerCalibration | None,
    ) -> dict[str, Tensor]:
        """The mixer's tensors, fp32.

        Raises:
            ConfigError: `copy` with options that are not Liger's, `calibrated` with a fixed mix or without text.
        """
        options = mixer.options
        made = {name: tensor.float().clone() for name, tensor in source.items()}
        if self.method == "copy":
            if options.gate != "key" or options.normalise:
                raise ConfigError(
                    f"gla method 'copy' got gate {options.gate!r} and normalise {options.normalise}, expected Liger's key and "
                    "false. Set them, or take method calibrated"
                )
        elif options.mix != "learned":
            raise ConfigError(f"gla method 'calibrated' got mix {options.mix!r}, expected learned, whose scales it solves")
        elif calibration is None:
            raise ConfigError("gla method 'calibrated' needs text to calibrate on. Give text, or method copy")
        if options.gate == "head":
            made["gate_proj.weight"] = torch.zeros(mixer.state_heads, config.hidden_size)
            made["A_log"] = torch.zeros(mixer.state_heads)
            made["dt_bias"] = torch.full((mixer.state_heads,), UNIT_STEP)
        if options.mix == "learned":
            made["feature_scale"] = torch.ones(mixer.state_heads)
            made["state_scale"] = torch.full((mixer.num_heads,), 0.5 if mixer.window else 1.0)
            if mixer.window:
                made["window_scale"] = torch.full((mixer.num_heads,), 0.5)
        return made if calibration is None else search(made, mixer, calibration)


def search(made: dict[str, Tensor], mixer: GatedLinearAttention, calibration: LayerCalibration) -> dict[str, Tensor]:
    """Fill a copied seed with the values that explain the base's heads best.

    Args:
        made: the base's tensors and neutral gates and scales; returned completed.
        mixer: the module, on any device.
        calibration: activations of this layer.
    """
    part = slice(0, min(SEARCH_SEQUENCES, calibration.inputs.shape[0]))
    inputs, context = calibration.inputs[part], calibration.context[part].unflatten(-1, (mixer.num_heads, -1)).double()
    energy = context.pow(2).sum((0, 1, 3)).clamp(min=1e-30)
    gated = mixer.options.gate == "head"
    # Cloned: the search writes into the module's own copies.
    module = materialised(mixer, {name: tensor.clone() for name, tensor in made.items()})
    best = torch.full((mixer.state_heads,), math.inf, dtype=torch.float64)
    with torch.no_grad():
        q, k, v = module.unrotated(inputs)
        near = [module.attend_window(q, k, v, calibration.angles).double()] if mixer.window else []
        for scale in FEATURE_SCALES:
            for half_life in HALF_LIVES if gated else (0,):
                module.feature_scale.fill_(scale)
                if gated:
                    module.A_log.fill_(math.log(math.log(2) / half_life))
                far = module.recurrent(inputs, q, k, v).double()
                weights, explained = _branch_scales([far, *near], context)
                error = (1 - explained / energy).unflatten(0, (mixer.state_heads, -1)).mean(1)
                better = error < best
                best = torch.where(better, error, best)
                members = better.repeat_interleave(mixer.num_heads // mixer.state_heads)
                made["feature_scale"] = torch.where(better, module.feature_scale, made["feature_scale"])
                if gated:
                    made["A_log"] = torch.where(better, module.A_log, made["A_log"])
                made["state_scale"] = torch.where(members, weights[:, 0].float(), made["state_scale"])
                if near:
                    made["window_scale"] = torch.where(members, weights[:, 1].float(), made["window_scale"])
    module = materialised(mixer, made)
    reader = SimpleNamespace(context=lambda rows: module.context(rows, calibration.angles))
    made["o_proj.weight"] = solve_out_proj(reader, made["o_proj.weight"], made.get("o_proj.bias"), calibration)
    return made


def _branch_scales(branches: list[Tensor], context: Tensor) -> tuple[Tensor, Tensor]:
    """Least-squares scales of the branches for each head.

    Args:
        branches: [n, T, H, d] each, fp64.
        context: what they should add up to, [n, T, H, d], fp64.

    Returns:
        Scales [H, branches] and the explained sum of squares [H].
    """
    stacked = torch.stack(branches, dim=-1)
    gram = torch.einsum("nthdi,nthdj->hij", stacked, stacked)
    cross = torch.einsum("nthdi,nthd->hi", stacked, context)
    damping = RIDGE * gram.diagonal(dim1=1, dim2=2).mean(-1).clamp(min=1e-30)
    damped = gram + damping[:, None, None] * torch.eye(len(branches), dtype=gram.dtype)
    weights = torch.linalg.solve(damped, cross)
    # What the damped scales explain, not what they would explain without damping.
    explained = 2 * (weights * cross).sum(1) - torch.einsum("hi,hij,hj->h", weights, gram, weights)
    return weights, explained
