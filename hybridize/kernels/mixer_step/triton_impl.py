"""One token through a layer in one launch: a program for each batch row and group of heads.

Heads of a group share two of the three parts of the convolution's channels. Were a program a head, one head's program would
write the shared channels of the convolution's state while another still reads them. So a program takes a whole group, one
head after the other: every channel and every state belongs to one program, and both are overwritten in place. (A ring of K
slots would allow a program a head; it would keep K inputs in place of K - 1, and a counter beside them.) With as many groups as
heads, which is how layers with expanded heads are, that is a program a head. The next head's state is on its way while this
one's is worked on.

Inside a program several threads may hold the same element: a barrier stands between the last load and the first store.

Letters: B batch, C channels, K taps, H output heads, G groups, P value dim, N key dim.
"""

import torch
import triton
import triton.language as tl

from hybridize.kernels._core.launch import DEVICES, empty, launch, power_of_2, tiles
from hybridize.kernels._core.library import registered
from hybridize.kernels._core.tl_utils import silu, softplus
from hybridize.kernels.mixer_step.torch_impl import gdn_composed, mamba2_composed

__all__ = ["DEVICES", "gdn_mixer_step", "mamba2_mixer_step", "refuses_gdn_mixer_step", "refuses_mamba2_mixer_step"]

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
TAPS = (2, 3, 4)
# Numbers of a head's state, which lies in the registers of a program; above it the three parts are launches of their own.
MOST_STATE = 16384
# As in torch_impl.py.
L2_EPS = tl.constexpr(1e-6)


@triton.jit
def convolved(x, weight, bias, conv, c, real, w_c, w_k, conv_c, conv_k, K: tl.constexpr):
    """SiLU(conv) of the channels `c` in fp32, and what their state becomes: its second and third input, and the new one."""
    new = tl.load(x + c, mask=real, other=0.0)
    out = new.to(tl.float32) * tl.load(weight + c * w_c + (K - 1) * w_k, mask=real, other=0.0).to(tl.float32)
    if bias is not None:
        out += tl.load(bias + c, mask=real, other=0.0).to(tl.float32)
    first = tl.load(conv + c * conv_c, mask=real, other=0.0)
    out += first.to(tl.float32) * tl.load(weight + c * w_c, mask=real, other=0.0).to(tl.float32)
    second, third = first, first
    if K > 2:
        second = tl.load(conv + c * conv_c + conv_k, mask=real, other=0.0)
        out += second.to(tl.float32) * tl.load(weight + c * w_c + w_k, mask=real, other=0.0).to(tl.float32)
    if K > 3:
        third = tl.load(conv + c * conv_c + 2 * conv_k, mask=real, other=0.0)
        out += third.to(tl.float32) * tl.load(weight + c * w_c + 2 * w_k, mask=real, other=0.0).to(tl.float32)
    return silu(out), second, third, new


@triton.jit
def shift(conv, c, real, conv_c, conv_k, second, third, new, K: tl.constexpr):
    """Write the state of the channels `c` after this token."""
    if K > 2:
        tl.store(conv + c * conv_c, second, mask=real)
    if K > 3:
        tl.store(conv + c * conv_c + conv_k, third, mask=real)
    tl.store(conv + c * conv_c + (K - 2) * conv_k, new, mask=real)


@triton.jit
def mamba2_token(
    z, xBC, dt, weight, bias, A_log, dt_bias, D, norm, conv, state, out,
    z_b, x_b, dt_b, w_c, w_k, conv_b, conv_c, conv_k, state_b, state_h, state_p, state_n, eps,
    G: tl.constexpr, R: tl.constexpr, P: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    group, b = tl.program_id(0), tl.cast(tl.program_id(1), tl.int64)
    p, n = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    in_p, in_n = p < P, n < N
    square = in_p[:, None] & in_n[None, :]
    xBC += b * x_b
    conv += b * conv_b
    state += b * state_b + group * R * state_h + p[:, None] * state_p + n[None, :] * state_n
    at_x, at_B = group * P + p, G * P + group * N + n
    x, x2, x3, x_new = convolved(xBC, weight, bias, conv, at_x, in_p, w_c, w_k, conv_c, conv_k, K)  # pyright: ignore[reportGeneralTypeIssues]
    B, B2, B3, B_new = convolved(xBC, weight, bias, conv, at_B, in_n, w_c, w_k, conv_c, conv_k, K)
    if AHEAD:
        after = tl.load(state, mask=square, other=0.0)
    tl.debug_barrier()
    shift(conv, at_x, in_p, conv_c, conv_k, x2, x3, x_new, K)
    shift(conv, at_B, in_n, conv_c, conv_k, B2, B3, B_new, K)
    for r in range(R):
        head = group * R + r
        at_C = G * (P + N) + head * N + n
        C, C2, C3, C_new = convolved(xBC, weight, bias, conv, at_C, in_n, w_c, w_k, conv_c, conv_k, K)
        if AHEAD:
            here = after
            after = tl.load(state + state_h, mask=square & (r + 1 < R), other=0.0)
        else:
            here = tl.load(state, mask=square, other=0.0)
        step = softplus(tl.load(dt + b * dt_b + head).to(tl.float32) + tl.load(dt_bias + head).to(tl.float32))
        decay = tl.exp(-step * tl.exp(tl.load(A_log + head).to(tl.float32)))
        gate = silu(tl.load(z + b * z_b + head * P + p, mask=in_p, other=0.0).to(tl.float32))
        tl.debug_barrier()
        here = here * decay + (step * x)[:, None] * B[None, :]
        tl.store(state, here, mask=square)
        shift(conv, at_C, in_n, conv_c, conv_k, C2, C3, C_new, K)
        y = (tl.sum(here * C[None, :], axis=1) + tl.load(D + head).to(tl.float32) * x) * gate
        y *= tl.rsqrt(tl.sum(y * y, axis=0) / P + eps)
        y *= tl.load(norm + head * P + p, mask=in_p, other=0.0).to(tl.float32)
        tl.store(out + (b * G * R + head) * P + p, y.to(out.dtype.element_ty), mask=in_p)
        state += state_h


@triton.jit
def gdn_token(
    z, qkv, a, b_logit, weight, A_log, dt_bias, norm, conv, state, out,
    z_b, x_b, a_b, logit_b, w_c, w_k, conv_b, conv_c, conv_k, state_b, state_h, state_n, state_p, eps, beta_max,
    G: tl.constexpr, R: tl.constexpr, P: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    group, b = tl.program_id(0), tl.cast(tl.program_id(1), tl.int64)
    p, n = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    in_p, in_n = p < P, n < N
    square = in_n[:, None] & in_p[None, :]
    qkv += b * x_b
    conv += b * conv_b
    state += b * state_b + group * R * state_h + n[:, None] * state_n + p[None, :] * state_p
    at_k, at_v = G * R * N + group * N + n, G * R * N + G * N + group * P + p
    k, k2, k3, k_new = convolved(qkv, weight, None, conv, at_k, in_n, w_c, w_k, conv_c, conv_k, K)  # pyright: ignore[reportGeneralTypeIssues]
    v, v2, v3, v_new = convolved(qkv, weight, None, conv, at_v, in_p, w_c, w_k, conv_c, conv_k, K)
    if AHEAD:
        after = tl.load(state, mask=square, other=0.0)
    scale = tl.load(norm + p, mask=in_p, other=0.0).to(tl.float32)
    tl.debug_barrier()
    shift(conv, at_k, in_n, conv_c, conv_k, k2, k3, k_new, K)
    shift(conv, at_v, in_p, conv_c, conv_k, v2, v3, v_new, K)
    k *= tl.rsqrt(tl.sum(k * k, axis=0) + L2_EPS)
    for r in range(R):
        head = group * R + r
        at_q = head * N + n
        q, q2, q3, q_new = convolved(qkv, weight, None, conv, at_q, in_n, w_c, w_k, conv_c, conv_k, K)
        if AHEAD:
            here = after
            after = tl.load(state + state_h, mask=square & (r + 1 < R), other=0.0)
        else:
            here = tl.load(state, mask=square, other=0.0)
        step = softplus(tl.load(a + b * a_b + head).to(tl.float32) + tl.load(dt_bias + head).to(tl.float32))
        decay = tl.exp(-step * tl.exp(tl.load(A_log + head).to(tl.float32)))
        beta = beta_max * tl.sigmoid(tl.load(b_logit + b * logit_b + head).to(tl.float32))
        gate = silu(tl.load(z + b * z_b + head * P + p, mask=in_p, other=0.0).to(tl.float32))
        tl.debug_barrier()
        here = here * decay
        wrong = v - tl.sum(k[:, None] * here, axis=0)
        here += k[:, None] * (beta * wrong)[None, :]
        tl.store(state, here, mask=square)
        shift(conv, at_q, in_n, conv_c, conv_k, q2, q3, q_new, K)
        q *= tl.rsqrt((tl.sum(q * q, axis=0) + L2_EPS) * N)
        y = tl.sum(q[:, None] * here, axis=0)
        y *= tl.rsqrt(tl.sum(y * y, axis=0) / P + eps) * scale * gate
        tl.store(out + (b * G * R + head) * P + p, y.to(out.dtype.element_ty), mask=in_p)
        state += state_h


def refuses_mamba2_mixer_step(
    z_BI, xBC_BC, dt_BH, weight_CK, bias_C, A_log_H, dt_bias_H, D_H, norm_I, eps, conv_BCK1, state_BHPN
):
    """Why these cannot be run, or None."""
    return _refuses(weight_CK, (z_BI, xBC_BC, dt_BH, weight_CK, bias_C, A_log_H, dt_bias_H, D_H, norm_I))


def refuses_gdn_mixer_step(z_BI, qkv_BC, a_BH, b_BH, weight_CK, A_log_H, dt_bias_H, beta_max, norm_P, eps, conv_BCK1, state_BHNP):
    """Why these cannot be run, or None."""
    return _refuses(weight_CK, (z_BI, qkv_BC, a_BH, b_BH, weight_CK, A_log_H, dt_bias_H, norm_P))


def _refuses(weight_CK, others):
    for tensor in others:
        if tensor is not None and tensor.dtype not in FLOATS:
            return f"got {tensor.dtype}, expected fp16, bf16 or fp32"
    if weight_CK.shape[1] not in TAPS:
        return f"got {weight_CK.shape[1]} taps, expected 2 to 4"
    return None


def _flat(tensor):
    """With the last dim side by side in memory."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def _sizes(channels, heads, P, N):
    groups = (channels - heads * N) // (P + N)
    return {"G": groups, "R": heads // groups, "P": P, "N": N, "BLOCK_P": power_of_2(P), "BLOCK_N": power_of_2(N)}


def _mamba2(z_BI, xBC_BC, dt_BH, weight_CK, bias_C, A_log_H, dt_bias_H, D_H, norm_I, eps, conv_BCK1, state_BHPN):
    (batch, channels), (heads, P, N) = xBC_BC.shape, state_BHPN.shape[1:]
    out_BI = empty((batch, heads * P), xBC_BC.dtype, xBC_BC.device)
    z, x, dt = (_flat(t) for t in (z_BI, xBC_BC, dt_BH))
    sizes = _sizes(channels, heads, P, N)
    launch(
        mamba2_token, (sizes["G"], batch),
        z, x, dt, weight_CK, bias_C, A_log_H, dt_bias_H, D_H, norm_I, conv_BCK1, state_BHPN, out_BI,
        z.stride(0), x.stride(0), dt.stride(0), *weight_CK.stride(), *conv_BCK1.stride(), *state_BHPN.stride(), eps,
        K=weight_CK.shape[1], **sizes,
        **tiles("mamba2_token", x.device, TILE=sizes["BLOCK_P"] * sizes["BLOCK_N"], R=sizes["R"]),
    )  # fmt: skip
    return out_BI


def _gdn(z_BI, qkv_BC, a_BH, b_BH, weight_CK, A_log_H, dt_bias_H, beta_max, norm_P, eps, conv_BCK1, state_BHNP):
    (batch, channels), (heads, N, P) = qkv_BC.shape, state_BHNP.shape[1:]
    out_BI = empty((batch, heads * P), qkv_BC.dtype, qkv_BC.device)
    z, x, a, b = (_flat(t) for t in (z_BI, qkv_BC, a_BH, b_BH))
    sizes = _sizes(channels, heads, P, N)
    launch(
        gdn_token, (sizes["G"], batch),
        z, x, a, b, weight_CK, A_log_H, dt_bias_H, norm_P, conv_BCK1, state_BHNP, out_BI,
        z.stride(0), x.stride(0), a.stride(0), b.stride(0), *weight_CK.stride(), *conv_BCK1.stride(), *state_BHNP.stride(),
        eps, float(beta_max), K=weight_CK.shape[1], **sizes,
        **tiles("gdn_token", x.device, TILE=sizes["BLOCK_P"] * sizes["BLOCK_N"], R=sizes["R"]),
    )  # fmt: skip
    return out_BI


def _like_z(z_BI, *rest):
    return z_BI.new_empty(z_BI.shape)


MAMBA2 = registered(
    "mamba2_mixer_step",
    "(Tensor z, Tensor xBC, Tensor dt, Tensor weight, Tensor? bias, Tensor A_log, Tensor dt_bias, Tensor D, Tensor norm, "
    "float eps, Tensor(a!) conv, Tensor(b!) state) -> Tensor",
    _mamba2,
    _like_z,
)
GDN = registered(
    "gdn_mixer_step",
    "(Tensor z, Tensor qkv, Tensor a, Tensor b, Tensor weight, Tensor A_log, Tensor dt_bias, float beta_max, Tensor norm, "
    "float eps, Tensor(a!) conv, Tensor(b!) state) -> Tensor",
    _gdn,
    _like_z,
)


def _fits(state):
    return power_of_2(state.shape[2]) * power_of_2(state.shape[3]) <= MOST_STATE


def mamba2_mixer_step(z_BI, xBC_BC, dt_BH, weight_CK, bias_C, A_log_H, dt_bias_H, D_H, norm_I, eps, conv_BCK1, state_BHPN):
    """As `hybridize.kernels.mixer_step.mamba2_mixer_step`, unchecked."""
    inputs = (z_BI, xBC_BC, dt_BH, weight_CK, bias_C, A_log_H, dt_bias_H, D_H, norm_I, float(eps), conv_BCK1, state_BHPN)
    return MAMBA2(*inputs) if _fits(state_BHPN) else mamba2_composed(*inputs, impl="auto")


def gdn_mixer_step(z_BI, qkv_BC, a_BH, b_BH, weight_CK, A_log_H, dt_bias_H, beta_max, norm_P, eps, conv_BCK1, state_BHNP):
    """As `hybridize.kernels.mixer_step.gdn_mixer_step`, unchecked."""
    inputs = (z_BI, qkv_BC, a_BH, b_BH, weight_CK, A_log_H, dt_bias_H, float(beta_max), norm_P, float(eps), conv_BCK1, state_BHNP)
    return GDN(*inputs) if _fits(state_BHNP) else gdn_composed(*inputs, impl="auto")
