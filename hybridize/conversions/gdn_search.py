"""The calibrated seed of gdn and kda: what the delta rule can do of a softmax head, solved on text.

For each head, over a small grid of feature maps, half-lives and write strengths, the taps of the value convolution are a
least-squares problem, because the delta rule is linear in its values:

    context_t ~ sum_j taps_j * DeltaRule(f(q), f(k), v delayed by j)_t        f(a) = SiLU(scale a + shift) / its length

beta matters twice: a small one adds up what was said (a decayed mean, as softmax makes), a large one replaces it. The size of
y against the norm's eps decides between a linear and a normalised head. Last, the output projection is a ridge regression
(prior: the base's own) onto what the residual stream lacks. All of it is a function of the native layer; a mixer without
biases gets them along the direction of the input that is most nearly constant.

Letters: N sequences, T tokens, D width of the stream, H query heads, P head width, J taps.
"""

import math
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from hybridize.conversions.fitting import RIDGE, shifted, size_and_norm, solve_out_proj, solve_taps, taps_applied
from hybridize.conversions.gdn_seed import Seed, named
from hybridize.conversions.layer import LayerCalibration, materialised
from hybridize.kernels.gdn import gdn
from hybridize.mixers.gdn import DeltaMixer, unit

# (scale, shift) of SiLU on q and k.
FEATURES = ((0.25, 0.5), (0.25, 1.0), (1.0, 0.5), (2.0, 0.0))
HALF_LIVES = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 1024.0)
# Shares of beta_max.
BETAS = (0.02, 0.1, 0.3, 0.7, 0.97)
# Values enter SiLU no larger than this in rms: there it is x / 2 to within a few per cent.
VALUE_RMS = 0.1
SEARCH_SEQUENCES = 10


def search(
    seed: Seed, mixer: DeltaMixer, config: Any, calibration: LayerCalibration, generator: torch.Generator
) -> dict[str, Tensor]:
    """Fill a carried-over seed with the solved values and name it.

    Args:
        seed: from `carried`; changed in place.
        mixer: the mixer, on any device.
        config: of the base.
        calibration: activations of this layer.
        generator: of the layer, for what stays random.
    """
    heads, groups, width = mixer.num_heads, mixer.num_groups, mixer.width
    per_group = heads // groups
    part = slice(0, min(SEARCH_SEQUENCES, calibration.inputs.shape[0]))
    inputs = calibration.inputs[part]
    ones = torch.ones(*inputs.shape[:2], 1)
    if not mixer.options.proj_bias:
        seed.constant = _constant(calibration.inputs)
        ones = (inputs @ seed.constant)[..., None]
    projected = (F.linear(inputs, seed.qkv) + ones * seed.qkv_bias).unflatten(-1, (-1, width))
    q, k, v = projected.split([heads, groups, groups], dim=2)
    context = calibration.context[part].unflatten(-1, (heads, width)).transpose(1, 2)
    weights = torch.ones(heads, width)
    for group in range(groups):
        members = slice(group * per_group, (group + 1) * per_group)
        found = _search_group(q[:, :, members], k[:, :, group], v[:, :, group], context[:, members], ones, seed, mixer, config,
                              calibration.angles)  # fmt: skip
        scale, shift = FEATURES[found["feature"]]
        rows = [torch.arange(members.start * width, members.stop * width)]
        rows += [torch.arange(group * width, (group + 1) * width) + mixer.inner + part * mixer.grouped for part in (0, 1)]
        for part_rows in rows[:2]:
            seed.taps[part_rows, -1] = scale
            seed.qkv_bias[part_rows] += shift / scale
        seed.taps[rows[2]] = found["value_scale"] * found["taps"].flip(-1)
        seed.half_life[members], seed.beta[members], weights[members] = found["half_life"], found["beta"], found["weight"]
    flat = weights.flatten()
    made = named(seed, mixer, generator)
    module = materialised(mixer, made)
    # Solved for the context on the teacher's scale: the ridge treats all heads alike, whatever the size of their y.
    view = SimpleNamespace(context=lambda u: module.context(u, calibration.angles) * flat)
    out = "out_proj" if "out_proj.weight" in made else "o_proj"
    made[f"{out}.weight"] = solve_out_proj(view, seed.out, seed.out_bias, calibration) * flat
    return made


def _constant(inputs: Tensor) -> Tensor:
    """The direction [D] whose product with the inputs [N, T, D] is nearest to 1."""
    rows = inputs.flatten(0, 1).double()
    gram = rows.T @ rows
    gram.diagonal().add_(RIDGE * gram.diagonal().mean())
    return torch.linalg.solve(gram, rows.sum(0)).float()


def _features(x: Tensor, feature: tuple[float, float], ones: Tensor, norm: Tensor | None, eps: float, angles: Any) -> Tensor:
    """What the mixer makes of a projection x [n, T, h, P] behind its convolution: features of length 1."""
    out = F.silu(feature[0] * x + feature[1] * ones[..., None])
    if norm is not None:
        out = out * torch.rsqrt(out.pow(2).mean(-1, keepdim=True) + eps) * norm
    if angles is not None:
        out = apply_rotary_pos_emb(out, out, *angles, unsqueeze_dim=2)[0]
    return unit(out)


def _search_group(
    q: Tensor, k: Tensor, v: Tensor, context: Tensor, ones: Tensor, seed: Seed, mixer: DeltaMixer, config: Any, angles: Any
) -> dict[str, Any]:
    """Best feature map, half-lives, betas, taps and sizes of the query heads that share one value head.

    Args:
        q: queries, [n, T, h, P].
        k: keys, [n, T, P].
        v: values, [n, T, P].
        context: what the teacher's heads made, [n, h, T, P].
        ones: what a bias is multiplied by, [n, T, 1].
        seed: for the q/k-norms it keeps.
        mixer: for its options.
        config: of the base.
        angles: cos and sin, [1, T, P].

    Returns:
        feature (index), half_life [h], beta [h], taps [P, J] newest first, value_scale, weight [h, P] of y's channels.
    """
    members, width, taps = q.shape[2], q.shape[3], mixer.options.conv_tokens
    delayed = shifted(v, taps).flatten(2)[:, :, None]
    lives = torch.tensor(HALF_LIVES)
    choices = [(life, beta) for beta in BETAS for life in HALF_LIVES]
    energy = context.double().pow(2).sum((0, 2, 3))
    turn = angles if mixer.options.rope else None

    def features(feature: tuple[float, float]) -> tuple[Tensor, Tensor]:
        qf = _features(q, feature, ones, seed.norms.get("q_norm.weight"), config.rms_norm_eps, turn)
        kf = _features(k[:, :, None], feature, ones, seed.norms.get("k_norm.weight"), config.rms_norm_eps, turn)
        return qf * width**-0.5, kf

    def delta(qf: Tensor, kf: Tensor, values: Tensor, half_lives: Tensor, beta: Tensor) -> Tensor:
        shape = (*qf.shape[:2], len(half_lives))
        g = (-math.log(2) / half_lives).expand(shape)
        return gdn(qf, kf, values, g, (mixer.options.beta_max * beta).expand(shape))[0]

    best: dict[str, Any] = {"error": math.inf}
    for index, feature in enumerate(FEATURES):
        qf, kf = features(feature)
        gram = torch.empty(members, len(choices), width, taps, taps, dtype=torch.float64)
        cross = torch.empty(members, len(choices), width, taps, dtype=torch.float64)
        for head in range(members):
            for place, beta in enumerate(BETAS):
                mixed = delta(qf[:, :, head : head + 1], kf, delayed, lives, torch.full_like(lives, beta))
                mixed = mixed.unflatten(-1, (taps, width))
                where = slice(place * len(lives), (place + 1) * len(lives))
                gram[head, where] = torch.einsum("ntcjp,ntckp->cpjk", mixed, mixed).double()
                cross[head, where] = torch.einsum("ntcjp,ntp->cpj", mixed, context[:, head]).double()
        solved = solve_taps(gram, cross, energy)
        if solved["error"] < best["error"]:
            best = {**solved, "feature": index}
    half_life, beta = torch.tensor([choices[int(place)] for place in best["place"]]).unbind(-1)
    qf, kf = features(FEATURES[best["feature"]])
    values = taps_applied(v, best["taps"])
    y = delta(qf, kf, values[:, :, None], half_life, beta)
    gains, weights = zip(*(size_and_norm(y[:, :, head], context[:, head]) for head in range(members)), strict=True)
    # One scale for the values of all heads of the group; SiLU halves it.
    scale = 2 * math.sqrt(mixer.eps) * math.exp(sum(map(math.log, gains)) / members)
    scale = min(scale, VALUE_RMS / max(float(values.pow(2).mean().sqrt()), 1e-12))
    return {**best, "half_life": half_life, "beta": beta, "value_scale": scale, "weight": torch.stack(weights)}
