"""The base's own attention, kept as it is."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from hybridize.families import element_bytes, head_dim


@dataclass(frozen=True, kw_only=True)
class Attention:
    """Keep the base's attention; its cache grows with every token."""

    forgets = False

    def build(self, config: Any, layer_idx: int) -> nn.Module | None:
        """None: the module that is already there stays."""
        return None

    def state_bytes(self, config: Any, tokens: int) -> int:
        """Keys and values of every token, 2 n_kv d bytes each."""
        return 2 * config.num_key_value_heads * head_dim(config) * element_bytes(config) * tokens
