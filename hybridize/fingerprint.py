"""Which weights a report, a verdict and an export are about: one hash of what a model computes."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hybridize.checkpoint import Checkpoint
from hybridize.core import digest
from hybridize.storage import file_sha256


def weight_files(found: Checkpoint) -> list[Path]:
    """The files that hold the tensors, in order of their names."""
    return sorted({info.file for info in found.tensors.values()})


def stamps(found: Checkpoint) -> list[list[Any]]:
    """Size and time of the weight files: a directory's hash does not see the weights, and no resume may mix two."""
    return [[file.name, (stat := os.stat(file)).st_size, stat.st_mtime_ns] for file in weight_files(found)]


def weights_hash(found: Checkpoint, hashes: Mapping[str, str] | None = None) -> str:
    """sha256 of what a model computes: config.json, and every byte of its weights. Tokenizer and card are no part of it.

    Args:
        found: the directory.
        hashes: sha256 of the weight files by name, where they are known; None reads them.
    """
    files = weight_files(found)
    if hashes is None:
        hashes = {file.name: file_sha256(file) for file in files}
    return digest([found.hash, {file.name: hashes[file.name] for file in files}])
