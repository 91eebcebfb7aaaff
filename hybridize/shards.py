"""safetensors files, read and written by byte range: a header is checked whole before one tensor is believed.

Reading is by pread, never mmap: a file cut short while open raises instead of killing the process, and memory stays
what we ask for. Writing plans every file's header first and then streams; nothing the size of a file is ever held.
Source: the safetensors format, https://github.com/huggingface/safetensors#format.
"""

import dataclasses
import hashlib
import json
import logging
import math
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hybridize.errors import CheckpointError
from hybridize.storage import BUFFER_BYTES, LargeFile

log = logging.getLogger(__name__)

MAX_HEADER_BYTES = 100_000_000
"""The format's own limit."""
MAX_SHARD_BYTES = 512 << 20
"""A shard is the unit of parallel work and of what a kill can cost; a group of tensors that is larger has its own."""

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """Where a tensor lies: `nbytes` bytes from `offset` (counted from the start of the file)."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def parse_json(data: bytes, where: str, infinities: bool = False) -> Any:
    """JSON from an untrusted file: a key given twice is refused, NaN and infinity too but for `infinities`.

    Raises:
        CheckpointError: it cannot be read so.
    """

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(items)
        if len(result) != len(items):
            seen: set[str] = set()
            twice = next(key for key, _ in items if key in seen or seen.add(key))
            raise ValueError(f"the key {twice!r} is given twice")
        return result

    def constant(name: str) -> Any:
        if infinities:
            return float(name)
        raise ValueError(f"{name} is not JSON")

    try:
        return json.loads(data, object_pairs_hook=pairs, parse_constant=constant)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: not valid JSON ({error}). Fetch the file again") from error


def open_regular(path: Path) -> int:
    """A read handle on an ordinary file. Raises CheckpointError for a folder, pipe or device, which could hang us."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise CheckpointError(f"{path}: not an ordinary file; expected one. Fetch the checkpoint again")
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file; the checkpoint is incomplete. Fetch it again") from error
    except PermissionError as error:
        raise CheckpointError(f"{path}: permission denied; expected a readable file") from error


def _entry(path: Path, name: str, entry: Any, start: int) -> TensorInfo:
    where = f"{path}: tensor {name!r}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where}: its header entry is not dtype, shape and data_offsets. Fetch the file again")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(f"{where}: got dtype {dtype!r}, expected one of {', '.join(DTYPES)}")
    for field, values in (("shape", shape), ("data_offsets", offsets)):
        if not isinstance(values, list) or any(type(value) is not int or value < 0 for value in values):
            raise CheckpointError(f"{where}: {field} is not a list of integers >= 0. Fetch the file again")
    if len(shape) > 8 or len(offsets) != 2:
        raise CheckpointError(f"{where}: got {len(shape)} dimensions and {len(offsets)} offsets, expected <= 8 and 2")
    nbytes = math.prod(shape) * DTYPES[dtype].itemsize
    if offsets[1] - offsets[0] != nbytes:
        raise CheckpointError(f"{where}: spans {offsets[1] - offsets[0]} bytes, expected {nbytes} for {dtype} {shape}")
    return TensorInfo(file=path, dtype=DTYPES[dtype], shape=tuple(shape), offset=start + offsets[0], nbytes=nbytes)


def read_header(path: Path) -> tuple[dict[str, TensorInfo], bytes]:
    """Read and check the header of a safetensors file.

    Returns:
        (name -> where the tensor lies, in the order of the bytes; the header's bytes).

    Raises:
        CheckpointError: it lies: size, JSON, names, dtypes, shapes, holes, overlaps, bytes missing or left over.
    """
    handle = open_regular(path)
    try:
        size = os.fstat(handle).st_size
        length = int.from_bytes(os.pread(handle, 8, 0), "little")
        if size < 8 or length > min(MAX_HEADER_BYTES, size - 8):
            raise CheckpointError(
                f"{path}: the header claims {length} bytes in a file of {size}, at most {MAX_HEADER_BYTES} are "
                "allowed: truncated or not safetensors. Fetch the file again"
            )
        raw = os.pread(handle, length, 8)
    finally:
        os.close(handle)
    header = parse_json(raw, f"{path}: header")
    if not isinstance(header, dict):
        kind = type(header).__name__
        raise CheckpointError(f"{path}: the header is a {kind}, expected a mapping. Fetch the file again")
    header.pop("__metadata__", None)
    start = 8 + length
    tensors = {name: _entry(path, name, entry, start) for name, entry in header.items()}
    tensors = dict(sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)))
    end = start
    for name, info in tensors.items():
        if info.offset != end:
            raise CheckpointError(
                f"{path}: tensor {name!r} starts at byte {info.offset}, expected {end}: overlap or hole. Fetch it again"
            )
        end += info.nbytes
    if end != size:
        word = "truncated" if size < end else "bytes left over"
        raise CheckpointError(f"{path}: has {size} bytes, expected {end} by its header: {word}. Fetch the file again")
    return tensors, raw


def _fill(handle: int, view: memoryview, offset: int, path: Path) -> None:
    while len(view):
        count = os.preadv(handle, [view], offset)
        if count == 0:
            raise CheckpointError(f"{path}: ended at byte {offset} while being read: it was cut. Fetch it again")
        view, offset = view[count:], offset + count


def read_tensor(info: TensorInfo) -> Tensor:
    """One tensor, in its stored dtype and shape, in memory of its own."""
    raw = torch.empty(info.nbytes, dtype=torch.uint8)
    handle = open_regular(info.file)
    try:
        _fill(handle, raw.numpy().data, info.offset, info.file)
    finally:
        os.close(handle)
    return raw.view(info.dtype).view(info.shape)


class OnDemand(Mapping):
    """Tensors by name, each read when it is asked for and not kept: they need not be in memory at once."""

    def __init__(self, places: dict[str, TensorInfo]):
        self.places = places

    def __getitem__(self, name: str) -> Tensor:
        return read_tensor(self.places[name])

    def __contains__(self, name: object) -> bool:
        return name in self.places

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)


def read_rows(info: TensorInfo, start: int, stop: int) -> Tensor:
    """Rows `start` to before `stop` of a tensor of one dimension or more, as read_tensor, and nothing else of it."""
    row = info.nbytes // max(1, info.shape[0])
    shape = (stop - start, *info.shape[1:])
    return read_tensor(dataclasses.replace(info, shape=shape, offset=info.offset + start * row, nbytes=(stop - start) * row))


def stream_tensor(info: TensorInfo, buffer: memoryview) -> Iterator[memoryview]:
    """The bytes of one tensor in pieces of at most `buffer`, which each piece reuses; the page cache stays small."""
    handle = open_regular(info.file)
    try:
        for done in range(0, info.nbytes, len(buffer)):
            piece = buffer[: min(len(buffer), info.nbytes - done)]
            _fill(handle, piece, info.offset + done, info.file)
            if hasattr(os, "posix_fadvise"):
                # The disk fetches the next piece while this one is hashed and written; this one is not read again.
                os.posix_fadvise(handle, info.offset + done + len(piece), len(buffer), os.POSIX_FADV_WILLNEED)
                os.posix_fadvise(handle, info.offset + done, len(piece), os.POSIX_FADV_DONTNEED)
            yield piece
    finally:
        os.close(handle)


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor on the CPU, row-major, without a copy where it is contiguous already."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A tensor to be written. Tensors of one `group` share a file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    group: str

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One file to be written: its name, its header (length field included) and its tensors in order."""

    name: str
    header: bytes
    tensors: tuple[Planned, ...]

    @property
    def nbytes(self) -> int:
        return len(self.header) + sum(tensor.nbytes for tensor in self.tensors)


def _header(tensors: Iterable[Planned]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        entries[tensor.name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [end, end + tensor.nbytes],
        }
        end += tensor.nbytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def plan_shards(tensors: list[Planned], limit: int = MAX_SHARD_BYTES) -> list[Shard]:
    """Divide tensors, in order, into files of at most `limit` bytes of data; a group is never divided."""
    groups: dict[str, list[Planned]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.group, []).append(tensor)
    files: list[list[Planned]] = [[]]
    held = 0
    for group in groups.values():
        size = sum(tensor.nbytes for tensor in group)
        if files[-1] and held + size > limit:
            files.append([])
            held = 0
        files[-1].extend(group)
        held += size
    if len(files) == 1:
        names = ["model.safetensors"]
    else:
        names = [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    files = [_aligned(file) for file in files]
    return [Shard(name=n, header=_header(file), tensors=tuple(file)) for n, file in zip(names, files, strict=True)]


def _aligned(tensors: list[Planned]) -> list[Planned]:
    """An order in which every tensor starts at a multiple of its element, as readers that map the file require."""
    groups = list(dict.fromkeys(tensor.group for tensor in tensors))
    ordered = sorted(tensors, key=lambda tensor: (groups.index(tensor.group), -tensor.dtype.itemsize))
    end = 0
    for tensor in ordered:
        if end % tensor.dtype.itemsize:
            # An odd number of 2-byte elements before 4-byte ones: give up the groups' order.
            return sorted(ordered, key=lambda tensor: -tensor.dtype.itemsize)
        end += tensor.nbytes
    return ordered


def index_of(shards: list[Shard]) -> dict[str, Any]:
    """The model.safetensors.index.json of several shards."""
    weight_map = {tensor.name: shard.name for shard in shards for tensor in shard.tensors}
    total = sum(tensor.nbytes for shard in shards for tensor in shard.tensors)
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}


def write_shard(
    folder: Path,
    shard: Shard,
    pieces: Callable[[Planned], Iterable[memoryview]],
    advance: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Write one planned file, hashing as it goes; whole and on disk, or not there.

    Args:
        folder: where.
        shard: the file.
        pieces: the bytes of a tensor, in order, in pieces of any size.
        advance: called with the number of bytes after each piece.

    Returns:
        {"sha256", "bytes"}.

    Raises:
        ConfigError: the disk is full or not writable.
    """
    whole = hashlib.sha256(shard.header)
    with LargeFile(folder / shard.name) as file:
        file.write(shard.header)
        for tensor in shard.tensors:
            before = file.size
            for piece in pieces(tensor):
                whole.update(piece)
                file.write(piece)
                if advance is not None:
                    advance(len(piece))
            assert file.size - before == tensor.nbytes, tensor.name
    return {"sha256": whole.hexdigest(), "bytes": file.size}


def new_buffer() -> memoryview:
    """A buffer for stream_tensor."""
    return memoryview(bytearray(BUFFER_BYTES))
