"""What a teacher said of each row of a run, on disk: the form of a cache, and reading it.

CACHE/teacher.json                  what it is of, and the sha256 of every other file; its presence means complete
      head.safetensors              `head` [V, D], where hidden states are kept
      stage-01-00000.safetensors    rows in order: `hidden` [n, T, D], or `ids` and `log_probs` [n, T, k] and `log_rest`
                                    [n, T, 1]; and `marks` [n], a hash of the tokens that each row is of

Row n of a stage follows from text, seed, the stage's place, seq_tokens and documents alone (`data.TrainBlocks`), so that a
cache serves every run of which these are the same, whatever its hybrid, its losses and the number of its processes.

Letters: N rows of a stage, n of a shard, B of a batch, T tokens, D width, V vocabulary, k likeliest tokens.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import NoneType
from typing import Any

import torch
from torch import Tensor

from hybridize.core import digest
from hybridize.data import Batch, Mixture, Tokens
from hybridize.data.blocks import ROW_ORDER
from hybridize.distill.losses import LOSSES, asks_of_teacher
from hybridize.distill.signals import Head, Signals, TopK
from hybridize.errors import CheckpointError, ConfigError
from hybridize.shards import DTYPES, TensorInfo, parse_json, read_header, read_rows, read_tensor, tensor_bytes
from hybridize.storage import file_sha256
from hybridize.untrusted import inside, read_small

FORMAT = 1
MANIFEST, HEAD = "teacher.json", "head.safetensors"
OFFERS = {"hidden": frozenset({"hidden", "head"}), "top_k": frozenset({"top_k"})}
"""What is kept -> the signals that it gives a loss."""
ABOUT = {
    "keep": str, "k": (int, NoneType), "hidden_size": int, "vocab_size": int, "head_dtype": str, "seed": int, "row_order": int,
    "text": str, "tokenizer": (str, NoneType), "bos_id": (int, NoneType), "teacher": dict, "stages": list, "files": dict,
}  # fmt: skip
ABOUT_STAGE = {
    "stage": int, "name": str, "rows": int, "shard_rows": int, "seq_tokens": int, "documents": str, "dtype": str,
}  # fmt: skip
AGAIN = "write it again with `hybridize teach`"


@dataclass(frozen=True, kw_only=True, eq=False)
class TeacherCache:
    """A complete cache whose manifest was checked; `check_files` is for the rest."""

    path: Path
    manifest: dict[str, Any]

    @property
    def hash(self) -> str:
        """Of all its files."""
        return self.manifest["sha256"]

    def stage(self, number: int) -> dict[str, Any] | None:
        """The record of a stage, counted from 1; None where the cache has nothing for it."""
        return next((stage for stage in self.manifest["stages"] if stage["stage"] == number), None)

    @property
    def head_numbers(self) -> int:
        """Numbers in the teacher's head, 0 where it is not kept."""
        return self.manifest["vocab_size"] * self.manifest["hidden_size"] if self.manifest["keep"] == "hidden" else 0

    @property
    def head_dtype(self) -> torch.dtype:
        """As the teacher's directory has it."""
        return DTYPES[self.manifest["head_dtype"]]

    def token_bytes(self, options: Any) -> int:
        """Bytes of one token that a stage reads, its part of a mark aside."""
        shapes = layout(self.manifest, {"seq_tokens": 1, "dtype": options.dtype}, 1)
        return sum(torch.Size(shape).numel() * dtype.itemsize for name, (dtype, shape) in shapes.items() if name != "marks")


def shard_name(stage: int, shard: int) -> str:
    """The file of a shard, stages from 1, shards from 0."""
    return f"stage-{stage:02d}-{shard:05d}.safetensors"


def open_cache(path: Path) -> TeacherCache:
    """Read a cache's manifest, and see that every file it names is there in its full size.

    Raises:
        CheckpointError: no manifest, which a complete cache has, or one that is not what was written, or a file cut short.
    """
    file = path / MANIFEST
    if not file.is_file():
        raise CheckpointError(f"{path}: has no {MANIFEST}, so that the cache is not complete; {AGAIN}")
    manifest = parse_json(read_small(inside(path, MANIFEST), 1 << 30), str(file))
    content = {key: value for key, value in manifest.items() if key != "sha256"} if isinstance(manifest, dict) else None
    if content is None or manifest.get("sha256") != digest(content):
        raise CheckpointError(f"{file}: is damaged, it is not what was written; {AGAIN}")
    if content.get("format") != FORMAT:
        raise CheckpointError(f"{file}: format is {content.get('format')!r}, expected {FORMAT}; {AGAIN}")
    _check_form(content, str(file))
    for name, record in content["files"].items():
        found = inside(path, name)
        if not found.is_file() or found.stat().st_size != record["bytes"]:
            raise CheckpointError(f"{found}: is absent or does not have its {record['bytes']} bytes; {AGAIN}")
    return TeacherCache(path=path, manifest=manifest)


def _check_form(content: dict[str, Any], where: str) -> None:
    """Raise CheckpointError for a manifest without something that is read later, or that leaves a shard of a stage out."""
    for owner, value, kinds in (
        ("it", content, ABOUT),
        *(("a stage", stage, ABOUT_STAGE) for stage in content.get("stages") or [None]),
        *(("a file", record, {"sha256": str, "bytes": int}) for record in (content.get("files") or {"": None}).values()),
    ):
        for key, kind in kinds.items():
            if not isinstance(value, dict) or not isinstance(value.get(key), kind):
                found = value.get(key) if isinstance(value, dict) else value
                raise CheckpointError(f"{where}: {owner} has {key} {found!r}, expected as `hybridize teach` writes it; {AGAIN}")
    for stage in content["stages"]:
        for shard in range(-(-stage["rows"] // max(1, stage["shard_rows"]))):
            if shard_name(stage["stage"], shard) not in content["files"]:
                raise CheckpointError(f"{where}: has no file {shard_name(stage['stage'], shard)}, which its rows need; {AGAIN}")


def check_files(cache: TeacherCache, rank: int, world: int, progress: Callable[[str, float, float], None] | None) -> None:
    """Hash the cache's files, of several processes each its share. Raises CheckpointError for one that was changed."""
    files = list(cache.manifest["files"].items())
    for count, (name, record) in enumerate(files[rank::world], 1):
        if file_sha256(cache.path / name) != record["sha256"]:
            raise CheckpointError(f"{cache.path / name}: is damaged (sha256 differs from {MANIFEST}); {AGAIN}")
        if progress is not None:
            progress("check cache", min(len(files), count * world), len(files))


def check_losses(options: Any, keep: str, k: int | None, where: str) -> None:
    """Check that what is kept of a teacher is enough for every loss of a stage.

    Args:
        options: the stage's.
        keep: "hidden" or "top_k".
        k: how many tokens of the latter.
        where: what messages begin with.

    Raises:
        ConfigError: a loss needs more; the message says what would do.
    """
    for spec in options.losses:
        loss = LOSSES.build(spec)
        ways = [way - {"ids"} for way in asks_of_teacher(loss)]
        if frozenset() in ways:
            continue
        if not any(way <= OFFERS[keep] for way in ways):
            if any(way <= OFFERS["hidden"] for way in ways):
                remedy = "keep hidden states (--keep hidden), or use the loss top_k_kl"
            else:
                remedy = "give the teacher's own directory"
            raise ConfigError(
                f"{where}: the loss {spec['name']!r} needs the teacher's {' and '.join(sorted(ways[0]))}, expected one that "
                f"reads {' and '.join(sorted(OFFERS[keep]))}, which is what is kept; {remedy}"
            )
        if keep == "top_k" and OFFERS["top_k"] in ways:
            try:
                loss.check_top_k(k)
            except ConfigError as error:
                raise ConfigError(f"{where}: {error}") from error


def cached_stages(built: list[tuple[str, Any]]) -> list[tuple[int, str, Any]]:
    """(number from 1, name, options) of the stages of a run that a cache can stand in for the teacher in."""
    numbered = ((number, name, options) for number, (name, options) in enumerate(built, 1))
    return [(number, name, options) for number, name, options in numbered if options.cacheable and options.needs_teacher]


def rows_follow_from(options: Any) -> dict[str, Any]:
    """What of a stage's options decides its rows, and what is kept of them."""
    return {"seq_tokens": options.seq_tokens, "documents": options.documents, "dtype": options.dtype}


def run_follows_from(seed: int, vocab_size: int, tokenizer: str | None) -> dict[str, Any]:
    """What of a run decides the same, its text aside, which may take long to read."""
    return {"tokenizer": tokenizer, "vocab_size": vocab_size, "seed": seed, "row_order": ROW_ORDER}


def check_run(cache: TeacherCache, built: list[tuple[str, Any]], run: dict[str, Any]) -> None:
    """Check that a cache is of the rows of a run, before its text is read.

    Args:
        cache: as `open_cache` gives it.
        built: (name, options) of every stage.
        run: as `run_follows_from` gives it.

    Raises:
        ConfigError: the first thing that differs.
    """
    for key, expected in run.items():
        _expect(cache, key, cache.manifest[key], expected)
    for number, name, options in cached_stages(built):
        found = cache.stage(number)
        where = f"stage {number} ({name})"
        if found is None:
            held = ", ".join(f"{stage['stage']} ({stage['name']})" for stage in cache.manifest["stages"])
            raise ConfigError(f"{cache.path}: holds rows of stage {held}, expected {where} too; {AGAIN} for this recipe")
        for key, expected in rows_follow_from(options).items():
            _expect(cache, f"{where}: {key}", found[key], expected)
        if found["rows"] < (needed := options.steps * options.step_rows):
            raise ConfigError(
                f"{cache.path}: {where}: holds {found['rows']} rows, expected at least {needed} for {options.tokens} tokens; "
                f"train on fewer, or {AGAIN}"
            )
        check_losses(options, cache.manifest["keep"], cache.manifest["k"], f"{cache.path}: {where}")


def check_text(cache: TeacherCache, text: Tokens | Mixture) -> None:
    """Check that a cache is of a run's text. Raises ConfigError."""
    _expect(cache, "the text's hash", cache.manifest["text"], text.sha256)
    _expect(cache, "bos_id", cache.manifest["bos_id"], text.bos_id)


def _expect(cache: TeacherCache, key: str, found: Any, expected: Any) -> None:
    if found != expected:
        raise ConfigError(
            f"{cache.path}: {key} is {found!r} in the cache, expected {expected!r} as in this run; change the run, or {AGAIN}"
        )


def marks_of(batch: Batch) -> Tensor:
    """A hash of what each row holds, tokens and positions: [B], int64."""
    rows = zip(batch.ids.cpu(), batch.ids if batch.positions is None else batch.positions.cpu(), strict=True)
    packed = batch.positions is not None
    hashes = (hashlib.sha256(bytes(tensor_bytes(ids)) + (bytes(tensor_bytes(at)) if packed else b"")) for ids, at in rows)
    return torch.tensor([int.from_bytes(found.digest()[:8], "little", signed=True) for found in hashes])


class CachedSignals:
    """A stage's teacher, read from a cache.

    Args:
        cache: the cache, checked for this run.
        number: the stage, counted from 1.
        device: where signals go.
    """

    def __init__(self, cache: TeacherCache, number: int, device: torch.device):
        record = cache.stage(number)
        assert record is not None
        self.cache, self.record, self.device = cache, record, device
        self.headers: dict[int, dict[str, TensorInfo]] = {}

    @cached_property
    def head(self) -> Head:
        """The teacher's, as a model of the stage's dtype has it: in its own, or widened. Raises CheckpointError."""
        path, about = inside(self.cache.path, HEAD), self.cache.manifest
        found, _ = read_header(path)
        shapes = {name: info.shape for name, info in found.items()}
        if shapes != (expected := {"head": (about["vocab_size"], about["hidden_size"])}):
            raise CheckpointError(f"{path}: holds {shapes}, expected {expected}; {AGAIN}")
        weight = read_tensor(found["head"])
        return Head(weight=(weight.float() if self.record["dtype"] == "fp32" else weight).to(self.device))

    def signals(self, batch: Batch) -> Signals:
        """What the teacher said of a micro-batch: [B, T, ...] each.

        Raises:
            CheckpointError: rows that are not those of the batch, or a file that was changed since it was checked.
        """
        found = self.rows(batch)
        if "hidden" in found:
            return Signals(hidden=found["hidden"], head=self.head, ids=batch.ids, positions=batch.positions)
        kept = TopK(ids=found["ids"], log_probs=found["log_probs"], log_rest=found["log_rest"])
        return Signals(top_k=kept, ids=batch.ids, positions=batch.positions)

    def rows(self, batch: Batch) -> dict[str, Tensor]:
        """The stored tensors of a batch's rows, read by byte range, nothing else of their files."""
        assert batch.numbers is not None
        numbers, parts = batch.numbers.tolist(), []
        start, stop, each = numbers[0], numbers[-1] + 1, self.record["shard_rows"]
        assert numbers == list(range(start, stop)), "rows of a micro-batch are neighbours"
        while start < stop:
            shard, at = divmod(start, each)
            count = min(stop - start, each - at)
            parts.append({name: read_rows(info, at, at + count) for name, info in self._shard(shard).items()})
            start += count
        found = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        marks = found.pop("marks")
        if not torch.equal(marks, marks_of(batch)):
            row = numbers[int((marks != marks_of(batch)).nonzero()[0])]
            raise CheckpointError(
                f"{self.cache.path}: row {row} of stage {self.record['stage']} is of other tokens than this run's; {AGAIN}"
            )
        return {name: tensor.to(self.device, non_blocking=True) for name, tensor in found.items()}

    def _shard(self, shard: int) -> dict[str, TensorInfo]:
        """Where the tensors of a shard lie; checked against the manifest when it is first read."""
        if shard not in self.headers:
            path = inside(self.cache.path, shard_name(self.record["stage"], shard))
            found, _ = read_header(path)
            rows = min(self.record["shard_rows"], self.record["rows"] - shard * self.record["shard_rows"])
            expected = layout(self.cache.manifest, self.record, rows)
            if {name: (info.dtype, info.shape) for name, info in found.items()} != expected:
                raise CheckpointError(f"{path}: its tensors are not those that {MANIFEST} speaks of; {AGAIN}")
            self.headers[shard] = found
        return self.headers[shard]


def layout(manifest: dict[str, Any], stage: dict[str, Any], rows: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """dtype and shape of each tensor of a shard of some rows."""
    tokens, k = stage["seq_tokens"], min(manifest["k"] or 0, manifest["vocab_size"] - 1)
    marks = {"marks": (torch.int64, (rows,))}
    if manifest["keep"] == "hidden":
        dtype = torch.float32 if stage["dtype"] == "fp32" else torch.bfloat16
        return {**marks, "hidden": (dtype, (rows, tokens, manifest["hidden_size"]))}
    many, one = (rows, tokens, k), (rows, tokens, 1)
    return {**marks, "ids": (torch.int32, many), "log_probs": (torch.float32, many), "log_rest": (torch.float32, one)}
