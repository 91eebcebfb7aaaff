"""The gated RMS norm, one group at a time: the text of the mathematics and the float64 oracle."""

import torch


def gated_rms_norm_reference(y, z, weight, eps, group_size, gate_first=True):
    """Run `hybridize.kernels.gated_norm.gated_rms_norm` group by group; same arguments and result.

    Args, Returns, Raises: as `hybridize.kernels.gated_norm.gated_rms_norm`, without its checks.
    Source: Zhang, Sennrich, arXiv 1910.07467, eq. 4, per group; gate as in the module docstring.
    """
    out = []
    for start in range(0, y.shape[-1], group_size):
        group = slice(start, start + group_size)
        gate = z[..., group] / (1 + torch.exp(-z[..., group]))
        values = y[..., group] * gate if gate_first else y[..., group]
        rms = ((values**2).sum(-1, keepdim=True) / group_size + eps) ** 0.5
        normed = values / rms * weight[group]
        out.append(normed if gate_first else normed * gate)
    return torch.cat(out, dim=-1)
