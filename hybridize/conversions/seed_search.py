"""The calibrated Mamba2 seed: what linear attention with a decay can do of a softmax head, solved on text.

For each head, over a small grid of feature maps and half-lives, the taps of the value convolution are a least-squares
problem, because the layer is linear in them:

    context_t ~ sum_j taps_j * sum_s 2^-(t-s)/half_life  <f(q_t), f(k_s)>  v_{s-j}        f(a) = SiLU(scale a + shift)

f's shift makes scores 1 + <q, k> + ..., the start of exp's series; the taps give heads that look at the token before.
The size of y against the norm's eps is chosen too: a small y passes the norm unchanged and keeps its amplitude, a large
one is normalised. Last, out_proj is a ridge regression (prior: the base's own) onto what the residual stream lacks,
so that a layer also makes up for what earlier seeds got wrong. All of it is a function of the native Mamba2 layer.

Letters: N sequences, T tokens, D width of the stream, H query heads, P head width, J taps.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridize.conversions.fitting import (
    OPEN_GATE,
    inverse_softplus,
    shifted,
    size_and_norm,
    solve_out_proj,
    solve_taps,
    taps_applied,
)
from hybridize.conversions.layer import LayerCalibration, materialised
from hybridize.errors import ConfigError
from hybridize.mixers.mamba2 import Mamba2Mixer

# (scale, shift) of SiLU on B and C. Chosen on stories260K among eleven; more brought under 1 % of perplexity.
FEATURES = ((0.25, 0.5), (0.25, 1.0), (1.0, 0.5), (2.0, 0.0))
HALF_LIVES = (0.5, 1, 2, 4, 8, 16, 32, 64, 128, 256, 1024)
# x enters SiLU this small, where it is x / 2 to within a few per cent.
X_RMS = 0.05
SEARCH_SEQUENCES = 10


def search(made: dict[str, Tensor], mixer: Mamba2Mixer, config: Any, calibration: LayerCalibration) -> dict[str, Tensor]:
    """Fill a carried-over seed with the solved values.

    Args:
        made: from `carried`; returned completed.
        mixer: the Mamba2Mixer, on any device.
        config: of the base.
        calibration: activations of this layer.
    """
    if "in_proj.bias" not in made:
        raise ConfigError("mamba2 method 'calibrated' opens the gate with a bias; proj_bias must be true")
    heads, groups, width, taps = mixer.num_heads, mixer.num_groups, mixer.width, mixer.conv_tokens
    part = slice(0, min(SEARCH_SEQUENCES, calibration.inputs.shape[0]))
    q, k, v = _projected(made, mixer, calibration.inputs[part])
    context = calibration.context[part].unflatten(-1, (heads, width)).transpose(1, 2)
    per_group = heads // groups
    norms = (made.get("q_norm.weight"), made.get("k_norm.weight"), config.rms_norm_eps)

    weight, bias = made["conv1d.weight"], made["conv1d.bias"]
    x0, b0, c0 = 0, groups * width, 2 * groups * width
    half_life, step = torch.zeros(heads), torch.zeros(heads)
    for group in range(groups):
        members = range(group * per_group, (group + 1) * per_group)
        found = _search_group(q[:, members.start : members.stop], k[:, group], v[:, group],
                              context[:, members.start : members.stop], taps, norms)  # fmt: skip
        rms = taps_applied(v[:, group], found["taps"]).pow(2).mean().sqrt()
        x_scale = X_RMS / max(float(rms), 1e-12)
        scale, shift = FEATURES[found["feature"]]
        x_rows = slice(x0 + group * width, x0 + (group + 1) * width)
        b_rows = slice(b0 + group * width, b0 + (group + 1) * width)
        c_rows = slice(c0 + members.start * width, c0 + members.stop * width)
        weight[x_rows, 0] = x_scale * found["taps"].flip(-1)
        for rows in (b_rows, c_rows):
            weight[rows, 0, -1] = scale
            bias[rows] = shift
        for place, head in enumerate(members):
            half_life[head] = found["half_life"][place]
            # y of the module is step * x_scale / 2 times y here; it should be found["size"] * sqrt(eps) in rms.
            step[head] = 2 / x_scale * found["gain"][place] * math.sqrt(mixer.norm.eps)
            made["norm.weight"][head * width : (head + 1) * width] = found["norm"][place]
    made["dt_bias"] = inverse_softplus(step)
    made["A_log"] = torch.log(math.log(2) / (half_life * step))
    made["in_proj.bias"][: mixer.inner] = OPEN_GATE
    module = materialised(mixer, made)
    made["out_proj.weight"] = solve_out_proj(module, made["out_proj.weight"], made.get("out_proj.bias"), calibration)
    return made


def _projected(made: dict[str, Tensor], mixer: Mamba2Mixer, inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [n, H, T, P], keys and values [n, groups, T, P] of the seed's own in_proj rows."""
    sizes = mixer.split_sizes()
    out = F.linear(inputs, made["in_proj.weight"], made.get("in_proj.bias"))
    parts = dict(zip(sizes, out.split(list(sizes.values()), dim=-1), strict=True))
    q, k, v = (parts[n].unflatten(-1, (-1, mixer.width)).transpose(1, 2) for n in ("C", "B", "x"))
    return q, k, v


def _features(x: Tensor, feature: tuple[float, float], norm: Tensor | None, eps: float) -> Tensor:
    out = F.silu(feature[0] * x + feature[1])
    if norm is not None:
        out = out * torch.rsqrt(out.pow(2).mean(-1, keepdim=True) + eps) * norm
    return out


def _decay(tokens: int, half_life: float) -> Tensor:
    distance = torch.arange(tokens)[:, None] - torch.arange(tokens)[None]
    return torch.where(distance >= 0, torch.exp2(-distance.clamp(min=0) / half_life), 0.0)


def _search_group(q: Tensor, k: Tensor, v: Tensor, context: Tensor, taps: int, norms: tuple) -> dict[str, Any]:
    """Best feature map, half-lives, taps, sizes and norm weights of the query heads that share one value head.

    Args:
        q: queries, [n, h, T, P].
        k: keys, [n, T, P].
        v: values, [n, T, P].
        context: what the teacher's heads made, [n, h, T, P].
        taps: of the convolution.
        norms: weights of the base's q- and k-norm or None, and their eps.

    Returns:
        feature (index), half_life [h], taps [P, J], gain [h], norm [h, P].
    """
    members, tokens, width = q.shape[1], q.shape[2], q.shape[3]
    delayed = shifted(v, taps).flatten(2)
    decays = [_decay(tokens, half_life) for half_life in HALF_LIVES]
    energy = context.double().pow(2).sum((0, 2, 3))
    best: dict[str, Any] = {"error": math.inf}
    for index, feature in enumerate(FEATURES):
        keys = _features(k, feature, norms[1], norms[2])
        gram = torch.empty(members, len(decays), width, taps, taps, dtype=torch.float64)
        cross = torch.empty(members, len(decays), width, taps, dtype=torch.float64)
        for head in range(members):
            scores = _features(q[:, head], feature, norms[0], norms[2]) @ keys.transpose(1, 2)
            for place, decay in enumerate(decays):
                mixed = ((scores * decay) @ delayed).unflatten(2, (taps, width))
                gram[head, place] = torch.einsum("ntjp,ntkp->pjk", mixed, mixed)
                cross[head, place] = torch.einsum("ntjp,ntp->pj", mixed, context[:, head])
        solved = solve_taps(gram, cross, energy)
        if solved["error"] < best["error"]:
            best = {**solved, "feature": index}
    chosen = FEATURES[best["feature"]]
    keys = _features(k, chosen, norms[1], norms[2])
    values = taps_applied(v, best["taps"])
    gains, weights = [], []
    for head in range(members):
        queries = _features(q[:, head], chosen, norms[0], norms[2])
        y = ((queries @ keys.transpose(1, 2)) * decays[int(best["place"][head])]) @ values
        gain, weight = size_and_norm(y, context[:, head])
        gains.append(gain)
        weights.append(weight)
    half_lives = torch.tensor([HALF_LIVES[int(p)] for p in best["place"]])
    return {**best, "half_life": half_lives, "gain": gains, "norm": torch.stack(weights)}
