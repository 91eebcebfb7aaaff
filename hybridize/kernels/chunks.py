"""What the chunked forms share: the precision they compute in, and how tokens are cut into chunks and blocks of chunks.

Letters: B batch, T tokens, U chunks of a block, L tokens of a chunk, H heads, E any last dim.
"""

from typing import NamedTuple

import torch
from torch import Tensor


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of state, decay and every product: fp64 for fp64 values, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def no_autocast(tensor: Tensor) -> torch.autocast:
    """A context in which products keep the dtype they are given, whatever the autocast."""
    return torch.autocast(tensor.device.type, enabled=False)


class Block(NamedTuple):
    """Neighbouring chunks of one length, handled at once."""

    start: int
    stop: int
    chunks: int
    first_chunk: int

    def of(self, tensor_BT: Tensor) -> Tensor:
        """Cut this block's tokens out: [B, T, ...] -> [B, U, L, ...], a view."""
        return tensor_BT[:, self.start : self.stop].unflatten(1, (self.chunks, -1))

    def borders(self, segments_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Document ids of this block's tokens, [U, B, L], and of the token before each chunk, [U, B, 1].

        Before the first token there is the document of the first token.
        """
        ids = self.of(segments_BT).transpose(0, 1)
        before = segments_BT[:, max(self.start - 1, 0) : max(self.start, 1)].T[..., None]
        return ids, torch.cat([before, ids[:-1, :, -1:]])


def blocks(tokens: int, chunk: int, numbers_of_a_chunk: int, most_numbers: int) -> list[Block]:
    """Cut tokens into blocks of as many chunks as keep the largest temporary within `most_numbers`; the rest is a chunk."""
    length = min(chunk, tokens)
    full = tokens // length
    most = max(1, most_numbers // numbers_of_a_chunk)
    cuts = [(first, min(most, full - first)) for first in range(0, full, most)]
    found = [Block(first * length, (first + count) * length, count, first) for first, count in cuts]
    if tokens % length:
        found.append(Block(full * length, tokens, 1, full))
    return found
