"""Attention weights -> Mamba2 weights: C from queries, B from keys, x from values, out_proj from o_proj.

Three methods. `mamba_in_llama` is the published layout (Wang et al., arXiv 2408.15237, repository jxiw/MambaInLlama,
mamba2/hybrid_wrapper.py), `mimetic` mmMamba's start (arXiv 2502.13145); both leave the decay and the convolution to
training. `calibrated` is ours: features, half-lives, taps and out_proj solved in closed form on text (seed_search.py).
Rows are paired as the base pairs heads: query head h reads key and value head h // (n_q / n_kv).
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from hybridize.conversions.fitting import inverse_softplus
from hybridize.conversions.layer import LayerCalibration
from hybridize.conversions.seed_search import search
from hybridize.errors import ConfigError
from hybridize.families import head_dim
from hybridize.mixers.mamba2 import Mamba2Mixer

DT_RANGE = (1e-3, 1e-1)


@dataclass(frozen=True, kw_only=True)
class Mamba2FromGQA:
    """How a Mamba2 layer is seeded."""

    method: Literal["calibrated", "mimetic", "mamba_in_llama"] = "calibrated"
    """`calibrated` is solved on text; `mamba_in_llama` and `mimetic` (mmMamba) are published and need none."""

    drops = frozenset()

    @property
    def calibrated(self) -> bool:
        return self.method == "calibrated"

    def __call__(
        self,
        source: dict[str, Tensor],
        mixer: Mamba2Mixer,
        config: Any,
        generator: torch.Generator,
        calibration: LayerCalibration | None,
    ) -> dict[str, Tensor]:
        """The mixer's tensors, fp32.

        Raises:
            ConfigError: the base has q/k/v biases and the mixer no place for them, or a calibrated seed got no text.
        """
        made = carried(source, mixer, config)
        if self.method == "calibrated":
            if calibration is None:
                raise ConfigError("mamba2 method 'calibrated' needs text to calibrate on. Give text, or method mimetic")
            return search(made, mixer, config, calibration)
        published = self.method == "mamba_in_llama"
        sizes, heads = mixer.split_sizes(), mixer.num_heads
        rows = dict(zip(sizes, made["in_proj.weight"].split(list(sizes.values())), strict=True))

        def uniform(shape: tuple[int, ...], bound: float) -> Tensor:
            return torch.empty(shape).uniform_(-bound, bound, generator=generator)

        inputs = made["in_proj.weight"].shape[1]
        if published:
            # nn.Linear's and nn.Conv1d's own starts: uniform within 1/sqrt(fan in).
            for name in ("z", "dt"):
                rows[name].copy_(uniform(tuple(rows[name].shape), inputs**-0.5))
            bound = mixer.conv_tokens**-0.5
            made["conv1d.weight"].copy_(uniform(tuple(made["conv1d.weight"].shape), bound))
            made["conv1d.bias"].copy_(uniform(tuple(made["conv1d.bias"].shape), bound))
            made["A_log"] = torch.log(torch.empty(heads).uniform_(1, 16, generator=generator))
        else:
            rows["z"].copy_(uniform(tuple(rows["z"].shape), 2**-2.5 * math.sqrt(6 / (inputs + sizes["z"]))))
            made["conv1d.weight"][:, 0, -1] = 1
            made["A_log"] = torch.ones(heads)
        low, high = (math.log(limit) for limit in DT_RANGE)
        step = torch.exp(torch.empty(heads).uniform_(low, high, generator=generator)).clamp(min=1e-4)
        made["dt_bias"] = inverse_softplus(step)
        made["D"] = torch.ones(heads) if published else torch.zeros(heads)
        return made


def carried(source: dict[str, Tensor], mixer: Mamba2Mixer, config: Any) -> dict[str, Tensor]:
    """What every method takes over from the base: projections, biases, q/k-norms; the rest zeros and ones.

    Args:
        source: q_proj, k_proj, v_proj, o_proj (weights, perhaps biases), perhaps q_norm and k_norm weights.
        mixer: a Mamba2Mixer.
        config: of the base or hybrid.

    Returns:
        All of the mixer's tensors, fp32: in_proj with zero z and dt rows, conv1d zero, norm one.
    """
    width, kv_heads = head_dim(config), config.num_key_value_heads
    repeat = mixer.num_groups // kv_heads

    def heads(tensor: Tensor) -> Tensor:
        """Key or value rows [n_kv * d, ...], each head repeated in place where the mixer is expanded."""
        return tensor.unflatten(0, (kv_heads, width)).repeat_interleave(repeat, dim=0).flatten(0, 1)

    made = {name: torch.zeros(tuple(t.shape)) for name, t in mixer.state_dict().items()}
    sizes = mixer.split_sizes()

    def fill(kind: str) -> None:
        rows = dict(zip(sizes, made[f"in_proj.{kind}"].split(list(sizes.values())), strict=True))
        rows["C"].copy_(source[f"q_proj.{kind}"].float())
        rows["B"].copy_(heads(source[f"k_proj.{kind}"].float()))
        rows["x"].copy_(heads(source[f"v_proj.{kind}"].float()))

    fill("weight")
    if "q_proj.bias" in source:
        if "in_proj.bias" not in made:
            raise ConfigError("mamba2: the base has q/k/v biases, which proj_bias: false would drop. Leave it true")
        fill("bias")
    made["out_proj.weight"] = source["o_proj.weight"].float().clone()
    if "o_proj.bias" in source:
        made["out_proj.bias"] = source["o_proj.bias"].float().clone()
    for name in ("q_norm.weight", "k_norm.weight"):
        if name in made:
            made[name] = source[name].float().clone()
    made["norm.weight"] = torch.ones_like(made["norm.weight"])
    return made
