"""Attention over low-rank keys and values: the cache holds latents of a few dimensions for each group of heads.

    c_k = A_k u, c_v = A_v u                        one pair for each group of key/value heads; this is what is cached
    k   = RoPE(norm(B_k c_k + b_k))                 rebuilt at every step, each token at its own position
    out = W_o concat_h(sum_s p_h,ts c_v,s) + b_o    the values' up-projection is part of W_o

The latent of a key lies before its bias, its norm and its rotary embedding, so all three stay exact. At full rank this is the
base's attention.

Letters: B batch, T new tokens, S tokens to attend to, H query heads, G key/value heads, C groups, d head width, r rank.
Source: Palu (Chang et al., arXiv 2407.21118), section 3: group-head low-rank decomposition and fused value up-projection.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import rotate_half

from hybridize.cache import LatentLayer, own_layer
from hybridize.errors import ConfigError
from hybridize.families import element_bytes, family_of, head_dim
from hybridize.mixers.windowed import one_hot

DEFAULT_GROUP = 4
POSITION_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class LowRankKV:
    """Options of low-rank keys and values (Palu, arXiv 2407.21118); queries stay the base's."""

    rank: int | float | Literal["full"] = 0.5
    """Mean latent dimensions of a group's keys and values: a count, a share of the group's width below 1, or full."""
    v_share: float = 0.7
    """Share of the 2 * rank dimensions that values get, as far as their full rank; keys have the rest. Palu's is 0.5."""
    group_heads: int | None = None
    """Key/value heads that share a latent; None is the largest divisor of their number up to 4 (Palu's G-LRD)."""

    forgets = False

    def __post_init__(self) -> None:
        if isinstance(self.rank, float) and not 0 < self.rank < 1:
            raise ConfigError(f"rank is {self.rank}, expected a share between 0 and 1, an integer >= 1, or 'full'")
        if isinstance(self.rank, int) and self.rank < 1:
            raise ConfigError(f"rank is {self.rank}, expected an integer >= 1, a share between 0 and 1, or 'full'")
        if not 0 < self.v_share < 1:
            raise ConfigError(f"v_share is {self.v_share}, expected a share between 0 and 1")
        if self.group_heads is not None and self.group_heads < 1:
            raise ConfigError(f"group_heads is {self.group_heads}, expected an integer >= 1")

    def heads_per_group(self, config: Any) -> int:
        """Key/value heads in a group. Raises ConfigError when `group_heads` does not divide the base's."""
        heads = config.num_key_value_heads
        if self.group_heads is None:
            return next(size for size in range(min(DEFAULT_GROUP, heads), 0, -1) if heads % size == 0)
        if heads % self.group_heads:
            raise ConfigError(f"group_heads is {self.group_heads}, expected a divisor of the base's {heads} key/value heads")
        return self.group_heads

    def ranks(self, config: Any) -> tuple[int, int]:
        """Latent dimensions of a group's keys and values. Raises ConfigError for one above the full rank."""
        heads = self.heads_per_group(config)
        full = min(heads * head_dim(config), config.hidden_size)
        rank = full if self.rank == "full" else max(1, round(self.rank * full)) if isinstance(self.rank, float) else self.rank
        if rank > full:
            raise ConfigError(f"rank is {rank}, expected at most {full}: {heads} heads of {head_dim(config)} to a group")
        # What one of the two cannot use, being at its full rank or at least one, the other gets.
        values = min(max(round(2 * rank * self.v_share), 2 * rank - full, 1), full, 2 * rank - 1)
        return 2 * rank - values, values

    def build(self, config: Any, layer_idx: int) -> nn.Module:
        """The mixer. Raises ConfigError when the options do not fit the base."""
        return LowRankAttention(config, layer_idx, self.heads_per_group(config), *self.ranks(config))

    def state_bytes(self, config: Any, tokens: int) -> int:
        """Both latents and the position of every token."""
        groups = config.num_key_value_heads // self.heads_per_group(config)
        return (groups * sum(self.ranks(config)) * element_bytes(config) + POSITION_BYTES) * tokens


class GroupedUp(nn.Module):
    """Key latents back to keys: one matrix for each group, `weight` [C, width, r], and the base's key `bias` [G * d]."""

    def __init__(self, groups: int, width: int, rank: int, bias: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(groups, width, rank))
        self.bias = nn.Parameter(torch.empty(groups * width)) if bias else None
        with torch.no_grad():
            nn.init.normal_(self.weight, std=rank**-0.5)
            if self.bias is not None:
                self.bias.zero_()

    def reset_own_parameters(self, init: Any) -> None:
        """For a layer that is not seeded: keys as large as their latents."""
        init.normal_(self.weight, std=self.weight.shape[-1] ** -0.5)
        if self.bias is not None:
            init.zeros_(self.bias)

    def forward(self, latents: Tensor) -> Tensor:
        """[B, C, S, r] to [B, C, S, width]."""
        keys = latents @ self.weight.transpose(1, 2)
        return keys if self.bias is None else keys + self.bias.view(self.weight.shape[0], 1, -1)


class LatentAttention(nn.Module):
    """What mixers over latents share: the base's queries, keys rotated at their own positions, the mask, the cache entry.

    Parameters: q_proj as in the base, q_norm and k_norm where it has them.
    """

    q_proj: nn.Linear

    def __init__(self, config: Any, layer_idx: int):
        super().__init__()
        family = family_of(config)
        self.config, self.layer_idx = config, layer_idx
        self.width, self.num_heads, self.kv_heads = head_dim(config), config.num_attention_heads, config.num_key_value_heads
        self.dropout = float(config.attention_dropout)
        for name, child in family.attention(config, layer_idx).named_children():
            if name in ("q_proj", "q_norm", "k_norm"):
                self.add_module(name, child)
        # Made on first use and no submodule: it has no weights, and must be neither cast nor left on the meta device.
        self._rotary: list[Any] = []

    def _queries(self, hidden_states: Tensor) -> Tensor:
        """[B, H, T, d], normed where the base does, before their rotary embedding."""
        return self._norm("q_norm", self.q_proj(hidden_states).unflatten(-1, (self.num_heads, self.width))).transpose(1, 2)

    def _extended(
        self, cache: Any, keys: Tensor, values: Tensor, angles: tuple[Tensor, Tensor], positions: Tensor | None, like: Tensor
    ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Latents of all tokens, [B, C, S, r] each, and the angles of the queries and of all keys.

        Args:
            cache: a DynamicCache or None; this layer's entry is a LatentLayer.
            keys: latents of the new tokens, [B, C, T, r].
            values: theirs, [B, C, T, r'].
            angles: cos and sin of the new tokens, [B, T, d].
            positions: of the new tokens, [B, T] or [1, T]; needed with a cache.
            like: a tensor of the model's dtype and device.
        """
        if cache is None:
            return keys, values, angles, angles
        if positions is None:
            raise ConfigError(f"layer {self.layer_idx} got a cache and no position_ids; call the model, or hand the positions on")
        # Made in the first call, so that a compiled step finds it.
        self._embedding(like)
        new = keys.shape[2]
        keys, values, places = own_layer(cache, self.layer_idx, LatentLayer).extend(keys, values, positions)
        if places.shape[1] == new:
            return keys, values, angles, angles
        # Queries have theirs from the same module, so that both are rotated alike whatever the model was cast to.
        return keys, values, self._angles(like, positions), self._angles(like, places)

    def _norm(self, name: str, heads: Tensor) -> Tensor:
        return getattr(self, name)(heads) if hasattr(self, name) else heads

    def _angles(self, like: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [B, S, d] of all tokens, by the family's own rotary embedding and its scaling."""
        return self._embedding(like)(like, positions)

    def _embedding(self, like: Tensor) -> Any:
        if not self._rotary:
            with torch.device(like.device):
                self._rotary.append(family_of(self.config).rotary(self.config))
        rotary = self._rotary[0]
        return rotary if rotary.inv_freq.device == like.device else rotary.to(like.device)

    def _mask(self, mask: Any, new: int, total: int, q: Tensor) -> Tensor | None:
        """The mask for scaled_dot_product_attention; None is causal over equal lengths, or one token that sees all."""
        if mask is None:
            if new in (1, total):
                return None
            return torch.ones(new, total, dtype=torch.bool, device=q.device).tril(total - new)
        if not isinstance(mask, Tensor) or mask.dim() != 4:
            raise ConfigError(
                f"attention over latents got a {type(mask).__name__} as mask, expected one of four dimensions. "
                "Load with attn_implementation='sdpa'"
            )
        return mask[..., :total]

    def _attend(self, q: Tensor, k: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """[B, H, T, r] of values [B, C, S, r] by scaled_dot_product_attention, each group's repeated for its heads."""
        if values.shape[1] != self.kv_heads:
            values = values.repeat_interleave(self.kv_heads // values.shape[1], dim=1)
        return F.scaled_dot_product_attention(
            q, k, values, attn_mask=mask, dropout_p=self.dropout if self.training else 0.0,
            is_causal=mask is None and q.shape[2] > 1, scale=self.width**-0.5, enable_gqa=True,
        )  # fmt: skip

    def _attend_one(self, q: Tensor, k: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """[B, H, 1, r] for one new token: each group's latents are read once for all its heads, and never copied."""
        grouped = q.view(q.shape[0], self.kv_heads, -1, self.width) * self.width**-0.5
        scores = (grouped @ k.transpose(2, 3)).view(q.shape[0], self.num_heads, 1, -1)
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        if mask is not None:
            # A finite floor: a row that sees nothing (padding) becomes an average instead of not-a-number.
            scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min) if mask.dtype == torch.bool else scores + mask
        weights = scores.softmax(dim=-1).to(values.dtype)
        return (weights.view(q.shape[0], values.shape[1], -1, scores.shape[-1]) @ values).view(*q.shape[:3], -1)


class LowRankAttention(LatentAttention):
    """The module that stands where `self_attn` was.

    Parameters: q_proj and o_proj's bias as in the base (a value bias goes into it, since attention weights sum to one), q_norm
    and k_norm where it has them; k_down [C r, D], k_up, v_down [C r, D]; o_proj [D, H r], head by head.
    """

    def __init__(self, config: Any, layer_idx: int, heads_per_group: int, rank: int, v_rank: int):
        super().__init__(config, layer_idx)
        family = family_of(config)
        self.groups, self.rank, self.v_rank = self.kv_heads // heads_per_group, rank, v_rank
        biased = family.has_qkv_bias(config)
        self.k_down = nn.Linear(config.hidden_size, self.groups * rank, bias=False)
        self.k_up = GroupedUp(self.groups, heads_per_group * self.width, rank, biased)
        self.v_down = nn.Linear(config.hidden_size, self.groups * v_rank, bias=False)
        self.o_proj = nn.Linear(self.num_heads * v_rank, config.hidden_size, bias=biased or family.has_out_bias(config))

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        position_ids: Tensor | None = None,
        **unused: Any,
    ) -> tuple[Tensor, None]:
        """Attend; see the module docstring.

        Args:
            hidden_states: u, [B, T, D].
            position_embeddings: cos and sin of the new tokens, [1 or B, T, d].
            attention_mask: [1 or B, 1, T, S], bool (True is visible) or additive; None is plain causal.
            past_key_values: a DynamicCache or None; this layer's entry becomes a LatentLayer.
            position_ids: positions of the new tokens, [1 or B, T]; needed with a cache.
            **unused: what other attention modules read.

        Returns:
            ([B, T, D], None).

        Raises:
            ConfigError: a mask of another kind (flash or flex attention), or a cache without positions.
        """
        return self.o_proj(self.context(hidden_states, position_embeddings, attention_mask, past_key_values, position_ids)), None

    def context(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """What o_proj reads: each head's mixture of value latents, [B, T, H * r]. Arguments as in `forward`."""
        batch, new, _ = hidden_states.shape
        latents, values = self._latents(hidden_states)
        latents, values, q_angles, k_angles = self._extended(
            past_key_values, latents, values, position_embeddings, position_ids, hidden_states
        )
        q, k = rotated(self._queries(hidden_states), q_angles), self._keys(latents, k_angles)
        mask = self._mask(attention_mask, new, k.shape[2], q)
        attend = self._attend_one if new == 1 and not self.training else self._attend
        return attend(q, k, values, mask).transpose(1, 2).reshape(batch, new, -1)

    def mixing_matrix(self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> Tensor:
        """What token s's values weigh in each head's output at token t, [B, H, T, T]. Arguments as in `forward`, no cache."""
        latents, values = self._latents(hidden_states)
        q, k = rotated(self._queries(hidden_states), position_embeddings), self._keys(latents, position_embeddings)
        return self._attend(q, k, one_hot(values), None)

    def _latents(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Latents of keys [B, C, T, r] and of values [B, C, T, r']."""
        latents = self.k_down(hidden_states).unflatten(-1, (self.groups, self.rank))
        values = self.v_down(hidden_states).unflatten(-1, (self.groups, self.v_rank))
        return latents.transpose(1, 2), values.transpose(1, 2)

    def _keys(self, latents: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
        """Keys with their angle, [B, G, S, d], of latents [B, C, S, r]."""
        k = self.k_up(latents).unflatten(-1, (-1, self.width)).transpose(2, 3).flatten(1, 2)
        return rotated(self._norm("k_norm", k), angles)


def rotated(heads: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """[B, n, T, d] with its rotary embedding, as transformers' apply_rotary_pos_emb does to queries and keys alike."""
    cos, sin = (angle.unsqueeze(1) for angle in angles)
    return heads * cos + rotate_half(heads) * sin
