"""What every seeding of latent attention shares: the base's heads as matrices, and from factors to named tensors.

Letters: D the stream's width, H query heads, G key/value heads, d head width, E = G * d, r latent width, R rotary width.
Rotary pairs of one head are rows j and j + d/2, as in transformers' rotate_half.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from hybridize.conversions.fitting import spread
from hybridize.conversions.layer import LayerCalibration
from hybridize.errors import ConfigError
from hybridize.families import head_dim
from hybridize.mixers.mla import LatentAttention

# Numbers in the queries that are looked at, tokens times width, such as 4096 of 4096; at least four sequences.
NUMBERS = 2**24


@dataclass(kw_only=True)
class Heads:
    """The base's projections in its stored dtype; q/k-norms that stay are beside them, folded ones are in the weights."""

    weights: dict[str, Tensor]
    """q [H * d, D], k [E, D], v [E, D], o [D, H * d]."""
    biases: dict[str, Tensor | None]
    norms: dict[str, Tensor]
    """Weights of the norms that stay, [d] each, by q and k; empty where there are none."""
    count: int
    groups: int
    width: int
    eps: float

    def rows(self, name: str, inputs: Tensor) -> Tensor:
        """q, k or v of `inputs` [n, D] before the rotary embedding, norms included, [n, heads, d] fp32."""
        out = torch.nn.functional.linear(inputs, self.weights[name].float(), self.biases[name])
        out = out.unflatten(-1, (-1, self.width))
        if name in self.norms:
            out = out * torch.rsqrt(out.pow(2).mean(-1, keepdim=True) + self.eps) * self.norms[name]
        return out


class Projected:
    """What the base's heads make of the calibration's sequences, each projection when it is first asked for."""

    def __init__(self, heads: Heads, calibration: LayerCalibration):
        count, length, _ = calibration.inputs.shape
        self.heads, self.angles = heads, calibration.angles
        self.places = spread(count, max(4, NUMBERS // (length * heads.count * heads.width)))
        """The sequences that are looked at, [n] int64."""
        self.inputs = calibration.inputs if len(self.places) == count else calibration.inputs[self.places]

    @cached_property
    def q(self) -> Tensor:
        """Before the rotary embedding, [n, T, H, d] fp32; keys and values likewise with G heads."""
        return self._rows("q")

    @cached_property
    def k(self) -> Tensor:
        return self._rows("k")

    @cached_property
    def v(self) -> Tensor:
        return self._rows("v")

    def _rows(self, name: str) -> Tensor:
        return self.heads.rows(name, self.inputs.flatten(0, 1)).unflatten(0, self.inputs.shape[:2])


@dataclass(kw_only=True)
class Factors:
    """A seed before it is named, fp64. Keys and values in the base's own coordinates, heads in order."""

    pairs: Tensor
    """Frequency index of each rotary pair, [R / 2] int64."""
    rope_key: Tensor
    """From keys to the rotary key, [R, E]: first halves of the pairs, then second halves."""
    rope_query: Tensor
    """From each query head to its rotary query, [H, R, d]."""
    down: Tensor
    """From [keys | values] to the latent, [r, 2E]."""
    up_keys: Tensor
    """From the latent to the plain key of each query head, [H, d, r]."""
    up_values: Tensor
    """From the latent to the value of each key/value head, [G, d, r]."""


@dataclass(kw_only=True)
class Rotary:
    """Which part of the keys stays rotary; fields as in Factors, and the rest."""

    pairs: Tensor
    rope_key: Tensor
    rope_query: Tensor
    plain: Tensor
    """From keys to what of them is not rotary, in the keys' own coordinates, [E, E]."""


def read_heads(source: Mapping[str, Tensor], mixer: LatentAttention, config: Any, calibration: LayerCalibration | None) -> Heads:
    """The base's projections, every one of them.

    Raises:
        ConfigError: q/k-norms are to be folded into constants, and there is no text to measure them on.
    """
    weights = {name: source[f"{name}_proj.weight"] for name in "qkvo"}
    biases = {name: source[f"{name}_proj.bias"].float() if f"{name}_proj.bias" in source else None for name in "qkvo"}
    norms = {name: source[f"{name}_norm.weight"].float() for name in "qk" if f"{name}_norm.weight" in source}
    heads = Heads(
        weights=weights, biases=biases, norms={}, count=config.num_attention_heads, groups=config.num_key_value_heads,
        width=head_dim(config), eps=config.rms_norm_eps,
    )  # fmt: skip
    if mixer.normed:
        heads.norms = norms
        return heads
    if norms and calibration is None:
        raise ConfigError("mla: qk_norm fold needs text to measure the norms on. Use qk_norm keep, or a calibrated method")
    for name, weight in norms.items():
        assert calibration is not None
        raw = heads.rows(name, calibration.inputs.flatten(0, 1))
        scale = torch.rsqrt(raw.pow(2).mean(-1) + heads.eps).mean(0)
        factor = (scale[:, None] * weight).flatten()
        heads.weights[name] = weights[name].float() * factor[:, None]
        if (bias := biases[name]) is not None:
            heads.biases[name] = bias * factor
    return heads


def assemble(heads: Heads, factors: Factors, mixer: LatentAttention) -> dict[str, Tensor]:
    """The mixer's tensors under their names, fp32; o_proj as the base has it.

    The plain query of a head is its whole query; what is rotary of it is missing in up_keys.
    """
    made: dict[str, Tensor] = {}
    E, rank = heads.groups * heads.width, mixer.rank
    down_keys, down_values = factors.down.float().split([E, E], dim=1)
    rope_key, rope_query = factors.rope_key.float(), factors.rope_query.float()
    wide = {name: heads.weights[name].float() for name in "qkvo"}
    if mixer.normed:
        for name in "qk":
            made[f"{name}_proj.weight"] = wide[name]
            made[f"{name}_norm.weight"] = heads.norms[name]
            if (bias := heads.biases[name]) is not None:
                made[f"{name}_proj.bias"] = bias
        made["q_rope_proj.weight"] = rope_query.flatten(0, 1)
        stream = torch.cat([down_values @ wide["v"], torch.zeros(mixer.rope, wide["v"].shape[1])])
        made["kv_a_proj_with_mqa.weight"] = torch.cat([stream, torch.cat([down_keys, rope_key])], dim=1)
        if (bias := heads.biases["v"]) is not None:
            made["kv_a_proj_with_mqa.bias"] = torch.cat([down_values @ bias, torch.zeros(mixer.rope)])
    else:
        made["q_proj.weight"] = _queries(wide["q"].unflatten(0, (heads.count, -1)), rope_query, mixer)
        latent = down_keys @ wide["k"] + down_values @ wide["v"]
        made["kv_a_proj_with_mqa.weight"] = torch.cat([latent, rope_key @ wide["k"]])
        if heads.biases["q"] is not None:
            b = {name: bias for name, bias in heads.biases.items() if bias is not None}
            made["q_proj.bias"] = _queries(b["q"].view(heads.count, -1, 1), rope_query, mixer)[:, 0]
            made["kv_a_proj_with_mqa.bias"] = torch.cat([down_keys @ b["k"] + down_values @ b["v"], rope_key @ b["k"]])
    repeat = heads.count // heads.groups
    values = factors.up_values.float().repeat_interleave(repeat, dim=0)
    ups = values if mixer.full_rope else torch.cat([factors.up_keys.float(), values], dim=1)
    made["kv_b_proj.weight"] = ups.reshape(-1, rank).contiguous()
    made["o_proj.weight"] = wide["o"]
    if (bias := heads.biases["o"]) is not None:
        made["o_proj.bias"] = bias
    if mixer.chosen:
        made["rope_pairs"] = factors.pairs.float()
    if hasattr(mixer, "kv_a_layernorm"):
        made["kv_a_layernorm.weight"] = torch.ones(rank)
    return made


def _queries(rows: Tensor, rope_query: Tensor, mixer: LatentAttention) -> Tensor:
    """Rows of q_proj from the base's [H, d, D]: per head the plain query, then the rotary one."""
    turned = rope_query @ rows
    return (turned if mixer.full_rope else torch.cat([rows, turned], dim=1)).flatten(0, 1).contiguous()


def signed(columns: Tensor) -> Tensor:
    """Columns with their largest entry positive: eigenvectors the same whatever the routine's mood."""
    top = columns.gather(-2, columns.abs().argmax(dim=-2, keepdim=True))
    return columns * torch.where(top < 0, -1.0, 1.0)


def principal(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, largest first, and their eigenvectors as columns, signs fixed. fp64."""
    values, vectors = torch.linalg.eigh(gram)
    return values.flip(-1), signed(vectors.flip(-1))


def leading(gram: Tensor, count: int) -> Tensor:
    """The first `count` principal components of [n, n] fp64 as columns, signs fixed, fp64.

    Found in fp32, a third of the time; what is lost of their being orthonormal one Newton step brings back.
    """
    found = principal(gram.float())[1][:, :count].double()
    return found @ (1.5 * torch.eye(found.shape[1], dtype=torch.float64) - 0.5 * found.T @ found)


def identity_latent(heads: Heads) -> dict[str, Tensor]:
    """The values themselves as the latent: `down`, `up_keys` (none) and `up_values` of r = E, fp64."""
    G, d = heads.groups, heads.width
    eye = torch.eye(G * d, dtype=torch.float64)
    nothing = torch.zeros(heads.count, d, G * d, dtype=torch.float64)
    return {"down": torch.cat([torch.zeros_like(eye), eye], dim=1), "up_keys": nothing, "up_values": eye.view(G, d, -1)}


def every_pair(heads: Heads) -> Rotary:
    """Every key dimension rotary, each at its own head's frequency."""
    G, d, half = heads.groups, heads.width, heads.width // 2
    places = torch.arange(G * d).view(G, 2, half)
    rope_key = torch.eye(G * d, dtype=torch.float64)[places.transpose(0, 1).flatten()]
    queries = rope_key.view(-1, G, d).transpose(0, 1).repeat_interleave(heads.count // G, dim=0)
    return Rotary(
        pairs=torch.arange(half).repeat(G), rope_key=rope_key, rope_query=queries, plain=torch.zeros(G * d, G * d).double()
    )
