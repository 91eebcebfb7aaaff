"""Sliding windows without sinks, under the base's own names: ministral for Llama and Mistral, Qwen's own classes for Qwen."""

from collections.abc import Iterable
from typing import Any

from hybridize.families import family_of, head_dim
from hybridize.native.target import Made, Specs, Target, carried


def window_of(mixers: Specs) -> int | None:
    """The window of all streaming layers; None where there is none."""
    return next((spec["window_tokens"] for spec in mixers if spec["name"] == "streaming"), None)


def layer_types(mixers: Specs) -> list[str]:
    """The kind of each layer in the words of a native config."""
    return ["sliding_attention" if spec["name"] == "streaming" else "full_attention" for spec in mixers]


def no_windows(config: Any, mixers: Specs, families: tuple[str, ...]) -> str | None:
    """What keeps layers of attention and windows from a native class with `sliding_window` and `layer_types`."""
    windowed = [spec for spec in mixers if spec["name"] == "streaming"]
    family = family_of(config).model_type
    if other := sorted({spec["name"] for spec in mixers} - {"attention", "streaming"}):
        return f"it has attention and windows, not {other[0]}"
    if family not in families:
        return f"it is a class for {' and '.join(families)}, the base is {family}"
    if any(spec["sink_tokens"] for spec in windowed):
        return "no native class keeps the first tokens beside a window"
    if any(spec["window_tokens"] != windowed[0]["window_tokens"] for spec in windowed):
        return "the native classes have one window for all layers"
    return None


class Windowed(Target):
    """The tensors are the base's; config.json says which layers have the window."""

    families: tuple[str, ...]
    mixers = frozenset({"streaming"})

    def obstacle(self, config: Any, mixers: Specs) -> str | None:
        return no_windows(config, mixers, self.families)

    def config(self, config: Any, mixers: Specs) -> dict[str, Any]:
        fields = {**carried(config), "model_type": self.model_type, "architectures": [self.architecture]}
        if getattr(config, "head_dim", None) is not None:
            fields["head_dim"] = config.head_dim
        if window_of(mixers) is not None:
            fields |= {"sliding_window": window_of(mixers), "layer_types": layer_types(mixers)}
        return fields

    def tensors(self, config: Any, mixers: Specs, names: Iterable[str]) -> list[Made]:
        return [Made(name=name, sources=(name,)) for name in names]


class Ministral(Windowed):
    """Llama or Mistral with some layers windowed."""

    model_type, architecture = "ministral", "MinistralForCausalLM"
    families = ("llama", "mistral")
    about = "full and sliding-window attention under the base's names"
    served = {
        "transformers": "MinistralForCausalLM",
        "vLLM": "as MistralForCausalLM, which reads layer_types",
        "SGLang": "through its transformers backend",
    }
    unserved = {"llama.cpp": "its llama graph has no windows by layer"}

    def obstacle(self, config: Any, mixers: Specs) -> str | None:
        if reason := super().obstacle(config, mixers):
            return reason
        if window_of(mixers) is None:
            return "no layer has a window: the base's own class holds it"
        if getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False):
            return "the base has biases that the native windowed class lacks"
        return None

    def config(self, config: Any, mixers: Specs) -> dict[str, Any]:
        # vLLM has no MinistralForCausalLM, and goes by `architectures`; transformers goes by model_type.
        fields = super().config(config, mixers) | {"architectures": ["MistralForCausalLM"], "head_dim": head_dim(config)}
        fields.pop("attention_bias", None)
        return fields


class OwnLlama(Windowed):
    """Every layer kept: the base's own class."""

    model_type, architecture, families = "llama", "LlamaForCausalLM", ("llama",)
    about = "every layer is kept: the base's own class"
    mixers = frozenset()
    served = dict.fromkeys(("transformers", "vLLM", "SGLang", "llama.cpp"), "the base's own class")

    def obstacle(self, config: Any, mixers: Specs) -> str | None:
        if reason := super().obstacle(config, mixers):
            return reason
        return None if window_of(mixers) is None else "the base's own class has no windows by layer"

    def config(self, config: Any, mixers: Specs) -> dict[str, Any]:
        # Mistral's class would take a default window where none is named.
        extra = {"mlp_bias": config.mlp_bias} if hasattr(config, "mlp_bias") else {"sliding_window": None}
        return super().config(config, mixers) | extra


class OwnMistral(OwnLlama):
    """Every layer kept."""

    model_type, architecture, families = "mistral", "MistralForCausalLM", ("mistral",)


class OwnQwen2(Windowed):
    """Qwen2's own class, whose config has windows by layer."""

    model_type, architecture, families = "qwen2", "Qwen2ForCausalLM", ("qwen2",)
    about = "its own class, with layer_types where layers have a window"
    served = OwnLlama.served

    def engine(self, engine: str, config: Any, mixers: Specs) -> tuple[bool, str]:
        if window_of(mixers) is None or engine == "transformers":
            return super().engine(engine, config, mixers)
        if engine == "llama.cpp":
            return False, "its graphs of Qwen have no windows"
        return True, "through its transformers backend"

    def config(self, config: Any, mixers: Specs) -> dict[str, Any]:
        fields = super().config(config, mixers)
        if window_of(mixers) is None:
            return fields
        # vLLM's own Qwen classes assert that there is one window; its transformers backend has one a layer.
        return fields | {"architectures": ["TransformersForCausalLM"], "use_sliding_window": True}


class OwnQwen3(OwnQwen2):
    """Qwen3's own class, whose config has windows by layer."""

    model_type, architecture, families = "qwen3", "Qwen3ForCausalLM", ("qwen3",)
