"""What llama.cpp and its converter take of a config, whatever the class; read and tried in llama-cpp-python 0.3.36."""

from typing import Any

from hybridize.families import head_dim

# Of these the converter writes some, and llama.cpp (src/llama-context.cpp) reads none: it computes with the defaults.
YARN_DEFAULTS = {
    "beta_fast": 32.0, "beta_slow": 1.0, "attention_factor": None, "mscale": None, "mscale_all_dim": None, "truncate": True,
}  # fmt: skip


def no_head(config: Any) -> str | None:
    """Granite's graphs compute a head's width, as do vLLM's and SGLang's."""
    if head_dim(config) * config.num_attention_heads == config.hidden_size:
        return None
    return f"takes head_dim = hidden_size / heads, the base has {head_dim(config)}"


def no_rotary(config: Any, llama3: bool) -> str | None:
    """What llama.cpp would read as another rotary embedding.

    Args:
        config: of a base or a hybrid.
        llama3: whether the class has a tensor for Llama 3.1's factors.
    """
    rope = config.rope_parameters or {}
    kind = rope.get("rope_type", "default")
    if kind == "yarn":
        odd = [f"{key} {rope[key]}" for key, value in YARN_DEFAULTS.items() if rope.get(key, value) not in (value, None)]
        return f"it reads yarn's defaults alone, the base has {odd[0]}" if odd else None
    if kind in ("default", "linear") or (kind == "llama3" and llama3):
        return None
    return f"its converter has no place for rotary embeddings of type {kind} in this class"
