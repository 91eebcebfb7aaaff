"""The calibrated seed of gdn and kda: what the delta rule can do of a softmax head, solved on text.

For each head, over a small grid of feature maps, half-lives and write strengths, the taps of the value convolution are a
least-squares problem, because the delta rule is linear in its values:

    context_t ~ sum_j taps_j * DeltaRule(f(q), f(k), v delayed by j)_t        f(a) = SiLU(scale a + shift) / its length

beta matters twice: a small one adds up what was said (a decayed mean, as softmax makes), a large one replaces it. Its logit
may follow how much later queries want a key, which stands in for the size that q and k lose to their norm. The size of
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
HALF_LIVES = (0.5, 1.5, 4.0, 8.0, 16.0, 48.0, 128.0, 1024.0)
# Shares of beta_max: while features are compared, and with the best of them.
FEW_BETAS = (0.05, 0.5)
BETAS = (0.02, 0.15, 0.5, 0.95)
# How far beta's logit follows the keys' importance, that is, the teacher's mean logit.
FOLLOWS = (0.0, 0.5, 1.0)
# Distance in tokens over which a key's importance is averaged (a half-life).
IMPORTANCE_SPAN = 16.0
# Values enter SiLU no larger than this in rms: there it is x / 2 to within a few per cent.
VALUE_RMS = 0.1
SEARCH_SEQUENCES = 5


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
    rows_of = _importance_rows(q, k, calibration.inputs[part], seed, config, calibration.angles)
    importance = F.linear(inputs, rows_of)
    mean = importance.mean((0, 1))
    importance = importance - mean
    weights = torch.ones(heads, width)
    for group in range(groups):
        members = slice(group * per_group, (group + 1) * per_group)
        found = _search_group(q[:, :, members], k[:, :, group], v[:, :, group], context[:, members], ones,
                              importance[:, :, members], seed, mixer, config, calibration.angles)  # fmt: skip
        scale, shift = FEATURES[found["feature"]]
        rows = [torch.arange(members.start * width, members.stop * width)]
        rows += [torch.arange(group * width, (group + 1) * width) + mixer.inner + part * mixer.grouped for part in (0, 1)]
        for part_rows in rows[:2]:
            seed.taps[part_rows, -1] = scale
            seed.qkv_bias[part_rows] += shift / scale
        seed.taps[rows[2]] = found["value_scale"] * found["taps"].flip(-1)
        seed.beta_rows[members] = found["follow"][:, None] * rows_of[members]
        seed.beta_logit[members] = torch.logit(found["beta"]) - found["follow"] * mean[members]
        seed.half_life[members], weights[members] = found["half_life"], found["weight"]
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


def _importance_rows(q: Tensor, k: Tensor, inputs: Tensor, seed: Seed, config: Any, angles: Any) -> Tensor:
    """How much the queries to come want a token's key, as a linear map of the token.

    softmax weighs a key by exp <q, k>; features of length 1 keep the angle of k and lose this size. Its part that is common
    to the queries that follow is the mean logit, and a write strength can carry it.

    Args:
        q: queries, [n, T, H, P].
        k: keys, [n, T, G, P].
        inputs: what they were projected from, [n, T, D].
        seed: for the q/k-norms it keeps.
        config: of the base.
        angles: cos and sin, [1, T, P].

    Returns:
        [H, D]: the ridge regression of the mean logit, less its mean, on the inputs less theirs.
    """
    for name in ("q", "k"):
        if (norm := seed.norms.get(f"{name}_norm.weight")) is not None:
            x = q if name == "q" else k
            x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps) * norm
            q, k = (x, k) if name == "q" else (q, x)
    q, k = apply_rotary_pos_emb(q, k, *angles, unsqueeze_dim=2)
    distance = torch.arange(q.shape[1])[:, None] - torch.arange(q.shape[1])
    weight = torch.where(distance > 0, torch.exp2(-distance.clamp(min=0) / IMPORTANCE_SPAN), 0.0)
    weight = weight / weight.sum(0).clamp(min=1e-30)
    # The mean over later tokens of <q_t, k_s>, without the T x T scores: first the mean query, then its product.
    mean = torch.einsum("ts,nthp->nshp", weight, q).unflatten(2, (k.shape[2], -1))
    logit = (mean * k[:, :, :, None]).sum(-1).flatten(2) * q.shape[-1] ** -0.5
    logit, inputs = logit[:, :-1].flatten(0, 1).double(), inputs[:, :-1].flatten(0, 1).double()
    logit, inputs = logit - logit.mean(0), inputs - inputs.mean(0)
    gram = inputs.T @ inputs
    gram.diagonal().add_(RIDGE * gram.diagonal().mean())
    return torch.linalg.solve(gram, inputs.T @ logit).T.float()


def _features(x: Tensor, feature: tuple[float, float], ones: Tensor, norm: Tensor | None, eps: float, angles: Any) -> Tensor:
    """What the mixer makes of a projection x [n, T, h, P] behind its convolution: features of length 1."""
    out = F.silu(feature[0] * x + feature[1] * ones[..., None])
    if norm is not None:
        out = out * torch.rsqrt(out.pow(2).mean(-1, keepdim=True) + eps) * norm
    if angles is not None:
        out = apply_rotary_pos_emb(out, out, *angles, unsqueeze_dim=2)[0]
    return unit(out)


def _search_group(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    context: Tensor,
    ones: Tensor,
    importance: Tensor,
    seed: Seed,
    mixer: DeltaMixer,
    config: Any,
    angles: Any,
) -> dict[str, Any]:
    """Best feature map, half-lives, betas, taps and sizes of the query heads that share one value head.

    Args:
        q: queries, [n, T, h, P].
        k: keys, [n, T, P].
        v: values, [n, T, P].
        context: what the teacher's heads made, [n, h, T, P].
        ones: what a bias is multiplied by, [n, T, 1].
        importance: of the keys to each head, [n, T, h], see `_importance_rows`.
        seed: for the q/k-norms it keeps.
        mixer: for its options.
        config: of the base.
        angles: cos and sin, [1, T, P].

    Returns:
        feature (index), half_life [h], beta [h], follow [h], taps [P, J] newest first, value_scale, weight [h, P]: of
        y's channels.
    """
    members, width, taps = q.shape[2], q.shape[3], mixer.options.conv_tokens
    delayed = shifted(v, taps).flatten(2)[:, :, None]
    energy = context.double().pow(2).sum((0, 2, 3))
    turn = angles if mixer.options.rope else None

    def features(feature: tuple[float, float]) -> tuple[Tensor, Tensor]:
        qf = _features(q, feature, ones, seed.norms.get("q_norm.weight"), config.rms_norm_eps, turn)
        kf = _features(k[:, :, None], feature, ones, seed.norms.get("k_norm.weight"), config.rms_norm_eps, turn)
        return qf * width**-0.5, kf

    def delta(qf: Tensor, kf: Tensor, values: Tensor, choice: Tensor, importance: Tensor) -> Tensor:
        half_life, beta, follow = choice.unbind(-1)
        beta = mixer.options.beta_max * torch.sigmoid(torch.logit(beta) + follow * importance)
        return gdn(qf, kf, values, (-math.log(2) / half_life).expand_as(beta), beta)[0]

    def solved(index: int, follows: tuple[float, ...], betas: tuple[float, ...]) -> dict[str, Any]:
        qf, kf = features(FEATURES[index])
        choices = [(life, beta, follow) for follow in follows for beta in betas for life in HALF_LIVES]
        gram = torch.empty(members, len(choices), width, taps, taps, dtype=torch.float64)
        cross = torch.empty(members, len(choices), width, taps, dtype=torch.float64)
        for head in range(members):
            for start in range(0, len(choices), len(HALF_LIVES)):
                part = torch.tensor(choices[start : start + len(HALF_LIVES)])
                mixed = delta(qf[:, :, head : head + 1], kf, delayed, part, importance[:, :, head : head + 1])
                mixed = mixed.unflatten(-1, (taps, width))
                where = slice(start, start + len(HALF_LIVES))
                gram[head, where] = torch.einsum("ntcjp,ntckp->cpjk", mixed, mixed).double()
                cross[head, where] = torch.einsum("ntcjp,ntp->cpj", mixed, context[:, head]).double()
        found = solve_taps(gram, cross, energy)
        return {**found, "feature": index, "choice": torch.tensor([choices[int(place)] for place in found["place"]])}

    tried = [solved(index, (0.0,), FEW_BETAS) for index in range(len(FEATURES))]
    best = solved(min(tried, key=lambda found: found["error"])["feature"], FOLLOWS, BETAS)
    qf, kf = features(FEATURES[best["feature"]])
    values = taps_applied(v, best["taps"])
    y = delta(qf, kf, values[:, :, None], best["choice"], importance)
    gains, weights = zip(*(size_and_norm(y[:, :, head], context[:, head]) for head in range(members)), strict=True)
    # One scale for the values of all heads of the group; SiLU halves it.
    scale = 2 * math.sqrt(mixer.eps) * math.exp(sum(map(math.log, gains)) / members)
    scale = min(scale, VALUE_RMS / max(float(values.pow(2).mean().sqrt()), 1e-12))
    half_life, beta, follow = best["choice"].unbind(-1)
    return {**best, "half_life": half_life, "beta": beta, "follow": follow, "value_scale": scale, "weight": torch.stack(weights)}
