"""One token through a layer, the references of its three parts one after the other: the float64 oracle."""

import torch

from hybridize.kernels.conv.reference import causal_conv1d_step_reference
from hybridize.kernels.gated_norm.reference import gated_rms_norm_reference
from hybridize.kernels.gdn.reference import gdn_reference
from hybridize.kernels.ssd.reference import ssd_reference

# Of the L2 norm of q and k, as transformers' Qwen3_5GatedDeltaNet has it.
L2_EPS = 1e-6


def mamba2_mixer_step_reference(
    z_BI, xBC_BC, dt_BH, weight_CK, bias_C, A_log_H, dt_bias_H, D_H, norm_I, eps, conv_BCK1, state_BHPN
):
    """Run `hybridize.kernels.mixer_step.mamba2_mixer_step`; same arguments and result, both states are overwritten.

    Args, Returns, Raises, Source: as there, without its checks.
    """
    heads, P, N = state_BHPN.shape[1:]
    groups = (xBC_BC.shape[1] - heads * N) // (P + N)
    y_BC = causal_conv1d_step_reference(xBC_BC, weight_CK, bias_C, conv_BCK1)
    x, B, C = y_BC[:, None].split([groups * P, groups * N, heads * N], dim=-1)
    x, B, C = x.unflatten(-1, (groups, P)), B.unflatten(-1, (groups, N)), C.unflatten(-1, (heads, N))
    dt = torch.log1p(torch.exp(dt_BH + dt_bias_H))[:, None]
    y, state = ssd_reference(x, dt, -torch.exp(A_log_H), B, C, D_H, state_BHPN)
    state_BHPN.copy_(state)
    return gated_rms_norm_reference(y[:, 0].flatten(1), z_BI, norm_I, eps, P)


def gdn_mixer_step_reference(
    z_BI, qkv_BC, a_BH, b_BH, weight_CK, A_log_H, dt_bias_H, beta_max, norm_P, eps, conv_BCK1, state_BHNP
):
    """Run `hybridize.kernels.mixer_step.gdn_mixer_step`; same arguments and result, both states are overwritten.

    Args, Returns, Raises, Source: as there, without its checks.
    """
    heads, N, P = state_BHNP.shape[1:]
    groups = (qkv_BC.shape[1] - heads * N) // (P + N)
    y_BC = causal_conv1d_step_reference(qkv_BC, weight_CK, None, conv_BCK1)
    q, k, v = y_BC[:, None].split([heads * N, groups * N, groups * P], dim=-1)
    q, k, v = q.unflatten(-1, (heads, N)), k.unflatten(-1, (groups, N)), v.unflatten(-1, (groups, P))
    q, k = (t / torch.sqrt((t * t).sum(-1, keepdim=True) + L2_EPS) for t in (q, k))
    g = -torch.exp(A_log_H) * torch.log1p(torch.exp(a_BH + dt_bias_H))
    beta = beta_max / (1 + torch.exp(-b_BH))
    y, state = gdn_reference(q / N**0.5, k, v, g[:, None], beta[:, None], state_BHNP)
    state_BHNP.copy_(state)
    return gated_rms_norm_reference(y[:, 0].flatten(1), z_BI, norm_P.repeat(heads), eps, P, gate_first=False)
