"""distill: a hybrid directory in, the trained hybrid directory out."""

import contextlib
import logging
import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from transformers import AutoTokenizer

from hybridize.checkpoint import load_model, open_checkpoint, save_checkpoint
from hybridize.core import digest
from hybridize.data import Mixture, Sources, Tokens, TrainBlocks, read_tokens
from hybridize.distill.loop import Metrics, Progress, Run, fork_random, seed_of, train
from hybridize.distill.saves import Position, State, read_latest_state, write_state
from hybridize.distill.stages import STAGES
from hybridize.errors import ConfigError
from hybridize.lineage import is_complete, read_lineage
from hybridize.storage import Staging, partial_folder

log = logging.getLogger(__name__)

SHARDED = {DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM}


def metrics_path(out: Path | str) -> Path:
    """Where a run's metrics.jsonl lies: beside the output, whose bytes do not depend on the clock."""
    out = Path(out)
    return out.with_name(f"{out.name}.metrics.jsonl")


def distill(
    student_dir: Path | str, stages: list[dict[str, Any]], text: Sources | Tokens | Mixture, out: Path | str,
    teacher: str | Path | None = None, resume: bool = False, seed: int = 0, progress: Progress | None = None,
    tracker: Any = None, token_cache: Path | None = None,
) -> Path:  # fmt: skip
    """Train a hybrid against its teacher, stage after stage, and write the result as a directory like the student's.

    Works in one process or in several that torchrun or accelerate started; the main one writes. Killed at any moment and
    called again with `resume`, it ends with the same bytes on a CPU.

    Args:
        student_dir: a hybrid directory; its dtypes are those of the output, whatever the training ran in.
        stages: {"name": "align" | "kl", **options} each; see StageOptions.
        text: what to train on, all of it: a source as `data.read_documents` takes it, several as {source: weight}, or tokens.
        out: the output directory; must not exist. Its `<out>.metrics.jsonl` appears beside it.
        teacher: a directory; None is the base that the student's lineage names.
        resume: go on with what a killed run left.
        seed: of data order and dropout.
        progress: called with (label, tokens done, tokens in all) after each step.
        token_cache: folder that keeps the tokens of sources; None is `<out>.tokens`, beside the output.
        tracker: for Accelerate's `log_with`: a name such as "tensorboard", or a GeneralTracker.

    Returns:
        The output directory.

    Raises:
        ConfigError: unknown options, globs that match nothing, an output that is there already.
        CheckpointError: student or teacher cannot be loaded.
        DataError: no text, or less than one row of it.
        TrainingError: a loss or gradient that is not finite.
    """
    if not stages:
        raise ConfigError("distill: got no stages, expected at least one of " + ", ".join(STAGES.names()))
    built = [(spec["name"], component) for component, spec in ((STAGES.build(spec), spec) for spec in stages)]
    student_dir, out = Path(student_dir), Path(out).absolute()
    open_checkpoint(student_dir)
    lineage = read_lineage(student_dir)
    teacher_dir = Path(teacher if teacher is not None else lineage["base"]["location"])
    accelerator = _accelerator(tracker, out)
    if isinstance(text, (Tokens, Mixture)):
        tokens = text
    else:
        cache = token_cache or out.with_name(f"{out.name}.tokens")
        tokens = _read(student_dir, text, cache, progress if accelerator.is_main_process else None)
    specs = [STAGES.spec(name, options) for name, options in built]
    record = {
        "stages": specs, "seed": seed, "text": tokens.sha256, "student": _fingerprint(student_dir),
        "teacher": _fingerprint(teacher_dir),
    }  # fmt: skip
    if resume and is_complete(out) and read_lineage(out).get("distill", [None])[-1] == record:
        # Killed between giving the output its name and clearing up.
        if accelerator.is_main_process and partial_folder(out).exists():
            shutil.rmtree(partial_folder(out))
        return out
    main = accelerator.is_main_process
    with Staging(out, resume, digest(record)) if main else contextlib.nullcontext() as staging:
        state = _train_all(accelerator, built, student_dir, teacher_dir, tokens, out, seed, progress)
        if staging is not None:
            history = [*lineage.get("distill", []), record]
            carried = {key: value for key, value in lineage.items() if key not in ("files", "versions")}
            _write(student_dir, state.weights, staging, {**carried, "distill": history})
            staging.finish()
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return out


def _accelerator(tracker: Any, out: Path) -> Accelerator:
    try:
        accelerator = Accelerator(
            cpu=not torch.cuda.is_available(), mixed_precision="no", log_with=tracker, project_dir=out.parent
        )
    except ValueError as error:
        raise ConfigError(f"tracker: {str(error).splitlines()[0]}") from error
    if accelerator.distributed_type in SHARDED:
        raise ConfigError(
            f"distill: started with {accelerator.distributed_type.value}, expected plain data parallelism; "
            "use torchrun or the launch config accelerate/ddp.yaml"
        )
    if tracker is not None and not accelerator.log_with:
        raise ConfigError(f"tracker: {tracker!r} is not installed; pip install it or leave it out")
    accelerator.init_trackers("hybridize")
    return accelerator


def _read(student_dir: Path, text: Sources, cache: Path, progress: Progress | None) -> Tokens | Mixture:
    tokenizer = AutoTokenizer.from_pretrained(student_dir, local_files_only=True, trust_remote_code=False)
    return read_tokens(tokenizer, text, cache, progress)


def _fingerprint(folder: Path) -> str:
    """Hash of a directory's weights where its lineage knows them, and of its config and headers."""
    files = read_lineage(folder)["files"] if is_complete(folder) else {}
    return digest([open_checkpoint(folder).hash, files])


def _train_all(
    accelerator: Accelerator, stages: list[tuple[str, Any]], student_dir: Path, teacher_dir: Path, tokens: Tokens | Mixture,
    out: Path, seed: int, progress: Progress | None,
) -> State:  # fmt: skip
    scratch = partial_folder(out) / "scratch"
    # The main process has opened the folder by now; all read the same state before it can be replaced.
    accelerator.wait_for_everyone()
    state = read_latest_state(scratch) or State(position=Position(stage=0, step=0), weights={}, moments={})
    accelerator.wait_for_everyone()
    log_file = Metrics(metrics_path(out), state.position) if accelerator.is_main_process else contextlib.nullcontext()
    with log_file as metrics, fork_random(accelerator.device):
        run = Run(accelerator=accelerator, seed=seed, scratch=scratch, metrics=metrics, progress=progress)
        for index, (name, options) in enumerate(stages):
            if index == state.position.stage:
                weights = _train_stage(run, index, name, options, student_dir, teacher_dir, tokens, state)
                state = State(position=Position(stage=index + 1, step=0), weights=weights, moments={})
                if accelerator.is_main_process:
                    write_state(scratch, state)
    return state


def _train_stage(
    run: Run, index: int, name: str, options: Any, student_dir: Path, teacher_dir: Path, tokens: Tokens | Mixture, state: State
) -> dict[str, Tensor]:
    """Load, train, and return every weight trained so far, fp32 on the CPU."""
    device = run.accelerator.device
    student, teacher, trained = load_pair(student_dir, teacher_dir, options, name, state.weights, device)
    blocks = TrainBlocks(
        tokens, options.seq_tokens, options.step_rows, seed_of(run.seed, index), tokens.bos_id, options.documents
    )  # fmt: skip
    if tokens.max_id >= student.config.vocab_size:
        raise ConfigError(f"data: token {tokens.max_id} is outside the student's vocabulary of {student.config.vocab_size}")
    if options.seq_tokens > student.config.max_position_embeddings and not options.beyond_context:
        raise ConfigError(
            f"stage {name!r}: seq_tokens is {options.seq_tokens}, expected at most the student's max_position_embeddings of "
            f"{student.config.max_position_embeddings}; set beyond_context to true to train beyond it"
        )
    micro_step = options.start(student, teacher, blocks.batch(0)[: options.rows].to(device))
    carried = {key: value for key, value in state.weights.items() if key not in trained}
    log.info("distill: stage %d (%s): %d parameters, %d steps", index + 1, name, len(trained), options.steps)
    train(run, index, name, options, micro_step, trained, carried, blocks, state)
    return carried | {key: parameter.detach().cpu() for key, parameter in trained.items()}


def load_pair(
    student_dir: Path, teacher_dir: Path, options: Any, name: str, weights: dict[str, Tensor], device: torch.device
) -> tuple[Any, Any, dict[str, nn.Parameter]]:
    """Student and teacher as a stage needs them: what is trained in fp32, what is frozen and equal held once.

    Args:
        student_dir: the hybrid.
        teacher_dir: its teacher.
        options: the stage's; its dtype is that of the frozen weights (bf16: as stored).
        name: the stage's, for messages.
        weights: what earlier steps made of some of the student's parameters.
        device: where both go.

    Returns:
        (student in training mode, teacher in eval mode, trained parameters by name).

    Raises:
        ConfigError: the two do not fit each other.
    """
    dtype = torch.float32 if options.dtype == "fp32" else None
    student, teacher = load_model(student_dir, dtype), load_model(teacher_dir, dtype)
    sizes = ("hidden_size", "num_hidden_layers", "vocab_size") if name == "align" else ("vocab_size",)
    for size in sizes:
        own, other = getattr(student.config, size), getattr(teacher.config, size)
        if own != other:
            raise ConfigError(f"stage {name!r}: {size} is {own} in {student_dir} and {other} in {teacher_dir}, expected equal")
    parameters = dict(student.named_parameters())
    with torch.no_grad():
        for key, weight in weights.items():
            parameters[key].data = weight.clone()
    student.requires_grad_(False)
    teacher.requires_grad_(False)
    trained = options.choose(options.candidates(student), name)
    for parameter in trained.values():
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)
    saved = share_frozen(student, teacher)
    log.info("distill: %.1f MB of frozen weights are shared with the teacher", saved / 1e6)
    return student.to(device).train(), teacher.to(device).eval(), trained


def share_frozen(student: nn.Module, teacher: nn.Module) -> int:
    """Make every frozen parameter of the student that equals the teacher's the very same tensor; return the bytes saved."""
    theirs = dict(teacher.named_parameters(remove_duplicate=False))
    saved = 0
    for path, module in student.named_modules():
        for leaf, parameter in list(module.named_parameters(recurse=False)):
            twin = theirs.get(f"{path}.{leaf}")
            if parameter.requires_grad or twin is None or twin.dtype != parameter.dtype or not torch.equal(twin, parameter):
                continue
            if parameter is not twin:
                setattr(module, leaf, twin)
                saved += parameter.numel() * parameter.element_size()
    return saved


def _write(student_dir: Path, weights: dict[str, Tensor], staging: Staging, lineage: dict[str, Any]) -> None:
    model = load_model(student_dir)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, weight in weights.items():
            parameters[name].copy_(weight)
    save_checkpoint(model, student_dir, staging, lineage)
