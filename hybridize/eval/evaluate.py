"""The eval verb: probes on one checkpoint, into one report."""

import dataclasses
import functools
import json
import logging
import os
import platform
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

import hybridize
from hybridize.checkpoint import Checkpoint, load_model, open_checkpoint
from hybridize.core import Report, digest
from hybridize.data import Tokens, read_documents, tokenize, tokenizer_hash
from hybridize.errors import CheckpointError, ConfigError
from hybridize.eval.context import EvalContext, ProbeResult, Progress
from hybridize.eval.kept import Kept
from hybridize.eval.probes import PROBES
from hybridize.fingerprint import weight_files, weights_hash
from hybridize.lineage import LINEAGE, read_lineage
from hybridize.storage import to_json, write_text

log = logging.getLogger(__name__)


def evaluate(
    checkpoint: Path | str,
    probes: list[dict[str, Any]],
    text: str | Path | Tokens | None = None,
    base: Path | str | None = None,
    out: Path | None = None,
    seed: int = 0,
    limit: int | None = None,
    progress: Progress | None = None,
    cache: Path | str | None = None,
    name: str | None = None,
) -> Report:
    """Measure a checkpoint.

    On a GPU in the checkpoint's own dtype; on the CPU in fp32, since bf16 there is slow and no nearer to a GPU's. Started in
    several processes, they share the documents of probes that can be divided; the first alone measures the rest and writes.

    Args:
        checkpoint: a base or hybrid directory.
        probes: {"name": ..., **options} of each probe.
        text: held-out text: a source as `hybridize.data.read_documents` takes it, or tokens of this tokenizer.
        base: directory of the base, for probes that compare; may be the checkpoint itself.
        out: where to write the report as JSON, and its items beside it (`items_path`); None is nowhere.
        seed: of prompts and of lm-eval.
        limit: at most so many items in each probe.
        progress: called with (label, done, total).
        cache: folder that keeps reports and answers, for other calls to use: what was measured of the same weights with the
            same probes, text, base, seed, limit and versions is read from it, and an evaluation that was stopped goes on.
        name: what the report calls the checkpoint; None is its path.

    Returns:
        The report, the same in each process; metric names are flat ("perplexity", "recall@8", "arc_easy/acc",
        "state_bytes@32768").

    Raises:
        ConfigError: unknown probes or options, two that give the same metric, or what a probe needs is absent.
        CheckpointError: the checkpoint or base cannot be used.
        DataError: the text cannot be used.
    """
    if not probes:
        raise ConfigError("eval: got no probes, expected at least one. Give a recipe with `evaluate`, or --tasks")
    if limit is not None and limit < 1:
        raise ConfigError(f"eval: limit is {limit}, expected at least 1")
    built = [(spec["name"], PROBES.build(spec)) for spec in probes]
    checkpoint, base = Path(checkpoint), None if base is None else Path(base)
    name = name or str(checkpoint)
    found = open_checkpoint(checkpoint)
    accelerator = _processes()
    main = accelerator is None or accelerator.is_main_process
    tokenizer = load_tokenizer(checkpoint)
    tokens = _tokens(tokenizer, text, checkpoint) if main else None
    if tokens is not None and tokens.max_id >= found.config.vocab_size:
        raise CheckpointError(
            f"{checkpoint}: the text has token {tokens.max_id}, the model's vocab_size is {found.config.vocab_size}; "
            "the tokenizer is another model's, copy this one's there"
        )
    kept = None if cache is None else Kept(Path(cache))
    key, earlier, answers = None, None, None
    measured = weights_hash(found, None if kept is None else kept.hashes(weight_files(found))) if main else ""
    if kept is not None and main:
        weights = kept.weights(found)
        sha = None if tokens is None else tokens.sha256
        versions = _versions(found)
        key = [weights, _base_key(kept, base, checkpoint), _follows_from(built), sha, seed, limit, versions]
        earlier, answers = kept.report(key), kept.answers(weights, versions)
    earlier, answers = _told(accelerator, (earlier, answers))
    if earlier is not None:
        report, items = dataclasses.replace(earlier[0], checkpoint=name, weights=measured), earlier[1]
        if main:
            log.warning("eval: %s: the same was measured before; its report is read from %s", checkpoint, cache)
    else:
        model = load_for_test(checkpoint)
        context = EvalContext(
            checkpoint=checkpoint, model=model, tokenizer=tokenizer, text=tokens,
            load_base=None if base is None else functools.partial(_base, base, checkpoint, model),
            seed=seed, limit=limit, progress=progress, accelerator=accelerator, answers=answers,
        )  # fmt: skip
        result = _measure(built, context)
        report = Report(
            checkpoint=name,
            # The headers of a base say little about its weights, but hashing those would read all of them again.
            checkpoint_hash=digest(read_lineage(checkpoint)["files"]) if (checkpoint / LINEAGE).is_file() else found.hash,
            metrics=result.metrics, samples=result.samples, item_hashes=result.item_hashes,
            versions=_versions(found) | result.versions, weights=measured,
        )  # fmt: skip
        report, items = _told(accelerator, (report, _lines(result)))
        if kept is not None and main:
            kept.keep(key, report, items)
    if out is not None and main:
        for path, content in ((items_path(Path(out)), items), (Path(out), to_json(report.to_dict()))):
            if not path.is_file() or path.read_text(encoding="utf-8") != content:
                write_text(path, content)
    return report


def _processes() -> Any:
    """The processes that torchrun or accelerate started together, None for one alone."""
    if "RANK" not in os.environ or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return None
    from accelerate import Accelerator, InitProcessGroupKwargs

    # The others wait while the first measures what cannot be divided.
    patience = InitProcessGroupKwargs(timeout=timedelta(weeks=1))
    return Accelerator(cpu=not torch.cuda.is_available(), kwargs_handlers=[patience])


def _told(accelerator: Any, value: Any) -> Any:
    """What the first process has, in every one."""
    if accelerator is None:
        return value
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([value])[0]


def _base_key(kept: Kept, base: Path | None, checkpoint: Path) -> str | None:
    """What is known of the base before anyone asks for it."""
    if base is None or not base.is_dir():
        return None
    return "itself" if base.resolve() == checkpoint.resolve() else kept.weights(open_checkpoint(base))


def _follows_from(probes: list[tuple[str, Any]]) -> list[Any]:
    """All that probes say they depend on: every option, and what lies outside."""
    return [
        [PROBES.spec(name, probe), probe.follows_from() if hasattr(probe, "follows_from") else None] for name, probe in probes
    ]


def items_path(report: Path) -> Path:
    """Where the items of a report lie: one JSON object a line, {"metric", "score", "prompt", "expected", "given"}."""
    return report.with_suffix(".items.jsonl")


def _lines(result: ProbeResult) -> str:
    rows = (
        {"metric": name, "score": score, **dataclasses.asdict(item)}
        for name, items in result.items.items()
        for score, item in zip(result.samples[name], items, strict=True)
    )
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _measure(probes: list[tuple[str, Any]], context: EvalContext) -> ProbeResult:
    """All probes in order, as one result."""
    total = ProbeResult(metrics={})
    for number, (name, probe) in enumerate(probes):
        if context.rank and not getattr(probe, "divides", False):
            continue
        context.tell("all probes", number, len(probes))
        result = probe(context)
        if twice := sorted(set(result.metrics) & set(total.metrics)):
            raise ConfigError(f"eval: probe {name!r} gives {twice[0]} a second time; expected each metric once")
        for key, metric in result.metrics.items():
            log.info("%s: %s %.6g %s", context.checkpoint, key, metric.value, metric.unit)
        total = ProbeResult(
            metrics=total.metrics | result.metrics,
            samples=total.samples | result.samples,
            item_hashes=total.item_hashes | result.item_hashes,
            items=total.items | result.items,
            versions=total.versions | result.versions,
        )
    context.tell("all probes", len(probes), len(probes))
    return total


def load_for_test(path: Path, dtype: torch.dtype | None = None) -> Any:
    """A checkpoint's model on the best device here: without a `dtype`, the GPU in its own, else the CPU in fp32."""
    if torch.cuda.is_available():
        return load_model(path, dtype).to("cuda")
    return load_model(path, dtype or torch.float32)


def load_tokenizer(path: Path) -> Any:
    """The tokenizer of a directory, or None where it has none."""
    if not any((path / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        return None
    return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)


def _base(base: Path, checkpoint: Path, model: Any) -> Any:
    return model if base.resolve() == checkpoint.resolve() else load_for_test(base)


def _tokens(tokenizer: Any, text: str | Path | Tokens | None, checkpoint: Path) -> Tokens | None:
    if text is None or isinstance(text, Tokens):
        return text
    if tokenizer is None:
        raise ConfigError(f"{checkpoint}: has no tokenizer to read {text} with; expected tokenizer.json")
    return tokenize(tokenizer, read_documents(text))


def _versions(found: Checkpoint) -> dict[str, str]:
    """What the numbers depend on beside weights and inputs; as `load_for_test` would load it here."""
    cuda = torch.cuda.is_available()
    tokenizer = tokenizer_hash(found.path)
    return {
        "hybridize": hybridize.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": metadata.version("transformers"),
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "dtype": str(found.dtype if cuda else torch.float32).removeprefix("torch."),
        "threads": str(torch.get_num_threads()),
        **({} if tokenizer is None else {"tokenizer": tokenizer}),
    }
