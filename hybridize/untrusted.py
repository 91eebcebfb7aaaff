"""The names, small files and config of an untrusted directory, checked before transformers sees them."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from hybridize.errors import CheckpointError, ConfigError
from hybridize.families import FAMILIES, NATIVE_TYPES
from hybridize.modeling import HYBRIDS
from hybridize.shards import open_regular, parse_json

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

# Bounds on sizes in an untrusted config, far above any model of these families: (least, greatest).
SIZES = {
    "num_hidden_layers": (1, 1024), "hidden_size": (1, 1 << 17), "intermediate_size": (1, 1 << 20),
    "vocab_size": (1, 1 << 22), "num_attention_heads": (1, 1 << 12), "num_key_value_heads": (1, 1 << 12),
    "max_position_embeddings": (1, 1 << 30),
}  # fmt: skip


def read_config(path: Path) -> tuple[dict[str, Any], bytes]:
    """The mapping in config.json and its bytes. Refuses quantised weights, and code from the repository other than our own.

    Our own is let through as the name of classes that this package has; nothing in the repository is run.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such folder; expected a Hugging Face checkpoint directory")
    data = read_small(inside(path, "config.json"))
    # Other architectures' configs hold infinities; what to say of those is that they are not supported.
    raw = parse_json(data, str(path / "config.json"), infinities=True)
    where = f"{path / 'config.json'}"
    if not isinstance(raw, dict):
        raise CheckpointError(f"{where}: got a {type(raw).__name__}, expected a mapping")
    _check_code(raw, where)
    for key in ("quantization_config", "compression_config"):
        if raw.get(key) is not None:
            raise CheckpointError(
                f"{where}: has {key}: quantised weights cannot be converted. Use the checkpoint in bf16, fp16 or fp32"
            )
    return raw, data


def _check_code(raw: dict[str, Any], where: str) -> None:
    """Refuse a map of classes that is not that of our class for the model_type, and a hybrid that calls itself its base."""
    own = {config.model_type: config.own_auto_map() for config, _, _ in HYBRIDS.values()}
    said = raw.get("model_type")
    if said in list(FAMILIES) and (marks := sorted({"mixers", "made_for_sha256"} & raw.keys())):
        raise CheckpointError(
            f"{where}: model_type is {said!r}, but {marks[0]} says that the weights are a hybrid's; expected 'hybrid_{said}'. "
            "Restore config.json or convert again"
        )
    if "auto_map" not in raw:
        return
    if said not in list(own):
        raise CheckpointError(
            f"{where}: has auto_map: the model runs code from its repository, which is refused. "
            "Use a checkpoint of a class that transformers has"
        )
    if raw["auto_map"] != own[said]:
        raise CheckpointError(
            f"{where}: auto_map is {raw['auto_map']!r}, expected that of {said}, {own[said]!r}. "
            "Restore config.json or convert again"
        )


def read_small(path: Path, limit: int = 64 << 20) -> bytes:
    """A whole file of at most `limit` bytes."""
    handle = open_regular(path)
    with os.fdopen(handle, "rb") as stream:
        data = stream.read(limit + 1)
    if len(data) > limit:
        raise CheckpointError(f"{path}: is larger than {limit >> 20} MiB; expected a small file")
    return data


def inside(folder: Path, name: str) -> Path:
    """The path of a plain file name in `folder`. Raises CheckpointError for a name or link that leads out of it.

    The hub's cache keeps `snapshots/<revision>/<name>` as links into its own `blobs`; those are let through.
    """
    if not isinstance(name, str) or not name or name in (".", "..") or set(name) & set("/\\\0"):
        raise CheckpointError(f"{folder}: the index names the file {name!r}, expected a plain name inside the folder")
    path = folder / name
    roots = [folder.resolve()]
    if roots[0].parent.name == "snapshots":
        roots.append(roots[0].parent.parent / "blobs")
    target = path.resolve()
    if target.parent not in roots:
        raise CheckpointError(f"{path}: is a link to {target}, expected a file inside the folder. Copy it there")
    return path


def build_config(raw: dict[str, Any], where: str) -> Any:
    """The config object, checked as far as building the architecture needs it."""
    kinds = [*FAMILIES, *(classes[0].model_type for classes in HYBRIDS.values())]
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in [*kinds, *NATIVE_TYPES]:
        raise CheckpointError(f"{where}: model_type is {model_type!r}, expected one of {', '.join(kinds)}")
    try:
        json.dumps(raw, allow_nan=False)
    except ValueError as error:
        raise CheckpointError(f"{where}: holds NaN or Infinity, expected finite numbers. Fetch the file again") from error
    for key in ("dtype", "torch_dtype"):
        known = {str(dtype).removeprefix("torch.") for dtype in FLOATS}
        if raw.get(key) is not None and raw[key] not in known:
            raise CheckpointError(f"{where}: {key} is {raw[key]!r}, expected one of {', '.join(sorted(known))}")
    for key, (least, greatest) in SIZES.items():
        value = raw.get(key)
        if value is not None and (type(value) is not int or not least <= value <= greatest):
            raise CheckpointError(f"{where}: {key} is {value!r}, expected an integer from {least} to {greatest}")
    try:
        config = type(AutoConfig.for_model(model_type)).from_dict(raw)
    except (StrictDataclassError, ConfigError, ValueError, TypeError, KeyError) as error:
        said = " ".join(str(error).split()).removeprefix("config.json: ")
        raise CheckpointError(f"{where}: cannot be used: {said}") from error
    if config.hidden_act not in ACT2FN:
        raise CheckpointError(f"{where}: hidden_act is {config.hidden_act!r}, expected an activation of transformers")
    rope = (config.rope_parameters or {}).get("rope_type", "default")
    if rope not in {"default", *ROPE_INIT_FUNCTIONS}:
        known = ", ".join(["default", *ROPE_INIT_FUNCTIONS])
        raise CheckpointError(f"{where}: rope_type is {rope!r}, expected one of {known}")
    if config.num_attention_heads % config.num_key_value_heads:
        raise CheckpointError(
            f"{where}: num_attention_heads is {config.num_attention_heads}, "
            f"expected a multiple of num_key_value_heads = {config.num_key_value_heads}"
        )
    kinds_of_layers = set(getattr(config, "layer_types", None) or []) - {"full_attention"}
    if model_type not in NATIVE_TYPES and (getattr(config, "sliding_window", None) is not None or kinds_of_layers):
        raise CheckpointError(
            f"{where}: sliding_window is {getattr(config, 'sliding_window', None)}: bases whose own attention is "
            "windowed are not supported. Use one without (sliding_window null, use_sliding_window false)"
        )
    return config
