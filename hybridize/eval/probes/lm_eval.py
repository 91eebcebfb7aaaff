"""Tasks of lm-eval, EleutherAI's evaluation harness: its own, those that read a local folder, or a folder of YAML files."""

import functools
import importlib
import importlib.util
import json
import logging
import math
import os
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from hybridize.core import Metric, digest
from hybridize.errors import ConfigError, DataError, MissingDependencyError
from hybridize.eval.context import EvalContext, Item, ProbeResult, item_hash
from hybridize.eval.local_tasks import expected_file, load_local, local_names, templates
from hybridize.registry import suggest

log = logging.getLogger(__name__)

# Of a prompt, as much is kept for people to read.
PROMPT_CHARS = 400
NAME_LINE = re.compile(r"""^["']?(?:task|group|tag)["']?:[ \t]*["']?([^\s"'#\[\]>|]+)""", re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class LmEval:
    """Each task's own metrics, by a preloaded model (arXiv 2405.14782)."""

    tasks: list[str]
    """Names of tasks or groups."""
    data_dir: str | None = None
    """Folder of data sets as JSON lines: tasks of ours that read it hide lm-eval's own of the same name."""
    include_path: str | None = None
    """Folder of YAML tasks; a task found there hides all others of the same name."""
    limit: int | None = None
    """At most so many documents of each task."""
    num_fewshot: int | None = None
    """None is what each task says."""
    batch_size: int = 8
    """Requests that go through the model at once."""

    divides: ClassVar[bool] = True
    """Several processes share its documents."""

    def __post_init__(self) -> None:
        if not self.tasks:
            raise ConfigError("tasks is empty, expected names of lm-eval tasks")
        if self.include_path is not None and not Path(self.include_path).is_dir():
            raise ConfigError(f"include_path is {self.include_path!r}, expected a folder of YAML tasks")
        if self.data_dir is not None and not Path(self.data_dir).is_dir():
            raise ConfigError(f"data_dir is {self.data_dir!r}, expected a folder of data sets, such as arc_easy/test.jsonl in it")
        if importlib.util.find_spec("lm_eval") is not None:
            self._check_names()

    @functools.cached_property
    def _included(self) -> str:
        return "" if self.include_path is None else "\n".join(_yaml_texts(Path(self.include_path)))

    @functools.cached_property
    def _local(self) -> list[str]:
        return [] if self.data_dir is None else local_names(Path(self.data_dir))

    def _check_names(self) -> None:
        """Refuse unknown names now: lm-eval itself takes half a minute to index its 14,000 files before it would."""
        missing = [name for name in self.tasks if name not in self._local and not _mentions(self._included, name)]
        if not missing:
            return
        known = _builtin_text()
        for name in missing:
            if name in templates() and not _mentions(known, name):
                raise ConfigError(
                    f"task {name!r} is read from {expected_file(name)} in the folder that data_dir (--task-data) names"
                )
            if not _mentions(known, name):
                names = sorted({*self._local, *NAME_LINE.findall(self._included)})
                near = suggest(name, sorted({*names, *NAME_LINE.findall(known)})).split("Known: ")[0]
                where = " and ".join(folder for folder in (self.data_dir, self.include_path) if folder is not None)
                there = f"in {where}: {', '.join(names)}" if names else "run `lm-eval ls tasks` for the list"
                raise ConfigError(f"unknown lm-eval task {name!r}. {near}Known {there}")

    @functools.cached_property
    def _loaded(self) -> list[Any]:
        """The tasks and groups as objects of lm-eval, their data read.

        Raises:
            ConfigError: one task is there twice.
            DataError: a data set cannot be read here.
        """
        from lm_eval.tasks import TaskManager

        hidden = NAME_LINE.findall(self._included)
        local = [name for name in self.tasks if name in self._local and name not in hidden]
        rest = [name for name in self.tasks if name not in local]
        found: dict[str, list[Any]] = {name: [load_local(Path(str(self.data_dir)), name, self.num_fewshot)] for name in local}
        only_own = all(_mentions(self._included, name) for name in rest)
        manager = TaskManager(include_path=self.include_path, include_defaults=not only_own) if rest else None
        for name in rest:
            assert manager is not None
            try:
                loaded = manager.load([name])
            except (KeyError, ValueError) as error:
                raise ConfigError(
                    f"lm_eval: {name!r} is no task that can be loaded here ({_line(error)}){self._hint(name)}"
                ) from error
            except OSError as error:
                raise DataError(f"lm_eval: the data of {name} cannot be read here ({_line(error)}){self._hint(name)}") from error
            whole = loaded.get("groups", {}).get(name)
            found[name] = list(loaded["tasks"].values()) if whole is None else [whole]
        seen: dict[str, str] = {}
        for name in self.tasks:
            for leaf in (leaf.task_name for item in found[name] for leaf in _tasks_of(item)):
                if leaf in seen:
                    raise ConfigError(f"lm_eval: task {leaf!r} is in {seen[leaf]!r} and in {name!r}, expected it once")
                seen[leaf] = name
        return [item for name in self.tasks for item in found[name]]

    def _hint(self, name: str) -> str:
        file = expected_file(name)
        if file is None:
            return ""
        return f". Without a download it is read from {file} in the folder that data_dir (--task-data) names"

    def follows_from(self) -> list[Any]:
        """What else the numbers follow from: lm-eval's version, and the prompts and documents of each task.

        Raises:
            MissingDependencyError, ConfigError, DataError: as a call does.
        """
        _need_lm_eval()
        with _quiet():
            leaves = {leaf.task_name: leaf for item in self._loaded for leaf in _tasks_of(item)}
            found = []
            for name, leaf in sorted(leaves.items()):
                rows = [*leaf.eval_docs, *((leaf.fewshot_docs() or []) if self._shots(leaf) else [])]
                config = re.sub(" at 0x[0-9a-f]+", "", str(leaf.dump_config()))
                found.append([name, digest(config), item_hash([json.dumps(row, default=str) for row in rows])])
        return [metadata.version("lm_eval"), found]

    def __call__(self, context: EvalContext) -> ProbeResult:
        """Measure.

        Returns:
            `task/metric` (and `task/metric,filter` for a filter that is not "none"); per-document scores where the
            metric is their mean. Nothing in a process that is not the first.

        Raises:
            MissingDependencyError: lm-eval is not installed.
            ConfigError: a task is there twice, or generates more than the model has room for.
            DataError: a task's data set cannot be read here, or holds an answer that the model has no room for.
        """
        _need_lm_eval()
        from lm_eval import evaluator

        from hybridize.eval.harness import Harness

        version = metadata.version("lm_eval")
        limit = min([limit for limit in (self.limit, context.limit) if limit is not None], default=None)
        processes = 1 if context.accelerator is None else context.accelerator.num_processes
        with _quiet():
            leaves = {leaf.task_name: leaf for item in self._loaded for leaf in _tasks_of(item)}
            for name, leaf in leaves.items():
                if (documents := min(len(leaf.eval_docs), limit or len(leaf.eval_docs))) < processes:
                    raise ConfigError(f"lm_eval: {name} has {documents} documents for {processes} processes; start fewer")
                leaf.set_config("num_fewshot", self._shots(leaf))
                leaf.set_fewshot_seed(context.seed)
            groups = {group.name: group for item in self._loaded for group in _groups_of(item)}
            folder = None if context.answers is None else context.answers / f"lm_eval-{version}"
            harness = Harness(context, self.batch_size, folder)
            _seed(context.seed)
            # Not `simple_evaluate`, which takes seconds to ask the operating system what machine this is.
            results = evaluator.evaluate(
                lm=harness, task_dict={"tasks": leaves, "groups": groups}, log_samples=True, bootstrap_iters=0, limit=limit
            )
        harness.say()
        if results is None:
            return ProbeResult(metrics={})
        return _collect(dict(results), leaves, version)

    def _shots(self, task: Any) -> int:
        """Examples in a prompt; as in lm-eval, a task that says zero keeps to it."""
        own = task.config.num_fewshot
        return own or 0 if self.num_fewshot is None or own == 0 else self.num_fewshot


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def _need_lm_eval() -> None:
    try:
        importlib.import_module("lm_eval.evaluator")
        importlib.import_module("lm_eval.models.huggingface")
        importlib.import_module("lm_eval.tasks")
    except ImportError as error:
        raise MissingDependencyError(f"probe 'lm_eval' needs lm-eval ({error}): pip install 'hybridize[eval]'") from error


def _quiet() -> Any:
    from hybridize.eval.harness import quiet

    return quiet()


def _line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _groups_of(item: Any) -> list[Any]:
    """The group and all groups in it; none of a task."""
    return [item, *item.get_all_groups()] if hasattr(item, "get_all_groups") else []


def _tasks_of(item: Any) -> list[Any]:
    """The tasks of a task or group."""
    return item.get_all_tasks() if hasattr(item, "get_all_tasks") else [item]


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


def _collect(results: dict[str, Any], tasks: dict[str, Any], version: str) -> ProbeResult:
    """lm-eval's results in our form."""
    metrics: dict[str, Metric] = {}
    samples: dict[str, list[float]] = {}
    hashes: dict[str, str] = {}
    items: dict[str, list[Item]] = {}
    for task, row in results["results"].items():
        leaves = _leaves(results, task)
        for key, value in row.items():
            metric, comma, chosen = key.partition(",")
            if not comma or metric.endswith("_stderr") or isinstance(value, (str, bool)) or not math.isfinite(value):
                continue
            name = f"{task}/{metric}" if chosen == "none" else f"{task}/{key}"
            found = [
                (leaf, sample)
                for leaf in leaves
                for sample in sorted(results["samples"].get(leaf, []), key=lambda sample: sample["doc_id"])
                if sample["filter"] == chosen and isinstance(sample.get(metric), (int, float))
            ]
            scores = [float(sample[metric]) for _, sample in found]
            # Scores of documents belong to a metric only when it is their mean: perplexities and F1 are not.
            if scores and math.isclose(sum(scores) / len(scores), value, rel_tol=1e-6, abs_tol=1e-9):
                samples[name] = scores
                hashes[name] = item_hash([f"{leaf} {sample['doc_id']} {sample['doc_hash']}" for leaf, sample in found])
                items[name] = [read_item(tasks[leaf], sample, metric) for leaf, sample in found]
            metrics[name] = Metric(
                value=float(value),
                stderr=_stderr(scores) if name in samples else None,
                higher_is_better=bool(results["higher_is_better"].get(task, {}).get(metric)),
                samples=len(scores) or sum(results["n-samples"].get(leaf, {}).get("effective", 0) for leaf in leaves),
            )
    if not metrics:
        raise DataError(f"lm_eval: {', '.join(results['results'])} gave no finite metric")
    return ProbeResult(metrics=metrics, samples=samples, item_hashes=hashes, items=items, versions={"lm_eval": version})


def read_item(task: Any, sample: dict[str, Any], metric: str) -> Item:
    """A document as a person would read it.

    Args:
        task: of lm-eval.
        sample: what it logged of the document: arguments, answers, target.
        metric: which decides what counts as given among choices.
    """
    arguments, answers, wanted = sample["arguments"], sample["filtered_resps"], sample["target"]
    prompt = str(arguments[0][0])
    if task.OUTPUT_TYPE == "multiple_choice":
        if "acc_mutual_info" in sample["metrics"]:
            arguments = arguments[: len(arguments) // 2]  # behind them the choices without their prompt
        shown = [answer for _, answer in arguments]
        choices = [answer.removeprefix(task.config.target_delimiter) for answer in shown]
        if task.multiple_input:
            # The choice lies in the prompt, and all continue alike: what they share is what was shown.
            wanted, choices = task.doc_to_text(sample["doc"]), task.doc_to_choice(sample["doc"])
            whole = [before + answer for before, answer in arguments]
            prompt = os.path.commonprefix(whole)
            shown = [text.removeprefix(prompt) for text in whole]
        lengths = {"acc_norm": [len(choice) for choice in choices], "acc_bytes": [len(choice.encode()) for choice in choices]}
        sizes = lengths.get(metric, [1] * len(choices))
        scores = [answer[0] / size if size else -math.inf for answer, size in zip(answers[: len(sizes)], sizes, strict=True)]
        given = shown[scores.index(max(scores))]
        right = wanted if isinstance(wanted, list) else [wanted]
        expected = " or ".join(shown[place] if isinstance(place, int) else str(place) for place in right)
    elif task.OUTPUT_TYPE == "loglikelihood":
        expected = str(arguments[0][1])
        given = expected if answers[0][1] else ""
    else:
        expected, given = str(wanted), str(sample["resps"][0][0])
    return Item(prompt=prompt[-PROMPT_CHARS:], expected=expected.strip(), given=given.strip())


def _stderr(scores: list[float]) -> float | None:
    if len(scores) < 2:
        return None
    mean = sum(scores) / len(scores)
    return math.sqrt(sum((score - mean) ** 2 for score in scores) / (len(scores) - 1) / len(scores))
