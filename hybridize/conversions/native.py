"""Whether a class that transformers already has computes what a plan describes; said before anything is converted."""

from typing import Any

from hybridize.families import FAMILIES, family_of, head_dim


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
    if names <= {"attention", "streaming"}:
        return _windowed(config, [spec for spec in mixers if spec["name"] == "streaming"])
    if names <= {"attention", "low_rank_kv"}:
        return _none("no class of transformers keeps low-rank keys from before the rotary embedding")
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
