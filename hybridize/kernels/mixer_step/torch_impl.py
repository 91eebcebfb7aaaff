"""One token through a layer as the PyTorch steps of its three parts, one after the other."""

import torch
import torch.nn.functional as F

from hybridize.kernels.chunks import compute_dtype
from hybridize.kernels.conv import causal_conv1d_step
from hybridize.kernels.gated_norm import gated_rms_norm
from hybridize.kernels.gdn import gdn_step
from hybridize.kernels.ssd import ssd_step

# Of the L2 norm of q and k, as transformers' Qwen3_5GatedDeltaNet has it.
L2_EPS = 1e-6


def mamba2_composed(
    z_BI, xBC_BC, dt_BH, weight_CK, bias_C, A_log_H, dt_bias_H, D_H, norm_I, eps, conv_BCK1, state_BHPN, impl="torch"
):
    """As `hybridize.kernels.mixer_step.mamba2_mixer_step`, unchecked; `impl` is of its parts."""
    dtype = compute_dtype(xBC_BC.dtype)
    heads, P, N = state_BHPN.shape[1:]
    groups = (xBC_BC.shape[1] - heads * N) // (P + N)
    xBC_BC = causal_conv1d_step(xBC_BC, weight_CK, bias_C, conv_BCK1, impl=impl)
    x, B, C = xBC_BC.split([groups * P, groups * N, heads * N], dim=-1)
    x, B, C = x.unflatten(-1, (groups, P)), B.unflatten(-1, (groups, N)), C.unflatten(-1, (heads, N))
    dt = F.softplus(dt_BH.to(dtype) + dt_bias_H.to(dtype))
    y = ssd_step(x, dt, -torch.exp(A_log_H.to(dtype)), B, C, D_H, state_BHPN, impl=impl)
    return gated_rms_norm(y.flatten(1), z_BI, norm_I, eps, P, impl=impl)


def gdn_composed(
    z_BI, qkv_BC, a_BH, b_BH, weight_CK, A_log_H, dt_bias_H, beta_max, norm_P, eps, conv_BCK1, state_BHNP, impl="torch"
):
    """As `hybridize.kernels.mixer_step.gdn_mixer_step`, unchecked; `impl` is of its parts."""
    dtype = compute_dtype(qkv_BC.dtype)
    heads, N, P = state_BHNP.shape[1:]
    groups = (qkv_BC.shape[1] - heads * N) // (P + N)
    y_BC = causal_conv1d_step(qkv_BC, weight_CK, None, conv_BCK1, impl=impl)
    q, k, v = y_BC.to(dtype).split([heads * N, groups * N, groups * P], dim=-1)
    q, k, v = q.unflatten(-1, (heads, N)), k.unflatten(-1, (groups, N)), v.unflatten(-1, (groups, P))
    q, k = (t * torch.rsqrt(t.square().sum(-1, keepdim=True) + L2_EPS) for t in (q, k))
    g = -torch.exp(A_log_H.to(dtype)) * F.softplus(a_BH.to(dtype) + dt_bias_H.to(dtype))
    y = gdn_step(q * N**-0.5, k, v, g, beta_max * torch.sigmoid(b_BH.to(dtype)), state_BHNP, impl=impl)
    z = z_BI.unflatten(-1, (heads, P))
    return gated_rms_norm(y.to(qkv_BC.dtype), z, norm_P, eps, P, gate_first=False, impl=impl).flatten(1)
