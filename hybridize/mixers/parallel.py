"""Windowed attention beside a recurrent branch in one layer, both reading the same input.

    out = a * Attention_window(x) + r * Recurrent(x)

a and r weigh each channel of the stream; a starts at 1 and r at 0, where the layer is streaming attention bit for bit (and,
with a window as long as the text, the base). The gradient reaches r at once and the branch as soon as r has moved.
Hymba (arXiv 2411.13676, equation 3) means two normed outputs with weights for each channel; Falcon-H1 (arXiv 2507.22448)
adds the two with a number each. Norms are left out here, as they would not let the layer start as the base.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hybridize.cache import BranchedLayer, own_layer
from hybridize.errors import ConfigError
from hybridize.mixers import MIXERS
from hybridize.mixers.streaming import Streaming
from hybridize.mixers.windowed import Reach, WindowedAttention

# Two lengths at which a mixer of one size has the same cache.
SHORT, LONG = 1, 1 << 24


@dataclass(frozen=True, kw_only=True)
class Parallel:
    """Options of windowed attention beside a recurrent branch."""

    recurrent: dict[str, Any] = field(default_factory=lambda: {"name": "mamba2"})
    """{"name": ..., **options} of the other branch: a mixer whose cache has one size. In a recipe its seed's options too."""
    sink_tokens: int = 4
    """First tokens that stay visible to the attention, as in streaming."""
    window_tokens: int = 1020
    """Last tokens that are visible to the attention, the token itself counted."""

    forgets = True
    nested: ClassVar[dict[str, str]] = {"recurrent": "recurrent_seed"}
    """Options that hold a mixer -> the conversion's option that holds its seed."""

    def __post_init__(self) -> None:
        Streaming(sink_tokens=self.sink_tokens, window_tokens=self.window_tokens)
        MIXERS.build(self.recurrent)

    def build(self, config: Any, layer_idx: int) -> nn.Module:
        branch = MIXERS.build(self.recurrent)
        if not branch.forgets or branch.state_bytes(config, SHORT) != branch.state_bytes(config, LONG):
            raise ConfigError(
                f"recurrent is {self.recurrent['name']!r}, whose cache grows with the text; expected a recurrent mixer, "
                "such as {name: mamba2}"
            )
        return ParallelMixer(config, layer_idx, self, branch)

    def state_bytes(self, config: Any, tokens: int) -> int:
        """Of both branches."""
        attention = Streaming(sink_tokens=self.sink_tokens, window_tokens=self.window_tokens)
        return sum(branch.state_bytes(config, tokens) for branch in (attention, MIXERS.build(self.recurrent)))


class ParallelMixer(WindowedAttention):
    """Streaming attention under the base's names, the other branch as `recurrent`, and a weight for each channel of either."""

    # Two branches, each behind its own projection: no one matrix tells what a token weighs.
    mixing_matrix: Any = None

    def __init__(self, config: Any, layer_idx: int, options: Parallel, branch: Any):
        super().__init__(config, layer_idx, Reach(sink=options.sink_tokens, window=options.window_tokens))
        self.recurrent = branch.build(config, layer_idx)
        self.attention_scale = nn.Parameter(torch.ones(config.hidden_size))
        self.recurrent_scale = nn.Parameter(torch.zeros(config.hidden_size))

    def reset_own_parameters(self, init: Any) -> None:
        """Attention alone."""
        init.ones_(self.attention_scale)
        init.zeros_(self.recurrent_scale)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        past_key_values: Any = None,
        padding_mask: Tensor | None = None,
        segment_ids: Tensor | None = None,
        **unused: Any,
    ) -> tuple[Tensor, None]:
        """Both branches on the same tokens; arguments and result as in WindowedAttention, the entry is a BranchedLayer."""
        entry = None if past_key_values is None else own_layer(past_key_values, self.layer_idx, BranchedLayer)
        common = {"past_key_values": entry, "padding_mask": padding_mask, "segment_ids": segment_ids}
        near = super().forward(hidden_states, position_embeddings, **common)[0]
        far = self.recurrent(hidden_states, position_embeddings=position_embeddings, **common)[0]
        if entry is not None:
            entry.advance(hidden_states)
        return self.attention_scale * near + self.recurrent_scale * far, None
