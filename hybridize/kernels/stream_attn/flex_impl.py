"""Sink + window attention as PyTorch's flex_attention, compiled: what the Triton kernels have to beat.

Source: Dong et al., arXiv 2412.05496; torch.nn.attention.flex_attention.
"""

import functools

import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from hybridize.kernels.stream_attn.torch_impl import document_starts

__all__ = ["DEVICES", "refuses_stream_attn", "refuses_stream_attn_step", "stream_attn"]

# On CPUs it has no backward pass.
DEVICES = ("cuda",)
BLOCK = 128


@functools.cache
def _compiled():
    return torch.compile(flex_attention)


def stream_attn(q, k, v, sink, window, segments, scale, dropout):
    """See `hybridize.kernels.stream_attn.stream_attn`."""
    starts = None if segments is None else document_starts(segments)
    mask = block_mask(q.shape[2], sink, window, starts, q.device)
    return _compiled()(q, k, v, block_mask=mask, scale=scale, enable_gqa=True)


def refuses_stream_attn(q, k, v, sink, window, segments, scale, dropout):
    """Why these arguments are left to PyTorch, or None."""
    if dropout > 0:
        return f"got dropout {dropout}, expected 0"
    if len({one.dtype for one in (q, k, v)}) > 1 or q.dtype == torch.float64:
        return f"got {q.dtype}, {k.dtype} and {v.dtype}, expected one of fp16, bf16 and fp32 for all"
    if q.shape[2] == 0 or q.shape[-1] < 16:
        return f"got {q.shape[2]} tokens and heads {q.shape[-1]} wide, expected at least 1 and 16"
    return None


def refuses_stream_attn_step(*arguments):
    """Why a step is left to PyTorch: its mask would be made anew for every token."""
    return "flex has no decode step here"


def block_mask(tokens, sink, window, starts, device):
    """Which blocks of BLOCK x BLOCK pairs are seen in part and which whole, from their borders alone.

    Args:
        tokens: T.
        sink: first tokens of a document that all its tokens see.
        window: last tokens that a token sees.
        starts: where each token's document starts, [B, T] int64, or None.
        device: of the result.
    """
    if starts is None:
        starts = torch.zeros(1, tokens, dtype=torch.int64, device=device)
    first = torch.arange(0, tokens, BLOCK, device=device)
    last = (first + BLOCK - 1).clamp(max=tokens - 1)
    from_first, from_last = starts[:, first, None], starts[:, last, None]
    ahead_least, ahead_most = first[:, None] - last, last[:, None] - first
    # Too many blocks in part cost time alone: their pairs are looked at one by one.
    some = (first <= last[:, None]) & (last >= from_first) & ((ahead_least < window) | (first < from_last + sink))
    whole = (ahead_least >= 0) & (first >= from_last) & (ahead_most < window) & (first + BLOCK <= tokens)
    part = some & ~whole

    def seen(batch, head, row, col):
        start, ahead = starts[batch % len(starts), row], row - col
        return (ahead >= 0) & (col >= start) & ((ahead < window) | (col - start < sink))

    lists = []
    for blocks in (part, whole & some):
        blocks = blocks[:, None]
        order = blocks.to(torch.int32).argsort(dim=-1, descending=True, stable=True).to(torch.int32)
        lists += [blocks.sum(-1, dtype=torch.int32), order]
    return BlockMask.from_kv_blocks(*lists, BLOCK_SIZE=BLOCK, mask_mod=seen, seq_lengths=(tokens, tokens))
