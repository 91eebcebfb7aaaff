"""Hugging Face directories, read as untrusted input and written whole.

Nothing reaches transformers before config, index and every header were checked against the tensors that the
architecture expects. `lineage.json` is written last: its presence says that a directory of ours is complete.
"""

import copy
import dataclasses
import hashlib
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

from hybridize.companions import companions, copy_companions
from hybridize.errors import CheckpointError, ConfigError
from hybridize.families import NATIVE_TYPES
from hybridize.lineage import write_lineage, write_manifest
from hybridize.modeling import FP32_PARAMETERS
from hybridize.shards import (
    Planned,
    Shard,
    TensorInfo,
    index_of,
    new_buffer,
    parse_json,
    plan_shards,
    read_header,
    read_rows,
    read_tensor,
    stream_tensor,
    tensor_bytes,
    write_shard,
)
from hybridize.storage import Staging, require_space, write_json, write_text
from hybridize.untrusted import FLOATS, build_config, inside, read_config, read_small

log = logging.getLogger(__name__)

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"

PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

# Tensors that packed formats (GPTQ, AWQ, bitsandbytes, compressed-tensors, fp8) add beside or instead of `weight`.
PACKED = ("qweight", "qzeros", "scales", "g_idx", "weight_packed", "weight_scale", "weight_scale_inv", "absmax", "SCB")
# One matrix under two names where the config ties them; a checkpoint stores either or both.
TIED = ("model.embed_tokens.weight", "lm_head.weight")
# A buffer that early checkpoints stored; transformers computes it from the config.
OLD_BUFFER = "rotary_emb.inv_freq"


@dataclass(frozen=True, kw_only=True)
class Described:
    """What a directory's config.json says; all that a plan needs."""

    path: Path
    config: Any
    """The config object of transformers, or ours for a hybrid; its dtype is always set."""
    raw_config: dict[str, Any]
    family: str
    """model_type of the base, a key of FAMILIES."""
    config_hash: str
    """sha256 of config.json."""
    shapes: dict[str, tuple[int, ...]] = field(repr=False)
    """Every tensor of the architecture and its shape, in the model's order."""

    @property
    def is_hybrid(self) -> bool:
        return self.config.model_type.startswith("hybrid_")

    @property
    def is_native(self) -> bool:
        """Whether it is of a class that hybrids are exported to: it loads and runs, and nothing converts it."""
        return self.family in NATIVE_TYPES

    @property
    def dtype(self) -> torch.dtype:
        return self.config.dtype


@dataclass(frozen=True, kw_only=True)
class Checkpoint(Described):
    """A validated directory, base or hybrid. No weights are in memory."""

    tensors: dict[str, TensorInfo]
    ignored: tuple[str, ...]
    """Stored tensors that the architecture does not have and that carry nothing (old rotary buffers)."""
    hash: str
    """sha256 over config.json and the shards' headers: names, dtypes, shapes and places, but not the weights."""
    other_files: tuple[str, ...]
    """Files to go along: tokenizer, generation settings, licence."""

    def read(self, name: str) -> Tensor:
        """One tensor in its stored dtype. Raises CheckpointError when the file changed since it was checked."""
        return read_tensor(self.tensors[self.stored_name(name)])

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """As `read`, the rows from `start` to before `stop` alone."""
        return read_rows(self.tensors[self.stored_name(name)], start, stop)

    def stored_name(self, name: str) -> str:
        """The name a tensor of the architecture is stored under: of a tied pair, the one that is there."""
        if name in TIED and name not in self.tensors and self.config.tie_word_embeddings:
            return TIED[1 - TIED.index(name)]
        return name

    def layer(self, index: int) -> dict[str, Tensor]:
        """Every tensor of a decoder layer, names without `model.layers.<index>.`."""
        prefix = f"model.layers.{index}."
        return {name.removeprefix(prefix): self.read(name) for name in self.tensors if name.startswith(prefix)}


def skeleton(config: Any) -> dict[str, tuple[int, ...]]:
    """Names and shapes of every tensor of a config's causal LM, in the model's order; nothing is allocated.

    Raises:
        ConfigError: a hybrid's `mixers` do not fit.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def stored_tensors(path: Path) -> tuple[dict[str, TensorInfo], list[tuple[str, bytes]]]:
    """Every tensor of the directory and (file, header bytes) of each shard."""
    single, index = os.path.lexists(path / WEIGHTS), os.path.lexists(path / INDEX)
    if single and index:
        raise CheckpointError(f"{path}: holds both {WEIGHTS} and {INDEX}, expected one. Remove the stale one")
    if single:
        tensors, raw = read_header(inside(path, WEIGHTS))
        return tensors, [(WEIGHTS, raw)]
    if not index:
        pickles = sorted(name for name in os.listdir(path) if name.endswith(PICKLED))
        if pickles:
            raise CheckpointError(
                f"{path}: {pickles[0]} is pickled weights, which can run code and are refused; expected safetensors. "
                "Use a revision that has them"
            )
        raise CheckpointError(f"{path}: holds neither {WEIGHTS} nor {INDEX}; expected safetensors weights")
    where = str(path / INDEX)
    parsed = parse_json(read_small(inside(path, INDEX)), where)
    weight_map = parsed.get("weight_map") if isinstance(parsed, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{where}: has no weight_map; expected tensor name -> file name. Fetch the file again")
    files: dict[str, Path] = {}
    for file in weight_map.values():
        files[file if isinstance(file, str) else repr(file)] = inside(path, file)
    tensors, headers = {}, []
    for file in sorted(files):
        found, raw = read_header(files[file])
        headers.append((file, raw))
        for name, info in found.items():
            if name in tensors:
                first = tensors[name].file.name
                raise CheckpointError(f"{path}: tensor {name!r} is in {first} and in {file}, expected once")
            if (said := weight_map.get(name)) != file:
                raise CheckpointError(f"{where}: tensor {name!r} lies in {file}, but the index says {said!r}")
            tensors[name] = info
    if missing := [name for name in weight_map if name not in tensors]:
        said = weight_map[missing[0]]
        raise CheckpointError(f"{where}: tensor {missing[0]!r} is missing in {said}, where the index puts it")
    return tensors, headers


def _compare(path: Path, tensors: dict[str, TensorInfo], expected: dict[str, tuple[int, ...]], tied: bool) -> tuple[str, ...]:
    """Refuse missing, extra, misshapen and packed tensors; return the old buffers that may be left behind."""
    for name, info in tensors.items():
        if name.rsplit(".", 1)[-1] in PACKED or info.dtype not in FLOATS:
            raise CheckpointError(
                f"{path}: tensor {name!r} ({str(info.dtype).removeprefix('torch.')}) is of quantised weights, "
                "which cannot be converted. Use the checkpoint in bf16, fp16 or fp32"
            )
    ignored = tuple(name for name in tensors if name.endswith(OLD_BUFFER) and name not in expected)
    for name, shape in expected.items():
        if name not in tensors and not (tied and name in TIED and any(other in tensors for other in TIED)):
            raise CheckpointError(f"{path}: tensor {name!r} is missing, config.json asks for it. Fetch it again")
        if name in tensors and (found := tensors[name].shape) != shape:
            raise CheckpointError(f"{path}: tensor {name!r} has shape {list(found)}, expected {list(shape)}")
    for name in tensors:
        if name not in expected and name not in ignored:
            raise CheckpointError(f"{path}: tensor {name!r} is extra: the model of config.json has no such tensor")
    return ignored


def open_checkpoint(path: Path | str) -> Checkpoint:
    """Validate a base or hybrid directory and say where its tensors lie. Reads config, index and headers only.

    Raises:
        CheckpointError: something cannot be trusted or is not supported; the message names the file.
    """
    path = Path(path)
    found, config_bytes = _describe(path)
    tensors, headers = stored_tensors(path)
    ignored = _compare(path, tensors, found.shapes, bool(found.config.tie_word_embeddings))
    if found.config.dtype is None:
        found.config.dtype = tensors["model.norm.weight"].dtype
    digest = hashlib.sha256(config_bytes)
    for name, header in headers:
        digest.update(f"\0{name}\0{len(header)}\0".encode() + header)
    said = {field.name: getattr(found, field.name) for field in dataclasses.fields(Described)}
    return Checkpoint(**said, tensors=tensors, ignored=ignored, hash=digest.hexdigest(), other_files=companions(path))


def _describe(path: Path) -> tuple[Described, bytes]:
    """What config.json says, its dtype left None where it names none; and the bytes of config.json."""
    raw, data = read_config(path)
    config = build_config(raw, str(path / "config.json"))
    try:
        shapes = skeleton(config)
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from error
    family = config.model_type.removeprefix("hybrid_")
    sha = hashlib.sha256(data).hexdigest()
    return Described(path=path, config=config, raw_config=raw, family=family, config_hash=sha, shapes=shapes), data


def describe(path: Path | str) -> Described:
    """As open_checkpoint where weights are; a directory of a config.json alone is taken at its word.

    Raises:
        CheckpointError: as open_checkpoint; or there are no weights and config.json names no dtype.
    """
    path = Path(path)
    if not path.is_dir() or any(name.endswith((".safetensors", INDEX, *PICKLED)) for name in os.listdir(path)):
        return open_checkpoint(path)
    found, _ = _describe(path)
    if found.config.dtype is None:
        raise CheckpointError(f"{path / 'config.json'}: names no dtype, and no weights say it. Add torch_dtype, such as bfloat16")
    log.info("%s: no weights here; planned by config.json alone", path)
    return found


def open_base(path: Path | str) -> Checkpoint:
    """As open_checkpoint, and the directory is not a hybrid already."""
    base = open_checkpoint(path)
    _refuse_hybrid(base)
    return base


def describe_base(path: Path | str) -> Described:
    """As describe, and the directory is not a hybrid already."""
    base = describe(path)
    _refuse_hybrid(base)
    return base


def _refuse_hybrid(base: Described) -> None:
    if base.is_hybrid or base.is_native:
        kind = "a hybrid already" if base.is_hybrid else "an export of a hybrid"
        raise CheckpointError(f"{base.path}: is {kind} ({base.config.model_type}). Give the base it came from")


def load_model(path: Path | str, dtype: torch.dtype | None = None, config: Any = None) -> Any:
    """Validate a base or hybrid directory, then load it with transformers, on the CPU, in eval mode.

    Args:
        path: the directory.
        dtype: of the weights in memory; None is the checkpoint's own.
        config: in place of the directory's own, for the same tensors.

    Raises:
        CheckpointError: as open_checkpoint; or transformers reports a tensor as missing, unexpected or misshapen.
    """
    found = open_checkpoint(path)
    used = found.config if config is None else copy.deepcopy(config)
    # A class with learnt sinks has no fused attention.
    attention = "sdpa" if MODEL_FOR_CAUSAL_LM_MAPPING[type(used)]._supports_sdpa else "eager"
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        found.path, config=used, dtype=dtype or found.dtype, attn_implementation=attention, local_files_only=True,
        use_safetensors=True, trust_remote_code=False, output_loading_info=True,
    )  # fmt: skip
    model, info = loaded
    for key in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := sorted(str(name) for name in set(info[key]) - set(found.ignored)):
            raise CheckpointError(f"{path}: transformers reports {key}: {', '.join(names[:5])}; expected none")
    return model.eval()


def save_checkpoint(model: Any, tokenizer_dir: Path | str, staging: Staging, lineage: dict[str, Any]) -> None:
    """Write a live model's directory into `staging`; the caller calls `staging.finish()`.

    Weights are stored in config.dtype, A_log, dt_bias and D in fp32; a tied head is left out. Tokenizer, generation
    settings and licence come from `tokenizer_dir`. What was written is read back and checked.

    Args:
        model: a hybrid or base causal LM, on any device.
        tokenizer_dir: the directory that its companions are copied from.
        staging: where.
        lineage: as write_lineage takes it.

    Raises:
        CheckpointError: a weight is not finite.
        ConfigError: the disk is full.
    """
    state = model.state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    _save(model.config, shapes, lambda name: [state[name].detach()], Path(tokenizer_dir), staging, lineage)


def save_changed(found: Checkpoint, weights: Mapping[str, Tensor], staging: Staging, lineage: dict[str, Any]) -> None:
    """As save_checkpoint, of a directory with some of its tensors replaced; in memory are a few MB, or one replaced tensor.

    Args:
        found: the directory; config, companions and all other tensors are its.
        weights: the new values by name, any dtype.
        staging: where.
        lineage: as write_lineage takes it.
    """
    assert weights.keys() <= found.shapes.keys(), "a weight that the checkpoint does not have"
    buffer = new_buffer()

    def values(name: str) -> Iterator[Tensor]:
        if name in weights:
            yield weights[name]
            return
        info = found.tensors[found.stored_name(name)]
        for piece in stream_tensor(info, buffer):
            yield torch.frombuffer(piece, dtype=info.dtype)

    _save(found.config, found.shapes, values, found.path, staging, lineage)


def _save(
    config: Any, shapes: dict[str, tuple[int, ...]], values: Callable[[str], Iterable[Tensor]], source: Path, staging: Staging,
    lineage: dict[str, Any],
) -> None:  # fmt: skip
    """Write a directory of tensors whose values come in pieces, in order."""
    dtype = config.dtype or torch.float32
    planned = [
        Planned(name=name, dtype=stored_dtype(name, dtype), shape=shape, group=group_of(name))
        for name, shape in shapes.items()
        if not (config.tie_word_embeddings and name == "lm_head.weight")
    ]
    shards = plan_shards(planned)
    require_space(staging.folder, sum(shard.nbytes for shard in shards))

    def pieces(tensor: Planned) -> Iterator[memoryview]:
        for value in values(tensor.name):
            value = value.to(tensor.dtype)
            if not is_finite(value):
                raise CheckpointError(f"{staging.out}: {tensor.name} holds a value that is not finite; nothing was saved")
            yield tensor_bytes(value)

    records = {shard.name: write_shard(staging.folder, shard, pieces) for shard in shards}
    finish_directory(staging, config, shards, records, source, lineage)


def is_finite(tensor: Tensor) -> bool:
    """Whether no value is infinite or NaN; by the extremes, which NaN poisons, so that no mask of its size is made."""
    return tensor.numel() == 0 or all(bool(torch.isfinite(bound)) for bound in torch.aminmax(tensor))


def stored_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype a tensor of a hybrid is stored in: fp32 for what decides the decay, else the model's."""
    return torch.float32 if name.rsplit(".", 1)[-1] in FP32_PARAMETERS else dtype


def group_of(name: str) -> str:
    """What a tensor shares a shard with: its decoder layer, or nothing but itself."""
    parts = name.split(".")
    return ".".join(parts[:3]) if name.startswith("model.layers.") else name


def finish_directory(
    staging: Staging,
    config: Any,
    shards: list[Shard],
    records: dict[str, dict[str, Any]],
    source: Path,
    lineage: dict[str, Any],
) -> None:
    """What follows the weights: index, config, a hybrid's code, companions, manifest, lineage; then all is read back."""
    folder = staging.folder
    if len(shards) > 1:
        write_json(folder / INDEX, index_of(shards))
    write_text(folder / "config.json", config.to_json_string())
    if config.model_type.startswith("hybrid_"):
        config.write_code(folder)
    copy_companions(source, folder)
    write_manifest(folder, records)
    write_lineage(folder, lineage)
    found = open_checkpoint(folder)
    assert {tensor.name for shard in shards for tensor in shard.tensors} == set(found.tensors)
