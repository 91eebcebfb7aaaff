"""The mixers as vLLM's layers: each computes what the mixer of the same name does, over vLLM's paged cache and kernels.

Source: vLLM 0.33.0, model_executor/models/llama.py, layers/mamba/mamba_mixer2.py, layers/mamba/gdn/qwen_gdn_linear_attn.py,
layers/attention/mla_attention.py. Letters: T tokens of all requests, H heads of this GPU, d head width, R rotary width.
"""

# pyright: reportMissingImports=false

import copy
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.attention import MLAAttention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.mamba.gdn.qwen_gdn_linear_attn import QwenGatedDeltaNetAttention
from vllm.model_executor.layers.mamba.mamba_mixer2 import MambaMixer2
from vllm.model_executor.model_loader.weight_utils import sharded_weight_loader
from vllm.model_executor.models.llama import LlamaAttention
from vllm.model_executor.utils import set_weight_attrs
from vllm.platforms import current_platform

from hybridize.families import family_of, head_dim
from hybridize.mixers.gdn import GDN
from hybridize.mixers.mamba2 import Mamba2
from hybridize.mixers.mla import LATENT_EPS, MLA, strided_pairs
from hybridize.mixers.streaming import Streaming


def build(vllm_config: Any, option: Any, prefix: str) -> nn.Module:
    """The layer that stands where `self_attn` was.

    Args:
        vllm_config: vLLM's configuration; its hf_config is the hybrid's.
        option: the layer's options.
        prefix: name of the module in the model.
    """
    kinds = {Mamba2: Mamba2Layer, GDN: GDNLayer, MLA: LatentLayer}
    return kinds.get(type(option), AttentionLayer)(vllm_config, option, prefix)


def _fp32(layer: nn.Module, *names: str) -> None:
    """Parameters of a head each, that stay in fp32 whatever the model's dtype."""
    for name in names:
        parameter = nn.Parameter(getattr(layer, name).data.float(), requires_grad=False)
        setattr(layer, name, parameter)
        set_weight_attrs(parameter, {"weight_loader": sharded_weight_loader(0)})


class AttentionLayer(LlamaAttention):
    """The base's attention, with its q/k-norms if it has them; of a streaming layer, over a window."""

    zeros: tuple[str, ...] = ()

    def __init__(self, vllm_config: Any, option: Any, prefix: str):
        config = copy.copy(vllm_config.model_config.hf_config)
        family = family_of(config)
        # vLLM counts the token itself too: a window of n sees n tokens.
        windowed = isinstance(option, Streaming)
        config.layer_types = ["sliding_attention" if windowed else "full_attention"] * config.num_hidden_layers
        config.sliding_window = option.window_tokens if windowed else None
        super().__init__(
            config=config,
            hidden_size=config.hidden_size,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            max_position_embeddings=config.max_position_embeddings,
            quant_config=vllm_config.quant_config,
            bias=family.has_qkv_bias(config),
            bias_o_proj=family.has_out_bias(config),
            cache_config=vllm_config.cache_config,
            prefix=prefix,
        )
        if family.qk_norm:
            self.q_norm = RMSNorm(self.head_dim, eps=config.rms_norm_eps)
            self.k_norm = RMSNorm(self.head_dim, eps=config.rms_norm_eps)

    def forward(self, positions: Tensor, hidden_states: Tensor) -> Tensor:
        """[T] positions and [T, D] -> [T, D]."""
        qkv, _ = self.qkv_proj(hidden_states)
        q, k, v = qkv.split([self.q_size, self.kv_size, self.kv_size], dim=-1)
        if hasattr(self, "q_norm"):
            q = self.q_norm(q.unflatten(-1, (-1, self.head_dim))).flatten(-2)
            k = self.k_norm(k.unflatten(-1, (-1, self.head_dim))).flatten(-2)
        q, k = self.rotary_emb(positions, q, k)
        return self.o_proj(self.attn(q, k, v))[0]


class Mamba2Layer(MambaMixer2):
    """Mamba2 with a group for each query head, and the base's q/k-norms on C and B behind the convolution."""

    def __init__(self, vllm_config: Any, option: Mamba2, prefix: str):
        config = vllm_config.model_config.hf_config
        family, heads, width = family_of(config), config.num_attention_heads, head_dim(config)
        out_bias = family.has_out_bias(config)
        super().__init__(
            hidden_size=config.hidden_size,
            ssm_state_size=width,
            conv_kernel_size=option.conv_tokens,
            intermediate_size=heads * width,
            use_conv_bias=True,
            # vLLM has one switch for in_proj and out_proj: what the checkpoint lacks is zero.
            use_bias=option.proj_bias or out_bias,
            n_groups=heads,
            num_heads=heads,
            head_dim=width,
            rms_norm_eps=option.norm_eps or config.rms_norm_eps,
            activation="silu",
            model_config=vllm_config.model_config,
            cache_config=vllm_config.cache_config,
            quant_config=vllm_config.quant_config,
            prefix=prefix,
        )
        _fp32(self, "dt_bias", "D")
        present = {"in_proj.bias": option.proj_bias, "out_proj.bias": out_bias}
        self.zeros = tuple(name for name, there in present.items() if not there and any(present.values()))
        if family.qk_norm:
            self.q_norm = RMSNorm(width, eps=config.rms_norm_eps)
            self.k_norm = RMSNorm(width, eps=config.rms_norm_eps)
            # vLLM splits what the convolution gives by this function, in prefill and decode alike.
            split = self.split_hidden_states_B_C_fn
            self.split_hidden_states_B_C_fn = lambda mixed: self._normed(*split(mixed))

    def _normed(self, x: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        heads = (B.unflatten(-1, (-1, self.head_dim)).contiguous(), C.unflatten(-1, (-1, self.head_dim)).contiguous())
        return x, self.k_norm(heads[0]).flatten(-2), self.q_norm(heads[1]).flatten(-2)

    def forward(self, positions: Tensor, hidden_states: Tensor) -> Tensor:
        """[T, D] -> [T, D]; positions are not read."""
        return super().forward(hidden_states)


class GDNLayer(QwenGatedDeltaNetAttention):
    """Gated DeltaNet with keys and values for each query head, and biases on its projections where the options say so."""

    def __init__(self, vllm_config: Any, option: GDN, prefix: str):
        config = vllm_config.model_config.hf_config
        heads, width = config.num_attention_heads, head_dim(config)
        self.proj_bias = option.proj_bias
        # A matter of names: a has no bias, and the fused [b | a] has one whose second half is zero.
        self.zeros = ()
        sizes = SimpleNamespace(
            hidden_size=config.hidden_size,
            hidden_act="silu",
            rms_norm_eps=option.norm_eps or config.rms_norm_eps,
            linear_num_key_heads=heads,
            linear_num_value_heads=heads,
            linear_key_head_dim=width,
            linear_value_head_dim=width,
            linear_conv_kernel_dim=option.conv_tokens,
        )
        super().__init__(sizes, vllm_config, prefix)
        # vLLM's kernel for CPUs reads dt_bias in the model's dtype alone; those for GPUs widen what they are given.
        _fp32(self, *(() if current_platform.is_cpu() else ("dt_bias",)), "A_log")

    def create_qkvz_proj(
        self, hidden_size: int, key_dim: int, value_dim: int, quant_config: Any, prefix: str
    ) -> MergedColumnParallelLinear:
        """[q | k | v | z] in one product."""
        return self._fused(hidden_size, [key_dim, key_dim, value_dim, value_dim], quant_config, prefix)

    def create_ba_proj(self, hidden_size: int, num_v_heads: int, quant_config: Any, prefix: str) -> MergedColumnParallelLinear:
        """[b | a] in one product."""
        return self._fused(hidden_size, [num_v_heads, num_v_heads], quant_config, prefix)

    def _fused(self, hidden_size: int, sizes: list[int], quant_config: Any, prefix: str) -> MergedColumnParallelLinear:
        made = MergedColumnParallelLinear(hidden_size, sizes, bias=self.proj_bias, quant_config=quant_config, prefix=prefix)
        if self.proj_bias:
            nn.init.zeros_(made.bias)
        return made

    def forward(self, positions: Tensor, hidden_states: Tensor) -> Tensor:
        """[T, D] -> [T, D]; positions are not read."""
        return super().forward(hidden_states)


class LatentLayer(nn.Module):
    """Latent attention with the mixer's own rotary pairs, norms, biases and score scale.

    vLLM's cache has few widths: a latent is made up with zeros, which no score and no value sees.
    """

    zeros: tuple[str, ...] = ()
    q_rope_proj: Any
    rope_pairs: Tensor
    inv_freq: Tensor

    def __init__(self, vllm_config: Any, option: MLA, prefix: str):
        super().__init__()
        config, quant = vllm_config.model_config.hf_config, vllm_config.quant_config
        family, self.width = family_of(config), head_dim(config)
        heads, hidden, bias = config.num_attention_heads, config.hidden_size, family.has_qkv_bias(config)
        self.num_heads = heads // get_tensor_model_parallel_world_size()
        self.rank, self.rope = option.sizes(config)
        held = config.kv_lora_rank
        self.made_up = held - self.rank
        self.normed = family.qk_norm and option.qk_norm == "keep"
        keys = config.num_key_value_heads * self.width
        queries = self.width if self.normed else self.width + self.rope

        def linear(kind: Any, read: int, made: int, bias: bool, name: str) -> Any:
            return kind(read, made, bias=bias, quant_config=quant, prefix=f"{prefix}.{name}")

        self.q_proj = linear(ColumnParallelLinear, hidden, heads * queries, bias, "q_proj")
        # Latents are shared by all heads: every GPU makes them all.
        self.kv_a_proj_with_mqa = linear(
            ReplicatedLinear, hidden + keys * self.normed, self.rank + self.rope, bias, "kv_a_proj_with_mqa"
        )
        if self.normed:
            self.k_proj = linear(ReplicatedLinear, hidden, keys, bias, "k_proj")
            self.q_norm = RMSNorm(self.width, eps=config.rms_norm_eps)
            self.k_norm = RMSNorm(self.width, eps=config.rms_norm_eps)
            self.q_rope_proj = nn.Module()
            self.q_rope_proj.weight = nn.Parameter(torch.empty(self.num_heads * self.rope, self.width), requires_grad=False)
            set_weight_attrs(self.q_rope_proj.weight, {"weight_loader": sharded_weight_loader(0)})
        if option.latent_norm == "rms":
            self.kv_a_layernorm = RMSNorm(self.rank, eps=LATENT_EPS)
        self.kv_b_proj = linear(ColumnParallelLinear, held, heads * 2 * self.width, False, "kv_b_proj")
        self.o_proj = linear(RowParallelLinear, heads * self.width, hidden, family.has_out_bias(config), "o_proj")
        rotary = family.rotary(config)
        self.turn_scale = float(rotary.attention_scaling)
        self.register_buffer("inv_freq", rotary.inv_freq.float(), persistent=False)
        self.chosen = option.frequencies == "chosen"
        self.register_buffer("rope_pairs", strided_pairs(self.width, self.rope).float(), persistent=False)
        self.attn = MLAAttention(
            num_heads=self.num_heads,
            scale=self.width**-0.5,
            qk_nope_head_dim=self.width,
            qk_rope_head_dim=self.rope,
            v_head_dim=self.width,
            q_lora_rank=None,
            kv_lora_rank=held,
            kv_b_proj=self.kv_b_proj,
            cache_config=vllm_config.cache_config,
            quant_config=quant,
            prefix=f"{prefix}.attn",
        )

    def forward(self, positions: Tensor, hidden_states: Tensor) -> Tensor:
        """[T] positions and [T, D] -> [T, D]."""
        q = self.q_proj(hidden_states)[0].unflatten(-1, (self.num_heads, -1))
        read = hidden_states
        if self.normed:
            plain = self.q_norm(q.contiguous())
            turned = torch.einsum("thd,hrd->thr", plain, self.q_rope_proj.weight.view(self.num_heads, self.rope, self.width))
            keys = self.k_proj(hidden_states)[0].unflatten(-1, (-1, self.width))
            read = torch.cat([hidden_states, self.k_norm(keys.contiguous()).flatten(1)], dim=-1)
        else:
            plain, turned = q.split([self.width, self.rope], dim=-1)
        latent, key = self.kv_a_proj_with_mqa(read)[0].split([self.rank, self.rope], dim=-1)
        latent = latent.contiguous()
        if hasattr(self, "kv_a_layernorm"):
            latent = self.kv_a_layernorm(latent)
        latent = F.pad(latent, (0, self.made_up))
        angles = positions[:, None].float() * self.inv_freq[self.rope_pairs.long()]
        angles = torch.cat([angles, angles], dim=-1)
        cos, sin = ((part * self.turn_scale).to(q.dtype) for part in (angles.cos(), angles.sin()))
        q = torch.cat([plain * self.turn_scale**2, _turn(turned, cos[:, None], sin[:, None])], dim=-1)
        shape = (hidden_states.shape[0], self.num_heads * self.width)
        mixed = self.attn(q, latent, _turn(key, cos, sin)[:, None], output_shape=shape)
        return self.o_proj(mixed)[0]


def _turn(pairs: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of pairs kept as two halves."""
    first, second = pairs.chunk(2, dim=-1)
    return pairs * cos + torch.cat([-second, first], dim=-1) * sin
