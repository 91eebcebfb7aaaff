"""State space duality (Mamba2) scan: a scalar decay per head and token, a P x N state per head.

    state_t = exp(dt_t A) state_{t-1} + dt_t x_t B_t^T,   y_t = state_t C_t + D x_t

The value heads, the heads of B and the heads of C have three independent counts, each a divisor of
the number of output heads H, which is the largest of the three. Output head h reads value head
h // (H/X), head h // (H/G) of B and head h // (H/M) of C: contiguous repetition, the pairing of
grouped-query attention.

Letters: B batch, T tokens, H output heads, X value heads, G heads of B, M heads of C, P value dim,
N state dim.
"""

import torch

from hybridize.errors import ConfigError
from hybridize.kernels._core.dispatch import fast_path
from hybridize.kernels.chunks import compute_dtype
from hybridize.kernels.ssd.torch_impl import ssd_chunked, ssd_step_torch

__all__ = ["ssd", "ssd_step"]

CHUNK_INFERENCE = 32
CHUNK_TRAINING = 64
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def ssd(
    x_BTXP,
    dt_BTH,
    A_H,
    B_BTGN,
    C_BTMN,
    D_H=None,
    state_BHPN=None,
    segments_BT=None,
    chunk=None,
    impl="auto",
):
    """Run the scan over T tokens; return outputs and the state after the last token.

    state_t = exp(dt_t A) state_{t-1} + dt_t x_t B_t^T,   y_t = state_t C_t + D x_t

    Args:
        x_BTXP: values, [B, T, X, P], fp16 | bf16 | fp32 | fp64.
        dt_BTH: step sizes after softplus, [B, T, H], floating; 0 (padding) keeps the state.
        A_H: decay rates, [H], floating, <= 0.
        B_BTGN: input maps, [B, T, G, N], dtype of x.
        C_BTMN: output maps, [B, T, M, N], dtype of x.
        D_H: skip weights, [H], floating, or None for no skip.
        state_BHPN: state before the first token, [B, H, P, N], fp32 (fp64 for fp64 values);
            None is zeros.
        segments_BT: integer document ids, [B, T], non-decreasing along T; the state is reset where
            the id differs from that of the token before. `state_BHPN` belongs to the document of
            the first token.
        chunk: tokens per chunk; None takes 32 without and 64 with gradients. It changes the speed,
            not the result. Triton takes its own.
        impl: "auto" (Triton on CUDA where its kernels take these inputs), "torch" or "triton".

    Returns:
        y_BTHP: outputs, [B, T, H, P], dtype of x.
        state_BHPN: state after the last token, fp32 (fp64 for fp64 values).

    Raises:
        ConfigError: a shape, a dtype, head counts that do not divide H, a chunk below 1, or an
            `impl` that cannot run.

    Numerics: products, states, decays in fp32 (fp64 for fp64 values), log decays summed in fp64.
        Relative RMS error against the fp64 recurrence, fp32: about 1e-7, gradients about 3e-7.
        Triton multiplies half precision operands as they are, sums in fp32, and keeps the states
        between chunks in the dtype of x.
    Cost: O(T L (P + N) + T P N) per head for chunks of L; training keeps T/L states per head.
        Differentiable once, in every floating argument.
    Source: Dao, Gu, arXiv 2405.21060, eq. 2 and section 6; own derivation of the backward.
    """
    _check_heads("ssd", x_BTXP, dt_BTH, A_H, B_BTGN, C_BTMN, D_H, leading=2)
    _check_state("ssd", x_BTXP, dt_BTH, B_BTGN, state_BHPN)
    if segments_BT is not None:
        if segments_BT.shape != dt_BTH.shape[:2] or segments_BT.dtype.is_floating_point:
            raise ConfigError(
                f"run ssd: segments_BT: got {segments_BT.dtype} {tuple(segments_BT.shape)}, "
                f"expected integers of shape {tuple(dt_BTH.shape[:2])}."
            )
    inputs = [t for t in (x_BTXP, dt_BTH, A_H, B_BTGN, C_BTMN, D_H, state_BHPN) if t is not None]
    if chunk is None:
        training = torch.is_grad_enabled() and any(t.requires_grad for t in inputs)
        chunk = CHUNK_TRAINING if training else CHUNK_INFERENCE
    if chunk < 1:
        raise ConfigError(f"run ssd: chunk: got {chunk}, expected at least 1.")
    if dt_BTH.shape[1] == 0:
        return _no_tokens(x_BTXP, dt_BTH, B_BTGN, state_BHPN)
    arguments = (x_BTXP, dt_BTH, A_H, B_BTGN, C_BTMN, D_H, state_BHPN, segments_BT, int(chunk))
    if fast := fast_path("ssd", "ssd", impl, *arguments):
        return fast(*arguments)
    return ssd_chunked(*arguments)


@torch.no_grad()
def ssd_step(x_BXP, dt_BH, A_H, B_BGN, C_BMN, D_H, state_BHPN, rows_B=None, impl="auto"):
    """Run the scan over one token, updating the state in place. Not differentiable.

    Args:
        x_BXP: values, [B, X, P], fp16 | bf16 | fp32 | fp64.
        dt_BH: step sizes after softplus, [B, H].
        A_H: decay rates, [H], <= 0.
        B_BGN: input maps, [B, G, N], dtype of x.
        C_BMN: output maps, [B, M, N], dtype of x.
        D_H: skip weights, [H], or None.
        state_BHPN: state, [B, H, P, N], fp32 (fp64 for fp64 values); overwritten.
        rows_B: integers, [B]: which row of `state_BHPN` each row of the batch goes on with, each row at
            most once. The state then has any number of rows. -1 leaves a row of the batch out: its outputs
            are 0, and no state changes. None is one state for each row of the batch, in order.
        impl: "auto" (Triton on CUDA where its kernel takes these inputs), "torch" or "triton".

    Returns:
        y_BHP: outputs, [B, H, P], dtype of x.

    Raises:
        ConfigError: a shape, a dtype, head counts that do not divide H, an `impl` that cannot run; on the CPU
            also rows that there are not, or twice. On a GPU that would wait for it: such a row gives NaN.

    Numerics: as `ssd`.
    Cost: one read and write of the state, O(P N) per head.
    Source: Dao, Gu, arXiv 2405.21060, eq. 2.
    """
    _check_heads("ssd_step", x_BXP, dt_BH, A_H, B_BGN, C_BMN, D_H, leading=1)
    _check_rows(x_BXP, state_BHPN, rows_B)
    rows = x_BXP.shape[0] if rows_B is None or state_BHPN is None else state_BHPN.shape[0]
    _check_state("ssd_step", x_BXP, dt_BH, B_BGN, state_BHPN, required=True, rows=rows)
    arguments = (x_BXP, dt_BH, A_H, B_BGN, C_BMN, D_H, state_BHPN, rows_B)
    if fast := fast_path("ssd", "ssd_step", impl, *arguments):
        return fast(*arguments)
    return ssd_step_torch(*arguments)


def _no_tokens(x_BTXP, dt_BTH, B_BTGN, state_BHPN):
    batch, _, heads = dt_BTH.shape
    P, N = x_BTXP.shape[-1], B_BTGN.shape[-1]
    y_BTHP = x_BTXP.new_zeros(batch, 0, heads, P)
    if state_BHPN is None:
        return y_BTHP, x_BTXP.new_zeros(batch, heads, P, N, dtype=compute_dtype(x_BTXP.dtype))
    return y_BTHP, state_BHPN.clone()


def _check_heads(op, x, dt, A_H, B, C, D_H, leading):
    """Check everything but the state; `leading` is the number of dims before the heads."""
    for name, tensor, dims in (("x", x, 2), ("B", B, 2), ("C", C, 2), ("dt", dt, 1)):
        if tensor.dim() != leading + dims or tensor.shape[:leading] != x.shape[:leading]:
            raise ConfigError(
                f"run {op}: {name}: got shape {tuple(tensor.shape)}, expected "
                f"{leading + dims} dims that begin with {tuple(x.shape[:leading])} like x."
            )
        if tensor.dtype not in FLOATS or (dims == 2 and tensor.dtype != x.dtype):
            raise ConfigError(f"run {op}: {name}: got {tensor.dtype}, expected {x.dtype} like x.")
    counts = {name: tensor.shape[leading] for name, tensor in (("x", x), ("B", B), ("C", C))}
    heads = max(counts.values())
    if any(count < 1 or heads % count for count in counts.values()):
        raise ConfigError(f"run {op}: heads: got {counts}, expected each count to divide the largest.")
    if B.shape[-1] != C.shape[-1]:
        raise ConfigError(f"run {op}: state dim: got {B.shape[-1]} in B and {C.shape[-1]} in C, expected one number.")
    for name, tensor in (
        ("dt", dt[(0,) * leading] if dt.numel() else A_H),
        ("A_H", A_H),
        ("D_H", D_H),
    ):
        if tensor is not None and tuple(tensor.shape) != (heads,):
            raise ConfigError(
                f"run {op}: {name}: got heads {tuple(tensor.shape)}, expected ({heads},), the largest head count of {counts}."
            )


def _check_rows(x, state_BHPN, rows_B):
    if rows_B is None:
        return
    if tuple(rows_B.shape) != tuple(x.shape[:1]) or rows_B.dtype not in (torch.int32, torch.int64):
        raise ConfigError(
            f"run ssd_step: rows_B: got {rows_B.dtype} {tuple(rows_B.shape)}, "
            f"expected int32 or int64 of shape {tuple(x.shape[:1])}."
        )
    if rows_B.device.type == "cpu" and not torch.compiler.is_compiling():
        kept = [row for row in rows_B.tolist() if row != -1]
        states = 0 if state_BHPN is None else state_BHPN.shape[0]
        if len(set(kept)) < len(kept) or any(not 0 <= row < states for row in kept):
            raise ConfigError(f"run ssd_step: rows_B: got {rows_B.tolist()}, expected rows of {states} states, each once, or -1.")


def _check_state(op, x, dt, B, state_BHPN, required=False, rows=None):
    if state_BHPN is None and not required:
        return
    shape = (x.shape[0] if rows is None else rows, dt.shape[-1], x.shape[-1], B.shape[-1])
    dtype = compute_dtype(x.dtype)
    if state_BHPN is None or tuple(state_BHPN.shape) != shape or state_BHPN.dtype != dtype:
        got = "None" if state_BHPN is None else f"{state_BHPN.dtype} {tuple(state_BHPN.shape)}"
        raise ConfigError(f"run {op}: state_BHPN: got {got}, expected {dtype} {shape}.")
