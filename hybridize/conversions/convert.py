"""Carry a plan out, out of core: plan every output file first, then stream.

Copied tensors move as bytes through a small buffer; computed layers are made one at a time per worker. The output's
bytes depend on base, plan, text and versions only, not on the order or number of workers, nor on how often a run was
killed.
"""

import contextlib
import hashlib
import logging
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hybridize.checkpoint import finish_directory
from hybridize.conversions.job import Job, open_job
from hybridize.conversions.layer import LayerCounts
from hybridize.core import Plan, digest
from hybridize.errors import ConfigError
from hybridize.fingerprint import stamps
from hybridize.lineage import is_complete, origin, read_lineage, verify_files, versions
from hybridize.shards import (
    Shard,
    tensor_bytes,
    write_shard,
)
from hybridize.storage import Staging, check_output, require_space, sweep

log = logging.getLogger(__name__)

Progress = Callable[[str, float, float], None]

# Beside the weights an output has tokenizer, config, manifest and lineage.
SMALL_FILES_BYTES = 32 << 20


@dataclass(frozen=True, kw_only=True)
class ConversionSummary:
    """What a conversion did, or with `dry_run` would do."""

    out: Path
    layers: tuple[LayerCounts, ...]
    """The mixers of each layer, then what lies outside them."""
    bytes: int
    shards: int
    resumed_shards: int
    """Shards that an earlier, killed run had finished."""

    @property
    def copied(self) -> int:
        return sum(layer.copied for layer in self.layers)

    @property
    def computed(self) -> int:
        return sum(layer.computed for layer in self.layers)

    @property
    def dropped(self) -> int:
        return sum(len(layer.dropped) for layer in self.layers)


def convert(
    plan: Plan,
    out: Path | str,
    text: Tensor | None = None,
    resume: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
    workers: int | None = None,
    base_path: Path | str | None = None,
    lineage_extra: dict[str, Any] | None = None,
) -> ConversionSummary:
    """Write the hybrid that a plan describes.

    Args:
        plan: from `plan` or read from its file.
        out: the output folder; must not exist, or be empty.
        text: token ids for calibrated conversions, [sequences, tokens], int64.
        resume: go on with what a killed run of the same conversion left.
        dry_run: check everything, write nothing.
        progress: called with (label, done, total); bytes for "convert".
        workers: shards written at once; None is the number of cores, at most 4. Not visible in the output.
        base_path: where the base lies now, when not where the plan says.
        lineage_extra: keys to add to lineage.json.

    Returns:
        Counts per layer.

    Raises:
        CheckpointError: the base cannot be trusted or is not the plan's.
        ConfigError: the output is in the way, text is missing, or the disk is too small.
    """
    out = Path(out)
    location = str(base_path if base_path is not None else plan.base)
    job = open_job(plan, location)
    if job.calibrated and text is None:
        raise ConfigError(
            f"layer {job.calibrated[0]}: its conversion is calibrated and needs text, got none. "
            "Give text, or choose another method"
        )
    lineage = _lineage(job, location, text if job.calibrated else None, lineage_extra)
    if resume and is_complete(out) and read_lineage(out).get("identity") == lineage["identity"]:
        verify_files(out)
        sweep(out)
        log.info("%s: already complete", out)
        return _summary(job, out, resumed=len(job.shards))
    check_output(out)
    if job.base.path.resolve() in out.resolve().parents:
        raise ConfigError(f"{out}: lies inside the base {job.base.path}, which stays as it is. Choose another output")
    for counts in job.counts:
        log.info("%s", counts)
    if dry_run:
        require_space(out, job.nbytes + SMALL_FILES_BYTES)
        return _summary(job, out, resumed=0)
    with Staging(out, resume, digest([lineage["identity"], stamps(job.base)])) as staging:
        resumed = _fill(job, staging, text, progress, workers or min(4, os.cpu_count() or 1), lineage)
        staging.finish()
    return _summary(job, out, resumed)


def _fill(
    job: Job, staging: Staging, text: Tensor | None, progress: Progress | None, workers: int, lineage: dict[str, Any]
) -> int:
    """Write all that is not written yet; return how many shards were."""
    records = {shard.name: record for shard in job.shards if (record := staging.finished(shard.name))}
    resumed = len(records)
    pending = [shard for shard in job.shards if shard.name not in records]
    require_space(staging.folder, sum(shard.nbytes for shard in pending) + SMALL_FILES_BYTES)
    with single_threaded():
        calibrated = _calibrate(job, pending, text, staging, progress)
        records |= _write(job, pending, calibrated, staging, progress, workers)
    finish_directory(staging, job.config, job.shards, records, job.base.path, lineage)
    return resumed


def _summary(job: Job, out: Path, resumed: int) -> ConversionSummary:
    return ConversionSummary(out=out, layers=tuple(job.counts), bytes=job.nbytes, shards=len(job.shards), resumed_shards=resumed)


def _lineage(job: Job, location: str, text: Tensor | None, extra: dict[str, Any] | None) -> dict[str, Any]:
    plan = {key: value for key, value in job.plan.to_dict().items() if key not in ("base", "origin")}
    calibration = None
    if text is not None:
        if text.dim() != 2 or text.dtype != torch.int64:
            raise ConfigError(f"text has shape {list(text.shape)} and {text.dtype}, expected int64 [sequences, tokens]")
        calibration = {
            "sequences": text.shape[0],
            "tokens": text.shape[1],
            "sha256": hashlib.sha256(tensor_bytes(text)).hexdigest(),
        }
    base = {"name": Path(os.path.abspath(location)).name, "location": location, "hash": job.base.hash, **origin(location)}
    lineage = {**(extra or {}), "verb": "convert", "base": base, "plan": plan, "calibration": calibration}
    return {**lineage, "identity": digest({"lineage": lineage, "versions": versions()})}


@contextlib.contextmanager
def single_threaded() -> Iterator[None]:
    """One torch thread per worker: workers share the cores, and decompositions give the same bits on any number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Stopped(Exception):
    """Ends a worker because another one failed; never leaves this module."""


def _calibrate(
    job: Job, pending: list[Shard], text: Tensor | None, staging: Staging, progress: Progress | None
) -> dict[int, Path]:
    """The computed tensors of calibrated layers, where a shard yet to be written needs any."""
    needed = {job.layer_of(tensor.name) for shard in pending for tensor in shard.tensors}
    if text is None or not needed & set(job.calibrated):
        return {}
    # Loaded here, because it brings the model's forward pass along, which copying tensors has no need of.
    from hybridize.conversions.calibrate import calibrate

    folder = staging.scratch / "calibration"
    folder.mkdir(exist_ok=True)
    return calibrate(job.plan, job.base, text, folder, progress)


def _write(
    job: Job,
    pending: list[Shard],
    calibrated: dict[int, Path],
    staging: Staging,
    progress: Progress | None,
    workers: int,
) -> dict[str, dict[str, Any]]:
    """Write the pending shards, `workers` at a time; what is finished is noted in the journal at once."""
    total = sum(tensor.nbytes for shard in pending for tensor in shard.tensors)
    lock = threading.Lock()
    stop = threading.Event()
    done = 0
    records: dict[str, dict[str, Any]] = {}

    def advance(count: int) -> None:
        nonlocal done
        with lock:
            done += count
            if progress is not None:
                progress("convert", done, total)
        if stop.is_set():
            raise _Stopped

    def work(shard: Shard) -> None:
        record = write_shard(staging.folder, shard, job.pieces(calibrated), advance)
        with lock:
            records[shard.name] = record
            staging.record(shard.name, record)

    with ThreadPoolExecutor(max_workers=workers) as pool:
        tasks = [pool.submit(work, shard) for shard in pending]
        try:
            finished, _ = wait(tasks, return_when=FIRST_EXCEPTION)
            for task in finished:
                task.result()
        except BaseException:
            # The other workers stop at their next piece, so that the error shows now and not an hour later.
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise
    return records
