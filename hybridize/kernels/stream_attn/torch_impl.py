"""Attention over part of the past as PyTorch's own attention on blocks of queries: masks stay small however long the text is.

Letters: B batch, H query heads, G key/value heads, T tokens, D head width.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Queries handled at once: the mask and scores of a block stay small. Of a short window no more than it holds, or most scores of a
# block are masked; but no fewer than the smallest.
QUERY_BLOCK, SMALLEST_BLOCK = 256, 64


def document_starts(segments_BT: Tensor) -> Tensor:
    """Index at which each token's document starts, [B, T] int64: the running maximum of the borders."""
    index = torch.arange(segments_BT.shape[1], device=segments_BT.device)
    borders = torch.ones_like(segments_BT, dtype=torch.bool)
    borders[:, 1:] = segments_BT[:, 1:] != segments_BT[:, :-1]
    return torch.where(borders, index, 0).cummax(dim=1).values


def block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    lasts: Callable[[Any], Any],
    earlier: Callable[[int], Tensor],
    segments: Tensor | None,
    attend: Callable[[Tensor, Tensor, Tensor, Tensor | None, bool], Tensor],
) -> Tensor:
    """Blocks of queries against what lasts and the slice of keys that their windows reach, [B, H, T, E].

    Args:
        q: [B, H, T, D].
        k: [B, G, T, D].
        v: [B, G, T, E].
        window: last tokens that a query sees, itself counted.
        lasts: position in the document -> whether the token stays visible to all that follow it.
        earlier: count -> positions of those that last among the first `count` tokens of a document.
        segments: document ids [B, T], or None for one document.
        attend: (q, k, v, mask or None, whether each query sees the keys up to its own place) -> [B, H, T, E].
    """
    new = q.shape[2]
    if segments is None and new <= window:
        return attend(q, k, v, None, True)
    index = torch.arange(new, device=q.device)
    lasting = lasts(index[None] if segments is None else index - document_starts(segments))
    pieces, block = [], min(max(window, SMALLEST_BLOCK), QUERY_BLOCK)
    for start in range(0, new, block):
        stop = min(start + block, new)
        first = max(0, start - window + 1)
        keep = torch.cat([earlier(first), index[first:stop]]) if segments is None else index[:stop]
        distance = index[start:stop, None] - keep[None]
        seen = (distance >= 0)[None] & ((distance < window)[None] | lasting[:, None, keep])
        if segments is not None:
            seen = seen & (segments[:, start:stop, None] == segments[:, None, keep])
        pieces.append(attend(q[:, :, start:stop], k[:, :, keep], v[:, :, keep], seen[:, None], False))
    return torch.cat(pieces, dim=2)
