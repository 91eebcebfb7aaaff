"""Attention weights -> latent attention, three ways, and what all of them end with.

Every rotary key dimension at rope_dim full, the values as they are at kv_rank full: both together are the base exactly. The
methods differ in which part of the keys stays rotary and how the rest is compressed with the values: `transmla` on text
(mla_fit.py), `svd` and `partial_rope` as published by X-EcoMLA and MHA2MLA (mla_published.py). Letters as in mla_parts.py.
"""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor

from hybridize.conversions import mla_scores
from hybridize.conversions.fitting import ENOUGH, refit_out_proj, solve_out_proj
from hybridize.conversions.layer import LayerCalibration, materialised
from hybridize.conversions.mla_fit import transmla
from hybridize.conversions.mla_parts import Factors, Heads, Projected, assemble, every_pair, identity_latent, read_heads
from hybridize.conversions.mla_published import Selection, choose_pairs, joint_svd, mean_key, own_pairs
from hybridize.errors import ConfigError
from hybridize.families import family_of, head_dim
from hybridize.mixers.mla import LATENT_EPS, MLA, LatentAttention

# Of o_proj's refit, in units of its Gram matrix's mean diagonal.
DAMPINGS = (1e-2, 1e-1, 1.0, 10.0)


@dataclass(frozen=True, kw_only=True)
class MLAFromGQA:
    """How a latent attention layer is seeded."""

    method: Literal["transmla", "svd", "partial_rope"] = "transmla"
    """`transmla` on text; `svd` (X-EcoMLA) and `partial_rope` (MHA2MLA) as published."""
    freq_fold: int | Literal["search"] = "search"
    """transmla: adjacent frequencies treated as one; a divisor of head_dim / 2. `search` doubles it while that helps a layer."""
    weigh: Literal["output", "activations"] = "output"
    """transmla: what an error counts by. `activations` is the published balance of keys and values."""
    out_proj: Literal["solved", "kept"] = "solved"
    """transmla: o_proj by ridge regression onto what the stream lacks, or the base's own."""
    select: Selection = "2-norm"
    """partial_rope: which rotary pairs of each key head stay."""

    drops = frozenset()
    from_scores = staticmethod(mla_scores.from_scores)
    spectra = staticmethod(mla_scores.spectra)
    spectra_of = staticmethod(mla_scores.spectra_of)

    def __post_init__(self) -> None:
        if isinstance(self.freq_fold, int) and self.freq_fold < 1:
            raise ConfigError(f"freq_fold is {self.freq_fold}, expected 1 or more, or search")

    @property
    def calibrated(self) -> bool:
        return self.method == "transmla" or (self.method == "partial_rope" and self.select == "2-norm")

    def check(self, mixer: MLA, config: Any) -> None:
        """Whether the method can fill the mixer on this base, asked when a plan is made. Raises ConfigError."""
        width = head_dim(config)
        _, rope = mixer.sizes(config)
        if isinstance(self.freq_fold, int) and width // 2 % self.freq_fold:
            raise ConfigError(f"freq_fold is {self.freq_fold}, expected a divisor of head_dim / 2 = {width // 2}, or search")
        if self.method == "svd" and width < rope < config.num_key_value_heads * width:
            raise ConfigError(
                f"method svd has one rotary key of at most head_dim = {width}, got rope_dim {rope}. Use less, or full"
            )
        if not self.calibrated and mixer.qk_norm == "fold" and family_of(config).qk_norm:
            raise ConfigError(
                f"qk_norm fold measures the norms on text, which method {self.method} has none of. Use qk_norm keep"
            )

    def __call__(
        self,
        source: dict[str, Tensor],
        mixer: LatentAttention,
        config: Any,
        generator: torch.Generator,
        calibration: LayerCalibration | None,
    ) -> dict[str, Tensor]:
        """The mixer's tensors, fp32.

        Raises:
            ConfigError: a calibrated method got no text.
        """
        if self.calibrated and calibration is None:
            raise ConfigError(f"mla method {self.method!r} needs text to calibrate on. Give text, or method svd")
        heads = read_heads(source, mixer, config, calibration)
        projected = None if calibration is None else Projected(heads, calibration)
        factors = self._factors(heads, mixer, calibration, projected)
        made = assemble(heads, factors, mixer)
        if "kv_a_layernorm.weight" in made:
            made["kv_a_layernorm.weight"] = _latent_scale(mixer, made, factors, projected)
        # An exact layer needs no correction, and would not be exact after one.
        exact = mixer.full_rope and mixer.rank == heads.groups * heads.width and "kv_a_layernorm.weight" not in made
        exact = exact and (mixer.normed or not family_of(config).qk_norm)
        if self.method == "transmla" and self.out_proj == "solved" and not exact:
            assert calibration is not None
            assert projected is not None
            made["o_proj.weight"] = _solved(materialised(mixer, made), made, factors, projected, calibration)
        return made

    def _factors(
        self, heads: Heads, mixer: LatentAttention, calibration: LayerCalibration | None, projected: Projected | None
    ) -> Factors:
        if mixer.full_rope and mixer.rank == heads.groups * heads.width:
            rotary, latent = every_pair(heads), identity_latent(heads)
        elif self.method == "transmla":
            assert projected is not None
            return transmla(projected, mixer, self.freq_fold, self.weigh)
        else:
            if mixer.full_rope:
                rotary = every_pair(heads)
            elif self.method == "svd":
                rotary = mean_key(heads, mixer)
            else:
                rotary = own_pairs(heads, choose_pairs(heads, mixer, self.select, calibration))
            latent = joint_svd(heads, mixer.rank, rotary.plain)
        return Factors(pairs=rotary.pairs, rope_key=rotary.rope_key, rope_query=rotary.rope_query, **latent)


def _solved(
    module: LatentAttention, made: dict[str, Tensor], factors: Factors, projected: Projected, calibration: LayerCalibration
) -> Tensor:
    """o_proj onto what the stream lacks, [D, H * d], fp32."""
    prior, bias = made["o_proj.weight"], made.get("o_proj.bias")
    if calibration.inputs[..., 0].numel() >= ENOUGH * prior.shape[1]:
        bound = SimpleNamespace(context=lambda inputs: module.context(inputs, calibration.angles))
        return solve_out_proj(bound, prior, bias, calibration)
    target = calibration.target[projected.places]
    return refit_out_proj(lambda some: context(module, factors, projected, some), prior, bias, target, DAMPINGS)


def context(module: LatentAttention, factors: Factors, projected: Projected, some: Tensor) -> Tensor:
    """What o_proj reads of some of the sequences looked at, [n, T, H * d]: `module.context` by the base's projections.

    Those are there already, and the module's are their linear functions.
    """
    q, keys = projected.q[some], projected.k[some].flatten(2)
    turned = torch.einsum("nthd,hrd->nhtr", q, factors.rope_query.float())
    latent = _latents(factors, keys, projected.v[some].flatten(2))
    plain, rope_key = q[..., : module.plain].transpose(1, 2), keys @ factors.rope_key.float().T
    plain, turned, latent, key = module.rotate(plain, turned, latent, rope_key, projected.angles)
    return module.expanded(plain, turned, latent[:, None], key[:, None], None).transpose(1, 2).flatten(2)


def _latents(factors: Factors, keys: Tensor, values: Tensor) -> Tensor:
    """Before their norm, [n, T, r], of [n, T, E] each."""
    return torch.cat([keys, values], dim=-1) @ factors.down.float().T


def _latent_scale(mixer: LatentAttention, made: dict[str, Tensor], factors: Factors, projected: Projected | None) -> Tensor:
    """Weight of the latent norm, [r]: least squares of each latent on its normed self; without text, its expected size.

    Without text inputs count as having no preferred direction and size 1 (what a fresh input norm makes of them).
    """
    if projected is None:
        rows = made["kv_a_proj_with_mqa.weight"][: mixer.rank]
        return torch.full((mixer.rank,), float(rows.square().sum(1).mean().sqrt()))
    latent = _latents(factors, projected.k.flatten(2), projected.v.flatten(2)).flatten(0, 1).double()
    normed = latent * torch.rsqrt(latent.square().mean(-1, keepdim=True) + LATENT_EPS)
    return ((latent * normed).sum(0) / normed.square().sum(0).clamp(min=1e-30)).float()
