"""What a native class is to a plan: when it computes the same, its config.json, and where each of its tensors comes from."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

Specs = list[dict[str, Any]]
"""{"name": ..., **every option} of each layer."""

ENGINES = ("transformers", "vLLM", "SGLang", "llama.cpp")
"""What may serve a checkpoint. Read in vLLM 0.33.0, SGLang 0.5.23 and the llama.cpp of llama-cpp-python 0.3.36."""


@dataclass(frozen=True, kw_only=True)
class Made:
    """One tensor of an export.

    `make` is given the sources' tensors, in order, in their stored dtypes, and returns the tensor in any dtype; None copies
    the one source's bytes.
    """

    name: str
    sources: tuple[str, ...] = ()
    make: Callable[..., Tensor] | None = None


class Target:
    """One native class. A subclass says in `obstacle` what the class cannot hold, and carries no state."""

    model_type: str
    architecture: str
    """The class that transformers loads."""
    about: str
    """What it holds, in a few words."""
    mixers: frozenset[str]
    """The mixers it may have; whether attention may stand beside them is for `obstacle`."""
    served: dict[str, str]
    """Engine -> how, for engines that have the class; the others are refused with `unserved`'s words."""
    unserved: dict[str, str] = {}

    def obstacle(self, config: Any, mixers: Specs) -> str | None:
        """Why the class cannot compute what these mixers do over the base's config, or None. One sentence, no full stop."""
        raise NotImplementedError

    def unready(self) -> str | None:
        """Why the transformers installed here computes another function under this class's name, or None."""
        return None

    def engine(self, engine: str, config: Any, mixers: Specs) -> tuple[bool, str]:
        """Whether an engine runs this export, and how or why not."""
        if engine in self.served:
            return True, self.served[engine]
        return False, self.unserved.get(engine, f"has no {self.model_type}")

    def config(self, config: Any, mixers: Specs) -> dict[str, Any]:
        """config.json of the export, as a mapping."""
        raise NotImplementedError

    def tensors(self, config: Any, mixers: Specs, names: Iterable[str]) -> list[Made]:
        """Every tensor of the export, in any order.

        Args:
            config: the hybrid's.
            mixers: its layers.
            names: the tensors of the hybrid; a tied head is not among them.
        """
        raise NotImplementedError


def carried(config: Any, *leave: str) -> dict[str, Any]:
    """The fields of a hybrid's config that any decoder shares, but for those named.

    What only the hybrid's class knows (mixers, how the file is bound to it) stays behind.
    """
    kept = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
        "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "use_cache", "pad_token_id",
        "bos_token_id", "eos_token_id", "tie_word_embeddings", "rope_parameters", "attention_bias", "attention_dropout",
    )  # fmt: skip
    found = config.to_dict()
    fields = {name: found[name] for name in kept if name in found and name not in leave}
    return {**fields, "dtype": str(config.dtype).removeprefix("torch.")}


def each_layer(names: Iterable[str]) -> list[tuple[str, int | None, str]]:
    """(name, layer or None, name within the layer) of every tensor."""
    found = []
    for name in names:
        parts = name.split(".", 3)
        inside = name.startswith("model.layers.")
        found.append((name, int(parts[2]) if inside else None, parts[3] if inside else name))
    return found
