"""Latent attention in every layer: deepseek_v3 without experts.

No weight changes but for the order of rotary rows: the class turns neighbours where the hybrid turns halves. It also divides
scores by sqrt(plain + rotary width) where the hybrid divides by sqrt(d). A factor on q_proj would round in bf16 (logits of a
random model then differ by 5e-2); the class has a place for it, the temperature of DeepSeek's YaRN, which it reads beside every
rotary embedding but the plain one. A plain one is written as a YaRN whose ramp lies beyond its last frequency, and so changes
none; servers, which take DeepSeek's YaRN alone, read that one right.

Source: transformers models/deepseek_v3/modeling_deepseek_v3.py, yarn_apply_mscale; modeling_rope_utils.py.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from hybridize.families import family_of, head_dim
from hybridize.mixers.mla import LATENT_EPS, MLA
from hybridize.native.target import Made, Specs, Target, carried, each_layer
from hybridize.vllm_plugin.verdict import LATENTS

FACTOR = 2
"""By which the YaRN that carries the scale pretends to lengthen the context; its logarithm is all that counts."""
FAST = (512, 64)
"""Latent and rotary width of DeepSeek's own models."""
ANY_WIDTH = ("default", "linear", "llama3")
"""Rotary embeddings that treat each frequency by itself, so that every second one is the same function."""


def sizes(config: Any, mixers: Specs) -> tuple[int, int]:
    """(r, R) of latent attention."""
    return MLA(**{key: value for key, value in mixers[0].items() if key != "name"}).sizes(config)


def rope_type(config: Any) -> str:
    """Of the base's rotary embedding."""
    return (config.rope_parameters or {}).get("rope_type", "default")


class DeepseekV3(Target):
    """Latent attention with a norm on the latent, a dense MLP in every layer."""

    model_type, architecture = "deepseek_v3", "DeepseekV3ForCausalLM"
    about = "latent attention under its names in every layer"
    mixers = frozenset({"mla"})
    served = {"transformers": architecture, "vLLM": architecture, "SGLang": architecture}

    def obstacle(self, config: Any, mixers: Specs) -> str | None:
        family, first = family_of(config), mixers[0]
        if {spec["name"] for spec in mixers} != {"mla"}:
            return "no native class mixes latent attention with another kind"
        _, rope = sizes(config, mixers)
        if any(spec != first for spec in mixers):
            return "the native class has one set of latent sizes for all layers"
        if first["latent_norm"] != "rms":
            return "the native class norms the latent; latent_norm is none"
        if family.has_qkv_bias(config):
            return "the base has q/k/v biases, the native class has none on queries"
        if family.qk_norm and first["qk_norm"] == "keep":
            return "the base has q/k-norms, which the native class lacks; qk_norm fold makes them constants"
        if first["frequencies"] != "uniform":
            return "each layer has rotary frequencies of its own; frequencies uniform has the native class's"
        if rope > head_dim(config) or rope == config.num_key_value_heads * head_dim(config):
            return f"the rotary key has {rope} dimensions, the native class repeats no frequency of a head of {head_dim(config)}"
        if (kind := rope_type(config)) not in ANY_WIDTH and not (kind == "yarn" and rope == head_dim(config)):
            whole = "; rope_dim of a whole head has them" if kind == "yarn" else ""
            return f"a rotary embedding of type {kind} has other frequencies in a rotary key of {rope} dimensions{whole}"
        if getattr(config, "mlp_bias", False):
            return "the base has biases in its MLP, the native class has none"
        return None

    def engine(self, engine: str, config: Any, mixers: Specs) -> tuple[bool, str]:
        rank, rope = sizes(config, mixers)
        if engine == "transformers":
            return super().engine(engine, config, mixers)
        if (kind := rope_type(config)) != "default":
            return False, f"reads a rotary embedding of type {kind} as DeepSeek's YaRN, which is another"
        if engine == "llama.cpp":
            # With 27 layers and two experts named it loads, and computes other logits (tried, 0.3.36).
            return False, "its deepseek2 asserts experts, and takes queries without a rank in models of 26 or 27 layers alone"
        if engine == "vLLM" and rank + rope not in LATENTS:
            widths = ", ".join(map(str, LATENTS))
            return False, f"keeps latents of {widths} numbers a token alone, kv_rank and rope_dim make {rank + rope}"
        said = [self.served[engine]]
        if engine == "vLLM" and (rank, rope) != FAST:
            said.append(f"with its Triton kernels: the fast ones take kv_rank {FAST[0]} with rope_dim {FAST[1]} alone")
        if config.rms_norm_eps != LATENT_EPS:
            said.append(f"its latent norm has eps {config.rms_norm_eps:g} in place of {LATENT_EPS:g}")
        return True, "; ".join(said)

    def config(self, config: Any, mixers: Specs) -> dict[str, Any]:
        rank, rope = sizes(config, mixers)
        width, heads = head_dim(config), config.num_attention_heads
        return {
            # Servers untie the head, whatever the config says.
            **carried(config), "model_type": self.model_type, "architectures": [self.architecture],
            "tie_word_embeddings": False, "attention_bias": False, "num_key_value_heads": heads,
            "q_lora_rank": None, "kv_lora_rank": rank, "qk_nope_head_dim": width, "qk_rope_head_dim": rope, "v_head_dim": width,
            "rope_interleave": True, "rope_parameters": rope_parameters(config, rope),
            "first_k_dense_replace": len(mixers), "num_nextn_predict_layers": 0,
            # No layer has experts; a factor other than 1 would be taken out of the MLPs of fp16 models by vLLM.
            "moe_intermediate_size": config.intermediate_size, "n_routed_experts": 1, "n_shared_experts": 1, "n_group": 1,
            "topk_group": 1, "num_experts_per_tok": 1, "routed_scaling_factor": 1.0,
        }  # fmt: skip

    def tensors(self, config: Any, mixers: Specs, names: Iterable[str]) -> list[Made]:
        made = [Made(name=name, sources=(name,), make=self._make(config, mixers, part)) for name, _, part in each_layer(names)]
        if config.tie_word_embeddings:
            made.append(Made(name="lm_head.weight", sources=("model.embed_tokens.weight",)))
        return made

    def _make(self, config: Any, mixers: Specs, part: str) -> Callable[[Tensor], Tensor] | None:
        rank, rope = sizes(config, mixers)
        match part:
            case "self_attn.kv_a_proj_with_mqa.weight":
                return lambda rows: torch.cat([rows[:rank], paired(rows[rank:])])
            case "self_attn.q_proj.weight":
                return lambda rows: torch.cat([_head(part, rope) for part in rows.chunk(config.num_attention_heads)])
        return None


def rope_parameters(config: Any, rope: int) -> dict[str, Any]:
    """The rotary embedding of the class: the base's frequencies, and with them the scale."""
    own = ("mscale", "mscale_all_dim", "attention_factor")
    found = {key: value for key, value in config.rope_parameters.items() if key not in own}
    # cos and sin of a base with YaRN are longer; here they are not, and the temperature has the square of it for all parts.
    longer = float(family_of(config).rotary(config).attention_scaling)
    if found.get("factor", 1) == 1:
        theta, context = found["rope_theta"], config.max_position_embeddings // FACTOR
        # The ramp lies between 3/4 and 19/20 of the rotary key's width; its frequencies end at half of it.
        fast, slow = (context / (2 * math.pi * theta ** (2 * place)) for place in (0.75, 0.95))
        found = {
            "rope_type": "yarn", "rope_theta": theta, "factor": float(FACTOR), "original_max_position_embeddings": context,
            "beta_fast": fast, "beta_slow": slow,
        }  # fmt: skip
    # Scores are multiplied by (1 + m / 10 log factor)^2, cos and sin by the quotient of that of both m.
    temperature = ((1 + rope / head_dim(config)) ** 0.25 * longer - 1) / (0.1 * math.log(found["factor"]))
    both = {"mscale": temperature} if found["rope_type"] == "yarn" else {}
    return {**found, **both, "mscale_all_dim": temperature}


def _head(rows: Tensor, rope: int) -> Tensor:
    """One head's queries, the rotary ones in pairs."""
    return torch.cat([rows[:-rope], paired(rows[-rope:])])


def paired(rows: Tensor) -> Tensor:
    """Rows (j, j + R/2), which turn together, as neighbours (2j, 2j + 1)."""
    return torch.stack(rows.chunk(2), dim=1).flatten(0, 1)
