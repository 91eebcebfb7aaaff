"""`gdn` by flash-linear-attention, where it is installed: fp16 or bf16 on CUDA, one decay a head, one document a row.

Its heads of q and of k are one number and those of v are the output heads, so shared heads are repeated here.
"""

import torch
from fla.ops.gated_delta_rule import chunk_gated_delta_rule  # pyright: ignore[reportMissingImports]

__all__ = ["DEVICES", "gdn", "refuses_gdn"]

DEVICES = ("cuda",)


def refuses_gdn(q_BTQN, k_BTGN, v_BTXP, g, beta_BTH, state_BHNP, segments_BT, chunk):
    """Why `gdn` cannot run these, or None."""
    if v_BTXP.dtype not in (torch.float16, torch.bfloat16):
        return f"got {v_BTXP.dtype}, expected fp16 or bf16"
    if g.dim() == 4:
        return "got a decay for each channel, expected one a head"
    if segments_BT is not None:
        return "got segments_BT, expected one document a row"
    return None


def gdn(q_BTQN, k_BTGN, v_BTXP, g, beta_BTH, state_BHNP, segments_BT, chunk):
    """As `hybridize.kernels.gdn.gdn`, which has checked the arguments.

    Source: fla-org/flash-linear-attention, fla/ops/gated_delta_rule/chunk.py.
    """
    heads = beta_BTH.shape[2]

    def repeated(tensor_BThE, to):
        return tensor_BThE.repeat_interleave(to // tensor_BThE.shape[2], dim=2)

    if q_BTQN.shape[2] != k_BTGN.shape[2]:
        q_BTQN, k_BTGN = repeated(q_BTQN, heads), repeated(k_BTGN, heads)
    return chunk_gated_delta_rule(
        q_BTQN, k_BTGN, repeated(v_BTXP, heads), g, beta_BTH, scale=1.0, initial_state=state_BHNP, output_final_state=True
    )  # fmt: skip
