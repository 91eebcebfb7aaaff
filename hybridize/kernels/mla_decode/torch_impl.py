"""Latent decoding as two products whose rows are heads: the cache is not repeated for each of them."""

import torch


def mla_decode_torch(q_latent_BHR, q_rope_BHE, latent_BSR, rope_BSE, starts_B, lengths_B, mask_BS, scale):
    """Run `hybridize.kernels.mla_decode.mla_decode` in PyTorch; same arguments and results. Differentiable.

    Args, Returns: as `hybridize.kernels.mla_decode.mla_decode`, without its checks.
    Source: as there.
    """
    dtype = torch.promote_types(q_rope_BHE.dtype, torch.float32)
    latent, rope = latent_BSR.to(dtype), rope_BSE.to(dtype)
    seen = _seen(latent_BSR, starts_B, lengths_B, mask_BS)
    if seen is not None:
        # A weight of zero times NaN would be NaN.
        latent = latent.masked_fill(~seen[..., None], 0.0)
    scores = q_rope_BHE.to(dtype) @ rope.mT
    if q_latent_BHR is not None:
        scores = scores + q_latent_BHR.to(dtype) @ latent.mT
    scores = scores * scale
    if seen is not None:
        scores = scores.masked_fill(~seen[:, None], -torch.inf)
    # One exponential an element; a row without tokens has no softmax.
    top, place = scores.max(-1, keepdim=True)
    weights = scores.softmax(-1)
    lse = (top - weights.gather(-1, place).log()).masked_fill(top == -torch.inf, -torch.inf).squeeze(-1)
    if seen is not None:
        weights = weights.masked_fill(~seen[:, None], 0.0)
    return (weights @ latent).to(q_rope_BHE.dtype), lse


def _seen(latent_BSR, starts_B, lengths_B, mask_BS):
    """[B, S], True where a token counts; None where all do."""
    place, seen = torch.arange(latent_BSR.shape[1], device=latent_BSR.device), mask_BS
    for bound in (
        None if starts_B is None else place >= starts_B[:, None],
        None if lengths_B is None else place < lengths_B[:, None],
    ):
        if bound is not None:
            seen = bound if seen is None else seen & bound
    return seen
