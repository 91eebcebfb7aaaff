"""The push verb: all that will be uploaded is settled first, with no network; then it is sent, and becomes visible at once.

Weights go first, as objects that no reader sees; one commit then brings weights, card and records into the branch together.
Objects that are there already are not sent again, so that a push that was cut goes on when it is called again.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from hybridize.core import Plan, Scores, read_json
from hybridize.errors import CheckpointError, ConfigError
from hybridize.hub.answers import asking
from hybridize.hub.bundle import Bundle, Upload, check_repo, check_secrets
from hybridize.hub.published import published
from hybridize.storage import to_json

log = logging.getLogger(__name__)

Progress = Callable[[str, float, float], None]
# Files of an earlier push that would change how the model is loaded if they stayed beside new ones.
REPLACED = (
    "*.safetensors", "*.safetensors.index.json", "lineage.json", "hybridize.manifest.json", "*.py", "chat_template*",
    "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*", "COPYING*", "layers.png", ".eval_results/*", "hybridize/report*.json",
    "hybridize/verdict.json", "hybridize/recipe.yaml",
)  # fmt: skip
WEIGHTS = ("*.safetensors", "*.bin", "*.gguf", "*.pt", "*.pth")


@dataclass(frozen=True, kw_only=True)
class Pushed:
    """What a push left on the Hub."""

    repo: str
    url: str
    commit: str
    revision: str
    private: bool
    removed: tuple[str, ...]
    """Files of an earlier push that are no part of this one."""


def bundle_document(path: Path, repo: str) -> Bundle:
    """Scores or a plan as they will be uploaded, `hybridize/NAME.json`, without this machine's folders.

    Raises:
        CheckpointError: neither scores nor a plan.
        ConfigError: the repository's name cannot be one, or a token is in the file.
    """
    check_repo(repo)
    data = read_json(path, "scores or a plan")
    if not isinstance(data, dict) or not {"tables", "layers"} & data.keys():
        raise CheckpointError(f"{path}: holds neither tables nor layers; expected what `hybridize score` or `plan` wrote")
    kind = Scores if "tables" in data else Plan
    kind.from_dict(data, str(path))
    text = to_json(published(data)).encode()
    what = "scores" if kind is Scores else "plan"
    files = (Upload(name=f"hybridize/{path.stem}.json", source=text, origin=f"the {what}, without local folders"),)
    check_secrets(files)
    return Bundle(repo=repo, files=files, card=None, left_out=(), what=what)


def push(bundle: Bundle, public: bool = False, revision: str | None = None, progress: Progress | None = None) -> Pushed:
    """Upload what was bundled.

    Args:
        bundle: from `bundle_model` or `bundle_document`.
        public: whether a new repository is seen by all; a public one that is there is written to only so.
        revision: the branch, made where there is none; None is main.
        progress: called with (label, bytes done, bytes).

    Returns:
        Where it is now.

    Raises:
        CheckpointError: no token, no right, no such name, no network, or another change came in between: see `answers`.
        ConfigError: the repository holds a model of others, or is public and `public` is not said.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    repo = bundle.repo
    api = HfApi()
    with asking(repo, writing=True), _no_bars():
        _check_token()
        url = api.create_repo(repo, private=not public, exist_ok=True)
        if revision is not None:
            api.create_branch(repo, branch=revision, exist_ok=True)
        found = api.model_info(repo, revision=revision)
    there = sorted(entry.rfilename for entry in found.siblings or [])
    private = bool(found.private)
    _check_place(bundle, there, private, public)
    removed = _stale(bundle, there)
    additions = {file.name: CommitOperationAdd(path_in_repo=file.name, path_or_fileobj=file.content) for file in bundle.files}
    done, total = 0, sum(file.size for file in bundle.files)
    with asking(repo, writing=True), _no_bars():
        for file in sorted(bundle.files, key=lambda file: -file.size):
            if progress is not None:
                progress("push", done, total)
            if fnmatch(file.name, "*.safetensors"):
                api.preupload_lfs_files(repo, [additions[file.name]], revision=revision, free_memory=False)
                log.info("%s: sent", file.name)
            done += file.size
        commit = api.create_commit(
            repo, [*additions.values(), *(CommitOperationDelete(path_in_repo=name) for name in removed)],
            commit_message=f"{bundle.what} by hybridize", revision=revision, parent_commit=found.sha,
        )  # fmt: skip
    if progress is not None:
        progress("push", total, total)
    return Pushed(
        repo=repo, url=str(url), commit=commit.oid, revision=revision or "main", private=private, removed=tuple(removed)
    )


def _check_token() -> None:
    from huggingface_hub import get_token

    if get_token() is None:
        raise CheckpointError("push: there is no token here. Run `hf auth login`, or set HF_TOKEN to one that may write")


def _check_place(bundle: Bundle, there: list[str], private: bool, public: bool) -> None:
    """Refuse to write where it would surprise. Raises ConfigError."""
    if not private and not public:
        raise ConfigError(
            f"{bundle.repo}: is public, and what is pushed is private by default. Say --public, or take another name"
        )
    if private and public:
        log.warning("%s: is private and stays so; change that on its page", bundle.repo)
    foreign = [name for name in there if any(fnmatch(name, pattern) for pattern in WEIGHTS)]
    if bundle.card is not None and foreign and "lineage.json" not in there:
        raise ConfigError(
            f"{bundle.repo}: holds {foreign[0]}, a model that is not ours. Take another name, or a branch: --revision"
        )


def _stale(bundle: Bundle, there: list[str]) -> list[str]:
    if bundle.card is None:
        return []
    new = {file.name for file in bundle.files}
    return [name for name in there if name not in new and any(fnmatch(name, pattern) for pattern in REPLACED)]


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    """Without the library's own progress bars, which would be drawn over ours."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    quiet = are_progress_bars_disabled()
    if not quiet:
        disable_progress_bars()
    try:
        yield
    finally:
        if not quiet:
            enable_progress_bars()
