"""Turn a hybrid's directory into a native class's: renamed, repeated and folded tensors, streamed, proved, then published.

In memory are a few MB or the sources of one tensor; the proof holds one layer of either model.
"""

import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig

from hybridize.checkpoint import (
    INDEX,
    TIED,
    Checkpoint,
    group_of,
    is_finite,
    open_checkpoint,
    skeleton,
)  # fmt: skip
from hybridize.companions import copy_companions
from hybridize.core import digest
from hybridize.errors import CheckpointError, ConfigError
from hybridize.fingerprint import stamps, weights_hash
from hybridize.lineage import is_complete, read_lineage, verify_files, versions, write_lineage, write_manifest
from hybridize.native import choose, target
from hybridize.native.proof import PADDED, Proof, prove, refused, sequence_tokens
from hybridize.native.target import Made
from hybridize.native.tokenizer import keep_tokenizer
from hybridize.shards import Planned, index_of, new_buffer, plan_shards, stream_tensor, tensor_bytes, write_shard
from hybridize.storage import Staging, check_output, require_space, sweep, to_json, write_json, write_text

log = logging.getLogger(__name__)

EMBEDDING, HEAD = TIED
Progress = Callable[[str, float, float], None]


@dataclass(frozen=True, kw_only=True)
class ExportSummary:
    """What an export did, or with `dry_run` would do."""

    out: Path
    target: str
    tensors: int
    bytes: int
    shards: int
    resumed_shards: int
    proof: tuple[Proof, ...]
    """Of each kind of text; empty with `dry_run`."""


def export(
    checkpoint: Path | str,
    to: str,
    out: Path | str,
    resume: bool = False,
    dry_run: bool = False,
    allow_approximate: bool = False,
    texts: dict[str, Tensor] | None = None,
    progress: Progress | None = None,
) -> ExportSummary:
    """Write a hybrid as a class that transformers has, and prove that it computes the same.

    Args:
        checkpoint: the hybrid's directory.
        to: a name of TARGETS, or "auto".
        out: the output folder; must not exist, or be empty.
        resume: go on with what a killed run of the same export left.
        dry_run: check everything, write nothing.
        allow_approximate: keep an export whose logits differ; how far is in its lineage.json.
        texts: token ids to prove it on beside random ones, by name, [sequences, tokens], int64.
        progress: called with ("export", bytes done, bytes) and ("prove", layers done, layers).

    Raises:
        ConfigError: no such class for this hybrid, the logits differ, or the output is in the way.
        CheckpointError: the directory cannot be trusted, or is no hybrid of ours.
    """
    found, out = open_checkpoint(checkpoint), Path(out)
    if not found.is_hybrid:
        raise CheckpointError(f"{found.path}: is a {found.config.model_type}, not a hybrid; it needs no export")
    name = choose(to, found.config, found.config.mixers)
    if reason := target(name).unready():
        raise ConfigError(f"{name}: {reason}")
    for label, ids in (texts or {}).items():
        if ids.dim() != 2 or ids.shape[1] < (least := sequence_tokens(found.config)):
            raise ConfigError(f"text {label!r} has shape {list(ids.shape)}, expected sequences of at least {least} tokens")
    job = Job(found, name)
    if dry_run and not is_complete(out):
        check_output(out)
        require_space(out, job.nbytes)
        return job.summary(out, 0, ())
    lineage = _lineage(job)
    if resume and is_complete(out) and read_lineage(out).get("identity") == lineage["identity"]:
        verify_files(out)
        sweep(out)
        done = tuple(Proof(**proof) for proof in read_lineage(out)["proof"])
        return job.summary(out, len(job.shards), done)
    check_output(out)
    with Staging(out, resume, digest([lineage["identity"], stamps(found)])) as staging:
        records = {shard.name: record for shard in job.shards if (record := staging.finished(shard.name))}
        resumed = len(records)
        require_space(staging.folder, sum(shard.nbytes for shard in job.shards if shard.name not in records))
        job.write(staging, records, progress)
        proof = tuple(prove(found, staging.folder, job.config, texts or {}, progress))
        if reason := refused(found for found in proof if found.text != PADDED):
            if not allow_approximate:
                # Nothing finished: what is there goes with the error.
                staging.journal["finished"].clear()
                raise ConfigError(f"{out}: {name} computes another function than the hybrid: {reason}. "
                                  "--allow-approximate keeps it; nothing was written")  # fmt: skip
            log.warning("%s: approximate: %s", out, reason)
        if padding := refused(found for found in proof if found.text == PADDED):
            log.warning("%s: %s does not take padding for nothing: %s. Texts of one length, and servers that pack, are exact",
                        out, name, padding)  # fmt: skip
        write_manifest(staging.folder, records)
        approximate = {"approximate": reason} if reason else {}
        write_lineage(staging.folder, {**lineage, **approximate, "proof": [vars(found) for found in proof]})
        staging.finish()
    return job.summary(out, resumed, proof)


class Job:
    """An export settled to the byte before anything is written.

    Attributes:
        config: of the native class.
        made: name -> how the tensor comes about.
        shards: the files to write.

    Raises:
        CheckpointError: a tensor of the hybrid would be lost, or one of the native class has no source.
    """

    def __init__(self, found: Checkpoint, name: str):
        self.found, self.name = found, name
        kind = target(name)
        self.fields = kind.config(found.config, found.config.mixers)
        self.config = AutoConfig.for_model(**{key: value for key, value in self.fields.items() if key != "architectures"})
        self.config.dtype = found.dtype
        # A tied head may be stored beside the embedding, or in its place; there is one matrix.
        tied = {HEAD} if found.config.tie_word_embeddings else set()
        self.names = ({*found.tensors} | ({EMBEDDING} if tied else set())) - tied - {*found.ignored}
        made = kind.tensors(found.config, found.config.mixers, sorted(self.names))
        self.made = {tensor.name: tensor for tensor in made}
        assert len(self.made) == len(made), "a tensor that is made twice"
        expected = skeleton(self.config)
        if self.config.tie_word_embeddings:
            expected.pop(HEAD)
        self._balance(expected)
        planned = [
            Planned(name=name, dtype=self._dtype(self.made[name]), shape=shape, group=group_of(name))
            for name, shape in expected.items()
        ]
        self.shards = plan_shards(planned)

    def _balance(self, expected: dict[str, tuple[int, ...]]) -> None:
        for lost in sorted(self.names - {source for made in self.made.values() for source in made.sources}):
            raise CheckpointError(f"{self.found.path}: {lost} has no place in {self.name}")
        for name in sorted(expected.keys() ^ self.made.keys()):
            side = "has no source in the hybrid" if name in expected else "is no tensor of the class"
            raise CheckpointError(f"{self.found.path}: {name} of {self.name} {side}")

    def _dtype(self, made: Made) -> torch.dtype:
        if not made.sources:
            return self.found.dtype
        return self.found.tensors[self.found.stored_name(made.sources[0])].dtype

    def write(self, staging: Staging, records: dict[str, dict[str, Any]], progress: Progress | None) -> None:
        """Write what is not written yet: shards, index, config and companions; `records` is completed."""
        pending = [shard for shard in self.shards if shard.name not in records]
        total, done = sum(tensor.nbytes for shard in pending for tensor in shard.tensors), 0

        def advance(count: int) -> None:
            nonlocal done
            done += count
            if progress is not None:
                progress("export", done, total)

        for shard in pending:
            records[shard.name] = write_shard(staging.folder, shard, self.pieces(), advance)
            staging.record(shard.name, records[shard.name])
        if len(self.shards) > 1:
            write_json(staging.folder / INDEX, index_of(self.shards))
        write_text(staging.folder / "config.json", to_json(self.fields))
        copy_companions(self.found.path, staging.folder)
        if keep_tokenizer(self.found.path, staging.folder):
            log.info("%s: tokenizer.json spelled out, since %s reads the files otherwise", staging.out, self.name)

    def pieces(self) -> Callable[[Planned], Iterator[memoryview]]:
        """The bytes of each tensor; holds one buffer, or one tensor with its sources."""
        buffer = new_buffer()

        def stream(tensor: Planned) -> Iterator[memoryview]:
            made = self.made[tensor.name]
            if made.make is None:
                (source,) = made.sources
                yield from stream_tensor(self.found.tensors[self.found.stored_name(source)], buffer)
                return
            value = made.make(*(self.found.read(source) for source in made.sources)).to(tensor.dtype)
            if tuple(value.shape) != tensor.shape or not is_finite(value):
                raise CheckpointError(
                    f"{self.found.path}: {tensor.name} of {self.name} comes out as {list(value.shape)}, expected finite values "
                    f"of {list(tensor.shape)}"
                )
            yield tensor_bytes(value.contiguous())

        return stream

    @property
    def nbytes(self) -> int:
        return sum(shard.nbytes for shard in self.shards)

    def summary(self, out: Path, resumed: int, proof: tuple[Proof, ...]) -> ExportSummary:
        return ExportSummary(
            out=out, target=self.name, tensors=len(self.made), bytes=self.nbytes, shards=len(self.shards),
            resumed_shards=resumed, proof=proof,
        )  # fmt: skip


def _lineage(job: Job) -> dict[str, Any]:
    found = job.found
    before = read_lineage(found.path) if is_complete(found.path) else {}
    lineage = {
        "verb": "export", "target": job.name, "base": before.get("base", {"name": found.path.name, "hash": found.hash}),
        "of": {"name": Path(os.path.abspath(found.path)).name, "hash": found.hash, "weights": weights_hash(found),
               "lineage": before},
    }  # fmt: skip
    return {**lineage, "identity": digest({"lineage": lineage, "versions": versions()})}
