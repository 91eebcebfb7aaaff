"""Gated memory unit: no state of its own, a gate over what an earlier recurrent layer remembers for the same tokens.

    m_t   = the memory that layer `reads` leaves, [C]
    out_t = W_out (m_t * SiLU(W_in u_t + b_in)) + b_out

The gate has a bias, which the published unit has not, so that it can start open and constant; b_out is there where the
base's o_proj has one. Only the new tokens' memory is needed, so that decoding keeps nothing for this layer.

Letters: B batch, T tokens, D width of the stream, C width of the memory, which is the base's heads times their width.
Source: Ren et al., arXiv 2507.06607, section 2 (SambaY); parameter names of microsoft/ArchScale,
lit_gpt/gated_memory_unit.py.
"""

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from hybridize.cache import StatelessLayer, own_layer
from hybridize.errors import ConfigError
from hybridize.families import family_of, head_dim
from hybridize.mixers.memory import Memories, left_by


@dataclass(frozen=True, kw_only=True)
class GMU:
    """Options of the gated memory unit."""

    reads: int
    """Index of the layer whose memory it gates; it lies below, and its mixer has a memory. A plan that leaves it out means
    the nearest such layer."""

    # What it reads cannot be rolled back.
    forgets = True
    takes = "mixture"

    def __post_init__(self) -> None:
        if self.reads < 0:
            raise ConfigError(f"reads is {self.reads}, expected the index of a layer, from 0")

    @staticmethod
    def settle(spec: dict[str, Any], below: list[Any], above: list[Any]) -> dict[str, Any]:
        """A layer's spec as a plan gives it, without `reads`, with the nearest layer below that it can read.

        Raises:
            ConfigError: there is none.
        """
        nearest = next((index for index in reversed(range(len(below))) if left_by(below[index]) == GMU.takes), None)
        if nearest is None:
            raise ConfigError(
                "reads the memory of a layer below it, and none of these has one. Put a recurrent mixer such as mamba2 there"
            )
        return {**spec, "reads": nearest}

    def build(self, config: Any, layer_idx: int) -> nn.Module:
        return GatedMemoryUnit(config, layer_idx, self)

    def width(self, config: Any) -> int:
        """Width of the memory it gates."""
        return config.num_attention_heads * head_dim(config)

    def state_bytes(self, config: Any, tokens: int) -> int:
        """Nothing: the memory is the read layer's, and is made anew with each token."""
        return 0


class GatedMemoryUnit(nn.Module):
    """The module that stands where `self_attn` was."""

    def __init__(self, config: Any, layer_idx: int, options: GMU):
        super().__init__()
        self.layer_idx, self.reads = layer_idx, options.reads
        width = options.width(config)
        self.in_proj = nn.Linear(config.hidden_size, width)
        self.out_proj = nn.Linear(width, config.hidden_size, bias=family_of(config).has_out_bias(config))

    def forward(
        self, hidden_states: Tensor, memories: Memories | None = None, past_key_values: Any = None, **unused: Any
    ) -> tuple[Tensor, None]:
        """Gate the memory; see the module docstring.

        Args:
            hidden_states: u, [B, T, D].
            memories: holds the memory of layer `reads` for the same tokens, [B, T, C].
            past_key_values: a DynamicCache or None; this layer's entry becomes a StatelessLayer, which counts tokens.
            **unused: what other attention modules read. Tokens do not meet here, so that padding needs no care.

        Returns:
            ([B, T, D], None).

        Raises:
            ConfigError: the memory is not there.
        """
        if memories is None:
            raise ConfigError(f"layer {self.layer_idx}: got no memories, expected that of layer {self.reads}")
        if past_key_values is not None:
            own_layer(past_key_values, self.layer_idx, StatelessLayer).advance(hidden_states)
        return self.out_proj(self.context(hidden_states, memories.take(self.reads))), None

    def context(self, hidden_states: Tensor, memory: Tensor) -> Tensor:
        """What out_proj reads: the gated memory, [B, T, C].

        Args:
            hidden_states: u, [B, T, D].
            memory: m, [B, T, C].
        """
        gate = F.silu(self.in_proj(hidden_states))
        return memory.to(gate) * gate
