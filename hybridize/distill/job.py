"""One call of distill as data: its stages, what each reads, and what is measured between them."""

import contextlib
import glob
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hybridize.checkpoint import load_model, open_checkpoint
from hybridize.core import read_json
from hybridize.data import Mixture, Sources, Tokens, TrainBlocks, load_tokenizer
from hybridize.data.documents import SUFFIXES
from hybridize.distill.chat import Examples
from hybridize.distill.loop import Progress, Run, seed_of
from hybridize.distill.posttrain import PostTraining, Recall, compare_recall, recall_path
from hybridize.distill.rows import ChatBlocks, PartBlocks, TextRows
from hybridize.distill.stages import STAGES
from hybridize.distill.teacher_cache import CachedSignals, TeacherCache, cached_stages, check_files, check_text
from hybridize.distill.teachers import check_vocabulary, runs_model
from hybridize.errors import ConfigError, DataError
from hybridize.storage import partial_folder, write_json

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, eq=False)
class Job:
    """What one call is to do: its stages and what they read."""

    stages: list[tuple[str, Any]]
    configs: list[tuple[Any, Any]]
    """Of each stage: the student's config and the teacher's while it runs."""
    examples: list[Examples | None]
    """Of each stage: what it trains on, where that is not the text."""
    tokens: Tokens | Mixture | None
    """The text."""
    student: Path
    teacher: Path
    out: Path
    recall: Recall | None
    cache: TeacherCache | None = None
    """What stands in for the teacher in the stages that a cache can serve."""

    def is_cached(self, options: Any) -> bool:
        """Whether a cache stands in for a stage's teacher."""
        return self.cache is not None and options.cacheable and options.needs_teacher

    def teacher_for(self, options: Any) -> Path | None:
        """The directory that a stage's teacher is loaded from, None where it loads none."""
        if self.is_cached(options) or not options.needs_teacher:
            return None
        return self.student if options.follows_itself else self.teacher

    @property
    def scratch(self) -> Path:
        """Folder of the training states."""
        return partial_folder(self.out) / "scratch"


def wanted(stages: list[dict[str, Any]]) -> list[tuple[str, Any]]:
    """(name, options) of each stage and part of one, without optional ones that have no data.

    Raises:
        ConfigError: none is left.
    """
    built = [(spec["name"], options) for spec in stages for options in STAGES.build(spec).expanded()]
    kept = [pair for pair in built if not (isinstance(pair[1], PostTraining) and pair[1].optional and pair[1].data is None)]
    for name, _ in (pair for pair in built if pair not in kept):
        log.info("stage %s: optional, and was given no data; left out", name)
    if not kept:
        raise ConfigError(f"distill: all stages are optional and have no data: {', '.join(name for name, _ in built)}")
    return kept


def configs_of(
    student: Any, teacher: Any, stages: list[tuple[str, Any]], cache: TeacherCache | None = None
) -> list[tuple[Any, Any]]:
    """(the student's config, the teacher's) while each stage runs; the last student's is that of the output.

    Args:
        student: config of the hybrid as the run finds it.
        teacher: of its teacher.
        stages: (name, options) each.
        cache: what stands in for the teacher where it can.

    Raises:
        ConfigError: a stage that asks for rows one of the two has no positions for.
    """
    found = []
    for name, options in stages:
        with in_stage(name):
            student = options.student_config(student)
            followed = student if options.follows_itself else options.teacher_config(teacher)
            # Chats and pairs are as long as they are, whatever the rows could hold.
            if not isinstance(options, PostTraining):
                options.check_context(student, "student")
                if runs_model(options, cache):
                    options.check_context(followed, "teacher")
            found.append((student, followed))
    return found


@contextlib.contextmanager
def in_stage(name: str) -> Iterator[None]:
    """Errors of options name their stage."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"stage {name!r}: {error}") from error


def source_of(options: Any, name: str, text: Sources | Tokens | Mixture | None) -> str | Path | None:
    """Where a stage after distillation finds its data; None for the run's tokens, or for no such stage.

    Args:
        options: any stage's.
        name: the stage's, for messages.
        text: what the run was given.

    Raises:
        ConfigError: the stage has nothing to train on.
    """
    if not isinstance(options, PostTraining):
        return None
    if options.data is not None:
        return options.data
    if isinstance(text, (str, Path)):
        return text
    if text is None or not options.packs:
        raise _nothing(name, options)
    return None


def _nothing(name: str, options: PostTraining) -> ConfigError:
    return ConfigError(
        f"stage {name!r}: trains on {'chats' if options.packs else 'preference pairs'} and was given none. Set the stage's "
        "`data` to a .jsonl file (--set distill.N.data=FILE), or leave the stage out"
    )


def check_sources(stages: list[dict[str, Any]]) -> None:
    """Find out before any work whether each stage of a run on plain text has something to train on.

    Raises:
        ConfigError: a stage has nothing.
        DataError: a stage's file is not there.
    """
    for name, options in wanted(stages):
        if not isinstance(options, PostTraining):
            continue
        if options.data is None:
            if not options.packs:
                raise _nothing(name, options)
            continue
        for part in (part.strip() for part in options.data.split(",")):
            if part.endswith(SUFFIXES) and not glob.glob(part, recursive=True):
                raise DataError(f"stage {name!r}: data is {part}, and no such file is there; expected .jsonl")


def read_examples(student_dir: Path, stages: list[tuple[str, Any]], sources: list[str | Path | None]) -> list[Examples | None]:
    """What each stage with a source of its own trains on. Raises ConfigError for tokens that the student does not have."""
    vocabulary = open_checkpoint(student_dir).config.vocab_size
    found: list[Examples | None] = []
    for (_, options), source in zip(stages, sources, strict=True):
        if source is None:
            found.append(None)
            continue
        examples = options.read(load_tokenizer(student_dir), source)
        if examples.highest_id >= vocabulary:
            raise ConfigError(f"{source}: token {examples.highest_id} is outside the student's vocabulary of {vocabulary}")
        found.append(examples)
    return found


def blocks_of(job: Job, index: int, seed: int, config: Any) -> Any:
    """The batches of a stage, for a student of some config. Raises ConfigError when the two do not fit."""
    (name, options), examples = job.stages[index], job.examples[index]
    if examples is not None:
        return ChatBlocks(examples, options.seq_tokens, options.step_rows, seed, getattr(options, "packed", False))
    text = job.tokens
    assert text is not None
    if text.max_id >= config.vocab_size:
        raise ConfigError(f"data: token {text.max_id} is outside the student's vocabulary of {config.vocab_size}")
    with in_stage(name):
        options.check_context(config, "student")
        options.check_text(text)
    parts = [TrainBlocks(text, part.seq_tokens, part.step_rows, seed, text.bos_id, options.documents) for part in options.parts]
    blocks = parts[0] if len(parts) == 1 else PartBlocks(options, parts)
    return TextRows(blocks) if isinstance(options, PostTraining) else blocks


def measure_recall(run: Run, job: Job, index: int, when: str, weights: dict[str, Tensor]) -> None:
    """Measure recall of the student with some weights; the second time, compare, warn and record."""
    name, options = job.stages[index]
    path = recall_path(run.scratch, index)
    if job.recall is None or options.recall_fall is None:
        return
    if when == "before" and path.exists():
        return
    device = run.accelerator.device
    model = load_model(job.student, torch.float32 if device.type == "cpu" else None, job.configs[index][0])
    found = job.recall(filled(model, weights).to(device), options.recall_pairs)
    record = {"before": found}
    if when == "after":
        record = compare_recall(read_json(path, "a record of recall")["before"], found, options, f"stage {index + 1} ({name})")
    if run.accelerator.is_main_process:
        write_json(path, record)
        if when == "after" and run.metrics is not None:
            row = {"stage": index + 1, "name": name, "step": options.steps, "tokens": options.steps * options.step_tokens}
            run.metrics.add({**row, "recall": record})
    run.accelerator.wait_for_everyone()


def tensors_of(model: Any) -> dict[str, Tensor]:
    """Parameters and buffers of a model by name."""
    return dict(model.named_parameters()) | dict(model.named_buffers())


def check_sizes(name: str, student: Any, teacher: Any, folders: tuple[Path, Path]) -> None:
    """Raise ConfigError when student and teacher cannot be compared.

    Args:
        name: the stage's.
        student: its config.
        teacher: the teacher's.
        folders: of both, for messages.
    """
    if student.vocab_size != teacher.vocab_size:
        check_vocabulary(*folders)
    for size in ("hidden_size", "num_hidden_layers") if name == "align" else ():
        own, other = getattr(student, size), getattr(teacher, size)
        if own != other:
            raise ConfigError(f"stage {name!r}: {size} is {own} in {folders[0]} and {other} in {folders[1]}, expected equal")


def filled(model: Any, weights: dict[str, Tensor]) -> Any:
    """A model with the values of some of its tensors replaced, in its own dtypes: what a directory of it would hold."""
    tensors = tensors_of(model)
    with torch.no_grad():
        for key, weight in weights.items():
            tensors[key].copy_(weight)
    return model


def with_weights(model: Any, weights: dict[str, Tensor]) -> Any:
    """A model with some of its tensors replaced, in the dtype of what replaces them."""
    tensors = tensors_of(model)
    with torch.no_grad():
        for key, weight in weights.items():
            tensors[key].data = weight.to(tensors[key].device, copy=True)
    return model


def check_cache(job: Job, seed: int, accelerator: Any, progress: Progress | None) -> None:
    """Check a job's cache against its text, its bytes, and its first and last rows against the run's own; called by all.

    Raises:
        ConfigError: a cache of another text.
        CheckpointError: of other rows, or changed since it was written.
    """
    if job.cache is None or not cached_stages(job.stages):
        return
    assert job.tokens is not None
    check_text(job.cache, job.tokens)
    main = accelerator.is_main_process
    check_files(job.cache, accelerator.process_index, accelerator.num_processes, progress if main else None)
    for number, _, options in cached_stages(job.stages):
        blocks = blocks_of(job, number - 1, seed_of(seed, number - 1), job.configs[number - 1][0])
        cached = CachedSignals(job.cache, number, torch.device("cpu"))
        for row in (0, options.steps * options.step_rows - 1):
            cached.rows(blocks.take(row, row + 1))
