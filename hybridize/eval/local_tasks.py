"""Tasks that read files of a local folder: lm-eval's own prompts and metrics, from `tasks/`, and nothing downloaded.

A file of `tasks/` is lm-eval's YAML with two keys more: `files`, where each split lies below the folder, and `fields`, what
each of its lines has. A split is used where its file is there; measured is the test split or, without one, the validation
split. With `{name}` in its files it stands for one task a file, and for their group.
"""

import functools
import json
from pathlib import Path
from typing import Any

import yaml

from hybridize.errors import DataError

TEMPLATES = Path(__file__).parent / "tasks"
# Keys of ours, which lm-eval does not know.
OURS = ("files", "fields", "group", "aggregate_metric_list")


@functools.lru_cache(maxsize=1)
def templates() -> dict[str, dict[str, Any]]:
    """What is shipped, by task or group."""
    return {path.stem: _template(path) for path in sorted(TEMPLATES.glob("*.yaml"))}


def _template(path: Path) -> dict[str, Any]:
    found = yaml.safe_load(path.read_text(encoding="utf-8"))
    above = _template(path.with_name(found.pop("include"))) if "include" in found else {}
    return {**above, **found}


def measured(template: dict[str, Any]) -> list[str]:
    """The files that hold what is measured, best first, below the folder."""
    splits = (template.get("test_split"), template.get("validation_split"))
    return [template["files"][split] for split in splits if split is not None]


def local_names(folder: Path) -> list[str]:
    """Names of tasks and groups that a folder may be asked for: all that are shipped, and one a file of the groups."""
    names = []
    for name, template in templates().items():
        names += [name, *(template["task"].format(name=member) for member in _members(folder, template))]
    return names


def expected_file(name: str) -> str | None:
    """The file that a task or group would be read from, below the folder; None for a name that is not ours."""
    for own, template in templates().items():
        before, inside, _ = template["task"].partition("{name}")
        if name == own:
            return measured(template)[0].format(name="*")
        if inside and name.startswith(before):
            return measured(template)[0].format(name=name.removeprefix(before))
    return None


def load_local(folder: Path, name: str, num_fewshot: int | None = None) -> Any:
    """A task of lm-eval that reads `folder`, or the group of all that its files are there for.

    Args:
        folder: laid out as the templates say, such as `arc_easy/test.jsonl`, `blimp/wh_vs_that_no_gap.jsonl`.
        name: one of `local_names(folder)`.
        num_fewshot: examples in a prompt, for which there has to be a file of their own; None is what the task says.

    Returns:
        lm_eval.api.task.Task, or lm_eval.api.group.Group.

    Raises:
        DataError: a file is missing, or holds something else than it should.
    """
    if name in templates() and "group" not in templates()[name]:
        return _task(folder, templates()[name], name, num_fewshot)
    if name in templates():
        return _group(folder, templates()[name], num_fewshot)
    for template in templates().values():
        for member in _members(folder, template):
            if template["task"].format(name=member) == name:
                return _task(folder, template, name, num_fewshot, member)
    raise AssertionError(name)


def _members(folder: Path, template: dict[str, Any]) -> list[str]:
    """What `{name}` stands for: the files that are there."""
    if "group" not in template:
        return []
    return sorted(path.stem for path in folder.glob(measured(template)[0].format(name="*")))


def _group(folder: Path, template: dict[str, Any], num_fewshot: int | None) -> Any:
    from lm_eval.api.group import Group
    from lm_eval.config.group import GroupConfig

    members = _members(folder, template)
    if not members:
        raise DataError(_missing(folder, template["group"], template, measured(template)[0].format(name="*")))
    aggregates = [dict(row) for row in template["aggregate_metric_list"]]
    group = Group.from_config(
        GroupConfig(group=template["group"], aggregate_metric_list=aggregates, metadata=dict(template["metadata"]))
    )
    for member in members:
        group.add(_task(folder, template, template["task"].format(name=member), num_fewshot, member))
    return group


def _task(folder: Path, template: dict[str, Any], name: str, num_fewshot: int | None, member: str = "") -> Any:
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

    paths = {split: _find(folder, pattern.format(name=member)) for split, pattern in template["files"].items()}
    needed = [template.get("test_split"), template.get("validation_split")]
    chosen = next((split for split in needed if split is not None and paths[split] is not None), None)
    if chosen is None:
        raise DataError(_missing(folder, name, template, measured(template)[0].format(name=member)))
    examples = template.get("fewshot_split", template.get("training_split"))
    own = template.get("num_fewshot")
    if num_fewshot if num_fewshot is not None and own != 0 else own:
        # lm-eval would take examples from what is measured.
        if examples is None:
            raise DataError(f"lm_eval: {name} has no split to draw examples from; leave num_fewshot out")
        if paths[examples] is None:
            raise DataError(_missing(folder, name, template, template["files"][examples].format(name=member)))
    rows = {split: _rows(path, template["fields"]) for split, path in paths.items() if path is not None}

    class LocalTask(ConfigurableTask):
        def download(self, dataset_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> None:
            self.dataset = {split: Dataset.from_list(found) for split, found in rows.items()}

    settings = {key: value for key, value in template.items() if key not in OURS}
    for key in ("training_split", "validation_split", "test_split"):
        settings[key] = template.get(key) if template.get(key) in rows else None
    settings["fewshot_split"] = template.get("fewshot_split") if template.get("fewshot_split") in rows else None
    # lm-eval changes what it is given.
    return LocalTask(config=json.loads(json.dumps({**settings, "task": name})))


def _find(folder: Path, pattern: str) -> Path | None:
    found = sorted(folder.glob(pattern))
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise DataError(f"lm_eval: {folder / pattern}: got {names}, expected one file. Keep the one to read there")
    return found[0] if found else None


def _missing(folder: Path, name: str, template: dict[str, Any], file: str) -> str:
    return (
        f"lm_eval: {folder / file}: not found; task {name!r} is read from it. Put it there: JSON lines with "
        f"{', '.join(template['fields'])}, as in the published set"
    )


def _rows(path: Path, fields: list[str]) -> list[dict[str, Any]]:
    """The objects of a .jsonl file. Raises DataError for a line that is none, or lacks a field."""
    rows = []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"lm_eval: {path}: is not UTF-8 ({error.reason}), expected JSON lines. Fetch the file again") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"lm_eval: {path}: line {number} is not JSON ({error.msg}), expected one object a line") from error
        if not isinstance(row, dict) or any(field not in row for field in fields):
            found = ", ".join(row) if isinstance(row, dict) else type(row).__name__
            raise DataError(f"lm_eval: {path}: line {number} has {found}; expected an object with {', '.join(fields)}")
        rows.append(row)
    if not rows:
        raise DataError(f"lm_eval: {path}: has no lines, expected JSON lines with {', '.join(fields)}")
    return rows
