"""Some key/value heads read everything, the others sinks and a window; the cache drops what these no longer read.

DuoAttention (Xiao et al., arXiv 2410.10819) and LServe (arXiv 2502.14866). How many heads of a layer stay full is the
plan's; which ones is data, the stored `alpha` [n_kv]: 1 for a full head, 0 for a streaming one. A query head goes with the
key/value head that it reads.

While stage `gates` learns which heads stay full, every head is a mixture by its gate g in [0, 1]: g * full + (1 - g) * streaming.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hybridize.cache import SplitHeadsLayer
from hybridize.errors import ConfigError
from hybridize.families import element_bytes, head_dim
from hybridize.mixers.streaming import check_window
from hybridize.mixers.windowed import EVERYTHING, Reach, WindowedAttention


@dataclass(frozen=True, kw_only=True)
class StreamingHeads:
    """Options of attention with full and streaming heads."""

    sink_tokens: int = 128
    """First tokens that streaming heads go on seeing (DuoAttention's)."""
    window_tokens: int = 256
    """Last tokens that streaming heads see, the token itself counted (DuoAttention's)."""
    full_share: float | None = None
    """Share of the key/value heads that stay full, rounded half up; 0.5 (DuoAttention's for grouped heads) if left out."""
    full_heads: list[int] | None = None
    """Which key/value heads stay full, in place of a share; goes with the conversion's method `given`."""

    forgets = True
    has_gates: ClassVar[bool] = True
    """Whether its module has `open_choice`, `soften` and `hardened`, so that a stage can learn its gates."""

    def __post_init__(self) -> None:
        check_window(self.sink_tokens, self.window_tokens)
        if self.full_heads is not None:
            if self.full_share is not None:
                raise ConfigError("got full_share together with full_heads, expected one. Remove one")
            if len(set(self.full_heads)) != len(self.full_heads):
                raise ConfigError(f"full_heads is {self.full_heads}, expected each head once")
            return
        share = 0.5 if self.full_share is None else self.full_share
        if not 0 <= share <= 1:
            raise ConfigError(f"full_share is {share}, expected 0 to 1")
        # Settled here, so that the saved config says it.
        object.__setattr__(self, "full_share", share)

    def full_count(self, config: Any) -> int:
        """How many key/value heads stay full."""
        if self.full_heads is not None:
            return len(self.full_heads)
        assert self.full_share is not None
        return int(config.num_key_value_heads * self.full_share + 0.5)

    def build(self, config: Any, layer_idx: int) -> nn.Module:
        heads = config.num_key_value_heads
        for head in self.full_heads or ():
            if not 0 <= head < heads:
                raise ConfigError(f"full_heads has {head}, expected 0 to {heads - 1}: the base has {heads} key/value heads")
        reach = Reach(sink=self.sink_tokens, window=self.window_tokens)
        return SplitHeadsAttention(config, layer_idx, reach, self.full_count(config), self.full_heads)

    def state_bytes(self, config: Any, tokens: int) -> int:
        """2 d elements for each head and token held: all tokens for full heads, sinks and window for the others."""
        full = self.full_count(config)
        held = full * tokens + (config.num_key_value_heads - full) * min(tokens, self.sink_tokens + self.window_tokens)
        return 2 * head_dim(config) * element_bytes(config) * held


class SplitHeadsAttention(WindowedAttention):
    """The base's projections over two kinds of heads, with a cache of two parts.

    Attributes:
        full_count: how many key/value heads are full.
        given: those of the plan, None where `alpha` was chosen otherwise.
        alpha: [G] buffer in the model's dtype; the `full_count` largest are full, the lower index first among equals.
        gate: None, or the parameter [G] that takes alpha's place while it is learnt; see `soften`.
    """

    entry_kind = SplitHeadsLayer
    alpha: Tensor
    gate: nn.Parameter | None

    def __init__(self, config: Any, layer_idx: int, reach: Reach, full_count: int, given: list[int] | None):
        super().__init__(config, layer_idx, reach)
        self.full_count, self.given = full_count, given
        self.num_groups = config.num_key_value_heads
        self.register_buffer("alpha", self.gates(list(range(full_count)) if given is None else given))
        self.register_parameter("gate", None)

    def gates(self, full: list[int]) -> Tensor:
        """`alpha` of a choice of full heads, fp32 [G]."""
        return torch.tensor([float(head in full) for head in range(self.num_groups)])

    @property
    def open_choice(self) -> bool:
        """Whether there is something to learn: the plan names no heads, and neither none nor all are full."""
        return self.given is None and 0 < self.full_count < self.num_groups

    def soften(self) -> None:
        """Make every head a mixture by a gate of its own, fp32 [G], all 1 as published; for training without a cache."""
        self.gate = nn.Parameter(torch.ones(self.num_groups, device=self.alpha.device))

    def hardened(self) -> dict[str, Tensor]:
        """What the gates come to, {"alpha": [G] fp32}: 1 for the `full_count` largest within [0, 1], else 0.

        The lower index comes first among equals. The module stays as it is.
        """
        assert self.gate is not None
        order = self.gate.detach().clamp(0, 1).argsort(descending=True, stable=True)
        return {"alpha": self.gates(order[: self.full_count].tolist())}

    def parts(self) -> list[tuple[str, Reach]]:
        both = [("full_", EVERYTHING, self.full_count), ("", self.reach, self.num_groups - self.full_count)]
        return [(prefix, reach) for prefix, reach, count in both if count]

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, entry: Any, padding: Tensor | None = None, segments: Tensor | None = None
    ) -> Tensor:
        if self.gate is not None:
            return self._mixture(q, k, v, entry, padding, segments)
        order = self.alpha.argsort(descending=True, stable=True)
        groups = {"full_": order[: self.full_count], "": order[self.full_count :]}
        # [B, G, H / G, T, d]: the query heads of one key/value head lie side by side.
        queries = q.unflatten(1, (self.num_groups, -1))
        pieces = []
        for prefix, reach in self.parts():
            chosen = groups[prefix]
            one = queries.index_select(1, chosen).flatten(1, 2)
            out = self.attend_part(
                prefix, reach, one, k.index_select(1, chosen), v.index_select(1, chosen), entry, padding, segments
            )
            pieces.append(out.unflatten(1, (len(chosen), -1)))
        return torch.cat(pieces, dim=1).index_select(1, order.argsort()).flatten(1, 2)

    def _mixture(self, q: Tensor, k: Tensor, v: Tensor, entry: Any, padding: Tensor | None, segments: Tensor | None) -> Tensor:
        """gate * full + (1 - gate) * streaming, head by head, [B, H, T, d]."""
        if entry is not None:
            raise ConfigError("gates that are being learnt have no cache; run with use_cache=False")
        assert self.gate is not None
        full, near = (self.attend_part("", reach, q, k, v, None, padding, segments) for reach in (EVERYTHING, self.reach))
        gate = self.gate.repeat_interleave(q.shape[1] // self.num_groups)[:, None, None]
        return (gate * full + (1 - gate) * near).to(full.dtype)
