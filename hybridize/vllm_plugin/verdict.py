"""Whether vLLM can serve a hybrid, and why not; said from config.json alone, before any weight is read.

What is refused is what vLLM 0.33.0 has no layer or no cache for. Files and lines are of that version.
"""

from typing import Any

from hybridize.families import family_of, head_dim
from hybridize.mixers import MIXERS
from hybridize.mixers.gdn import GDN
from hybridize.mixers.mamba2 import Mamba2
from hybridize.mixers.mla import MLA
from hybridize.mixers.streaming import Streaming

SERVED = ("attention", "streaming", "mamba2", "gdn", "mla")

# Rotary embeddings that do not depend on the length of the text, and are the same in transformers and vLLM.
ROPES = ("default", "linear", "llama3", "yarn")

# Taps of vLLM's causal convolution (model_executor/layers/mamba/ops/causal_conv1d.py: 2 to 4 in all of its kernels).
TAPS = (2, 4)

# Widths of a latent and its rotary key that every backend takes (layers/attention/mla_attention.py, MLACommonBackend).
LATENTS = (320, 512, 576)


def obstacle(config: Any, mixers: list[dict[str, Any]], tensor_parallel: int = 1) -> str | None:
    """Why vLLM cannot serve these layers over a config, in one line, or None.

    Args:
        config: of the base or the hybrid.
        mixers: {"name": ..., **options} of each layer.
        tensor_parallel: GPUs that share each layer.

    Returns:
        None when it is served exactly, otherwise a reason with the next step where there is one.
    """
    for layer, spec in enumerate(mixers):
        if spec["name"] not in SERVED:
            return f"layer {layer} is {spec['name']}, which vLLM has no layer for; served are {', '.join(SERVED)}"
    options = [MIXERS.build(spec) for spec in mixers]
    if reason := _base(config, tensor_parallel):
        return reason
    for layer, (spec, option) in enumerate(zip(mixers, options, strict=True)):
        if reason := _layer(config, option):
            return f"layer {layer} ({spec['name']}): {reason}"
    return _together(config, options, tensor_parallel)


def _base(config: Any, tensor_parallel: int) -> str | None:
    if config.hidden_act != "silu":
        return f"hidden_act is {config.hidden_act}, vLLM's MLP of these families has silu alone"
    if (kind := (config.rope_parameters or {}).get("rope_type", "default")) not in ROPES:
        return f"the rotary embedding is of type {kind}, which changes with the length of the text; served are {', '.join(ROPES)}"
    if config.num_attention_heads % tensor_parallel:
        return f"{config.num_attention_heads} heads cannot be shared by {tensor_parallel} GPUs. Use a divisor"
    groups = config.num_key_value_heads
    if groups % tensor_parallel and tensor_parallel % groups:
        return f"{groups} key/value heads cannot be shared by {tensor_parallel} GPUs. Use a divisor or a multiple"
    return None


def _layer(config: Any, option: Any) -> str | None:
    if isinstance(option, Streaming) and option.sink_tokens:
        # A window has no exceptions (layers/attention/attention.py); what is called sinks there are learned logits.
        return f"sink_tokens is {option.sink_tokens}, vLLM keeps no first tokens beside a window; sink_tokens 0 is served"
    if isinstance(option, Mamba2 | GDN) and not TAPS[0] <= option.conv_tokens <= TAPS[1]:
        return f"conv_tokens is {option.conv_tokens}, vLLM's convolution has {TAPS[0]} to {TAPS[1]}"
    if isinstance(option, GDN):
        return _gdn(config, option)
    if isinstance(option, MLA) and option.sizes(config)[1] == config.num_key_value_heads * head_dim(config):
        return "every key dimension is rotary, vLLM's latent attention needs a plain part; give rope_dim a smaller number"
    return None


def _gdn(config: Any, option: GDN) -> str | None:
    # layers/mamba/gdn/qwen_gdn_linear_attn.py: prefill norms, splits and gates behind the convolution in one kernel.
    if family_of(config).qk_norm and option.qk_norm:
        return "vLLM has no q/k-norms behind the convolution; qk_norm false is served"
    if option.rope:
        return "vLLM does not rotate queries and keys of the delta rule; rope false is served"
    if option.beta_max != 1:
        return f"beta_max is {option.beta_max}, vLLM has 1"
    if family_of(config).has_out_bias(config):
        return "the base has a bias on o_proj, vLLM's out_proj of Gated DeltaNet has none"
    return None


def _together(config: Any, options: list[Any], tensor_parallel: int) -> str | None:
    # layers/attention/mla_attention.py, get_mla_dims: one set of sizes, read from the config.
    sizes = sorted({option.sizes(config) for option in options if isinstance(option, MLA)})
    if not sizes:
        return None
    if len(sizes) > 1:
        return f"mla layers have several (kv_rank, rope_dim): {', '.join(map(str, sizes))}; vLLM has one set for all layers"
    if sum(sizes[0]) > LATENTS[-1]:
        return f"kv_rank + rope_dim is {sum(sizes[0])}, vLLM's cache of latents has up to {LATENTS[-1]}; plan a smaller kv_rank"
    width = latent_width(config, options)
    if not _pages_agree(config, options, width, tensor_parallel):
        return (
            f"keys and values of a token have {_attended(config, tensor_parallel)} numbers on a GPU, its latent {width}: with "
            "recurrent layers beside them vLLM needs a multiple. Use latent layers in place of attention"
        )
    return None


def _attended(config: Any, tensor_parallel: int) -> int:
    return 2 * max(1, config.num_key_value_heads // tensor_parallel) * head_dim(config)


def _pages_agree(config: Any, options: list[Any], width: int, tensor_parallel: int) -> bool:
    """Whether vLLM can give all layers pages of one size.

    v1/core/kv_cache_planning.py, unify_kv_cache_spec_page_size: a latent's page grows by whole numbers, all others are padded.
    Without recurrent layers there are other ways (get_kv_cache_groups), without attention there is nothing to agree with.
    """
    attends = any(not isinstance(option, MLA | Mamba2 | GDN) for option in options)
    recurrent = any(isinstance(option, Mamba2 | GDN) for option in options)
    attended = _attended(config, tensor_parallel)
    return not (attends and recurrent) or attended <= width or attended % width == 0


def latent_width(config: Any, options: list[Any]) -> int:
    """Numbers of a token in vLLM's cache of a latent layer: kv_rank + rope_dim, made up with zeros to a width that vLLM has."""
    needed = max(sum(option.sizes(config)) for option in options if isinstance(option, MLA))
    enough = [width for width in LATENTS if width >= needed]
    return next((width for width in enough if _pages_agree(config, options, width, 1)), enough[0])


def extra_fields(config: Any, options: list[Any]) -> dict[str, Any]:
    """Fields that vLLM looks for in a config and ours has not: which layers have a state, sizes of the latent."""
    recurrent = [isinstance(option, Mamba2 | GDN) for option in options]
    # Read by ModelConfig.is_hybrid and get_num_layers_by_block_type (config/model.py); windows go to their layers.
    fields: dict[str, Any] = {"layer_types": ["linear_attention" if state else "full_attention" for state in recurrent]}
    # Tokens of a chunk in vLLM's scan: its speed, not its result.
    fields["mamba_chunk_size"] = 256
    # Backends of the delta rule are chosen by these.
    fields |= {"linear_key_head_dim": head_dim(config), "linear_value_head_dim": head_dim(config)}
    latent = next((option for option in options if isinstance(option, MLA)), None)
    if latent is not None:
        rope, width = latent.sizes(config)[1], head_dim(config)
        rank = latent_width(config, options) - rope
        fields |= {
            "q_lora_rank": None, "kv_lora_rank": rank, "qk_nope_head_dim": width, "qk_rope_head_dim": rope, "v_head_dim": width,
        }  # fmt: skip
    return fields
