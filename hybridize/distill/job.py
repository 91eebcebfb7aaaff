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
from transformers import AutoTokenizer

from hybridize.checkpoint import load_model, open_checkpoint
from hybridize.core import read_json
from hybridize.data import Mixture, Sources, Tokens, TrainBlocks
from hybridize.data.documents import SUFFIXES
from hybridize.distill.chat import Examples
from hybridize.distill.loop import Run
from hybridize.distill.posttrain import PostTraining, Recall, compare_recall, recall_path
from hybridize.distill.rows import ChatBlocks, PartBlocks, TextRows
from hybridize.distill.stages import STAGES
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

    @property
    def scratch(self) -> Path:
        """Folder of the training states."""
        return partial_folder(self.out) / "scratch"


def wanted(stages: list[dict[str, Any]]) -> list[tuple[str, Any]]:
    """(name, options) of each stage, without optional ones that have no data. Raises ConfigError when none is left."""
    built = [(spec["name"], options) for options, spec in ((STAGES.build(spec), spec) for spec in stages)]
    kept = [pair for pair in built if not (isinstance(pair[1], PostTraining) and pair[1].optional and pair[1].data is None)]
    for name, _ in (pair for pair in built if pair not in kept):
        log.info("stage %s: optional, and was given no data; left out", name)
    if not kept:
        raise ConfigError(f"distill: all stages are optional and have no data: {', '.join(name for name, _ in built)}")
    return kept


def configs_of(student: Any, teacher: Any, stages: list[tuple[str, Any]]) -> list[tuple[Any, Any]]:
    """(the student's config, the teacher's) while each stage runs; the last student's is that of the output.

    Args:
        student: config of the hybrid as the run finds it.
        teacher: of its teacher.
        stages: (name, options) each.

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
                if options.needs_teacher:
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
        tokenizer = AutoTokenizer.from_pretrained(student_dir, local_files_only=True, trust_remote_code=False)
        examples = options.read(tokenizer, source)
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


def filled(model: Any, weights: dict[str, Tensor]) -> Any:
    """A model with the values of some of its parameters replaced, in its own dtypes: what a directory of it would hold."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for key, weight in weights.items():
            parameters[key].copy_(weight)
    return model


def with_weights(model: Any, weights: dict[str, Tensor]) -> Any:
    """A model with some of its parameters replaced, in the dtype of what replaces them."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for key, weight in weights.items():
            parameters[key].data = weight.clone()
    return model
