"""Whether a class that transformers already has computes what a plan describes; said before anything is converted."""

from typing import Any

from hybridize.families import FAMILIES, family_of, head_dim
from hybridize.mixers.mla import MLA

# Mixers that no class of transformers has beside the base's attention, and why.
NO_CLASS = {
    "gmu": "no class of transformers has gated memory units",
    "nha": "no class of transformers runs one softmax over slots and a window",
    "parallel": "the native class with both branches in a layer (falcon_h1) has full attention, not a window",
    "block_sparse": "no native class keeps strided blocks beside a window",
    "streaming_heads": "no native class gives the heads of one layer different windows",
    "gla": "no native class has gated linear attention beside a softmax window",
    "lolcats": "no native class has a softmax window and feature maps under one normaliser",
    "low_rank_kv": "no class of transformers keeps low-rank keys from before the rotary embedding",
    "xkv": "no class of transformers shares one layer's latents of keys and values with others",
    "mla": "no native class mixes latent attention with another kind",
    "kda": "the native classes with Kimi delta attention have latent attention beside it, not the base's",
}


def native_verdict(config: Any, mixers: list[dict[str, Any]]) -> dict[str, str]:
    """{"target": model_type of the native class or "none", "reason": one sentence}.

    Args:
        config: of the base.
        mixers: {"name": ..., **every option} of each layer.
    """
    names = {spec["name"] for spec in mixers}
    if names == {"attention"}:
        return {"target": config.model_type, "reason": "every layer is kept: the base's own class"}
    if names <= {"attention", "mamba2"}:
        return _granite(config, mixers)
    if names <= {"attention", "gdn"}:
        return _qwen(config, mixers)
    if names == {"mla"}:
        return _deepseek(config, mixers)
    if names <= {"attention", "streaming"}:
        return _windowed(config, [spec for spec in mixers if spec["name"] == "streaming"])
    for name, reason in NO_CLASS.items():
        if name in names:
            return _none(reason)
    return _none(f"no class of transformers mixes {', '.join(sorted(names))}")


def _none(reason: str) -> dict[str, str]:
    return {"target": "none", "reason": f"{reason}; the hybrid loads through this package"}


def _granite(config: Any, mixers: list[dict[str, Any]]) -> dict[str, str]:
    recurrent = [spec for spec in mixers if spec["name"] == "mamba2"]
    inner = config.num_attention_heads * head_dim(config)
    if family_of(config).qk_norm:
        return _none("the base has q/k-norms, which no native Mamba2 hybrid has")
    if len(recurrent) == len(mixers):
        return _none("the native Mamba2 class needs at least one attention layer to generate")
    if inner % config.hidden_size:
        return _none(f"heads x head_dim = {inner} is no multiple of hidden_size = {config.hidden_size}, as it needs to be")
    if any(spec != recurrent[0] for spec in recurrent):
        return _none("the native class has one set of Mamba2 options for all layers")
    if recurrent[0]["norm_eps"] not in (None, config.rms_norm_eps):
        return _none(f"norm_eps is {recurrent[0]['norm_eps']}, the native class takes the base's {config.rms_norm_eps}")
    if getattr(config, "mlp_bias", False):
        return _none("the base has biases in its MLP, the native class has none")
    return {"target": "granitemoehybrid", "reason": "attention and Mamba2 under its names"}


def _qwen(config: Any, mixers: list[dict[str, Any]]) -> dict[str, str]:
    recurrent = [spec for spec in mixers if spec["name"] == "gdn"]
    # Keys and values that stay grouped are no obstacle: export repeats them.
    plain = {"proj_bias": False, "qk_norm": False, "rope": False, "beta_max": 1}
    if config.model_type.removeprefix("hybrid_") != "qwen3":
        return _none("the native class has q/k-norms in its attention layers, which the base has not")
    if getattr(config, "attention_bias", False):
        return _none("the base has biases in its attention, the native Gated DeltaNet has none")
    if config.hidden_act != "silu":
        return _none(f"hidden_act is {config.hidden_act}, which the native class would use after the convolution instead of SiLU")
    if len(recurrent) == len(mixers):
        return _none("the native class needs at least one attention layer to generate")
    if any(spec["conv_tokens"] != recurrent[0]["conv_tokens"] for spec in recurrent):
        return _none("the native class has one conv_tokens for all layers")
    for spec in recurrent:
        if odd := [f"{key}: {spec[key]}".lower() for key, value in plain.items() if spec[key] != value]:
            return _none(f"the native Gated DeltaNet has no place for {odd[0]}")
        if spec["norm_eps"] not in (None, config.rms_norm_eps):
            return _none(f"norm_eps is {spec['norm_eps']}, the native class takes the base's {config.rms_norm_eps}")
    return {"target": "qwen3_5_text", "reason": "attention with its gate at 1/2 and Gated DeltaNet under its names"}


def _deepseek(config: Any, mixers: list[dict[str, Any]]) -> dict[str, str]:
    family, first = family_of(config), mixers[0]
    _, rope = MLA(**{key: value for key, value in first.items() if key != "name"}).sizes(config)
    if any(spec != first for spec in mixers):
        return _none("the native class has one set of latent sizes for all layers")
    if first["latent_norm"] != "rms":
        return _none("the native class norms the latent; latent_norm is none")
    if family.has_qkv_bias(config):
        return _none("the base has q/k/v biases, the native class has none on queries")
    if family.qk_norm and first["qk_norm"] == "keep":
        return _none("the base has q/k-norms, which the native class lacks; qk_norm fold makes them constants")
    if first["frequencies"] != "uniform":
        return _none("each layer has rotary frequencies of its own; frequencies uniform has the native class's")
    if rope > head_dim(config) or rope == config.num_key_value_heads * head_dim(config):
        return _none(
            f"the rotary key has {rope} dimensions, the native class repeats no frequency of a head of {head_dim(config)}"
        )
    if (kind := (config.rope_parameters or {}).get("rope_type", "default")) != "default":
        return _none(f"the rotary embedding is of type {kind}, which native servers read as another")
    if getattr(config, "mlp_bias", False):
        return _none("the base has biases in its MLP, the native class has none")
    return {"target": "deepseek_v3", "reason": "latent attention under its names in every layer"}


def _windowed(config: Any, windowed: list[dict[str, Any]]) -> dict[str, str]:
    if any(spec["sink_tokens"] for spec in windowed):
        return _none("no native class keeps the first tokens beside a window")
    if any(spec["window_tokens"] != windowed[0]["window_tokens"] for spec in windowed):
        return _none("the native classes have one window for all layers")
    if config.model_type in ("qwen2", "qwen3"):
        return {"target": config.model_type, "reason": "its own class with layer_types and a sliding window"}
    assert config.model_type in FAMILIES
    if getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False):
        return _none("the base has biases that the native windowed class lacks")
    return {"target": "ministral", "reason": "full and sliding-window attention under the base's names"}
