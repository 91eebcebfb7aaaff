"""One token through a whole recurrent layer between its projections: convolution, state, gated norm.

    Mamba2:          x, B, C = SiLU(conv([x | B | C]));   dt = softplus(dt + dt_bias);   one step of `ssd` with A = -exp(A_log)
                     out = RMSNorm_head(y * SiLU(z)) * norm
    gated delta net: q, k, v = SiLU(conv([q | k | v]));   q, k of length 1, q / sqrt(N);   one step of `gdn` with
                     g = -exp(A_log) softplus(a + dt_bias), beta = beta_max sigmoid(b);   out = RMSNorm_head(y) * norm * SiLU(z)

The state of the convolution and the matrix state are overwritten. As one launch it needs one read and one write of each, and
nothing between the three parts goes through memory.

Letters: B batch, I = H P, C channels of the convolution, K taps, K1 = K - 1, H output heads, G groups of heads that share two of
the three parts of C, P value dim, N key (state) dim.
"""

import torch

from hybridize.errors import ConfigError
from hybridize.kernels._core.dispatch import fast_path
from hybridize.kernels.chunks import compute_dtype
from hybridize.kernels.mixer_step.torch_impl import gdn_composed, mamba2_composed

__all__ = ["gdn_mixer_step", "mamba2_mixer_step"]


@torch.no_grad()
def mamba2_mixer_step(
    z_BI, xBC_BC, dt_BH, weight_CK, bias_C, A_log_H, dt_bias_H, D_H, norm_I, eps, conv_BCK1, state_BHPN, impl="auto"
):
    """Mix one token as Mamba2 does between in_proj and out_proj, updating both states in place. Not differentiable.

    Args:
        z_BI: gate before its SiLU, [B, H P], dtype of xBC.
        xBC_BC: inputs of the convolution, [B, C], C = G P + G N + H N, fp16 | bf16 | fp32 | fp64: x, B, C side by side.
        dt_BH: step sizes before dt_bias and softplus, [B, H], floating.
        weight_CK: taps, oldest input first, [C, K], floating, K >= 1.
        bias_C: of the convolution, [C], floating, or None.
        A_log_H: log of the decay rates, [H], floating.
        dt_bias_H: [H], floating.
        D_H: skip weights, [H], floating.
        norm_I: scale of the norm, [H P], floating.
        eps: of the norm, > 0.
        conv_BCK1: the last K - 1 inputs, [B, C, K - 1], dtype of xBC; overwritten.
        state_BHPN: state, [B, H, P, N], fp32 (fp64 for fp64 inputs); overwritten.
        impl: "auto", "torch" or "triton" (2 to 4 taps, no fp64; of heads with more than 16384 numbers as separate launches).

    Returns:
        out_BI: what out_proj reads, [B, H P], dtype of xBC.

    Raises:
        ConfigError: a shape, a dtype, or an `impl` that cannot run here.

    Numerics: in fp32 (fp64 for fp64 inputs); in PyTorch each of the three parts rounds its result to the dtype of xBC, as one
        launch it is rounded once at the end.
    Cost: one read and write of the states.
    Source: Dao, Gu, arXiv 2405.21060, section 7; transformers models/granitemoehybrid.
    """
    given = {"A_log_H": A_log_H, "dt_bias_H": dt_bias_H, "D_H": D_H}
    _check(
        "mamba2_mixer_step", z_BI, xBC_BC, {"dt_BH": dt_BH}, given, weight_CK, bias_C, conv_BCK1, state_BHPN, state_BHPN.shape[2:]
    )
    _check_shape("mamba2_mixer_step", "norm_I", norm_I, z_BI.shape[1:])
    inputs = (z_BI, xBC_BC, dt_BH, weight_CK, bias_C, A_log_H, dt_bias_H, D_H, norm_I, eps, conv_BCK1, state_BHPN)
    return (fast_path("mixer_step", "mamba2_mixer_step", impl, *inputs) or mamba2_composed)(*inputs)


@torch.no_grad()
def gdn_mixer_step(
    z_BI, qkv_BC, a_BH, b_BH, weight_CK, A_log_H, dt_bias_H, beta_max, norm_P, eps, conv_BCK1, state_BHNP, impl="auto"
):
    """Mix one token as a gated delta net does between its projections, updating both states in place. Not differentiable.

    Args:
        z_BI: gate before its SiLU, [B, H P], dtype of qkv.
        qkv_BC: inputs of the convolution, [B, C], C = H N + G N + G P, fp16 | bf16 | fp32 | fp64: q, k, v side by side.
        a_BH: what the decay is made of, [B, H], floating.
        b_BH: logit of the write strength, [B, H], floating.
        weight_CK: taps, oldest input first, [C, K], floating, K >= 1; no bias.
        A_log_H: log of the decay rates, [H], floating.
        dt_bias_H: [H], floating.
        beta_max: 1 or 2, upper end of the write strength.
        norm_P: scale of the norm, one for all heads, [P], floating.
        eps: of the norm, > 0.
        conv_BCK1: the last K - 1 inputs, [B, C, K - 1], dtype of qkv; overwritten.
        state_BHNP: state, [B, H, N, P], fp32 (fp64 for fp64 inputs); overwritten.
        impl: as in `mamba2_mixer_step`.

    Returns:
        out_BI: what out_proj reads, [B, H P], dtype of qkv.

    Raises:
        ConfigError: a shape, a dtype, or an `impl` that cannot run here.

    Numerics, Cost: as `mamba2_mixer_step`.
    Source: Yang, Kautz, Hatamizadeh, arXiv 2412.06464, section 3.4; transformers models/qwen3_5.
    """
    given = {"A_log_H": A_log_H, "dt_bias_H": dt_bias_H}
    N, P = state_BHNP.shape[2:]
    _check("gdn_mixer_step", z_BI, qkv_BC, {"a_BH": a_BH, "b_BH": b_BH}, given, weight_CK, None, conv_BCK1, state_BHNP, (P, N))
    _check_shape("gdn_mixer_step", "norm_P", norm_P, (P,))
    inputs = (z_BI, qkv_BC, a_BH, b_BH, weight_CK, A_log_H, dt_bias_H, beta_max, norm_P, eps, conv_BCK1, state_BHNP)
    return (fast_path("mixer_step", "gdn_mixer_step", impl, *inputs) or gdn_composed)(*inputs)


def _check(op, z_BI, x_BC, of_tokens, of_heads, weight_CK, bias_C, conv_BCK1, state, dims):
    """Check what both functions have; `dims` is (P, N)."""
    (batch, channels), heads, (P, N) = x_BC.shape, state.shape[1], dims
    shared = channels - heads * N
    if shared <= 0 or shared % (P + N) or heads % (shared // (P + N)):
        raise ConfigError(
            f"run {op}: channels: got {channels}, expected {heads} N + G (N + P) with N {N}, P {P} and G a divisor of {heads}."
        )
    if weight_CK.dim() != 2 or weight_CK.shape[0] != channels or weight_CK.shape[1] < 1:
        raise ConfigError(f"run {op}: weight_CK: got shape {tuple(weight_CK.shape)}, expected ({channels}, K) with K >= 1.")
    for name, tensor in of_tokens.items():
        _check_shape(op, name, tensor, (batch, heads))
    for name, tensor in of_heads.items():
        _check_shape(op, name, tensor, (heads,))
    if bias_C is not None:
        _check_shape(op, "bias_C", bias_C, (channels,))
    _check_shape(op, "z", z_BI, (batch, heads * P), x_BC.dtype)
    _check_shape(op, "conv_BCK1", conv_BCK1, (batch, channels, weight_CK.shape[1] - 1), x_BC.dtype)
    _check_shape(op, "state", state, (batch, *state.shape[1:]), compute_dtype(x_BC.dtype))


def _check_shape(op, name, tensor, shape, dtype=None):
    if tuple(tensor.shape) != tuple(shape) or tensor.dtype != (dtype or tensor.dtype):
        raise ConfigError(
            f"run {op}: {name}: got {tensor.dtype} {tuple(tensor.shape)}, expected {dtype or 'floating'} {tuple(shape)}."
        )
