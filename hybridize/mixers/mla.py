"""Multi-head latent attention: every token leaves one latent and one rotary key behind, shared by all heads.

    q_h = W_q u, split into a plain part and a rotary part
    c, k_r = W_a u                                    c perhaps RMS-normed; the cache holds c and the rotated k_r
    k_h, v_h = W_b,h c
    score_h = (q_plain,h . k_h + q_rot,h . k_r) / sqrt(d)

Parameter names and order are those of transformers' DeepseekV3Attention without a query rank. Its score divides by
sqrt(plain + rotary width): export gives it the factor that is left, and nothing else changes but rows' order. Three things it
lacks are options here: no norm on the latent, rotary pairs at frequencies of their own, and the base's q/k-norms.

YaRN lengthens cos and sin so that every score is larger by one factor. A plain part has neither, and gets the factor itself:
it is a temperature of the whole softmax (DeepSeek-V2, section 3.1.4, has it beside 1 / sqrt(d)), not a weight of one part.

Many tokens expand the latents to heads; few tokens after a long past are absorbed: queries go into the latent space.

Letters: B batch, T new tokens, S tokens to attend to, H query heads, d head width, r latent width, R rotary width.
Source: DeepSeek-V2, arXiv 2405.04434, section 2.1; Meng et al. (TransMLA), arXiv 2502.07864.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybridize.errors import ConfigError
from hybridize.families import element_bytes, family_of, head_dim
from hybridize.kernels._core.dispatch import fast_path
from hybridize.mixers.mamba2 import HeadNorm
from hybridize.mixers.windowed import one_hot

# The native class's latent norm has this eps whatever the model's is.
LATENT_EPS = 1e-6


@dataclass(frozen=True, kw_only=True)
class MLA:
    """Options of latent attention; KV bytes of a token are (kv_rank + rope_dim) elements."""

    kv_rank: int | Literal["full"] | None = None
    """Width of the latent. None: half of n_kv * d. "full": all that rope_dim leaves of keys and values."""
    rope_dim: int | Literal["full"] | None = None
    """Width of the rotary key, even. None: head_dim. "full": n_kv * d, each head's frequencies; the latent holds values alone."""
    latent_norm: Literal["none", "rms"] = "none"
    """RMS norm on the latent, as the native class always has it."""
    frequencies: Literal["chosen", "uniform"] = "chosen"
    """`chosen`: each rotary pair has a frequency found by the seed. `uniform`: evenly strided over the base's, as the native
    class has them; rope_dim divides head_dim or is a multiple of it."""
    qk_norm: Literal["keep", "fold"] = "keep"
    """Of bases with q/k-norms. `keep`: keys are normed before they are compressed. `fold`: norms become constants."""

    forgets = False

    def __post_init__(self) -> None:
        if isinstance(self.kv_rank, int) and self.kv_rank < 1:
            raise ConfigError(f"kv_rank is {self.kv_rank}, expected 1 or more, or full")
        if isinstance(self.rope_dim, int) and (self.rope_dim < 2 or self.rope_dim % 2):
            raise ConfigError(f"rope_dim is {self.rope_dim}, expected an even number of 2 or more, or full")

    def sizes(self, config: Any) -> tuple[int, int]:
        """(r, R) on a base. Raises ConfigError when the base's heads do not have as much."""
        width = head_dim(config)
        keys = config.num_key_value_heads * width
        rope = keys if self.rope_dim == "full" else self.rope_dim or width
        if rope > keys:
            raise ConfigError(f"rope_dim is {rope}, expected at most n_kv * head_dim = {keys}. Use full or less")
        if self.frequencies == "uniform" and width % rope and rope % width:
            raise ConfigError(
                f"rope_dim is {rope}, expected a divisor or a multiple of head_dim = {width} for uniform frequencies"
            )
        full = 2 * keys - rope
        rank = full if self.kv_rank == "full" else self.kv_rank or max(1, keys // 2)
        if rank > full:
            raise ConfigError(f"kv_rank is {rank}, expected at most {full} beside rope_dim {rope}. Use full or less")
        return rank, rope

    def build(self, config: Any, layer_idx: int) -> nn.Module:
        return LatentAttention(config, layer_idx, self)

    def state_bytes(self, config: Any, tokens: int) -> int:
        return sum(self.sizes(config)) * element_bytes(config) * tokens


class LatentAttention(nn.Module):
    """The module that stands where `self_attn` was."""

    rope_pairs: Tensor

    def __init__(self, config: Any, layer_idx: int, options: MLA):
        super().__init__()
        family = family_of(config)
        bias = family.has_qkv_bias(config)
        self.layer_idx = layer_idx
        self.width, self.num_heads = head_dim(config), config.num_attention_heads
        keys = config.num_key_value_heads * self.width
        self.rank, self.rope = options.sizes(config)
        self.full_rope = self.rope == keys
        # With every key dimension rotary there is no plain part, and the latent holds values alone.
        self.plain = 0 if self.full_rope else self.width
        self.dropout = float(config.attention_dropout)
        # Of queries and of keys, hence squared.
        self.plain_scale = float(family.rotary(config).attention_scaling) ** 2
        self.normed = family.qk_norm and options.qk_norm == "keep"
        hidden = config.hidden_size
        if self.normed:
            # A norm is not linear: keys are normed at full width first, and the latent reads them beside the stream.
            self.q_proj = nn.Linear(hidden, self.num_heads * self.width, bias=bias)
            self.k_proj = nn.Linear(hidden, keys, bias=bias)
            self.q_norm = HeadNorm(self.width, config.rms_norm_eps)
            self.k_norm = HeadNorm(self.width, config.rms_norm_eps)
            self.q_rope_proj = nn.Linear(self.width, self.num_heads * self.rope, bias=False)
            self.kv_a_proj_with_mqa = nn.Linear(hidden + keys, self.rank + self.rope, bias=bias)
        else:
            self.q_proj = nn.Linear(hidden, self.num_heads * (self.plain + self.rope), bias=bias)
            self.kv_a_proj_with_mqa = nn.Linear(hidden, self.rank + self.rope, bias=bias)
        if options.latent_norm == "rms":
            self.kv_a_layernorm = HeadNorm(self.rank, LATENT_EPS)
        self.kv_b_proj = nn.Linear(self.rank, self.num_heads * (self.plain + self.width), bias=False)
        self.o_proj = nn.Linear(self.num_heads * self.width, hidden, bias=family.has_out_bias(config))
        self.chosen = options.frequencies == "chosen" and not self.full_rope
        if self.chosen:
            # Small whole numbers, exact in every dtype a checkpoint is stored in.
            self.register_buffer("rope_pairs", self.default_pairs().float())

    def default_pairs(self) -> Tensor:
        """Which of the base's d/2 frequencies each of the R/2 rotary pairs turns at, int64."""
        return strided_pairs(self.width, self.rope)

    def _rotary(self, angles: tuple[Tensor, Tensor]) -> list[Tensor]:
        """cos and sin of the rotary pairs, each [B, T, R]: first halves and second halves of the pairs alike."""
        half = self.width // 2
        if self.chosen:
            index = self.rope_pairs.long()
            picked = [angle[..., :half].index_select(-1, index) for angle in angles]
        elif self.rope < self.width:
            picked = [angle[..., : half : self.width // self.rope] for angle in angles]
        else:
            picked = [angle[..., :half].repeat(1, 1, self.rope // self.width) for angle in angles]
        return [torch.cat([angle, angle], dim=-1) for angle in picked]

    def project(self, hidden_states: Tensor, angles: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries and what the cache keeps.

        Args:
            hidden_states: [B, T, D].
            angles: cos and sin of the base's rotary embedding, [B, T, d].

        Returns:
            plain queries [B, H, T, d or 0], rotated queries [B, H, T, R], latents [B, T, r], rotated keys [B, T, R].
        """
        q = self.q_proj(hidden_states).unflatten(-1, (self.num_heads, -1))
        if self.normed:
            q = self.q_norm(q)
            turned = torch.einsum("bthd,hrd->bthr", q, self.q_rope_proj.weight.view(self.num_heads, self.rope, self.width))
            plain = q[..., : self.plain]
            keys = self.k_norm(self.k_proj(hidden_states).unflatten(-1, (-1, self.width))).flatten(2)
            hidden_states = torch.cat([hidden_states, keys], dim=-1)
        else:
            plain, turned = q.split([self.plain, self.rope], dim=-1)
        latent, key = self.kv_a_proj_with_mqa(hidden_states).split([self.rank, self.rope], dim=-1)
        return self.rotate(plain.transpose(1, 2), turned.transpose(1, 2), latent, key, angles)

    def rotate(
        self, plain: Tensor, turned: Tensor, latent: Tensor, key: Tensor, angles: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What `project` returns, of the same before rotary embedding and norm."""
        if self.plain_scale != 1:
            plain = plain * self.plain_scale
        if hasattr(self, "kv_a_layernorm"):
            latent = self.kv_a_layernorm(latent)
        cos, sin = self._rotary(angles)
        turned = turned * cos[:, None] + _half_turn(turned) * sin[:, None]
        return plain, turned, latent, key * cos + _half_turn(key) * sin

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **unused: Any,
    ) -> tuple[Tensor, None]:
        """Attend; see the module docstring.

        Args:
            hidden_states: [B, T, D].
            position_embeddings: cos and sin, [B, T, d].
            attention_mask: [B, 1, T, S], bool (True is seen) or additive; None is causal.
            past_key_values: a cache or None; this layer's entry holds latents [B, 1, S, r] as keys and rotary keys
                [B, 1, S, R] as values.
            **unused: what other attention modules read.

        Returns:
            ([B, T, D], None).

        Raises:
            ConfigError: a mask of another form, such as a flash-attention one.
        """
        if attention_mask is not None and (not isinstance(attention_mask, Tensor) or attention_mask.dim() != 4):
            raise ConfigError("mla: got a mask that is not [batch, 1, tokens, keys]. Load with attn_implementation sdpa or eager")
        return self.o_proj(self.context(hidden_states, position_embeddings, attention_mask, past_key_values)), None

    def context(
        self, hidden_states: Tensor, angles: tuple[Tensor, Tensor], mask: Tensor | None = None, cache: Any = None
    ) -> Tensor:
        """What o_proj reads, [B, T, H * d]. Arguments as in `forward`."""
        plain, turned, latent, key = self.project(hidden_states, angles)
        latent, key = latent[:, None], key[:, None]
        if cache is not None:
            latent, key = cache.update(latent, key, self.layer_idx)
        new, total = plain.shape[2], latent.shape[2]
        # Expanding costs every past token r * d a head; absorbing costs every score r instead of d.
        absorb = total > new and new * (self.rank - self.width) < self.rank * self.width
        attend = self.absorbed if absorb else self.expanded
        return attend(plain, turned, latent, key, mask).transpose(1, 2).flatten(2)

    def mixing_matrix(self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> Tensor:
        """What token s's values weigh in each head's output at token t, [B, H, T, T]. Arguments as in `forward`, no cache."""
        plain, turned, latent, key = self.project(hidden_states, position_embeddings)
        return self.expanded(plain, turned, latent[:, None], key[:, None], None, one_hot)

    def expanded(
        self,
        plain: Tensor,
        turned: Tensor,
        latent: Tensor,
        key: Tensor,
        mask: Tensor | None,
        values: Callable[[Tensor], Tensor] = lambda v: v,
    ) -> Tensor:
        """Attention over keys and values of every head, made from the latents.

        Args:
            plain: [B, H, T, d or 0].
            turned: [B, H, T, R].
            latent: [B, 1, S, r].
            key: rotary keys, [B, 1, S, R].
            mask: as in `forward`.
            values: what is read in place of the values [B, H, S, d].

        Returns:
            [B, H, T, d].
        """
        new, total = turned.shape[2], latent.shape[2]
        heads = self.kv_b_proj(latent[:, 0]).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        k, v = heads.split([self.plain, self.width], dim=-1)
        k = torch.cat([k, key.expand(-1, self.num_heads, -1, -1)], dim=-1)
        if mask is None and new != total:
            mask = _causal(new, total, turned.device)
        return F.scaled_dot_product_attention(
            torch.cat([plain, turned], dim=-1), k, values(v), attn_mask=mask, is_causal=mask is None,
            dropout_p=self.dropout if self.training else 0.0, scale=self.width**-0.5,
        )  # fmt: skip

    def absorbed(self, plain: Tensor, turned: Tensor, latent: Tensor, key: Tensor, mask: Tensor | None) -> Tensor:
        """The same function by scores in the latent space: reads each latent once for all heads. As `expanded`."""
        heads, new, total = self.num_heads, turned.shape[2], latent.shape[2]
        up_keys, up_values = self.kv_b_proj.weight.view(heads, -1, self.rank).split([self.plain, self.width], dim=1)
        latent, key = latent[:, 0], key[:, 0]
        q_latent = torch.einsum("bhtd,hdr->bhtr", plain, up_keys) if self.plain else None
        # A bias in the mask, a dropped weight or a gradient is PyTorch's.
        if new == 1 and not (torch.is_grad_enabled() or (self.training and self.dropout)):
            seen = None if mask is None else mask[:, 0, 0].expand(len(latent), -1)
            first = None if q_latent is None else q_latent[:, :, 0]
            one = first, turned[:, :, 0], latent, key, None, None, seen, self.width**-0.5
            if (seen is None or seen.dtype == torch.bool) and (fast := fast_path("mla_decode", "mla_decode", "auto", *one)):
                return torch.einsum("bhr,hdr->bhd", fast(*one)[0], up_values)[:, :, None]
        # Heads are rows of one product: the cache is not repeated for each.
        scores = turned.flatten(1, 2) @ key.transpose(1, 2)
        if q_latent is not None:
            scores = scores + q_latent.flatten(1, 2) @ latent.transpose(1, 2)
        wide = torch.promote_types(scores.dtype, torch.float32)
        scores = scores.to(wide).unflatten(1, (heads, new)) * self.width**-0.5
        if mask is None and new > 1:
            mask = _causal(new, total, turned.device)
        if mask is not None and mask.dtype == torch.bool:
            scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        elif mask is not None:
            scores = scores + mask
        weights = F.dropout(scores.softmax(dim=-1), self.dropout, self.training).to(latent.dtype)
        mixed = (weights.flatten(1, 2) @ latent).unflatten(1, (heads, new))
        return torch.einsum("bhtr,hdr->bhtd", mixed, up_values)


def strided_pairs(width: int, rope: int) -> Tensor:
    """R/2 of d/2 frequencies, evenly strided, or all of them over and over, int64."""
    pairs, known = torch.arange(rope // 2), width // 2
    return pairs % known if rope >= width else pairs * known // (rope // 2)


def _half_turn(pairs: Tensor) -> Tensor:
    """(a, b) -> (-b, a) for pairs kept as two halves."""
    first, second = pairs.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)


def _causal(new: int, total: int, device: torch.device) -> Tensor:
    """[1, 1, new, total], True where the last `new` of `total` tokens may look."""
    return torch.ones(new, total, dtype=torch.bool, device=device).tril(total - new)[None, None]
