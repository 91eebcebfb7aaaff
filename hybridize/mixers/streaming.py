"""Sink + window attention: each token sees the first few tokens of its document and the last `window_tokens` ones.

Keys keep their true rotary angle (unlike StreamingLLM, which re-numbers them inside the cache), so that a window wider
than the text is exactly the base's attention.
"""

from dataclasses import dataclass
from typing import Any

from torch import nn

from hybridize.errors import ConfigError
from hybridize.families import element_bytes, head_dim
from hybridize.mixers.windowed import Reach, WindowedAttention


def check_window(sink_tokens: int, window_tokens: int) -> None:
    """Raises ConfigError for a negative number of sinks or an empty window."""
    if sink_tokens < 0 or window_tokens < 1:
        raise ConfigError(f"sink_tokens is {sink_tokens} and window_tokens {window_tokens}, expected >= 0 and >= 1")


@dataclass(frozen=True, kw_only=True)
class Streaming:
    """Options of sink + window attention (Xiao et al., arXiv 2309.17453; LightTransfer, arXiv 2410.13846)."""

    sink_tokens: int = 4
    """First tokens that stay visible to all (LightTransfer's w_sink)."""
    window_tokens: int = 1020
    """Last tokens that are visible, the token itself counted (LightTransfer's w_recent)."""

    forgets = True

    def __post_init__(self) -> None:
        check_window(self.sink_tokens, self.window_tokens)

    @property
    def reach(self) -> Reach:
        return Reach(sink=self.sink_tokens, window=self.window_tokens)

    def build(self, config: Any, layer_idx: int) -> nn.Module:
        return WindowedAttention(config, layer_idx, self.reach)

    def state_bytes(self, config: Any, tokens: int) -> int:
        """Keys and values of the sinks and the window, 2 n_kv d elements each."""
        return 2 * config.num_key_value_heads * head_dim(config) * element_bytes(config) * self.reach.slots(tokens)
