"""The two records beside the weights of a directory of ours: the manifest, and lineage.json, which is written last.

The manifest has the sha256 of every file. lineage.json says what the directory was made from; its presence means complete.
"""

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

from hybridize.core import read_json
from hybridize.errors import CheckpointError
from hybridize.storage import file_sha256, write_json
from hybridize.untrusted import inside
from hybridize.version import __version__

MANIFEST, LINEAGE = "hybridize.manifest.json", "lineage.json"


def write_manifest(folder: Path, records: dict[str, dict[str, Any]]) -> None:
    """Write hybridize.manifest.json: sha256 and size of every file.

    Args:
        folder: the directory.
        records: shard name -> what write_shard returned; all other files are hashed here.
    """
    files = {}
    for name in sorted(os.listdir(folder)):
        if name not in (MANIFEST, LINEAGE):
            path = folder / name
            record = records.get(name) or {"sha256": file_sha256(path), "bytes": path.stat().st_size}
            files[name] = {"sha256": record["sha256"], "bytes": record["bytes"]}
    write_json(folder / MANIFEST, {"files": files})


def versions() -> dict[str, str]:
    """The versions that a directory's bytes depend on."""
    names = ("torch", "transformers", "safetensors")
    found = {name: metadata.version(name) for name in names}
    return {"hybridize": __version__, "python": platform.python_version(), **found}


def origin(folder: Path | str) -> dict[str, str]:
    """{"repo", "revision"} of a directory in the Hub's cache: the repository's id and the commit. Empty for any other."""
    path = Path(os.path.abspath(folder))
    # The Hub's cache keeps models--ORG--NAME/snapshots/COMMIT; no name on the Hub holds two hyphens in a row.
    if path.parent.name != "snapshots" or not path.parent.parent.name.startswith("models--"):
        return {}
    return {"repo": path.parent.parent.name.removeprefix("models--").replace("--", "/", 1), "revision": path.name}


def is_complete(folder: Path | str) -> bool:
    """Whether a directory of ours was finished: lineage.json is there."""
    return (Path(folder) / LINEAGE).is_file()


def read_lineage(folder: Path | str) -> dict[str, Any]:
    """The lineage.json of a directory of ours.

    Raises:
        CheckpointError: it is absent (the directory is not complete, or not ours) or cannot be read.
    """
    lineage = read_json(Path(folder) / LINEAGE, "the lineage of a directory written by hybridize")
    if not isinstance(lineage, dict) or not isinstance(lineage.get("base"), dict) or "files" not in lineage:
        raise CheckpointError(f"{Path(folder) / LINEAGE}: has no base or files; expected one written by hybridize")
    return lineage


def write_lineage(folder: Path, lineage: dict[str, Any]) -> None:
    """Write lineage.json, the last file of a directory. Adds `files` (name -> sha256) and `versions`."""
    manifest = read_json(folder / MANIFEST, "the manifest written just before")
    files = {name: record["sha256"] for name, record in manifest["files"].items()}
    files[MANIFEST] = file_sha256(folder / MANIFEST)
    write_json(folder / LINEAGE, {**lineage, "files": files, "versions": versions()})


def verify_files(folder: Path | str) -> None:
    """Hash every file that lineage.json lists. Raises CheckpointError naming the first that differs or is absent."""
    for name, expected in read_lineage(folder)["files"].items():
        path = inside(Path(folder), name)
        if not path.is_file() or file_sha256(path) != expected:
            raise CheckpointError(f"{path}: is absent or was changed (sha256 differs). Make the folder again")
