"""Attention over keys and values that a group of adjacent layers rebuilds from the latents of its lowest layer.

    c   = A u                               in the group's lowest layer, its owner; cached once for the whole group
    o   = A' u                              in each layer above it, of few dimensions or none; cached by that layer
    k   = RoPE(norm(B_k [c; o] + b_k))      in every layer, at every step, each token at its own position
    v   = B_v [c; o] + b_v
    out = W_o softmax(q k) v

The published factors of a token come from the keys of all the group's layers. A lower layer cannot know those above it before
it has run, so they exist for a prompt that is compressed afterwards, and decoding is not the forward pass. Here the latents
are a function of the owner's input alone: training, prefill and decode are one function. What the layers above cannot take
from it, they may cache for themselves (`own_share`). The published method has latents of keys beside latents of values; here
both are rebuilt from all that is cached, and with biases, as neither costs cache.

Letters: B batch, T new tokens, S tokens to attend to, D width of the stream, H query heads, G key/value heads, d head width.
Source: xKV (Chang et al., arXiv 2503.18893), section 3: one basis of tokens for adjacent layers, an up-projection for each.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hybridize.errors import ConfigError
from hybridize.families import element_bytes, family_of, head_dim
from hybridize.mixers.low_rank_kv import POSITION_BYTES, LatentAttention, rotated
from hybridize.mixers.memory import Memories


@dataclass(frozen=True, kw_only=True)
class XKV:
    """Options of keys and values shared by adjacent layers (xKV, arXiv 2503.18893); queries stay the base's."""

    rank: int | float | Literal["full"] = 0.25
    """Dimensions that a layer caches, in the mean over its group: a count, a share below 1 of its keys and values, or full, with
    which the layers are the base's attention."""
    own_share: float = 0.55
    """What each layer above the owner caches for itself, as a share of the rank; the shared latents are all that is left, as far
    as the width of the stream. The less a layer caches, the less of it should be its own; xKV's is 0."""
    group_layers: int = 4
    """Layers of a group. A plan forms groups of adjacent layers from the bottom up, and a group that is cut short says so."""
    reads: int | None = None
    """Index of the group's owner; None is the owner itself. A plan that leaves it out means the layers' order."""

    forgets = False
    leaves = takes = "shared latents"

    def __post_init__(self) -> None:
        if isinstance(self.rank, float) and not 0 < self.rank < 1:
            raise ConfigError(f"rank is {self.rank}, expected a share between 0 and 1, an integer >= 1, or 'full'")
        if isinstance(self.rank, int) and self.rank < 1:
            raise ConfigError(f"rank is {self.rank}, expected an integer >= 1, a share between 0 and 1, or 'full'")
        if not 0 <= self.own_share <= 1:
            raise ConfigError(f"own_share is {self.own_share}, expected a share from 0 to 1")
        if self.group_layers < 1:
            raise ConfigError(f"group_layers is {self.group_layers}, expected an integer >= 1")
        if self.reads is not None and self.reads < 0:
            raise ConfigError(f"reads is {self.reads}, expected the index of a layer, from 0")

    @staticmethod
    def settle(spec: dict[str, Any], below: list[Any], above: list[Any]) -> dict[str, Any]:
        """A layer's spec as a plan gives it, with its place in a group.

        A layer joins the group below it while that has a place left. Otherwise it owns the next one, of itself and the layers
        right above it that are given the same.

        Args:
            spec: without `reads`; options of the conversion may be among it.
            below: options of the mixers of the layers below, settled.
            above: specs of the layers above, not settled.
        """
        size = spec.get("group_layers", XKV.group_layers)
        if not isinstance(size, int):
            return spec
        top = below[-1] if below else None
        if isinstance(top, XKV):
            owner = len(below) - 1 if top.reads is None else top.reads
            group = below[owner:]
            adjacent = all(isinstance(other, XKV) and other.reads == owner for other in group[1:])
            alike = all(spec.get(name, getattr(XKV, name)) == getattr(top, name) for name in ("rank", "own_share"))
            if adjacent and alike and len(group) < top.group_layers:
                return {**spec, "reads": owner, "group_layers": top.group_layers}
        equal = next((count for count, other in enumerate(above) if other != spec), len(above))
        return {**spec, "reads": None, "group_layers": min(size, equal + 1)}

    def check_read(self, owner: "XKV") -> None:
        """Raises ConfigError for an owner of a group with other options than this layer's."""
        for name in ("rank", "own_share", "group_layers"):
            if (found := getattr(owner, name)) != (own := getattr(self, name)):
                raise ConfigError(f"which has {name} {found}, expected this layer's {own}")

    def sizes(self, config: Any) -> tuple[int, int]:
        """Dimensions of the shared latents, and of what each layer above the owner caches for itself.

        Raises:
            ConfigError: a rank above the full one.
        """
        width, layers = 2 * config.num_key_value_heads * head_dim(config), self.group_layers
        full, most = min(width, config.hidden_size), min(layers * width, config.hidden_size)
        if self.rank == "full":
            return most, full
        rank = min(max(1, round(self.rank * width)), full) if isinstance(self.rank, float) else self.rank
        if rank > full:
            raise ConfigError(f"rank is {rank}, expected at most {full}: a layer's keys and values, as far as the stream is wide")
        own = round(self.own_share * rank)
        if (shared := layers * rank - (layers - 1) * own) <= most:
            return shared, own
        # What the stream is too narrow for goes to the layers above.
        return most, (layers * rank - most) // (layers - 1)

    def width(self, config: Any) -> int:
        """Dimensions of the shared latents."""
        return self.sizes(config)[0]

    memory_width = width

    def build(self, config: Any, layer_idx: int) -> nn.Module:
        """The mixer. Raises ConfigError when the options do not fit the base."""
        return SharedLatentAttention(config, layer_idx, self)

    def state_bytes(self, config: Any, tokens: int) -> int:
        """The shared latents where this layer owns them, its own where not, and the position of every token."""
        cached = self.sizes(config)[self.reads is not None]
        return (cached * element_bytes(config) + POSITION_BYTES) * tokens


class SharedLatentAttention(LatentAttention):
    """The module that stands where `self_attn` was.

    Parameters: q_proj, o_proj, q_norm and k_norm as in the base; down [r, D], which makes what this layer caches, and which a
    layer without latents of its own has not; k_up and v_up [G d, R] over the shared latents, then its own, with biases.
    """

    def __init__(self, config: Any, layer_idx: int, options: XKV):
        super().__init__(config, layer_idx)
        self.reads = options.reads
        self.shared, self.own = options.sizes(config)
        if self.reads is None:
            self.own = 0
        if cached := self.shared if self.reads is None else self.own:
            self.down = nn.Linear(config.hidden_size, cached, bias=False)
        keys = self.kv_heads * self.width
        self.k_up = nn.Linear(self.shared + self.own, keys)
        self.v_up = nn.Linear(self.shared + self.own, keys)
        self.o_proj = nn.Linear(self.num_heads * self.width, config.hidden_size, bias=family_of(config).has_out_bias(config))

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        position_ids: Tensor | None = None,
        memories: Memories | None = None,
        **unused: Any,
    ) -> tuple[Tensor, None]:
        """Attend; see the module docstring.

        Args:
            hidden_states: u, [B, T, D].
            position_embeddings: cos and sin of the new tokens, [1 or B, T, d].
            attention_mask: [1 or B, 1, T, S], bool (True is visible) or additive; None is plain causal.
            past_key_values: a DynamicCache or None; this layer's entry becomes a LatentLayer, whose keys are all that this
                layer caches, [B, 1, S, r], and whose values have no width.
            position_ids: positions of the new tokens, [1 or B, T]; needed with a cache.
            memories: where the owner leaves the shared latents of all tokens, [B, S, r], and the others take them.
            **unused: what other attention modules read.

        Returns:
            ([B, T, D], None).

        Raises:
            ConfigError: the owner's latents are not there or of another length, a mask of another kind (flash or flex
                attention), or a cache without positions.
        """
        memory = None
        if self.reads is not None:
            if memories is None:
                raise ConfigError(f"layer {self.layer_idx}: got no memories, expected that of layer {self.reads}")
            memory = memories.take(self.reads)
        mixed, cached = self._mixed(hidden_states, position_embeddings, attention_mask, past_key_values, position_ids, memory)
        if self.reads is None and memories is not None:
            memories.leave(self.layer_idx, cached)
        return self.o_proj(mixed), None

    def context(self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], memory: Tensor | None = None) -> Tensor:
        """What o_proj reads without a cache, [B, T, H * d]; `memory` is the owner's latents, [B, T, r], or None in it."""
        return self._mixed(hidden_states, position_embeddings, None, None, None, memory)[0]

    def latents(self, hidden_states: Tensor) -> Tensor:
        """What this layer caches of [B, T, D]: [B, T, r], of no width where it has none of its own."""
        return self.down(hidden_states) if hasattr(self, "down") else hidden_states[..., :0]

    def _mixed(
        self,
        hidden_states: Tensor,
        angles: tuple[Tensor, Tensor],
        mask: Any,
        cache: Any,
        positions: Tensor | None,
        memory: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """What o_proj reads, [B, T, H * d], and what this layer caches of all tokens, [B, S, .]. Arguments as in `forward`."""
        new = hidden_states.shape[1]
        fresh = self.latents(hidden_states)[:, None]
        cached, _, q_angles, k_angles = self._extended(cache, fresh, fresh[..., :0], angles, positions, hidden_states)
        cached = cached[:, 0]
        if memory is not None and memory.shape[1] != cached.shape[1]:
            raise ConfigError(
                f"layer {self.layer_idx}: layer {self.reads} left latents of {memory.shape[1]} tokens, expected "
                f"{cached.shape[1]}; give both layers the same cache"
            )
        latents = cached if memory is None else torch.cat([memory.to(cached), cached], dim=-1)
        k = self.k_up(latents).unflatten(-1, (self.kv_heads, self.width)).transpose(1, 2)
        q, k = rotated(self._queries(hidden_states), q_angles), rotated(self._norm("k_norm", k), k_angles)
        mask = self._mask(mask, new, k.shape[2], q)
        if new == 1 and not self.training:
            # One token: mix latents, then go up once, instead of taking every past token's values up.
            mixed = self._attend_one(q, k, latents[:, None], mask).view(q.shape[0], self.kv_heads, -1, latents.shape[-1])
            up, bias = (part.unflatten(0, (self.kv_heads, self.width)) for part in (self.v_up.weight, self.v_up.bias))
            return (mixed @ up.transpose(1, 2) + bias[:, None]).reshape(q.shape[0], 1, -1), cached
        values = self.v_up(latents).unflatten(-1, (self.kv_heads, self.width)).transpose(1, 2)
        return self._attend(q, k, values, mask).transpose(1, 2).flatten(2), cached
