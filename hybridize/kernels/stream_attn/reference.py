"""Sink + window attention as a masked softmax over all tokens: the text of the mathematics and the float64 oracle.

Letters: B batch, H query heads, G key/value heads, T tokens, S slots, D head width.
"""

import torch


def stream_attn_reference(q_BHTD, k_BGTD, v_BGTD, sink, window, segments_BT=None, scale=None):
    """Run `hybridize.kernels.stream_attn.stream_attn` with a dense mask; same arguments and result, no dropout.

    Args, Returns, Raises: as `hybridize.kernels.stream_attn.stream_attn`, without its checks.
    Source: Xiao et al., arXiv 2309.17453, section 3.2, with every key at its true position.
    """
    batch, heads, tokens, width = q_BHTD.shape
    pairs = heads // k_BGTD.shape[1]
    ids = torch.zeros(batch, tokens, dtype=torch.long) if segments_BT is None else segments_BT
    same = ids[:, :, None] == ids[:, None]
    # Position in the document: how many tokens of it come before.
    place = torch.tril(same, -1).sum(-1)
    ahead = place[:, :, None] - place[:, None]
    seen = same & (ahead >= 0) & ((ahead < window) | (place[:, None] < sink))
    scores = q_BHTD @ k_BGTD.repeat_interleave(pairs, dim=1).mT * (width**-0.5 if scale is None else scale)
    weights = torch.where(seen[:, None], scores, -torch.inf).softmax(-1)
    return weights @ v_BGTD.repeat_interleave(pairs, dim=1)


def stream_attn_step_reference(q_BHD, keys_BGSD, values_BGSD, counts_B=None, scale=None):
    """Run `hybridize.kernels.stream_attn.stream_attn_step` row by row; same arguments and result.

    Args, Returns, Raises: as `hybridize.kernels.stream_attn.stream_attn_step`, without its checks.
    Source: as `stream_attn_reference`.
    """
    out = []
    for row, (q_HD, keys_GSD, values_GSD) in enumerate(zip(q_BHD, keys_BGSD, values_BGSD, strict=True)):
        count = keys_GSD.shape[1] if counts_B is None else int(counts_B[row])
        q_GRD = q_HD.unflatten(0, (keys_GSD.shape[0], -1))
        scores = q_GRD @ keys_GSD[:, :count].mT * (q_HD.shape[-1] ** -0.5 if scale is None else scale)
        out.append((scores.softmax(-1) @ values_GSD[:, :count]).flatten(0, 1))
    return torch.stack(out)
