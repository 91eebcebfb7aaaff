"""Tasks of lm-eval, EleutherAI's evaluation harness: its own, or a folder of YAML files."""

import functools
import importlib
import importlib.util
import logging
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from hybridize.core import Metric
from hybridize.errors import ConfigError, DataError, MissingDependencyError
from hybridize.eval.context import EvalContext, ProbeResult, item_hash
from hybridize.registry import suggest

log = logging.getLogger(__name__)

NAME_LINE = re.compile(r"""^["']?(?:task|group|tag)["']?:[ \t]*["']?([^\s"'#\[\]>|]+)""", re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class LmEval:
    """Each task's own metrics, by a preloaded model (arXiv 2405.14782)."""

    tasks: list[str]
    """Names of tasks or groups."""
    include_path: str | None = None
    """Folder of YAML tasks; a task found there hides lm-eval's own of the same name."""
    limit: int | None = None
    """At most so many documents of each task."""
    num_fewshot: int | None = None
    """None is what each task says."""
    batch_size: int = 8

    def __post_init__(self) -> None:
        if not self.tasks:
            raise ConfigError("tasks is empty, expected names of lm-eval tasks")
        if self.include_path is not None and not Path(self.include_path).is_dir():
            raise ConfigError(f"include_path is {self.include_path!r}, expected a folder of YAML tasks")
        if importlib.util.find_spec("lm_eval") is not None:
            self._check_names()

    def _check_names(self) -> None:
        """Refuse unknown names now: lm-eval itself takes half a minute to index its 14,000 files before it would."""
        own = "" if self.include_path is None else "\n".join(_yaml_texts(Path(self.include_path)))
        missing = [name for name in self.tasks if not _mentions(own, name)]
        if not missing:
            return
        known = _builtin_text()
        for name in missing:
            if not _mentions(known, name):
                names = sorted(set(NAME_LINE.findall(own)))
                near = suggest(name, sorted({*names, *NAME_LINE.findall(known)})).split("Known: ")[0]
                there = f"in {self.include_path}: {', '.join(names)}" if names else "run `lm-eval ls tasks` for the list"
                raise ConfigError(f"unknown lm-eval task {name!r}. {near}Known {there}")

    def __call__(self, context: EvalContext) -> ProbeResult:
        """Measure.

        Returns:
            `task/metric` (and `task/metric,filter` for a filter that is not "none"); per-document scores where the
            metric is their mean.

        Raises:
            MissingDependencyError: lm-eval is not installed.
            DataError: a task's data set cannot be read here.
        """
        try:
            evaluator = importlib.import_module("lm_eval.evaluator")
            models = importlib.import_module("lm_eval.models.huggingface")
            tasks = importlib.import_module("lm_eval.tasks")
        except ImportError as error:
            raise MissingDependencyError(f"probe 'lm_eval' needs lm-eval ({error}): pip install 'hybridize[eval]'") from error
        context.tell("lm_eval", 0, 1)
        limits = [limit for limit in (self.limit, context.limit) if limit is not None]
        harness = models.HFLM(
            pretrained=context.model, tokenizer=context.need_tokenizer("lm_eval"), batch_size=self.batch_size,
            device=str(context.device), max_length=context.model.config.max_position_embeddings,
        )  # fmt: skip
        own = None if self.include_path is None else "\n".join(_yaml_texts(Path(self.include_path)))
        only_own = own is not None and all(_mentions(own, name) for name in self.tasks)
        try:
            manager = tasks.TaskManager(include_path=self.include_path, include_defaults=not only_own)
            results = evaluator.simple_evaluate(
                model=harness, tasks=list(self.tasks), task_manager=manager, log_samples=True, bootstrap_iters=0,
                limit=min(limits, default=None), num_fewshot=self.num_fewshot, random_seed=context.seed,
                numpy_random_seed=context.seed, torch_random_seed=context.seed, fewshot_random_seed=context.seed,
            )  # fmt: skip
        except OSError as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise DataError(f"lm_eval: the data of {', '.join(self.tasks)} cannot be read here ({reason})") from error
        context.tell("lm_eval", 1, 1)
        return _collect(dict(results), metadata.version("lm_eval"))


@functools.lru_cache(maxsize=1)
def _builtin_text() -> str:
    """All of lm-eval's own YAML, about 8 MB; reading it takes a second, and a recipe is checked more than once."""
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or spec.origin is None:
        raise MissingDependencyError("probe 'lm_eval' needs lm-eval: pip install 'hybridize[eval]'")
    return "\n".join(_yaml_texts(Path(spec.origin).parent / "tasks"))


def _yaml_texts(folder: Path) -> Iterator[str]:
    """Texts of the YAML files of a folder; some of lm-eval's have no suffix."""
    skip = (".py", ".pyc", ".md", ".json", ".jsonl", ".txt", ".csv", ".sh", ".parquet", ".arrow", ".gz")
    for root, _, files in os.walk(folder):
        for name in sorted(files):
            if not name.endswith(skip):
                yield Path(root, name).read_text(encoding="utf-8", errors="replace")


def _mentions(text: str, name: str) -> bool:
    return re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", text) is not None


def _leaves(results: dict[str, Any], task: str) -> list[str]:
    below = results.get("group_subtasks", {}).get(task) or []
    return [leaf for name in below for leaf in _leaves(results, name)] if below else [task]


def _collect(results: dict[str, Any], version: str) -> ProbeResult:
    """lm-eval's results in our form."""
    metrics: dict[str, Metric] = {}
    samples: dict[str, list[float]] = {}
    hashes: dict[str, str] = {}
    for task, row in results["results"].items():
        leaves = _leaves(results, task)
        for key, value in row.items():
            metric, comma, chosen = key.partition(",")
            if not comma or metric.endswith("_stderr") or isinstance(value, (str, bool)) or not math.isfinite(value):
                continue
            name = f"{task}/{metric}" if chosen == "none" else f"{task}/{key}"
            items = [
                (f"{leaf} {sample['doc_id']} {sample['doc_hash']}", sample[metric])
                for leaf in leaves
                for sample in sorted(results["samples"].get(leaf, []), key=lambda sample: sample["doc_id"])
                if sample["filter"] == chosen and isinstance(sample.get(metric), (int, float))
            ]
            scores = [float(score) for _, score in items]
            # Scores of documents belong to a metric only when it is their mean: perplexities and F1 are not.
            if scores and math.isclose(sum(scores) / len(scores), value, rel_tol=1e-6, abs_tol=1e-9):
                samples[name], hashes[name] = scores, item_hash([item for item, _ in items])
            metrics[name] = Metric(
                value=float(value),
                stderr=_stderr(scores) if name in samples else None,
                higher_is_better=bool(results["higher_is_better"].get(task, {}).get(metric)),
                samples=len(scores) or sum(results["n-samples"].get(leaf, {}).get("effective", 0) for leaf in leaves),
            )
    if not metrics:
        raise DataError(f"lm_eval: {', '.join(results['results'])} gave no finite metric")
    return ProbeResult(metrics=metrics, samples=samples, item_hashes=hashes, versions={"lm_eval": version})


def _stderr(scores: list[float]) -> float | None:
    if len(scores) < 2:
        return None
    mean = sum(scores) / len(scores)
    return math.sqrt(sum((score - mean) ** 2 for score in scores) / (len(scores) - 1) / len(scores))
