"""Block-sparse attention: the first tokens, the last ones, and every n-th block of those between.

A query at position t sees the token at position p <= t of the same document when

    p < sink_tokens,  or  t - p < window_tokens,  or  (p // block_tokens) mod stride_blocks = 0.

Positions count from the document's first token, so block 0 is always seen. With stride_blocks 1, or a window as wide as
the text, this is the base's attention.

LongGen (Ge et al., arXiv 2410.01485) tries sinks with a window and strided blocks as two variants of its sparse layers; here
one rule holds all three parts, sinks and window are counted in tokens and not in blocks, and every head of a layer sees
the same blocks, so that one cache serves them all.
"""

from dataclasses import dataclass
from typing import Any

from torch import nn

from hybridize.errors import ConfigError
from hybridize.families import element_bytes, head_dim
from hybridize.mixers.streaming import check_window
from hybridize.mixers.windowed import Reach, WindowedAttention


@dataclass(frozen=True, kw_only=True)
class BlockSparse:
    """Options of sink + window + strided blocks (after LongGen, arXiv 2410.01485)."""

    sink_tokens: int = 4
    """First tokens that stay visible to all."""
    window_tokens: int = 1024
    """Last tokens that are visible, the token itself counted."""
    block_tokens: int = 64
    """Tokens of a block."""
    stride_blocks: int = 16
    """Blocks 0, n, 2n, ... stay visible; 1 is every block."""

    forgets = True

    def __post_init__(self) -> None:
        check_window(self.sink_tokens, self.window_tokens)
        if self.block_tokens < 1 or self.stride_blocks < 1:
            raise ConfigError(f"block_tokens is {self.block_tokens} and stride_blocks {self.stride_blocks}, expected both >= 1")

    @property
    def reach(self) -> Reach:
        return Reach(sink=self.sink_tokens, window=self.window_tokens, block=self.block_tokens, stride=self.stride_blocks)

    def build(self, config: Any, layer_idx: int) -> nn.Module:
        return WindowedAttention(config, layer_idx, self.reach)

    def state_bytes(self, config: Any, tokens: int) -> int:
        """Keys and values of the window and of what lasts before it, 2 n_kv d elements each; grows by 1/stride_blocks."""
        return 2 * config.num_key_value_heads * head_dim(config) * element_bytes(config) * self.reach.slots(tokens)
