"""What the config of every hybrid does beside its family's: name the code that loads it, and bind what its weights were made for.

A hybrid's config.json has an `auto_map`, so that a plain `from_pretrained(..., trust_remote_code=True)` finds the classes in the
file beside it, and `made_for_sha256`, a hash of each thing that decides what the tensors mean: the class, the mixers, the
sizes. A file edited to other mixers has tensors of the same names and shapes and would be read wrong; here it is refused, when
it is read and again when a model is built. Both fields are made anew whenever a config is written, in `to_dict` alone.

Not bound is what may change beside the same weights: rotary embedding, context, vocabulary (whose size the tensors show),
token ids, dtype.
"""

# The mixin names what the library classes it is mixed into have; a type checker sees it alone.
# pyright: reportAttributeAccessIssue=false

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from hybridize.errors import ConfigError
from hybridize.families import head_dim

CODE_FILE = "modeling_hybridize.py"

# What is hashed together, as it is called in a message.
BOUND = {
    "class": ("model_type", "architectures", "auto_map"),
    "mixers": ("mixers",),
    "sizes": (
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
        "hidden_act", "rms_norm_eps", "attention_bias", "mlp_bias", "tie_word_embeddings",
    ),
}  # fmt: skip


def copy_code(config: Any, folder: Path) -> None:
    """Put the file that these classes are in beside a config.json: right for the one that goes along with weights."""
    shutil.copyfile(__file__, folder / CODE_FILE)


def wrong_class(found: str, expected: str) -> ConfigError:
    """The error of a model_type that is not that of the class that was asked."""
    return ConfigError(
        f"config.json: model_type is {found!r}, expected {expected!r}: these weights are a hybrid's, and another class reads "
        "them wrong. Restore config.json or convert again"
    )


class HybridConfigMixin:
    """Over a family's config; the class is called Hybrid<Family>Config, and its models Hybrid<Family>Model and ...ForCausalLM."""

    made_for_sha256: Any = None
    # In the package the classes are in many files, and `hybridize.remote`, which makes one of them, puts itself here.
    write_code = copy_code

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.check_made_for()

    @classmethod
    def own_auto_map(cls) -> dict[str, str]:
        """Auto class -> where in the file beside the weights its class is."""
        stem = f"{CODE_FILE.removesuffix('.py')}.{cls.__name__.removesuffix('Config')}"
        return {"AutoConfig": f"{stem}Config", "AutoModel": f"{stem}Model", "AutoModelForCausalLM": f"{stem}ForCausalLM"}

    def made_for(self, auto_map: dict[str, str] | None = None) -> dict[str, str]:
        """Part -> sha256 over its fields' values.

        What the family has not got is what is false, so that a release that adds a field changes no hash.

        Args:
            auto_map: in place of our own.
        """
        values = {name: getattr(self, name, None) for names in BOUND.values() for name in names}
        values |= {"head_dim": head_dim(self), "auto_map": auto_map or self.own_auto_map()}
        return {
            part: hashlib.sha256(json.dumps([values[name] or None for name in names], sort_keys=True).encode()).hexdigest()
            for part, names in BOUND.items()
        }

    def check_made_for(self) -> None:
        """Compare with the hashes that a config was read with; one without them is taken at its word.

        Raises:
            ConfigError: of the class, the mixers or the sizes, which is named.
        """
        if self.model_type != (own := type(self).model_type):
            raise wrong_class(self.model_type, own)
        if self.made_for_sha256 is None:
            return
        if not isinstance(self.made_for_sha256, dict) or set(self.made_for_sha256) != set(BOUND):
            raise ConfigError(
                f"config.json: made_for_sha256 is {self.made_for_sha256!r}, expected a sha256 for each of {', '.join(BOUND)}. "
                "Restore config.json or convert again"
            )
        for part, found in self.made_for(getattr(self, "auto_map", None)).items():
            if (expected := self.made_for_sha256[part]) != found:
                raise ConfigError(
                    f"config.json: {self._described(part)} not what the weights were made for (sha256 {found[:12]}, expected "
                    f"{str(expected)[:12]}). Restore it or convert again; where you changed the weights to fit, remove "
                    "made_for_sha256"
                )

    def _described(self, part: str) -> str:
        if part == "class":
            return f"model_type {self.model_type!r} with architectures {self.architectures} and its auto_map is"
        if part == "mixers":
            return "mixers is"
        return f"one of {', '.join(BOUND[part])} is"

    def to_dict(self) -> dict[str, Any]:
        """As transformers', with the map of the classes and the hashes as of now."""
        fields = super().to_dict()
        if self.mixers is not None:
            fields |= {"auto_map": self.own_auto_map(), "made_for_sha256": self.made_for()}
        return fields

    def save_pretrained(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> None:
        """As transformers', and the file of these classes beside it."""
        super().save_pretrained(save_directory, push_to_hub, **kwargs)
        if self.mixers is not None:
            self.auto_map, self.made_for_sha256 = self.own_auto_map(), self.made_for()
            self.write_code(Path(save_directory))
