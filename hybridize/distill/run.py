"""distill: a hybrid directory in, the trained hybrid directory out."""

import contextlib
import dataclasses
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn

from hybridize.checkpoint import describe, load_model, open_checkpoint, save_changed
from hybridize.core import digest
from hybridize.data import Mixture, Sources, Tokens, load_tokenizer, read_tokens
from hybridize.distill.adapters import Lora, inject, is_adapter, merged, targeted, watched
from hybridize.distill.disk import DiskStage
from hybridize.distill.job import (
    Job,
    blocks_of,
    check_cache,
    check_sizes,
    configs_of,
    measure_recall,
    read_examples,
    source_of,
    tensors_of,
    wanted,
    with_weights,
)
from hybridize.distill.layers import share_layers
from hybridize.distill.loop import Metrics, Progress, Run, fork_random, seed_of, train
from hybridize.distill.posttrain import PostTraining, Recall, recall_records, restore_qk, start_weights
from hybridize.distill.saves import Position, State, read_latest_state
from hybridize.distill.sharded_saves import latest_folder, names_of, read_about, read_into, read_whole
from hybridize.distill.sharding import asked_to_shard, check_divisible, load_sharded_pair, make_mesh
from hybridize.distill.stages import STAGES
from hybridize.distill.streams import disk_folder, on_disk, reached
from hybridize.distill.teacher_cache import CachedSignals
from hybridize.distill.teachers import Teacher, prepare, runs_model
from hybridize.errors import ConfigError
from hybridize.lineage import is_complete, origin, read_lineage
from hybridize.shards import OnDemand
from hybridize.storage import Staging, partial_folder

log = logging.getLogger(__name__)


def metrics_path(out: Path | str) -> Path:
    """Where a run's metrics.jsonl lies: beside the output, whose bytes do not depend on the clock."""
    out = Path(out)
    return out.with_name(f"{out.name}.metrics.jsonl")


def distill(
    student_dir: Path | str, stages: list[dict[str, Any]], text: Sources | Tokens | Mixture | None, out: Path | str,
    teacher: str | Path | None = None, resume: bool = False, seed: int = 0, progress: Progress | None = None,
    tracker: Any = None, token_cache: Path | None = None, recall: Recall | None = None, shard: bool = False,
) -> Path:  # fmt: skip
    """Train a hybrid against its teacher, stage after stage, and write the result as a directory like the student's.

    Works in one process or in several that torchrun or accelerate started; the main one writes. Killed at any moment and
    called again with `resume`, it ends with the same bytes on a CPU.

    Args:
        student_dir: a hybrid directory; its dtypes are those of the output, whatever the training ran in.
        stages: {"name": "align" | "kl" | "long" | "gates" | "sft" | "dpo", **options} each; see StageOptions.
        text: what to train on, all of it: a source as `data.read_documents` takes it, several as {source: weight}, or tokens;
            None where every stage has `data` of its own.
        out: the output directory; must not exist. Its `<out>.metrics.jsonl` appears beside it.
        teacher: a model's directory, or a cache that `teach` wrote, for stages of losses over logits; None is the base that the
            student's lineage names, which other stages read beside a cache.
        resume: go on with what a killed run left.
        seed: of data order and dropout.
        progress: called with (label, tokens done, tokens in all) after each step.
        token_cache: folder that keeps the tokens of sources; None is `<out>.tokens`, beside the output.
        tracker: for Accelerate's `log_with`: a name such as "tensorboard", or a GeneralTracker.
        recall: measures recall before and after stages that train on answers; None measures nothing.
        shard: divide weights, gradients and moments over the processes, as a launch config for FSDP asks too.

    Returns:
        The output directory.

    Raises:
        ConfigError: unknown options, globs that match nothing, an output that is there already.
        CheckpointError: student or teacher cannot be loaded.
        DataError: no text, or less than one row of it.
        TrainingError: a loss that is not finite or leaps, where the stage does not skip it.
        StoppedError: SIGTERM or Ctrl-C, after the step was finished and its state saved.
    """
    built = build_stages(stages)
    shard = asked_to_shard(shard)
    for name, options in built if shard else ():
        check_divisible(name, options)
    sources = [source_of(options, name, text) for name, options in built]
    plain = [name for (name, options), source in zip(built, sources, strict=True) if source is None]
    if plain and text is None:
        raise ConfigError(f"stage {plain[0]!r}: trains on text and was given none. Name it with --data")
    student_dir, out = Path(student_dir), Path(out).absolute()
    found = open_checkpoint(student_dir)
    lineage = read_lineage(student_dir)
    taught = prepare(student_dir, teacher, built, seed)
    theirs = describe(taught.model) if any(runs_model(options, taught.cache) for _, options in built) else found
    configs = configs_of(found.config, theirs.config, built, taught.cache)
    accelerator = _accelerator(tracker, out)
    if (shard or accelerator.num_processes > 1) and any(on_disk(options) for _, options in built):
        how = "--shard" if shard else f"{accelerator.num_processes} processes"
        raise ConfigError(
            f"stage 'align': engine is disk with {how}, expected one process that divides nothing; use engine: memory"
        )
    tokens = None
    if isinstance(text, (Tokens, Mixture)):
        tokens = text
    elif plain and text is not None:
        cache = token_cache or out.with_name(f"{out.name}.tokens")
        tokens = read_tokens(load_tokenizer(student_dir), text, cache, progress if accelerator.is_main_process else None)
    examples = read_examples(student_dir, built, sources)
    specs = [STAGES.spec(name, options) for name, options in built]
    record = {
        "stages": specs, "seed": seed, "text": None if tokens is None else tokens.sha256,
        "student": _fingerprint(student_dir), **_record_of(taught, built),
    }  # fmt: skip
    if any(found is not None for found in examples):
        record["examples"] = [None if found is None else found.sha256 for found in examples]
    if resume and is_complete(out) and read_lineage(out).get("distill", [None])[-1] == record:
        # Killed between giving the output its name and clearing up.
        if accelerator.is_main_process and partial_folder(out).exists():
            shutil.rmtree(partial_folder(out))
        return out
    main = accelerator.is_main_process
    job = Job(
        stages=built, configs=configs, examples=examples, tokens=tokens, student=student_dir, teacher=taught.model, out=out,
        recall=recall, cache=taught.cache,
    )  # fmt: skip
    check_cache(job, seed, accelerator, progress)
    # A run that stopped at a spike is the same job when it goes on past it.
    identity = {**record, "stages": [{key: spec[key] for key in spec if key != "on_spike"} for spec in specs]}
    with Staging(out, resume, digest(identity)) if main else contextlib.nullcontext() as staging:
        state = _train_all(accelerator, job, seed, progress, shard)
        if staging is not None:
            assert state is not None
            carried = {key: value for key, value in lineage.items() if key not in ("files", "versions")}
            carried["distill"] = [*lineage.get("distill", []), record]
            # Beside the record, which is the job's identity: a teacher may be moved.
            carried["teachers"] = [*lineage.get("teachers", []), _named(taught)]
            if records := recall_records(job.scratch, built):
                carried["recall"] = [*lineage.get("recall", []), *records]
            save_changed(dataclasses.replace(found, config=configs[-1][0]), state.weights, staging, carried)
            staging.finish()
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return out


def build_stages(stages: list[dict[str, Any]]) -> list[tuple[str, Any]]:
    """(name, options) of each stage, without optional ones that have no data. Raises ConfigError for none, or a wrong one."""
    if not stages:
        raise ConfigError("distill: got no stages, expected at least one of " + ", ".join(STAGES.names()))
    return wanted(stages)


def _accelerator(tracker: Any, out: Path) -> Accelerator:
    try:
        accelerator = Accelerator(
            cpu=not torch.cuda.is_available(), mixed_precision="no", log_with=tracker, project_dir=out.parent
        )
    except ValueError as error:
        raise ConfigError(f"tracker: {str(error).splitlines()[0]}") from error
    if accelerator.distributed_type == DistributedType.MEGATRON_LM:
        raise ConfigError(
            f"distill: started with {accelerator.distributed_type.value}, expected data parallelism or FSDP; "
            "use torchrun or the launch configs accelerate/ddp.yaml and fsdp2.yaml"
        )
    if tracker is not None and not accelerator.log_with:
        raise ConfigError(f"tracker: {tracker!r} is not installed; pip install it or leave it out")
    accelerator.init_trackers("hybridize")
    return accelerator


def _fingerprint(folder: Path) -> str:
    """Hash of a directory's weights where its lineage knows them, and of its config and headers."""
    files = read_lineage(folder)["files"] if is_complete(folder) else {}
    return digest([open_checkpoint(folder).hash, files])


def _record_of(taught: Teacher, built: list[tuple[str, Any]]) -> dict[str, Any]:
    """What the run's record says of its teacher; with a cache, which one, and the model of the stages that it does not serve."""
    if taught.cache is None:
        return {"teacher": _fingerprint(taught.model)}
    record = {"teacher": taught.cache.manifest["teacher"]["fingerprint"], "cache": taught.cache.hash}
    beside = any(runs_model(options, taught.cache) for _, options in built)
    return {**record, "model": _fingerprint(taught.model)} if beside else record


def _named(taught: Teacher) -> dict[str, str]:
    """A run's teacher by its name, and by repository and commit where it is the Hub's: its licence may ask for something."""
    if taught.cache is not None:
        return {"name": taught.cache.manifest["teacher"]["name"]}
    return {"name": taught.model.resolve().name, **origin(taught.model)}


def _train_all(accelerator: Accelerator, job: Job, seed: int, progress: Progress | None, shard: bool) -> State | None:
    """Run what is left of all stages; the last state, on the main process, with everything that was trained."""
    mesh = make_mesh(accelerator.device) if shard else None
    # The main process has opened the folder by now; all read the same state before it can be replaced.
    accelerator.wait_for_everyone()
    state = _read_state(job.scratch, shard) or State(position=Position(stage=0, step=0), weights={}, moments={})
    accelerator.wait_for_everyone()
    log_file = contextlib.nullcontext()
    main = accelerator.is_main_process
    if main:
        at = state.position.stage
        done = reached(job.scratch, state.position, job.stages[at][1] if at < len(job.stages) else None)
        log_file = Metrics(metrics_path(job.out), done)
    with log_file as metrics, fork_random(accelerator.device):
        run = Run(accelerator=accelerator, seed=seed, scratch=job.scratch, metrics=metrics, progress=progress, mesh=mesh)
        for index in range(len(job.stages)):
            if index < state.position.stage and main:
                # Killed after the state that follows it, before it was removed.
                shutil.rmtree(disk_folder(job.scratch, index), ignore_errors=True)
            if index == state.position.stage:
                position = Position(stage=index + 1, step=0)
                if on_disk(job.stages[index][1]):
                    state = _train_on_disk(run, job, index, state)
                    continue
                weights = _train_stage(run, job, index, state)
                run.save(position, {}, weights, {})
                state = State(position=position, weights={} if shard else weights, moments={})
                del weights
    if not shard:
        return state
    folder = latest_folder(job.scratch)
    assert folder is not None
    return read_whole(folder) if accelerator.is_main_process else None


def _train_on_disk(run: Run, job: Job, index: int, state: State) -> State:
    """As _train_stage, and the state after it: weights go from file to file, and none stays in memory."""
    if state.weights and not isinstance(state.weights, OnDemand):
        state = _through_file(run, state.position, state.weights)
    before = state.weights if isinstance(state.weights, OnDemand) else OnDemand({})
    state = _through_file(run, Position(stage=index + 1, step=0), DiskStage(run, job, index, before).train())
    shutil.rmtree(disk_folder(run.scratch, index))
    return state


def _through_file(run: Run, position: Position, weights: Mapping[str, Tensor]) -> State:
    """Save a state, and read it as one whose weights lie in its file."""
    run.save(position, {}, weights, {})
    state = read_latest_state(run.scratch)
    assert state is not None
    return state


def _read_state(scratch: Path, shard: bool) -> State | None:
    """The latest state; of a run that divides weights, its place alone, since each process reads its own part later."""
    folder, plain = latest_folder(scratch), read_latest_state(scratch)
    if folder is not None and plain is not None:
        later = folder.name > plain.position.file.removesuffix(".safetensors")
        folder, plain = (folder, None) if later else (None, plain)
    if shard and plain is not None:
        raise ConfigError(f"{scratch}: holds states of a run that did not divide weights; go on with it without --shard")
    if folder is None:
        return plain
    if not shard:
        return read_whole(folder)
    position, guards = read_about(folder)
    return State(position=position, weights={}, moments={}, guards=guards)


def _train_stage(run: Run, job: Job, index: int, state: State) -> dict[str, Tensor]:
    """Load, train, and return every weight trained so far: fp32 on the CPU with no adapter among them, or divided."""
    name, options = job.stages[index]
    device = run.accelerator.device
    before: dict[str, Tensor] = {}
    if isinstance(options, PostTraining):
        before = start_weights(run.scratch, state, run.accelerator.is_main_process, run.accelerator.wait_for_everyone)
        measure_recall(run, job, index, "before", before)
    if run.mesh is None:
        student, teacher, trained = load_pair(
            job.student, job.teacher_for(options), options, name, state.weights, device,
            before if options.follows_itself else {}, seed_of(run.seed, index), job.configs[index],
        )  # fmt: skip
        carried = {key: value for key, value in state.weights.items() if key not in trained and not is_adapter(key)}
    else:
        folder = latest_folder(run.scratch)
        kept = names_of(folder) if folder is not None else set()
        student, teacher, trained = load_sharded_pair(
            job.student, job.teacher_for(options), options, name, kept, device, run.mesh, job.configs[index]
        )
        own = dict(student.named_parameters())
        carried = {key: own[key].detach() for key in kept if key not in trained}
        if folder is not None:
            moments = read_into(folder, {key: own[key] for key in kept}, dict(trained) if state.position.step else {})
            state = State(position=state.position, weights={}, moments=moments, guards=state.guards)
    shares = share_layers(student, trained, run.mesh is not None) if options.by_layers else None
    if shares is not None:
        trained = shares.own
        state = dataclasses.replace(state, moments={key: own for key, own in state.moments.items() if key in trained})
    blocks = blocks_of(job, index, seed_of(run.seed, index), student.config)
    if job.is_cached(options):
        assert job.cache is not None
        teacher = CachedSignals(job.cache, index + 1, device)
    micro_step = options.start(student, teacher, blocks.batch(0)[: options.rows].to(device))
    adapters = {key: parameter for key, parameter in trained.items() if is_adapter(key)}
    if adapters:
        micro_step = watched(micro_step, student, name)
    log.info("distill: stage %d (%s): %d parameters, %d steps", index + 1, name, len(trained), options.steps)
    train(run, index, name, options, micro_step, trained, carried, blocks, state, shares)
    if shares is not None:
        trained = shares.parameters
        shares.weights()
    if run.mesh is not None:
        return carried | {key: parameter.detach() for key, parameter in trained.items()}
    own = {key: parameter.detach().cpu() for key, parameter in trained.items() if key not in adapters}
    weights = carried | options.leave(student, own)
    if adapters:
        weights |= merged(student)
    if isinstance(options, PostTraining):
        if options.restore_qk:
            weights = restore_qk(weights, before, open_checkpoint(job.student), float(options.restore_qk), name)
        # Room for the model that recall is measured on.
        del student, teacher, trained, adapters, micro_step
        measure_recall(run, job, index, "after", weights)
    return weights


def load_pair(
    student_dir: Path, teacher_dir: Path | None, options: Any, name: str, weights: Mapping[str, Tensor], device: torch.device,
    teacher_weights: dict[str, Tensor] | None = None, seed: int = 0, configs: tuple[Any, Any] = (None, None),
) -> tuple[Any, Any, dict[str, nn.Parameter]]:  # fmt: skip
    """Student and teacher as a stage needs them: what is trained in fp32, what is frozen and equal held once.

    Args:
        student_dir: the hybrid.
        teacher_dir: its teacher; None for a stage without one.
        options: the stage's; its dtype is that of the frozen weights (bf16: as stored).
        name: the stage's, for messages.
        weights: what earlier steps made of some of the student's parameters and adapters.
        device: where both go.
        teacher_weights: what earlier steps made of some of the teacher's, where that is a former student.
        seed: of fresh adapters.
        configs: the student's and the teacher's in place of their directories'.

    Returns:
        (student in training mode, teacher in eval mode or None, trained parameters by name, adapters last).

    Raises:
        ConfigError: the two do not fit each other, or a glob matches nothing.
        MissingDependencyError: adapters without peft.
    """
    dtype = torch.float32 if options.dtype == "fp32" else None
    student = load_model(student_dir, dtype, configs[0])
    teacher: Any = None
    if teacher_dir is not None and options.needs_teacher:
        teacher = load_model(teacher_dir, dtype, configs[1])
        check_sizes(name, student.config, teacher.config, (student_dir, teacher_dir))
    # What the stage adds to the student comes first into being, then gets its values.
    added = weights.keys() - tensors_of(student).keys()
    with_weights(student, {key: weight for key, weight in weights.items() if key not in added})
    options.prepare(student, teacher)
    student.requires_grad_(False)
    candidates = options.candidates(student)
    trained = options.choose(candidates, name)
    for parameter in trained.values():
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)
    if teacher is not None:
        with_weights(teacher, teacher_weights or {}).requires_grad_(False)
        saved = share_frozen(student, teacher)
        log.info("distill: %.1f MB of frozen weights are shared with the teacher", saved / 1e6)
        teacher = teacher.to(device).eval()
    if options.lora is not None:
        lora = Lora(**options.lora)
        adapters = inject(student, lora, targeted(student, lora, candidates, name), seed)
        for parameter in trained.values():
            parameter.requires_grad_(True)
        trained = trained | adapters
    with_weights(student, {key: weights[key] for key in sorted(added)})
    options.check_rates(trained, name)
    return student.to(device).train(), teacher, trained


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
