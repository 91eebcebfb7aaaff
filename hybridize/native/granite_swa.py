"""Sliding windows without sinks in the one class that transformers, vLLM, SGLang and llama.cpp all have: granite_swa.

It is Llama with windows by layer and a logit in each head's softmax that no token has (the sink); at -1e4 that weighs
exp(-1e4) = 0 beside any real score. Its multipliers are one, but for the score's, which the class has no default for.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from hybridize.families import family_of, head_dim
from hybridize.native.gguf import no_head, no_rotary
from hybridize.native.granite import attention_biases
from hybridize.native.target import Made, Specs, Target, carried
from hybridize.native.windowed import layer_types, no_windows, window_of

OFF = -1e4
"""A sink's logit that weighs nothing in fp32 and bf16."""


class GraniteSWA(Target):
    """Llama, Mistral or Qwen2 with some layers windowed."""

    model_type, architecture = "granite_swa", "GraniteSWAForCausalLM"
    about = "full and sliding-window attention, its learned sinks switched off"
    mixers = frozenset({"streaming"})
    served = {
        "transformers": f"{architecture}, without SDPA", "vLLM": architecture, "SGLang": architecture, "llama.cpp": "granite_swa",
    }  # fmt: skip

    def obstacle(self, config: Any, mixers: Specs) -> str | None:
        if reason := no_windows(config, mixers, ("llama", "mistral", "qwen2")):
            return reason
        return None if window_of(mixers) is not None else "no layer has a window: the base's own class holds it"

    def engine(self, engine: str, config: Any, mixers: Specs) -> tuple[bool, str]:
        if engine != "transformers" and (reason := no_head(config)):
            return False, reason
        if engine == "llama.cpp" and (reason := no_rotary(config, llama3=True)):
            return False, reason
        if engine == "llama.cpp" and config.hidden_act != "silu":
            return False, f"its graph has SiLU, the base has {config.hidden_act}"
        return super().engine(engine, config, mixers)

    def config(self, config: Any, mixers: Specs) -> dict[str, Any]:
        return {
            **carried(config), "model_type": self.model_type, "architectures": [self.architecture],
            "head_dim": head_dim(config), "attention_bias": family_of(config).has_qkv_bias(config),
            "mlp_bias": bool(getattr(config, "mlp_bias", False)),
            "sliding_window": window_of(mixers), "layer_types": layer_types(mixers),
            "attention_multiplier": head_dim(config) ** -0.5, "embedding_multiplier": 1.0, "logits_scaling": 1.0,
            "residual_multiplier": 1.0,
        }  # fmt: skip

    def tensors(self, config: Any, mixers: Specs, names: Iterable[str]) -> list[Made]:
        known = set(names)
        made = [Made(name=name, sources=(name,)) for name in sorted(known)]
        for index in range(len(mixers)):
            attention = f"model.layers.{index}.self_attn."
            made += attention_biases(config, attention, known)
            # Made of a tensor for its dtype; how many heads there are is the config's.
            source = f"{attention}q_proj.weight"
            made.append(Made(name=f"{attention}sinks", sources=(source,), make=_sinks(config.num_attention_heads)))
        return made


def _sinks(heads: int) -> Callable[[Tensor], Tensor]:
    return lambda weight: torch.full((heads,), OFF, dtype=weight.dtype)
