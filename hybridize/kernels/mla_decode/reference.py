"""Latent decoding, row by row and head by head: the text of the mathematics and the float64 oracle."""

import torch


def mla_decode_reference(
    q_latent_BHR, q_rope_BHE, latent_BSR, rope_BSE, starts_B=None, lengths_B=None, mask_BS=None, scale=1.0
):  # fmt: skip
    """Run `hybridize.kernels.mla_decode.mla_decode` over the tokens that count alone; same arguments and results.

    Args, Returns: as `hybridize.kernels.mla_decode.mla_decode`, without its checks.
    Source: DeepSeek-V2, arXiv 2405.04434, equations 9 to 19, with one latent for all heads.
    """
    batch, heads = q_rope_BHE.shape[:2]
    out, lse = [], []
    for b in range(batch):
        first = 0 if starts_B is None else int(starts_B[b])
        last = latent_BSR.shape[1] if lengths_B is None else int(lengths_B[b])
        counted = [s for s in range(first, last) if mask_BS is None or bool(mask_BS[b, s])]
        values, keys = latent_BSR[b, counted], rope_BSE[b, counted]
        for h in range(heads):
            scores = keys @ q_rope_BHE[b, h]
            if q_latent_BHR is not None:
                scores = scores + values @ q_latent_BHR[b, h]
            weights = torch.exp(scores * scale)
            out.append((weights[:, None] * values).sum(0) / weights.sum())
            lse.append(weights.sum().log())
    return torch.stack(out).unflatten(0, (batch, heads)), torch.stack(lse).view(batch, heads)
