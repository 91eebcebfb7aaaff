"""Gated linear attention: a decay for each key channel and token (or one a head), an N x P state per state head.

    state_t = diag(exp(log_decay_t)) state_{t-1} + k_t v_t^T,   y_t = state_t^T q_t

Query head h reads state h // (H/S): contiguous repetition, the pairing of grouped-query attention.

Letters: B batch, T tokens, H query heads, S state heads, N key dim, P value dim, E decays of a head (N or 1).
"""

import torch

from hybridize.errors import ConfigError
from hybridize.kernels._core.dispatch import fast_path
from hybridize.kernels.chunks import compute_dtype
from hybridize.kernels.gla.torch_impl import gla_chunked

__all__ = ["gla", "gla_step"]

CHUNK_INFERENCE = 32
CHUNK_TRAINING = 64  # a chunk leaves a state to the backward
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def gla(q_BTHN, k_BTSN, v_BTSP, log_decay_BTSE, state_BSNP=None, segments_BT=None, chunk=None, impl="auto"):
    """Run the recurrence over T tokens; return outputs and the state after the last token.

    state_t = diag(exp(log_decay_t)) state_{t-1} + k_t v_t^T,   y_t = state_t^T q_t

    Args:
        q_BTHN: queries, [B, T, H, N], fp16 | bf16 | fp32 | fp64; no scale is applied.
        k_BTSN: keys, [B, T, S, N], S a divisor of H; 0 (padding) adds nothing to the state.
        v_BTSP: values, [B, T, S, P].
        log_decay_BTSE: log decays, [B, T, S, N] or [B, T, S, 1], floating, <= 0; 0 (padding) keeps the state.
        state_BSNP: state before the first token, [B, S, N, P], fp32 (fp64 for fp64 values); None is zeros.
        segments_BT: integer document ids, [B, T], non-decreasing along T; the state is reset where the id differs from
            that of the token before. `state_BSNP` belongs to the document of the first token.
        chunk: tokens per chunk; None takes 32 without and 64 with gradients. It changes the speed, not the result.
        impl: "auto" or "torch", which are the same here.

    Returns:
        y_BTHP: outputs, [B, T, H, P], dtype of v.
        state_BSNP: state after the last token, fp32 (fp64 for fp64 values).

    Raises:
        ConfigError: a shape, a dtype, head counts that do not divide, a chunk below 1, or an `impl` that there is not.

    Numerics: products, states, decays in fp32 (fp64 for fp64 values), log decays summed in fp64; no factor above one.
    Cost: O(T L (N + P) + T N P) per head for chunks of L; training keeps T/L states. Differentiable once, in every
        floating argument.
    Source: Yang et al., arXiv 2312.06635, eq. 3.
    """
    _check("gla", q_BTHN, k_BTSN, v_BTSP, log_decay_BTSE, state_BSNP, leading=2)
    if segments_BT is not None and (segments_BT.shape != q_BTHN.shape[:2] or segments_BT.dtype.is_floating_point):
        raise ConfigError(
            f"run gla: segments_BT: got {segments_BT.dtype} {tuple(segments_BT.shape)}, "
            f"expected integers of shape {tuple(q_BTHN.shape[:2])}."
        )
    arguments = (q_BTHN, k_BTSN, v_BTSP, log_decay_BTSE, state_BSNP, segments_BT)
    if fast := fast_path("gla", "gla", impl, *arguments):
        return fast(*arguments)
    if chunk is None:
        tracked = (t for t in (q_BTHN, k_BTSN, v_BTSP, log_decay_BTSE, state_BSNP) if t is not None)
        training = torch.is_grad_enabled() and any(t.requires_grad for t in tracked)
        chunk = CHUNK_TRAINING if training else CHUNK_INFERENCE
    if chunk < 1:
        raise ConfigError(f"run gla: chunk: got {chunk}, expected at least 1.")
    (batch, tokens, heads, width), values = q_BTHN.shape, v_BTSP.shape[-1]
    if tokens == 0:
        empty = v_BTSP.new_zeros(batch, 0, heads, values)
        if state_BSNP is not None:
            return empty, state_BSNP.clone()
        return empty, v_BTSP.new_zeros(batch, k_BTSN.shape[2], width, values, dtype=compute_dtype(v_BTSP.dtype))
    return gla_chunked(q_BTHN, k_BTSN, v_BTSP, log_decay_BTSE, state_BSNP, segments_BT, int(chunk))


@torch.no_grad()
def gla_step(q_BHN, k_BSN, v_BSP, log_decay_BSE, state_BSNP):
    """Run the recurrence over one token, updating the state in place. Not differentiable.

    Args:
        q_BHN: queries, [B, H, N], fp16 | bf16 | fp32 | fp64.
        k_BSN: keys, [B, S, N].
        v_BSP: values, [B, S, P].
        log_decay_BSE: log decays, [B, S, N] or [B, S, 1], <= 0.
        state_BSNP: state, [B, S, N, P], fp32 (fp64 for fp64 values); overwritten.

    Returns:
        y_BHP: outputs, [B, H, P], dtype of v.

    Raises:
        ConfigError: a shape, a dtype, or head counts that do not divide.

    Numerics: as `gla`.
    Cost: one read and write of the state, O(N P) per state head and one read per query head.
    Source: Yang et al., arXiv 2312.06635, eq. 3.
    """
    _check("gla_step", q_BHN, k_BSN, v_BSP, log_decay_BSE, state_BSNP, leading=1, required=True)
    dtype = state_BSNP.dtype
    state_BSNP.mul_(log_decay_BSE.to(dtype).exp()[..., None])
    state_BSNP.addcmul_(k_BSN.to(dtype)[..., None], v_BSP.to(dtype)[:, :, None])
    with torch.autocast(v_BSP.device.type, enabled=False):
        q_BSRN = q_BHN.to(dtype).unflatten(1, (k_BSN.shape[1], -1))
        return (q_BSRN @ state_BSNP).flatten(1, 2).to(v_BSP.dtype)


def _check(op, q, k, v, log_decay, state, leading, required=False):
    """Check shapes and dtypes; `leading` is the number of dims before the heads."""
    for name, tensor in (("q", q), ("k", k), ("v", v), ("log_decay", log_decay)):
        if tensor.dim() != leading + 2 or tensor.shape[:leading] != q.shape[:leading]:
            raise ConfigError(
                f"run {op}: {name}: got shape {tuple(tensor.shape)}, expected "
                f"{leading + 2} dims that begin with {tuple(q.shape[:leading])} like q."
            )
        if tensor.dtype not in FLOATS or (tensor.dtype == torch.float64) != (v.dtype == torch.float64):
            raise ConfigError(f"run {op}: {name}: got {tensor.dtype}, expected a floating dtype, fp64 only with fp64 values.")
    heads, states, width = q.shape[leading], k.shape[leading], k.shape[-1]
    if states < 1 or heads % states or v.shape[leading] != states or log_decay.shape[leading] != states:
        raise ConfigError(
            f"run {op}: heads: got {heads} of q, {states} of k, {v.shape[leading]} of v, {log_decay.shape[leading]} of decay; "
            "expected as many of k, v and log_decay, a divisor of q's."
        )
    if q.shape[-1] != width or log_decay.shape[-1] not in (1, width):
        raise ConfigError(
            f"run {op}: key dim: got {q.shape[-1]} in q, {width} in k, {log_decay.shape[-1]} in log_decay; "
            "expected one number, or 1 in log_decay."
        )
    if state is None and not required:
        return
    shape, dtype = (q.shape[0], states, width, v.shape[-1]), compute_dtype(v.dtype)
    if state is None or tuple(state.shape) != shape or state.dtype != dtype:
        got = "None" if state is None else f"{state.dtype} {tuple(state.shape)}"
        raise ConfigError(f"run {op}: state_BSNP: got {got}, expected {dtype} {shape}.")
