"""A delta-rule layer made from attention, before and after it has names: what the seeds of gdn and kda share.

What a seed decides is a `Seed`, in words of the mixer; `named` writes it under the parameter names of either mixer.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hybridize.conversions.fitting import OPEN_GATE, inverse_softplus
from hybridize.errors import ConfigError
from hybridize.families import head_dim
from hybridize.mixers.gdn import DeltaMixer, GDNMixer

# Tokens until `copy` has forgotten half: slow beside any text that it is tuned on.
SLOW_HALF_LIFE = 1024.0


@dataclass
class Seed:
    """A delta-rule layer before it has names; all fp32. H query heads, G key and value heads, d head width."""

    qkv: Tensor
    """Rows of q, k, v, [(H + 2 G) d, D]."""
    qkv_bias: Tensor
    """[(H + 2 G) d]."""
    taps: Tensor
    """Of the convolution, oldest first, [(H + 2 G) d, K]."""
    half_life: Tensor
    """Tokens, [H]."""
    beta_logit: Tensor
    """Bias of beta before its sigmoid, [H]."""
    beta_rows: Tensor
    """How beta's logit follows the input, [H, D]."""
    out: Tensor
    """The last projection, [D, H d]."""
    out_bias: Tensor | None
    norms: dict[str, Tensor]
    """q_norm.weight and k_norm.weight where the mixer keeps them."""
    constant: Tensor | None = None
    """[D] with <constant, u> about 1, for a mixer without biases; None where it has them."""


def carried(source: dict[str, Tensor], mixer: DeltaMixer, config: Any) -> Seed:
    """What every method takes over from the base, with the gates of `copy`.

    Args:
        source: q_proj, k_proj, v_proj, o_proj (weights, perhaps biases), perhaps q_norm and k_norm weights.
        mixer: a DeltaMixer.
        config: of the base or hybrid.

    Raises:
        ConfigError: the base has q/k/v biases and the mixer no place for them.
    """
    width, kv_heads = head_dim(config), config.num_key_value_heads
    repeat = mixer.num_groups // kv_heads

    def heads(tensor: Tensor) -> Tensor:
        """Key or value rows [n_kv * d, ...], each head repeated in place where the mixer is expanded."""
        return tensor.float().unflatten(0, (kv_heads, width)).repeat_interleave(repeat, dim=0).flatten(0, 1)

    def rows(kind: str) -> Tensor:
        q, k, v = (source[f"{name}_proj.{kind}"] for name in "qkv")
        return torch.cat([q.float(), heads(k), heads(v)])

    qkv = rows("weight")
    bias = torch.zeros(len(qkv))
    if "q_proj.bias" in source:
        if not mixer.options.proj_bias:
            raise ConfigError("the base has q/k/v biases, which proj_bias: false would drop. Leave it true")
        bias = rows("bias")
    norms = {name: source[name].float().clone() for name in ("q_norm.weight", "k_norm.weight") if name in source}
    if norms and not hasattr(mixer, "q_norm"):
        # The L2 norm that follows takes the size away as the base's norm did; only its weight is left to fold in.
        part = [mixer.inner, mixer.grouped]
        for name, start, count in (("q", 0, part[0]), ("k", part[0], part[1])):
            weight = norms[f"{name}_norm.weight"].repeat(count // width)
            qkv[start : start + count] *= weight[:, None]
            bias[start : start + count] *= weight
        norms = {}
    taps = torch.zeros(len(qkv), mixer.options.conv_tokens)
    taps[:, -1] = 1
    return Seed(
        qkv=qkv,
        qkv_bias=bias,
        taps=taps,
        half_life=torch.full((mixer.num_heads,), SLOW_HALF_LIFE),
        beta_logit=torch.zeros(mixer.num_heads),
        beta_rows=torch.zeros(mixer.num_heads, qkv.shape[1]),
        out=source["o_proj.weight"].float().clone(),
        out_bias=source["o_proj.bias"].float().clone() if "o_proj.bias" in source else None,
        norms=norms,
    )


def named(seed: Seed, mixer: DeltaMixer, generator: torch.Generator) -> dict[str, Tensor]:
    """The mixer's tensors of a seed. `generator` draws the first factors of KDA's two bottlenecks; the second are zero."""
    heads, width, inputs = mixer.num_heads, mixer.width, seed.qkv.shape[1]
    # A_log 0: the decay is softplus(dt_bias) alone (Taylor-Calibrate's choice).
    rate = math.log(2) / seed.half_life
    made = {"conv1d.weight": seed.taps[:, None].clone(), **seed.norms}
    linear: dict[str, tuple[Tensor, Tensor]] = {}
    beta = (seed.beta_rows, seed.beta_logit)
    if isinstance(mixer, GDNMixer):
        linear["in_proj_qkv"] = (seed.qkv, seed.qkv_bias)
        linear["in_proj_z"] = (torch.zeros(mixer.inner, inputs), torch.full((mixer.inner,), OPEN_GATE))
        linear["in_proj_b"] = beta
        made["in_proj_a.weight"] = torch.zeros(heads, inputs)
        made["A_log"], made["dt_bias"] = torch.zeros(heads), inverse_softplus(rate)
        made["norm.weight"], out = torch.ones(width), "out_proj"
    else:
        sizes = [mixer.inner, mixer.grouped, mixer.grouped]
        for name, weight, bias in zip("qkv", seed.qkv.split(sizes), seed.qkv_bias.split(sizes), strict=True):
            linear[f"{name}_proj"] = (weight, bias)
        linear["b_proj"] = beta
        linear["g_b_proj"] = (torch.zeros(mixer.inner, width), torch.zeros(mixer.inner))
        for name in ("g_a_proj.weight", "forget_gate.f_a_proj.weight"):
            made[name] = torch.empty(width, inputs).uniform_(-(inputs**-0.5), inputs**-0.5, generator=generator)
        made["forget_gate.f_b_proj.weight"] = torch.zeros(mixer.inner, width)
        made["forget_gate.A_log"] = torch.zeros(1, 1, heads, 1)
        made["forget_gate.dt_bias"] = inverse_softplus(rate).repeat_interleave(width)
        made["o_norm.weight"], out = torch.full((width,), 2.0), "o_proj"
    for name, (weight, bias) in linear.items():
        if mixer.options.proj_bias:
            made[f"{name}.bias"] = bias.clone()
        elif seed.constant is not None and bias.any():
            weight = weight + bias[:, None] * seed.constant
        made[f"{name}.weight"] = weight.clone()
    made[f"{out}.weight"] = seed.out
    if seed.out_bias is not None:
        made[f"{out}.bias"] = seed.out_bias
    return made
