"""What was measured before: a folder of reports and answers, each under the hash of all that it follows from.

    hashes.json            sha256 of files, by path and by what the file system says of them
    reports/<hash>.json    a report, its items beside it
    answers/<hash>/        what one model answered, on one device and these versions

All of it may be removed at any time; it is then measured again.
"""

import json
import logging
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hybridize.checkpoint import Checkpoint
from hybridize.core import Report, digest
from hybridize.errors import ConfigError
from hybridize.fingerprint import weight_files
from hybridize.storage import disk_errors, file_sha256, write_json, write_text

log = logging.getLogger(__name__)

# Raised when the same inputs would give other numbers.
FORMAT = 1
# Clocks of file systems tick this slowly: a file younger than that may change without a sign of it.
SETTLED_NS = 2_000_000_000


class Kept:
    """The folder of earlier measurements.

    Args:
        folder: made where it is missing.

    Raises:
        ConfigError: it is a file, or cannot be made.
    """

    def __init__(self, folder: Path):
        if folder.exists() and not folder.is_dir():
            raise ConfigError(f"{folder}: is a file, expected a folder for reports and answers; choose another")
        self.folder = folder
        with disk_errors(folder):
            (folder / "reports").mkdir(parents=True, exist_ok=True)

    def hashes(self, files: Iterable[Path]) -> dict[str, str]:
        """sha256 of files, by name.

        A file is read once; until size, time, place and inode change its hash is taken from `hashes.json`.
        """
        path = self.folder / "hashes.json"
        try:
            known = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, json.JSONDecodeError):
            known = {}
        hashes, changed = {}, False
        for file in sorted(files):
            place, stat = str(file.resolve()), file.stat()
            marks = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
            if known.get(place, [None])[:-1] != marks:
                known[place] = [*marks, file_sha256(file)]
                settled = time.time_ns() - max(stat.st_mtime_ns, stat.st_ctime_ns) > SETTLED_NS
                hashes[file.name] = known[place][-1] if settled else known.pop(place)[-1]
                changed = changed or settled
            else:
                hashes[file.name] = known[place][-1]
        if changed:
            write_json(path, known)
        return hashes

    def weights(self, found: Checkpoint) -> str:
        """Hash of a model as it will be run: config, every byte of its weights, tokenizer."""
        return digest([found.hash, self.hashes({*weight_files(found), *(found.path / name for name in found.other_files)})])

    def answers(self, weights: str, versions: dict[str, str]) -> Path:
        """The folder for what one model answers; as many threads as there are make no other model."""
        return self.folder / "answers" / digest([FORMAT, weights, {k: v for k, v in versions.items() if k != "threads"}])

    def report(self, key: Any) -> tuple[Report, str] | None:
        """A report and its items, JSON lines, that follow from `key`; None where there is none."""
        path = self._path(key)
        if not path.is_file():
            return None
        return Report.read(path), path.with_suffix(".items.jsonl").read_text(encoding="utf-8")

    def keep(self, key: Any, report: Report, items: str) -> None:
        """Write a report and its items for the next time."""
        path = self._path(key)
        write_text(path.with_suffix(".items.jsonl"), items)
        # Not in alphabetical order: tables show metrics as they were measured.
        write_text(path, json.dumps(report.to_dict(), allow_nan=False))

    def _path(self, key: Any) -> Path:
        return self.folder / "reports" / f"{digest([FORMAT, key])}.json"
