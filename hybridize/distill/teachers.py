"""What a run's teacher may be: the base, another model that reads the same tokens, or a cache of what a model said."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybridize.checkpoint import describe
from hybridize.data import Mixture, Tokens, check_same_tokenizer, tokenizer_hash
from hybridize.distill.teacher_cache import MANIFEST, TeacherCache, check_run, check_text, open_cache, run_follows_from
from hybridize.errors import ConfigError
from hybridize.lineage import read_lineage

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, eq=False)
class Teacher:
    """What a run's `teacher` stands for."""

    model: Path
    """The directory for stages that need a model."""
    cache: TeacherCache | None = None
    """What stages of losses over logits read in its place."""


def teacher_of(student_dir: Path | str, teacher: str | Path | None) -> Teacher:
    """The teacher that was given, a model's directory or a cache; without one, and beside a cache, the base of the lineage.

    Raises:
        CheckpointError: a cache that is not whole, or a student without lineage.
    """
    if teacher is not None and not is_cache(Path(teacher)):
        return Teacher(model=Path(teacher))
    cache = None if teacher is None else open_cache(Path(teacher))
    return Teacher(model=Path(read_lineage(student_dir)["base"]["location"]), cache=cache)


def prepare(student_dir: Path, teacher: str | Path | None, built: list[tuple[str, Any]], seed: int) -> Teacher:
    """As `teacher_of`, after everything that can be checked of it before any text is read.

    Args:
        student_dir: a hybrid.
        teacher: what was given.
        built: (name, options) of every stage of the run.
        seed: the run's.

    Raises:
        ConfigError: a model of other tokens; a cache of other rows, or with too little of them; or a stage that needs a
            model beside the cache, and none is there.
        CheckpointError: as `teacher_of`.
    """
    found = teacher_of(student_dir, teacher)
    if found.cache is not None:
        vocabulary = describe(student_dir).config.vocab_size
        check_run(found.cache, built, run_follows_from(seed, vocabulary, tokenizer_hash(student_dir)))
    for number, (name, options) in enumerate(built, 1):
        if not runs_model(options, found.cache):
            continue
        if found.cache is not None and not found.model.is_dir():
            raise ConfigError(
                f"stage {number} ({name}): reads more of its teacher than a cache holds, and the base {found.model} is not "
                "there; put it there, or leave the stage out"
            )
        check_teacher(student_dir, found.model)
        break
    return found


def runs_model(options: Any, cache: TeacherCache | None) -> bool:
    """Whether a stage runs a teacher that is a model of its own."""
    return options.needs_teacher and not options.follows_itself and not (cache is not None and options.cacheable)


def check_for_run(base: Path, teacher: Path, built: list[tuple[str, Any]], seed: int, text: Tokens | Mixture) -> None:
    """Check a teacher against what a hybrid of some base will be trained on, before there is a hybrid.

    Args:
        base: the directory that the hybrid will be made from.
        teacher: a model's directory or a cache.
        built: (name, options) of every stage.
        seed: the run's.
        text: what it will train on.

    Raises:
        ConfigError: as `prepare`; or there is no such directory.
    """
    cache = cache_in(teacher)
    if cache is not None:
        check_run(cache, built, run_follows_from(seed, describe(base).config.vocab_size, tokenizer_hash(base)))
        check_text(cache, text)
    elif teacher.resolve() != base.resolve():
        check_same_tokenizer(base, teacher)
        check_vocabulary(base, teacher)


def cache_in(teacher: Path) -> TeacherCache | None:
    """What a teacher's directory holds, if that is a cache and no model. Raises ConfigError for no directory."""
    if not teacher.is_dir():
        raise ConfigError(f"{teacher}: no such directory, expected a model's, or a cache that `hybridize teach` wrote")
    return open_cache(teacher) if is_cache(teacher) else None


def is_cache(path: Path) -> bool:
    """Whether a directory is a cache, whole or not, and no model's."""
    return (path / MANIFEST).exists() or (not (path / "config.json").exists() and any(path.glob("stage-*.safetensors")))


def check_teacher(student_dir: Path, teacher_dir: Path) -> None:
    """Check that a model reads the tokens that a student does; of the base that its lineage names there is no question.

    Raises:
        ConfigError: another tokenizer, or a vocabulary of another size than its tokens account for.
    """
    base = Path(read_lineage(student_dir)["base"]["location"])
    if teacher_dir.resolve() == base.resolve():
        return
    if check_same_tokenizer(student_dir, teacher_dir) is None:
        log.warning(
            "teacher: neither %s nor %s has tokenizer files, so nothing shows that both read the same tokens; "
            "taken at your word, as their vocabularies are of one size", student_dir, teacher_dir,
        )  # fmt: skip
    check_vocabulary(student_dir, teacher_dir)


def check_vocabulary(student_dir: Path, teacher_dir: Path) -> None:
    """Check that a teacher's head has a row for each of the student's, and that further rows are of no token.

    Models of a family pad their heads to different sizes (151,936 and 152,064 rows for one tokenizer of Qwen2.5).

    Raises:
        ConfigError: fewer rows, or more, and not proven to be padding.
    """
    own, other = (describe(folder).config.vocab_size for folder in (student_dir, teacher_dir))
    if own == other:
        return
    said = f"vocab_size is {own} in {student_dir} and {other} in {teacher_dir}"
    if other < own:
        raise ConfigError(f"{said}, expected no fewer in the teacher; take a teacher of the student's family")
    highest = check_same_tokenizer(student_dir, teacher_dir)
    if highest is None:
        raise ConfigError(f"{said}, and without tokenizer files nothing shows that the surplus is padding; copy them there")
    if highest >= own:
        raise ConfigError(f"{said}, and token {highest} is among the surplus, expected padding; take another teacher")
    log.info("teacher: rows %d to %d of its head are padding and left out", own, other - 1)
