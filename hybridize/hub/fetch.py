"""Where a base or hybrid comes from: a local directory, the bundled model, or the Hub.

What the Hub has is read where its cache keeps it, and never copied. A cut connection goes on where it was; a call that failed
keeps the files that came whole.
"""

import logging
from importlib import resources
from pathlib import Path

from hybridize.errors import CheckpointError
from hybridize.hub.answers import asking
from hybridize.hub.licences import card_licence, licence_files, repo_licence, text_licence
from hybridize.lineage import is_complete, read_lineage
from hybridize.redact import scrub
from hybridize.registry import suggest

log = logging.getLogger(__name__)

# Short names people type -> the repository that is meant.
ALIASES = {
    "llama-3-8b": "meta-llama/Meta-Llama-3-8B",
    "llama-3-8b-instruct": "meta-llama/Meta-Llama-3-8B-Instruct",
    "llama-3.1-8b": "meta-llama/Llama-3.1-8B",
    "llama-3.1-8b-instruct": "meta-llama/Llama-3.1-8B-Instruct",
    "llama-3.2-1b": "meta-llama/Llama-3.2-1B",
    "llama-3.2-1b-instruct": "meta-llama/Llama-3.2-1B-Instruct",
    "llama-3.2-3b": "meta-llama/Llama-3.2-3B",
    "llama-3.2-3b-instruct": "meta-llama/Llama-3.2-3B-Instruct",
    "mistral-7b": "mistralai/Mistral-7B-v0.3",
    "mistral-7b-instruct": "mistralai/Mistral-7B-Instruct-v0.3",
    "qwen2.5-1.5b": "Qwen/Qwen2.5-1.5B",
    "qwen2.5-7b": "Qwen/Qwen2.5-7B",
    "qwen2.5-7b-instruct": "Qwen/Qwen2.5-7B-Instruct",
    "qwen3-0.6b": "Qwen/Qwen3-0.6B",
    "qwen3-1.7b": "Qwen/Qwen3-1.7B",
    "qwen3-8b": "Qwen/Qwen3-8B",
}
DEMO = "demo"
# All a plan reads, and all a conversion reads. Pickled weights and code are not even fetched.
CONFIG_ONLY = ["config.json", "lineage.json", "README.md", "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*"]
PATTERNS = [*CONFIG_ONLY, "*.safetensors", "*.json", "tokenizer*", "*.model", "merges.txt", "chat_template.jinja"]
# Second copies of the weights, in other layouts.
ELSEWHERE = ["consolidated*", "*/*"]


def shape_of(name: str) -> Path:
    """The directory of a config.json: of a well-known shape that comes with the package, or as in `resolve_base`.

    Raises:
        CheckpointError: as in `resolve_base`.
    """
    known = Path(str(resources.files("hybridize") / "configs" / "shapes"))
    if name.lower() in {folder.name for folder in known.iterdir()}:
        return known / name.lower()
    return resolve_base(name, weights=False)


def demo_model() -> Path:
    """The bundled small model."""
    return Path(str(resources.files("hybridize") / "demo" / "model"))


def resolve_base(name: str, revision: str | None = None, weights: bool = True) -> Path:
    """The local directory of a base or hybrid: a path, "demo", an alias such as llama-3-8b, or a hub id, which is fetched.

    Args:
        name: as above; a hub id or alias may end with @ and a branch, tag or commit.
        revision: the same, given by itself; None without either is the main branch.
        weights: False fetches config.json, card and licence only, all that `plan` and `info` read.

    Raises:
        CheckpointError: not a directory, not on the Hub, gated, no such revision, or no network; the message says what to do.
    """
    if name == DEMO:
        return demo_model()
    path = Path(name)
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(f"{name}: is a file, expected the directory of a checkpoint")
    short, at, pinned = name.partition("@")
    repo = ALIASES.get(short.lower(), short)
    if repo.count("/") != 1 or name.startswith((".", "/", "~")) or ":" in name or (at and not pinned):
        known = suggest(short, [DEMO, *sorted(ALIASES)])
        raise CheckpointError(
            scrub(f"{name}: no such directory, and not a hub id such as me/model or me/model@revision. {known}")
        )
    if at and revision not in (None, pinned):
        raise CheckpointError(f"{name}: names the revision {pinned}, and {revision!r} is asked for. Give one of them")
    return _fetch(repo, revision or pinned or None, PATTERNS if weights else CONFIG_ONLY)


def _fetch(repo: str, revision: str | None, patterns: list[str]) -> Path:
    from huggingface_hub import HfApi

    with asking(repo if revision is None else f"{repo}@{revision}"):
        folder = Path(HfApi().snapshot_download(repo, revision=revision, allow_patterns=patterns, ignore_patterns=ELSEWHERE))
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{repo}: holds no config.json, expected a checkpoint of transformers")
    licence = card_licence(folder) or text_licence(licence_files(folder)) or repo_licence(repo)
    log.warning("base: %s@%s (licence: %s)", repo, folder.name, "not stated" if licence is None else licence.title)
    return folder


def base_of(folder: Path) -> Path:
    """The directory of the base that a hybrid was made from, by its lineage: where it lay, or on the Hub at the same commit.

    Raises:
        CheckpointError: the hybrid has no lineage, or its base is neither here nor known by a repository.
    """
    base = read_lineage(folder)["base"]
    location = base.get("location")
    if isinstance(location, str) and (location == DEMO or Path(location).is_dir()):
        return resolve_base(location)
    repo, revision = base.get("repo"), base.get("revision")
    if isinstance(repo, str) and (revision is None or isinstance(revision, str)):
        return resolve_base(repo, revision)
    raise CheckpointError(f"{folder}: its base {location!r} is not here, and its lineage names no repository. Give the base")


def teacher_for(folder: Path | None, teacher: str | None) -> str | None:
    """What `distill`, `teach` and `run` take as a teacher: a path as it is given, a hub id as its directory.

    Args:
        folder: of the hybrid, whose base it is where none is given; None where there is no hybrid yet.
        teacher: path, hub id or alias; None is the hybrid's base.

    Raises:
        CheckpointError: as `resolve_base` and `base_of`.
    """
    if teacher is not None:
        return str(resolve_base(teacher)) if is_named(teacher) else teacher
    if folder is None or not is_complete(folder):
        return None
    location = read_lineage(folder)["base"].get("location", "")
    return None if Path(location).is_dir() else str(base_of(folder))


def is_named(name: str) -> bool:
    """Whether a name is no path that is here, but one of ours, an alias, or of the form of a hub id."""
    short = name.partition("@")[0]
    known = short == DEMO or short.lower() in ALIASES
    return not Path(name).exists() and (known or (short.count("/") == 1 and not name.startswith((".", "/", "~"))))
