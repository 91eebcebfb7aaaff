"""RMS norm over groups of channels with a SiLU gate, before or after the norm.

    gate first:  out = RMSNorm_groups(y * silu(z)) * weight     (Mamba2)
    norm first:  out = RMSNorm_groups(y) * weight * silu(z)     (gated delta networks)
    RMSNorm(v) = v / sqrt(mean(v^2) + eps), the mean over one group

With a group per head the norm of a head does not depend on the other heads.

Letters: D channels.
"""

import torch
import torch.nn.functional as F

from hybridize.errors import ConfigError
from hybridize.kernels._core.dispatch import fast_path

__all__ = ["gated_rms_norm"]


def gated_rms_norm(y, z, weight, eps, group_size, gate_first=True, impl="auto"):
    """Gate and normalise the last dim in groups of `group_size` channels. Differentiable.

    Args:
        y: values, [..., D], fp16 | bf16 | fp32 | fp64.
        z: gate before its SiLU, shape of y, floating.
        weight: scale, [D], floating.
        eps: added to the mean square, > 0.
        group_size: channels per group; divides D. D itself gives one plain RMS norm.
        gate_first: True gates before the norm, False after it.
        impl: "auto", "torch" or "triton".

    Returns:
        out: [..., D], dtype of y.

    Raises:
        ConfigError: a shape, a group size that does not divide D, or an `impl` that cannot run.

    Numerics: gate, statistics and scale in fp32 (fp64 for fp64 values), one rounding at the end.
    Cost: O(D) per token.
    Source: Zhang, Sennrich, arXiv 1910.07467, eq. 4 (the norm); Dao, Gu, arXiv 2405.21060,
        section 7 (gate first); Yang, Kautz, Hatamizadeh, arXiv 2412.06464, section 3.4 (norm
        first).
    """
    if z.shape != y.shape:
        raise ConfigError(f"run gated_rms_norm: z: got shape {tuple(z.shape)}, expected {tuple(y.shape)} like y.")
    if tuple(weight.shape) != tuple(y.shape[-1:]):
        raise ConfigError(f"run gated_rms_norm: weight: got shape {tuple(weight.shape)}, expected {tuple(y.shape[-1:])}.")
    if group_size < 1 or y.shape[-1] % group_size:
        raise ConfigError(f"run gated_rms_norm: group_size: got {group_size}, expected a divisor of {y.shape[-1]}.")
    if fast := fast_path("gated_norm", "gated_rms_norm", impl, y, z, weight, eps, group_size, gate_first):
        return fast(y, z, weight, eps, group_size, gate_first)
    dtype = torch.float64 if y.dtype == torch.float64 else torch.float32
    values, gate = y.to(dtype), F.silu(z.to(dtype))
    if gate_first:
        values = values * gate
    groups = values.unflatten(-1, (-1, group_size))
    scale = torch.rsqrt(groups.square().mean(-1, keepdim=True) + eps)
    out = (groups * scale).flatten(-2) * weight.to(dtype)
    return (out if gate_first else out * gate).to(y.dtype)
