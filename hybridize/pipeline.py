"""run: the verbs in order, each skipped when its output already matches. No scheduler, no state but the directory.

WORK/recipe.yaml  plan.json  converted/  distilled/  report-base.json  report-converted.json  report.json
     verdict.json  report.html  report.md  report.all.json  tokens/  measured/  scores.json (where the plan follows them)
"""

import dataclasses
import logging
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hybridize.checkpoint import Described, describe_base, open_base
from hybridize.conversions import CONVERSIONS, convert
from hybridize.conversions import plan as make_plan
from hybridize.core import Plan, Report, Scores, Verdict
from hybridize.data import (
    Mixture,
    Sources,
    Tokens,
    document_hash,
    is_held_out,
    load_tokenizer,
    read_documents,
    read_tokens,
    spread_blocks,
    weighted_sources,
)
from hybridize.distill import STAGES, build_stages, check_for_run, check_sources, distill
from hybridize.distill.cost import Machine, StageCost, refuse, run_cost
from hybridize.distill.job import in_stage
from hybridize.distill.teachers import cache_in
from hybridize.errors import ConfigError, DataError
from hybridize.eval import GATES, PROBES, comparison_table, evaluate, gate, report
from hybridize.eval.context import EvalContext
from hybridize.lineage import is_complete
from hybridize.modeling import hybrid_config
from hybridize.recipe import Recipe, text_sources
from hybridize.storage import write_json, write_text

log = logging.getLogger(__name__)

Progress = Callable[[str, float, float], None]
Announce = Callable[[Plan, list[StageCost]], None]
# A text of fewer documents is cut into pieces of this many characters before it is split.
FEWEST_DOCUMENTS = 40
PIECE_CHARS = 4_000
# Prompts of each length that recall is compared on around a stage.
RECALL_SAMPLES = 32


@dataclass(frozen=True)
class RunResult:
    """What a run made; reports by column of the table."""

    work: Path
    plan: Plan
    reports: dict[str, Report]
    verdict: Verdict | None
    html: Path

    def table(self) -> list[list[str]]:
        return comparison_table(self.reports)


def check_components(recipe: Recipe) -> None:
    """Build every component a recipe names, so that a wrong option is found before any work. Raises ConfigError."""
    for stage in recipe.distill:
        STAGES.build(stage)
    for probe in recipe.evaluate:
        PROBES.build(probe)
    for check in recipe.gates:
        GATES.build(check)


def fitted(stages: list[dict[str, Any]], config: Any) -> list[dict[str, Any]]:
    """Stages with rows no longer than the checkpoint's context, which `long` stretches, but for those that say they may be.

    Recipes name no model sizes, so that rows are cut to what a base has room for. Raises ConfigError for a context that cannot
    be stretched.
    """
    out = []
    for stage in stages:
        built = STAGES.build(stage)
        with in_stage(stage["name"]):
            config = built.student_config(config)
        context = getattr(config, "max_position_embeddings", None)
        if context and built.seq_tokens > context and not built.beyond_context:
            log.info("stage %s: rows of %d tokens, the checkpoint's context", stage["name"], context)
            stage = {**stage, "seq_tokens": context}
        out.append(stage)
    return out


def calibrated_layers(plan: Plan) -> list[int]:
    """Layers whose seed needs text."""
    return [layer.index for layer in plan.layers if CONVERSIONS.build(layer.conversion).calibrated]


def need_text(plan: Plan) -> str:
    """One line for a plan whose seeds need text where none was given: which layer, and which methods need none."""
    index = calibrated_layers(plan)[0]
    spec = plan.layers[index].conversion
    loaded = CONVERSIONS.load(spec["name"])
    methods = typing.get_args(typing.get_type_hints(loaded).get("method"))
    free = [method for method in methods if not CONVERSIONS.build({**spec, "method": method}).calibrated]
    other = f", or a method that needs none ({', '.join(free)})" if free else ""
    return f"layer {index}: the seed of its {spec['name']} is calibrated on text. Give --data TEXT{other}"


def cut(document: str) -> Iterator[str]:
    """A document in pieces of about PIECE_CHARS, cut at line ends."""
    held: list[str] = []
    size = 0
    for line in document.splitlines(keepends=True):
        held.append(line)
        size += len(line)
        if size >= PIECE_CHARS:
            yield "".join(held).rstrip("\n")
            held, size = [], 0
    if held:
        yield "".join(held).rstrip("\n")


def split_text(
    tokenizer: Any, data: Sources, held_out: str | None, share: float, cache: Path | None = None, progress: Progress | None = None
) -> tuple[Tokens | Mixture, Tokens]:
    """Text to train on and text to measure on, as tokens. No document is on both sides, whatever sources hold it.

    Documents are cut when all sources together have too few of them to be split fairly.

    Args:
        tokenizer: of the base.
        data: what to train on: a source, or several with weights.
        held_out: what to measure on; None is a share of `data`'s documents, by hash, from every source.
        share: of the documents.
        cache: folder for tokens; None keeps them in memory.
        progress: called with (label, done, total).

    Raises:
        DataError: one of the two sides would be empty.
    """
    sources = weighted_sources(data)
    first = islice((None for source in sources for _ in read_documents(source)), FEWEST_DOCUMENTS)
    few = sum(1 for _ in first) < FEWEST_DOCUMENTS
    kept = {document_hash(document) for document in read_documents(held_out)} if held_out is not None else set()

    def too_little(source: str) -> str:
        return f"{source}: too little text to hold {share:.0%} out; give text of its own with --held-out"

    def documents(source: str, training: bool) -> Iterator[str]:
        found = False
        for whole in read_documents(source):
            if kept and document_hash(whole) in kept:
                continue
            for document in cut(whole) if few else (whole,):
                if held_out is not None or is_held_out(document, share) != training:
                    found = True
                    yield document
        if training and not found:
            raise DataError(
                f"{source}: all of it is in {held_out}; give other text with --held-out" if kept else too_little(source)
            )

    def measured(_: str) -> Iterator[str]:
        if held_out is not None:
            yield from read_documents(held_out)
            return
        found = False
        for document in (document for source in sources for document in documents(source, training=False)):
            found = True
            yield document
        if not found:
            raise DataError(too_little(", ".join(sources)))

    train = read_tokens(tokenizer, data, cache, progress, lambda source: documents(source, training=True))
    test = read_tokens(tokenizer, held_out or "held out", cache, progress, measured)
    assert isinstance(test, Tokens)
    return train, test


def calibration_rows(text: Tokens | Mixture, recipe: Recipe, config: Any) -> Tensor:
    """Rows for calibrated conversions, [N, T] int64, spread evenly over each text, as many of each as its weight asks for."""
    context = min(recipe.data.calibration_seq_tokens, getattr(config, "max_position_embeddings", None) or 1 << 30)
    wanted = max(1, recipe.data.calibration_tokens // context)
    if isinstance(text, Tokens):
        return spread_blocks(text, context, text.bos_id, wanted)
    places = [text.place(row)[0] for row in range(wanted)]
    return torch.cat(
        [spread_blocks(part, context, part.bos_id, places.count(i)) for i, part in enumerate(text.parts) if i in places]
    )  # fmt: skip


def _costs(
    found: Described, plan: Plan, stages: list[dict[str, Any]], machine: Machine, teacher: str | Path | None
) -> list[StageCost]:
    """What the stages of a hybrid that is not there yet will cost."""
    if not stages:
        return []
    student = dataclasses.replace(found, config=hybrid_config(found.config, [layer.mixer for layer in plan.layers]))
    cache = None if teacher is None else cache_in(Path(teacher))
    model = found if teacher is None or cache is not None else Path(teacher)
    return run_cost(student, model, build_stages(stages), machine, cache)


def preview(
    recipe: Recipe, base: Path, machine: Machine, scores: Scores | None = None, teacher: str | Path | None = None
) -> tuple[Plan, list[StageCost]]:
    """What a run would do and what its stages would cost. Reads config.json alone, and writes nothing.

    Args:
        recipe: what to do.
        base: directory of the base; its weights need not be there.
        machine: what the run would have.
        scores: layer scores of the base, where the recipe's ranks follow them.
        teacher: as for `run`.

    Raises:
        HybridizeError: as `run` does for what it can see without weights and text.
    """
    _check(recipe)
    found = describe_base(base)
    plan = make_plan(found, recipe.plan, recipe.name, recipe.seed, scores)
    return plan, _costs(found, plan, fitted(recipe.distill, found.config), machine, teacher)


def _check(recipe: Recipe) -> None:
    check_components(recipe)
    if recipe.sizes:
        raise ConfigError(f"recipe {recipe.name}: chooses by the base's size. Load it with load_recipe(..., config=...)")


def run(
    recipe: Recipe,
    base: Path,
    data: str | Mapping[str, float] | None,
    out: Path,
    held_out: str | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    scores: Scores | None = None,
    machine: Machine | None = None,
    announce: Announce | None = None,
    teacher: str | Path | None = None,
    cache: Path | None = None,
) -> RunResult:
    """Plan, convert, distill, evaluate, gate, report.

    Args:
        recipe: what to do.
        base: directory of the base checkpoint.
        data: text to train on, a source or {source: weight}, None for the recipe's `data.mixture`; without `held_out` a share
            of its documents is kept for evaluation.
        out: the working directory.
        held_out: text to evaluate on.
        resume: go on with a run that was killed; finished steps are skipped either way when they match.
        progress: called with (label, done, total).
        scores: layer scores of the base, where the recipe's ranks follow them.
        machine: what it runs on; a run whose weights, gradients and moments alone are more than it holds is refused. None
            counts nothing.
        announce: called with the plan and what each stage will cost before anything is written; no costs where there is no
            `machine` or the training is done.
        teacher: as for `distill`; None is the base.
        cache: as for `evaluate`, so that runs of the same base measure it once; None is a folder in `out`.

    Returns:
        Plan, reports by column (base, converted, distilled), the verdict (None without gates) and the report's path.

    Raises:
        HybridizeError: as the verbs do.
    """
    _check(recipe)
    checkpoint = open_base(base)
    plan = make_plan(checkpoint, recipe.plan, recipe.name, recipe.seed, scores)
    stages = fitted(recipe.distill, checkpoint.config)
    sources = text_sources(recipe, data)
    weighted_sources(sources)  # a wrong one is found before any work
    if stages:
        check_sources(stages)
    counts = machine is not None and not is_complete(out / "distilled")
    costs = _costs(checkpoint, plan, stages, machine, teacher) if machine is not None and counts else []
    if announce is not None:
        announce(plan, costs)
    if machine is not None:
        refuse(costs, machine)
    _claim(out, recipe, plan)
    if scores is not None:
        write_json(out / "scores.json", scores.to_dict())
    share = recipe.data.held_out_share
    train, test = split_text(load_tokenizer(base), sources, held_out, share, out / "tokens", progress)
    if teacher is not None and stages:
        check_for_run(base, Path(teacher), build_stages(stages), recipe.seed, train)

    converted, distilled = out / "converted", out / "distilled"
    text = calibration_rows(train, recipe, checkpoint.config) if calibrated_layers(plan) else None
    convert(plan, converted, text, resume=resume or is_complete(converted), progress=progress, base_path=base)
    cache = cache or out / "measured"
    reports = {"base": _measured(recipe, base, base, test, out / "report-base.json", cache, progress)}
    if stages:
        reports["converted"] = _measured(recipe, converted, base, test, out / "report-converted.json", cache, progress)
        distill(converted, stages, train, distilled, teacher=teacher or base, resume=resume or is_complete(distilled),
                seed=recipe.seed, progress=progress, recall=recall_of(converted, recipe.seed))  # fmt: skip
        final = "distilled"
    else:
        distilled, final = converted, "converted"
    reports[final] = _measured(recipe, distilled, base, test, out / "report.json", cache, progress)
    verdict = gate(reports[final], reports["base"], recipe.gates, out / "verdict.json") if recipe.gates else None
    html = report(out, out / "report.html")
    return RunResult(work=out, plan=plan, reports=reports, verdict=verdict, html=html)


def recall_of(folder: Path, seed: int) -> Callable[[Any, list[int]], dict[str, float]]:
    """What measures recall of a model that is being trained, for `distill`.

    Args:
        folder: a directory with the model's tokenizer.
        seed: of the prompts.

    Returns:
        A function of the model and numbers of facts; those the model or its tokenizer has no room or words for are left
        out, with a line in the log.
    """
    tokenizer = load_tokenizer(folder)

    def measure(model: Any, pairs: list[int]) -> dict[str, float]:
        found: dict[str, float] = {}
        for count in pairs:
            probe = PROBES.build({"name": "recall", "pairs": [count], "samples": RECALL_SAMPLES})
            try:
                result = probe(EvalContext(checkpoint=folder, model=model, tokenizer=tokenizer, seed=seed))
            except ConfigError as error:
                log.info("recall with %d pairs is not watched: %s", count, error)
                continue
            found |= {name: metric.value for name, metric in result.metrics.items() if name == f"recall@{count}"}
        return found

    return measure


def _claim(out: Path, recipe: Recipe, plan: Plan) -> None:
    """Write recipe and plan, or check that the directory holds the same ones."""
    path = out / "plan.json"
    if path.exists():
        if Plan.read(path).digest() != plan.digest():
            raise ConfigError(f"{out}: holds the run of another plan. Choose another --out, or remove it")
    elif out.exists() and any(out.iterdir()):
        raise ConfigError(f"{out}: not empty, and no run of ours. Choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    write_json(path, plan.to_dict())
    write_text(out / "recipe.yaml", recipe.resolved())


def _measured(
    recipe: Recipe, checkpoint: Path, base: Path, text: Tokens, path: Path, cache: Path, progress: Progress | None
) -> Report:
    """The report on a checkpoint, written to `path`."""
    probes = recipe.evaluate or [{"name": "perplexity"}]
    # The working directory may move; what a report says of its checkpoint must not name this machine's folders.
    return evaluate(checkpoint, probes, text, base=base, out=path, seed=recipe.seed, progress=progress, cache=cache,
                    name=checkpoint.name)  # fmt: skip
