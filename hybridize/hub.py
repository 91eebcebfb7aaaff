"""Where a base comes from: a local directory, the bundled model, or the Hub."""

import logging
from importlib import resources
from pathlib import Path

from hybridize.errors import CheckpointError, MissingDependencyError
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
CONFIG_ONLY = ["config.json", "LICENSE*", "NOTICE*", "USE_POLICY*"]
PATTERNS = [*CONFIG_ONLY, "*.safetensors", "*.json", "tokenizer*", "*.model", "merges.txt"]
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
    """The local directory of a base: a path, "demo", an alias such as llama-3-8b, or a hub id, which is fetched.

    Args:
        name: as above.
        revision: of a hub id; None is its main branch.
        weights: False fetches config.json and the licence only, all that `plan` and `info` read.

    Raises:
        CheckpointError: not a directory, not on the Hub, gated, or no network; the message says what to do.
    """
    if name == DEMO:
        return demo_model()
    path = Path(name)
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(f"{name}: is a file, expected the directory of a checkpoint")
    repo = ALIASES.get(name.lower(), name)
    if repo.count("/") != 1 or name.startswith((".", "/", "~")):
        raise CheckpointError(f"{name}: no such directory, and not a hub id. {suggest(name, [DEMO, *sorted(ALIASES)])}")
    return _fetch(repo, revision, PATTERNS if weights else CONFIG_ONLY)


def _fetch(repo: str, revision: str | None, patterns: list[str]) -> Path:
    try:
        from huggingface_hub import HfApi, snapshot_download
        from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
    except ImportError as error:
        raise MissingDependencyError("huggingface_hub is missing: pip install huggingface_hub") from error
    try:
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=patterns, ignore_patterns=ELSEWHERE))
    except GatedRepoError as error:
        raise CheckpointError(
            f"{repo}: gated. Accept its licence on https://huggingface.co/{repo}, then run `hf auth login` or set HF_TOKEN"
        ) from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(f"{repo}: no such repository on the Hub, or it is private and no token is set") from error
    except LocalEntryNotFoundError as error:
        raise CheckpointError(f"{repo}: not in the local cache and the Hub cannot be reached; give a local directory") from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise CheckpointError(f"{repo}: cannot be fetched ({str(error).splitlines()[0]}); give a local directory") from error
    try:
        card = HfApi().model_info(repo, revision=revision).card_data
        licence = (card or {}).get("license_name") or (card or {}).get("license") or "not stated"
    except (HfHubHTTPError, OSError):
        licence = "not known offline; see the model page"
    log.warning("base: %s (licence: %s)", repo, licence)
    return folder
