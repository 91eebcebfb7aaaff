"""teach: what a teacher says of the rows that a run will train on, written once for every run that reads it.

A shard of rows is in memory at a time. A killed call goes on behind its last finished shard. Several processes, started by
torchrun, write a shard each and need one file system.
"""

import contextlib
import dataclasses
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor

from hybridize.checkpoint import describe, is_finite, load_model, open_checkpoint
from hybridize.core import digest
from hybridize.data import Batch, Mixture, Sources, Tokens, TrainBlocks, load_tokenizer, read_tokens, tokenizer_hash
from hybridize.distill.job import Job, blocks_of, configs_of, wanted
from hybridize.distill.kl import read_hidden
from hybridize.distill.loop import seed_of
from hybridize.distill.losses import LOSSES, asks_of_teacher
from hybridize.distill.losses.top_k_kl import likeliest
from hybridize.distill.signals import Head
from hybridize.distill.teacher_cache import (
    FORMAT,
    HEAD,
    MANIFEST,
    OFFERS,
    cached_stages,
    check_losses,
    layout,
    marks_of,
    open_cache,
    rows_follow_from,
    run_follows_from,
    shard_name,
)
from hybridize.distill.teachers import check_teacher, is_cache, runs_model, teacher_of
from hybridize.errors import ConfigError, TrainingError
from hybridize.kernels.linear_kl.heads import each_logits
from hybridize.lineage import versions
from hybridize.shards import DTYPES, NAMES, Planned, Shard, plan_shards, tensor_bytes, write_shard
from hybridize.storage import Staging, file_sha256, partial_folder, require_space, sweep, write_json

log = logging.getLogger(__name__)

Progress = Callable[[str, float, float], None]
# A shard is in memory while it is made, and what a kill can cost.
SHARD_BYTES = 512 << 20


@dataclass(frozen=True, kw_only=True)
class StageNeed:
    """What a cache will hold of one stage."""

    stage: int
    """From 1."""
    name: str
    rows: int
    tokens: int
    bytes: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Lesson:
    """One call of teach: what it writes, and what that follows from."""

    student: Path
    model: Path
    """The teacher's directory."""
    built: list[tuple[str, Any]]
    content: dict[str, Any]
    """The manifest but for text and files."""

    @property
    def beside(self) -> list[str]:
        """One line for each stage that reads more of its teacher than a cache holds."""
        said = f"reads more of its teacher than logits: distill will run {teacher_of(self.student, None).model} itself there"
        names = [name for name, options in self.built if runs_model(options, None) and not options.cacheable]
        return [f"{name} {said}" for name in names]

    @property
    def bytes(self) -> int:
        """Of all stages and the teacher's head, headers aside."""
        head = self.content["vocab_size"] * self.content["hidden_size"] * DTYPES[self.content["head_dtype"]].itemsize
        return sum(need.bytes for need in self.needs) + (head if self.content["keep"] == "hidden" else 0)

    @property
    def needs(self) -> list[StageNeed]:
        found = []
        for record in self.content["stages"]:
            rows = record["rows"]
            nbytes, tokens = rows * _row_bytes(self.content, record), rows * record["seq_tokens"]
            found.append(StageNeed(stage=record["stage"], name=record["name"], rows=rows, tokens=tokens, bytes=nbytes))
        return found


def plan_lesson(
    student_dir: Path | str, stages: list[dict[str, Any]], teacher: str | Path | None = None, keep: str = "hidden",
    k: int | None = None, seed: int = 0,
) -> Lesson:  # fmt: skip
    """Check what `teach` is asked for, before any text or weights are read; `needs` of the result says what it will take.

    Args:
        student_dir: a hybrid directory.
        stages: as `distill` takes them.
        teacher: a model's directory; None is the base that the student's lineage names.
        keep: "hidden" for final hidden states, "top_k" for the likeliest tokens.
        k: how many of these; None is the k of the stages' own losses.
        seed: the run's.

    Raises:
        ConfigError: no stage that a cache can serve, a loss that needs more than is kept, a teacher of other tokens.
        CheckpointError: student or teacher cannot be read.
    """
    student_dir, built = Path(student_dir), wanted(stages)
    if keep not in OFFERS:
        raise ConfigError(f"keep is {keep!r}, expected one of {', '.join(OFFERS)}")
    if teacher is not None and is_cache(Path(teacher)):
        raise ConfigError(f"{teacher}: is a teacher's cache, expected the directory of a model")
    student, model = open_checkpoint(student_dir), teacher_of(student_dir, teacher).model
    found = open_checkpoint(model)
    check_teacher(student_dir, model)
    served = cached_stages(built)
    if not served:
        names = ", ".join(name for name, _ in built)
        raise ConfigError(
            f"teach: no stage of {names} reads a teacher's logits, expected one such as kl; distill without a cache"
        )
    k = _kept_k([options for _, _, options in served], keep, k)
    content: dict[str, Any] = {
        "format": FORMAT, "keep": keep, "k": k, "hidden_size": found.config.hidden_size, "versions": versions(),
        "head_dtype": NAMES[found.tensors[found.stored_name("lm_head.weight")].dtype],
        **run_follows_from(seed, student.config.vocab_size, tokenizer_hash(student_dir)), "stages": [],
    }  # fmt: skip
    for number, name, options in served:
        check_losses(options, keep, k, f"stage {number} ({name})")
        record = {
            "stage": number, "name": name, "rows": options.steps * options.step_rows, "rows_at_once": options.rows,
            **rows_follow_from(options),
        }  # fmt: skip
        # Whole micro-batches, so that the teacher reads what it would read in a run.
        record["shard_rows"] = options.rows * max(1, SHARD_BYTES // (_row_bytes(content, record) * options.rows))
        content["stages"].append(record)
    return Lesson(student=student_dir, model=model, built=built, content=content)


def _kept_k(served: list[Any], keep: str, k: int | None) -> int | None:
    """How many tokens are kept. Raises ConfigError where that does not follow from the losses."""
    if keep != "top_k":
        if k is not None:
            raise ConfigError(f"k is {k}, and keep is {keep!r}; k goes with --keep top_k")
        return None
    if k is None:
        losses = [LOSSES.build(spec) for options in served for spec in options.losses]
        found = sorted({loss.k for loss in losses if OFFERS["top_k"] in asks_of_teacher(loss)})
        if len(found) != 1:
            said = ", ".join(map(str, found)) or "no loss that has one"
            raise ConfigError(f"k is not given, and the stages' losses have {said}, expected one k; use top_k_kl, or give --k")
        return found[0]
    if k < 1:
        raise ConfigError(f"k is {k}, expected at least 1")
    return k


def teach(
    student_dir: Path | str, stages: list[dict[str, Any]], text: Sources | Tokens | Mixture, out: Path | str,
    teacher: str | Path | None = None, keep: str = "hidden", k: int | None = None, resume: bool = False, seed: int = 0,
    progress: Progress | None = None, token_cache: Path | None = None,
) -> Path:  # fmt: skip
    """Write what a teacher says of every row that `distill` will train on in stages of losses over its logits.

    `hidden` keeps final hidden states as the losses read them (bf16 in a stage that runs in bf16, else fp32) and the
    teacher's head, from which every such loss is what it is beside the teacher, bit for bit in one process on a CPU. `top_k`
    keeps the k likeliest tokens with their log-probabilities and that of all others together, in fp32, for `top_k_kl`.

    Args:
        student_dir: the hybrid that will be trained, or another of the same base.
        stages: as `distill` takes them.
        text: as `distill` takes it.
        out: the cache's directory; must not exist.
        teacher: as for `plan_lesson`, and so `keep`, `k` and `seed`.
        keep: what is kept.
        k: how many tokens.
        resume: go on with what a killed call left.
        seed: the run's.
        progress: called with (label, tokens done, tokens in all) after each shard.
        token_cache: folder that keeps the tokens of sources; None is `<out>.tokens`.

    Returns:
        The cache's directory, which `distill` takes as its teacher.

    Raises:
        ConfigError: as `plan_lesson`; the disk has no room; the output is there already.
        CheckpointError: student or teacher cannot be loaded.
        DataError: less than one row of text.
        TrainingError: the teacher gives a value that is not finite.
    """
    lesson, out = plan_lesson(student_dir, stages, teacher, keep, k, seed), Path(out).absolute()
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    main = accelerator.is_main_process
    shown = progress if main else None
    if not isinstance(text, (Tokens, Mixture)):
        text = read_tokens(load_tokenizer(lesson.student), text, token_cache or out.with_name(f"{out.name}.tokens"), shown)
    content = {**lesson.content, "text": text.sha256, "bos_id": text.bos_id}
    if main:
        content["teacher"] = {"name": lesson.model.resolve().name, "fingerprint": _fingerprint(lesson.model)}
    content = _said_by_main(content)
    if _said_by_main(main and resume and _is_written(out, content)):
        return out
    configs = configs_of(describe(lesson.student).config, describe(lesson.model).config, lesson.built)
    job = Job(
        stages=lesson.built, configs=configs, examples=[None] * len(lesson.built), tokens=text, student=lesson.student,
        teacher=lesson.model, out=out, recall=None,
    )  # fmt: skip
    with Staging(out, resume, digest(content)) if main else contextlib.nullcontext() as staging:
        _write_stages(job, content, seed, staging, accelerator.device, shown)
        if staging is not None:
            finished = staging.journal["finished"].items()
            content["files"] = {name: {"sha256": record["sha256"], "bytes": record["bytes"]} for name, record in finished}
            write_json(staging.folder / MANIFEST, {**content, "sha256": digest(content)})
            staging.finish()
    accelerator.wait_for_everyone()
    return out


def _said_by_main(value: Any) -> Any:
    """What the main process has, on all of them."""
    if not dist.is_initialized():
        return value
    held = [value]
    dist.broadcast_object_list(held)
    return held[0]


def _is_written(out: Path, content: dict[str, Any]) -> bool:
    """Whether the output is the cache that is asked for: killed between getting its name and the clearing up, or never."""
    if not (out / MANIFEST).is_file():
        return False
    held = open_cache(out).manifest
    if any(held.get(key) != value for key, value in content.items()):
        return False
    sweep(out)
    return True


def _write_stages(
    job: Job, content: dict[str, Any], seed: int, staging: Staging | None, device: torch.device, progress: Progress | None
) -> None:
    """Write what is missing of a cache; `staging` is the main process's."""
    world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    folder = partial_folder(job.out) / "files"
    missing: dict[int, list[int]] = {}
    if staging is not None:
        missing = {record["stage"]: _missing(record, staging) for record in content["stages"]}
        least = [_rows(r, s) * _row_bytes(content, r) for r in content["stages"] for s in missing[r["stage"]]]
        head = _one_file(HEAD, {"head": (DTYPES[content["head_dtype"]], (content["vocab_size"], content["hidden_size"]))})
        with_head = content["keep"] == "hidden" and staging.finished(HEAD) is None
        require_space(folder, sum(least) + with_head * head.nbytes)
        if with_head:
            rows = open_checkpoint(job.teacher).read_rows("lm_head.weight", 0, content["vocab_size"])
            staging.record(HEAD, write_shard(folder, head, lambda tensor: [tensor_bytes(rows)]))
    missing = _said_by_main(missing)
    for record in content["stages"]:
        shards = missing[record["stage"]]
        if not shards:
            continue
        index = record["stage"] - 1
        (name, options), configs = job.stages[index], job.configs[index]
        blocks = blocks_of(job, index, seed_of(seed, index), configs[0])
        model = load_model(job.teacher, torch.float32 if options.dtype == "fp32" else None, configs[1])
        model = model.to(device).requires_grad_(False)
        whole = -(-record["rows"] // record["shard_rows"])
        log.info("teach: stage %d (%s): %d of %d shards to write", record["stage"], name, len(shards), whole)
        for first in range(0, len(shards), world):
            own = shards[first + rank] if first + rank < len(shards) else None
            found: list[Any] = [None if own is None else (own, _write(folder, content, record, own, options, blocks, model))]
            if world > 1:
                mine, found = found[0], [None] * world
                dist.all_gather_object(found, mine)
            for shard, written in (pair for pair in found if pair is not None):
                if staging is not None:
                    staging.record(shard_name(record["stage"], shard), written)
            if progress is not None:
                done = whole - len(shards) + min(len(shards), first + world)
                rows = min(record["rows"], done * record["shard_rows"])
                progress(f"teach {name}", rows * record["seq_tokens"], record["rows"] * record["seq_tokens"])


def _missing(record: dict[str, Any], staging: Staging) -> list[int]:
    shards = range(-(-record["rows"] // record["shard_rows"]))
    return [shard for shard in shards if staging.finished(shard_name(record["stage"], shard)) is None]


def _row_bytes(content: dict[str, Any], record: dict[str, Any]) -> int:
    return sum(torch.Size(shape).numel() * dtype.itemsize for dtype, shape in layout(content, record, 1).values())


def _rows(record: dict[str, Any], shard: int) -> int:
    """Rows of a shard, counted from 0."""
    return min(record["shard_rows"], record["rows"] - shard * record["shard_rows"])


def _one_file(name: str, tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]]) -> Shard:
    planned = [Planned(name=key, dtype=dtype, shape=shape, group="") for key, (dtype, shape) in tensors.items()]
    return dataclasses.replace(plan_shards(planned)[0], name=name)


def _write(
    folder: Path, content: dict[str, Any], record: dict[str, Any], number: int, options: Any, blocks: TrainBlocks, model: Any
) -> dict[str, Any]:
    """Run the teacher over one shard's rows, a micro-batch at a time, and write them."""
    shard = _one_file(shard_name(record["stage"], number), layout(content, record, _rows(record, number)))
    held = {tensor.name: torch.empty(tensor.shape, dtype=tensor.dtype) for tensor in shard.tensors}
    rows = len(held["marks"])
    for start in range(0, rows, options.rows):
        at = slice(start, min(rows, start + options.rows))
        first = number * record["shard_rows"]
        batch = blocks.take(first + at.start, first + at.stop)
        for name, value in _said(model, batch, options, content).items():
            if not is_finite(value):
                raise TrainingError(
                    f"teach: the teacher gives {name} that is not finite in rows {first + at.start} to {first + at.stop - 1} of "
                    f"stage {record['stage']}; finished shards are kept. Look at that text, or take another teacher"
                )
            held[name][at] = value
    return write_shard(folder, shard, lambda tensor: [tensor_bytes(held[tensor.name])])


@torch.no_grad()
def _said(model: Any, batch: Batch, options: Any, content: dict[str, Any]) -> dict[str, Tensor]:
    """What is kept of a micro-batch, [B, T, ...] each, and the marks of its rows."""
    hidden = read_hidden(model, batch.to(model.device), options)
    kept: dict[str, Tensor] = {"hidden": hidden}
    if content["keep"] == "top_k":
        head = Head(weight=model.lm_head.weight[: content["vocab_size"]])
        losses = [LOSSES.build(spec) for spec in options.losses]
        # In the chunks of the loss itself, whose sizes decide how products are rounded.
        chunk = next(loss.chunk_tokens for loss in losses if OFFERS["top_k"] in asks_of_teacher(loss))
        parts = [likeliest(logits, content["k"]) for logits in each_logits(hidden.flatten(0, 1), head, chunk)]
        joined = {name: torch.cat([getattr(part, name) for part in parts]) for name in ("ids", "log_probs", "log_rest")}
        kept = {name: value.unflatten(0, hidden.shape[:2]) for name, value in joined.items()}
    return {**{name: value.cpu() for name, value in kept.items()}, "marks": marks_of(batch)}


def _fingerprint(folder: Path) -> str:
    """Hash of a model: config, headers, and the weights themselves."""
    found = open_checkpoint(folder)
    files = sorted({info.file for info in found.tensors.values()})
    return digest([found.hash, {file.name: file_sha256(file) for file in files}])
