"""The base families: where each keeps its classes and which attention extras it carries. Data only."""

import importlib
from dataclasses import dataclass
from typing import Any

from hybridize.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Family:
    """One base architecture of transformers.

    Source: transformers `models/<model_type>/modeling_<model_type>.py`.
    """

    model_type: str
    prefix: str
    """Prefix of the class names, such as "Llama" in LlamaAttention."""
    qkv_bias: bool | None
    """Biases on q, k, v: always, never, or (None) as config.attention_bias says."""
    qk_norm: bool
    """RMSNorm over each head of q and k, before the rotary embedding."""

    @property
    def hybrid_type(self) -> str:
        return f"hybrid_{self.model_type}"

    def _class(self, name: str) -> Any:
        module = importlib.import_module(f"transformers.models.{self.model_type}.modeling_{self.model_type}")
        return getattr(module, f"{self.prefix}{name}")

    def attention(self, config: Any, layer_idx: int) -> Any:
        """A fresh attention module of the base, parameters named and shaped as in its checkpoints."""
        return self._class("Attention")(config, layer_idx)

    def decoder_layer(self, config: Any, layer_idx: int) -> Any:
        return self._class("DecoderLayer")(config, layer_idx)

    def norm(self, config: Any) -> Any:
        """The norm of the stream: before each part of a layer, and once at the end."""
        return self._class("RMSNorm")(config.hidden_size, eps=config.rms_norm_eps)

    def rotary(self, config: Any) -> Any:
        return self._class("RotaryEmbedding")(config=config)

    def has_qkv_bias(self, config: Any) -> bool:
        return bool(config.attention_bias) if self.qkv_bias is None else self.qkv_bias

    def has_out_bias(self, config: Any) -> bool:
        return self.qkv_bias is None and bool(config.attention_bias)


FAMILIES = {
    "llama": Family(model_type="llama", prefix="Llama", qkv_bias=None, qk_norm=False),
    "mistral": Family(model_type="mistral", prefix="Mistral", qkv_bias=False, qk_norm=False),
    "qwen2": Family(model_type="qwen2", prefix="Qwen2", qkv_bias=True, qk_norm=False),
    "qwen3": Family(model_type="qwen3", prefix="Qwen3", qkv_bias=None, qk_norm=True),
}

# model_types of the classes that a hybrid may be exported to and that are no family.
NATIVE_TYPES = ("ministral", "granite_swa", "granitemoehybrid", "bamba", "qwen3_5_text", "deepseek_v3")


def family_of(config: Any) -> Family:
    """The family of a base or hybrid config. Raises ConfigError for an unsupported architecture."""
    name = str(config.model_type).removeprefix("hybrid_")
    if name not in FAMILIES:
        raise ConfigError(f"config.json: model_type is {name!r}, expected one of {', '.join(FAMILIES)}")
    return FAMILIES[name]


def head_dim(config: Any) -> int:
    """Width of one head; some families leave it out of the config."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def element_bytes(config: Any) -> int:
    """Bytes of one element in the model's dtype; a config without one means fp32."""
    dtype = str(getattr(config, "dtype", None) or "float32").removeprefix("torch.")
    return {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}[dtype]
