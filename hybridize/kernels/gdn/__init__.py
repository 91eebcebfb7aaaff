"""Gated delta rule: a matrix state that decays, and is corrected where it answers a key wrongly.

    state_t = exp(g_t) state_{t-1};   state_t += beta_t k_t (v_t - k_t^T state_t)^T;   y_t = q_t^T state_t

The decay g is one number for each head (Gated DeltaNet) or one for each of its key channels (Kimi delta attention).
Heads of q, of k and of v have three independent counts, each a divisor of the number of output heads H, which is that of
beta and g. Output head h reads head h // (H/Q) of q, h // (H/G) of k, h // (H/X) of v: contiguous repetition, the pairing
of grouped-query attention.

Letters: B batch, T tokens, H output heads, Q heads of q, G heads of k, X value heads, N key dim, P value dim.
"""

import torch

from hybridize.errors import ConfigError
from hybridize.kernels._core.dispatch import fast_path
from hybridize.kernels.chunks import compute_dtype
from hybridize.kernels.gdn.torch_impl import gdn_chunked

__all__ = ["gdn", "gdn_step"]

CHUNK = 32
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def gdn(q_BTQN, k_BTGN, v_BTXP, g, beta_BTH, state_BHNP=None, segments_BT=None, chunk=None, impl="auto"):
    """Run the gated delta rule over T tokens; return outputs and the state after the last token.

    state_t = exp(g_t) state_{t-1};   state_t += beta_t k_t (v_t - k_t^T state_t)^T;   y_t = q_t^T state_t

    Args:
        q_BTQN: queries, [B, T, Q, N], fp16 | bf16 | fp32 | fp64; scaled and normalised by the caller.
        k_BTGN: keys, [B, T, G, N], dtype of q; of length 1 where beta may exceed 1 / |k|^2, else the state may grow.
        v_BTXP: values, [B, T, X, P], dtype of q.
        g: log decays, [B, T, H] or, one for each channel, [B, T, H, N], floating, <= 0.
        beta_BTH: write strengths, [B, T, H], floating, in [0, 2]; 0 with g = 0 (padding) keeps the state.
        state_BHNP: state before the first token, [B, H, N, P], fp32 (fp64 for fp64 values); None is zeros.
        segments_BT: integer document ids, [B, T], non-decreasing along T; the state is reset where the id differs from
            that of the token before. `state_BHNP` belongs to the document of the first token.
        chunk: tokens per chunk of the PyTorch path; None takes 32. It changes the speed, not the result.
        impl: "auto", "torch", "triton", or "fla" (flash-linear-attention, where installed).

    Returns:
        y_BTHP: outputs, [B, T, H, P], dtype of v.
        state_BHNP: state after the last token, fp32 (fp64 for fp64 values).

    Raises:
        ConfigError: a shape, a dtype, head counts that do not divide H, a chunk below 1, or an `impl` that cannot run.

    Numerics: products, states and decays in fp32 (fp64 for fp64 values), the triangular inverse in fp64, log decays
        summed in fp64; no factor above one. Relative RMS error against the fp64 recurrence, fp32: about 2e-7, gradients
        about 5e-7. With beta = 2 and one key for all tokens nothing dies out, and the rounding of <k, k> adds up: about
        4e-8 for each token. Triton: products and stored states in the dtype of v (fp32 in three passes of TF32), sums, the
        running state and the inverse in fp32.
    Cost: O(T L (L + N + P) + T N P) per head for chunks of L; training keeps T/L states per head
        (Triton: the inputs alone). Differentiable once, in every floating argument.
    Source: Yang, Kautz, Hatamizadeh, arXiv 2412.06464, eq. 10 and section 3.3; a decay for each channel: arXiv
        2510.26692, eq. 1; own derivation of the backward.
    """
    _check("gdn", q_BTQN, k_BTGN, v_BTXP, g, beta_BTH, state_BHNP, leading=2)
    if segments_BT is not None and (segments_BT.shape != beta_BTH.shape[:2] or segments_BT.dtype.is_floating_point):
        raise ConfigError(
            f"run gdn: segments_BT: got {segments_BT.dtype} {tuple(segments_BT.shape)}, "
            f"expected integers of shape {tuple(beta_BTH.shape[:2])}."
        )
    chunk = CHUNK if chunk is None else chunk
    if chunk < 1:
        raise ConfigError(f"run gdn: chunk: got {chunk}, expected at least 1.")
    if beta_BTH.shape[1] == 0:
        batch, _, heads = beta_BTH.shape
        y_BTHP = v_BTXP.new_zeros(batch, 0, heads, v_BTXP.shape[-1])
        if state_BHNP is not None:
            return y_BTHP, state_BHNP.clone()
        size = (batch, heads, k_BTGN.shape[-1], v_BTXP.shape[-1])
        return y_BTHP, v_BTXP.new_zeros(size, dtype=compute_dtype(v_BTXP.dtype))
    arguments = (q_BTQN, k_BTGN, v_BTXP, g, beta_BTH, state_BHNP, segments_BT, int(chunk))
    if fast := fast_path("gdn", "gdn", impl, *arguments):
        return fast(*arguments)
    return gdn_chunked(*arguments)


@torch.no_grad()
def gdn_step(q_BQN, k_BGN, v_BXP, g, beta_BH, state_BHNP, rows_B=None, impl="auto"):
    """Run the gated delta rule over one token, updating the state in place. Not differentiable.

    Args:
        q_BQN: queries, [B, Q, N], fp16 | bf16 | fp32 | fp64.
        k_BGN: keys, [B, G, N], dtype of q.
        v_BXP: values, [B, X, P], dtype of q.
        g: log decays, [B, H] or [B, H, N], <= 0.
        beta_BH: write strengths, [B, H].
        state_BHNP: state, [B, H, N, P], or [R, H, N, P] with `rows_B`, fp32 (fp64 for fp64 values); overwritten.
        rows_B: integers, [B], which state an entry of the batch has, none twice; -1 leaves the entry out: its output is
            zero, no state changes. None is entry b with state b.
        impl: "auto", "torch" or "triton".

    Returns:
        y_BHP: outputs, [B, H, P], dtype of v.

    Raises:
        ConfigError: a shape, a dtype, head counts that do not divide H, or an `impl` that cannot run.

    Numerics: as `gdn`, all in the dtype of the state.
    Cost: two reads and writes of the state (Triton: one), O(N P) per head.
    Source: as `gdn`.
    """
    if state_BHNP is None:
        raise ConfigError("run gdn_step: state_BHNP: got None, expected a tensor.")
    batch, heads = beta_BH.shape[:2]
    _check(
        "gdn_step", q_BQN, k_BGN, v_BXP, g, beta_BH, state_BHNP, leading=1, rows=None if rows_B is None else state_BHNP.shape[0]
    )
    if rows_B is not None and (tuple(rows_B.shape) != (batch,) or rows_B.dtype not in (torch.int32, torch.int64)):
        raise ConfigError(
            f"run gdn_step: rows_B: got {rows_B.dtype} {tuple(rows_B.shape)}, expected integers of shape {(batch,)}."
        )
    if fast := fast_path("gdn", "gdn_step", impl, q_BQN, k_BGN, v_BXP, g, beta_BH, state_BHNP, rows_B):
        return fast(q_BQN, k_BGN, v_BXP, g, beta_BH, state_BHNP, rows_B)
    if rows_B is not None:
        kept = (rows_B >= 0).nonzero()[:, 0]
        own, y_BHP = state_BHNP[rows_B[kept]], v_BXP.new_zeros(batch, heads, v_BXP.shape[2])
        y_BHP[kept] = gdn_step(q_BQN[kept], k_BGN[kept], v_BXP[kept], g[kept], beta_BH[kept], own, impl="torch")
        state_BHNP[rows_B[kept]] = own
        return y_BHP
    dtype = state_BHNP.dtype
    q, k, v = (t.to(dtype).repeat_interleave(heads // t.shape[1], dim=1) for t in (q_BQN, k_BGN, v_BXP))
    decay = torch.exp(g.to(dtype))
    state_BHNP.mul_(decay[..., None] if g.dim() == 3 else decay[..., None, None])
    wrong = v - (k[..., None] * state_BHNP).sum(-2)
    state_BHNP.addcmul_(k[..., None], (beta_BH.to(dtype)[..., None] * wrong)[:, :, None])
    return (q[..., None] * state_BHNP).sum(-2).to(v_BXP.dtype)


def _check(op, q, k, v, g, beta, state_BHNP, leading, rows=None):
    """Check shapes and dtypes; `leading` is the number of dims before the heads, `rows` of the state if not the batch."""
    for name, tensor, dims in (("q", q, 2), ("k", k, 2), ("v", v, 2), ("beta", beta, 1)):
        if tensor.dim() != leading + dims or tensor.shape[:leading] != v.shape[:leading]:
            raise ConfigError(
                f"run {op}: {name}: got shape {tuple(tensor.shape)}, expected "
                f"{leading + dims} dims that begin with {tuple(v.shape[:leading])} like v."
            )
        if tensor.dtype not in FLOATS or (dims == 2 and tensor.dtype != v.dtype):
            raise ConfigError(f"run {op}: {name}: got {tensor.dtype}, expected {v.dtype} like v.")
    heads = beta.shape[-1]
    counts = {name: tensor.shape[leading] for name, tensor in (("q", q), ("k", k), ("v", v))}
    if any(count < 1 or heads % count for count in counts.values()):
        raise ConfigError(f"run {op}: heads: got {counts}, expected each count to divide the {heads} of beta.")
    if q.shape[-1] != k.shape[-1]:
        raise ConfigError(f"run {op}: key dim: got {q.shape[-1]} in q and {k.shape[-1]} in k, expected one number.")
    shapes = (tuple(beta.shape), (*beta.shape, k.shape[-1]))
    if tuple(g.shape) not in shapes or g.dtype not in FLOATS:
        raise ConfigError(f"run {op}: g: got {g.dtype} {tuple(g.shape)}, expected floating {shapes[0]} or {shapes[1]}.")
    if state_BHNP is None:
        return
    shape, dtype = (v.shape[0] if rows is None else rows, heads, k.shape[-1], v.shape[-1]), compute_dtype(v.dtype)
    if tuple(state_BHNP.shape) != shape or state_BHNP.dtype != dtype:
        raise ConfigError(f"run {op}: state_BHNP: got {state_BHNP.dtype} {tuple(state_BHNP.shape)}, expected {dtype} {shape}.")
