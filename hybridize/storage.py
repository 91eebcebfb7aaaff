"""The one module that makes files durable: nothing appears under its final name before it is whole and on disk.

A file is written beside its final name, flushed to the disk and renamed. A directory is built in a hidden sibling,
`.<name>.partial`, with a journal of what is finished, and renamed at the end; a killed run leaves that sibling or the
complete directory, never a part of it under the final name. Holds on local POSIX file systems.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import mmap
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from hybridize.errors import ConfigError

log = logging.getLogger(__name__)

BUFFER_BYTES = 8 << 20

# What the operating system says when it is the user's disk or rights, and not our mistake.
_OUTSIDE = {
    errno.ENOSPC: "no space left on the device",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.EIO: "the device reports an input/output error",
}


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a full disk, a quota or missing rights into a one-line ConfigError that names `path`."""
    try:
        yield
    except OSError as error:
        if error.errno not in _OUTSIDE:
            raise
        raise ConfigError(
            f"{path}: cannot be written: {_OUTSIDE[error.errno]}. Mend that or choose another place, then run again"
        ) from error


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable, as fsync makes a file's bytes durable."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """Fsync every file and folder below `folder`, and `folder` itself."""
    for root, _, names in os.walk(folder):
        for name in names:
            handle = os.open(os.path.join(root, name), os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
        sync_folder(Path(root))


def publish_folder(temporary: Path, final: Path) -> None:
    """Give a folder that others have filled its final name, once all of it is on disk."""
    with disk_errors(final):
        sync_tree(temporary)
        os.rename(temporary, final)
        sync_folder(final.parent)


def write_bytes(path: Path, data: bytes) -> None:
    """Put `data` under `path`, whole or not at all, on disk when this returns."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    with disk_errors(path):
        with open(temporary, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """As write_bytes, in UTF-8."""
    write_bytes(path, text.encode())


class LargeFile:
    """A large file written front to back past the page cache, then flushed, and renamed to `path` when the block ends.

    Going past the cache takes a third of the processor time, and the source's pages are not pushed out. Where a file
    system refuses that (tmpfs), it is an ordinary file. After an error only the temporary file is there.

    Args:
        path: the final name.
    """

    ALIGNMENT = 4096
    """What direct writes ask of address, length and offset."""

    def __init__(self, path: Path):
        self.path = path
        self.temporary = path.with_name(f".{path.name}.tmp")
        # An anonymous map begins at a page's border, which direct writes need.
        self._buffer = mmap.mmap(-1, BUFFER_BYTES)
        self._held = 0
        self.size = 0

    def __enter__(self) -> "LargeFile":
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        with disk_errors(self.path):
            try:
                self._handle = os.open(self.temporary, flags | getattr(os, "O_DIRECT", 0), 0o644)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                self._handle = os.open(self.temporary, flags, 0o644)
        return self

    def write(self, piece: memoryview | bytes) -> None:
        """Append bytes. Raises ConfigError when the disk is full."""
        view = memoryview(piece)
        while len(view):
            count = min(len(view), BUFFER_BYTES - self._held)
            self._buffer[self._held : self._held + count] = view[:count]
            self._held, view = self._held + count, view[count:]
            self.size += count
            if self._held == BUFFER_BYTES:
                self._flush(BUFFER_BYTES)

    def _flush(self, length: int) -> None:
        with disk_errors(self.path), memoryview(self._buffer) as whole:
            done = 0
            while done < length:
                with whole[done:length] as rest:
                    done += os.write(self._handle, rest)
        self._held = 0

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if error is None:
                self._flush(-(-self._held // self.ALIGNMENT) * self.ALIGNMENT)
                with disk_errors(self.path):
                    os.ftruncate(self._handle, self.size)
                    os.fsync(self._handle)
                    os.replace(self.temporary, self.path)
                    sync_folder(self.path.parent)
        finally:
            os.close(self._handle)
            self._buffer.close()


def open_anywhere(path: Path) -> int:
    """A handle on a file that is read and written at any place, made where it is missing: working files, never an output."""
    with disk_errors(path):
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)


def write_at(path: Path, handle: int, data: memoryview, offset: int) -> None:
    """Put bytes where they belong in a file opened with `open_anywhere`. Raises ConfigError when the disk is full."""
    with disk_errors(path):
        while len(data):
            count = os.pwrite(handle, data, offset)
            data, offset = data[count:], offset + count


def flush(path: Path, handle: int) -> None:
    """Put on disk what was written."""
    with disk_errors(path):
        os.fsync(handle)


def rename(old: Path, new: Path) -> None:
    """Give a file, on disk by now, another name in the same folder."""
    with disk_errors(new):
        os.replace(old, new)
        sync_folder(new.parent)


def append_stream(path: Path) -> IO[str]:
    """A text file open for appending: logs, which nobody takes for whole."""
    with disk_errors(path):
        return open(path, "a", encoding="utf-8")


def append_line(path: Path, line: str) -> None:
    """Add a line to a file by one write, so that lines of several processes stay whole. One that a kill cut short ends there."""
    with disk_errors(path):
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        try:
            # The line before may have been cut short; an empty one is nothing.
            data = f"\n{line}\n".encode()
            if os.write(handle, data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        finally:
            os.close(handle)


def to_json(value: Any) -> str:
    """The spelling of our JSON files: keys sorted, two spaces, newline at the end; NaN is refused."""
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


def write_json(path: Path, value: Any) -> None:
    """As write_bytes, the JSON of `value`."""
    write_text(path, to_json(value))


def file_sha256(path: Path) -> str:
    """sha256 of a file's bytes, read in small pieces."""
    digest = hashlib.sha256()
    buffer = bytearray(BUFFER_BYTES)
    with open(path, "rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
    return digest.hexdigest()


def require_space(folder: Path, needed: int) -> None:
    """Check that `needed` bytes fit on the disk of `folder` (or of its nearest parent that exists).

    Raises:
        ConfigError: they do not; the message holds both figures.
    """
    place = Path(os.path.abspath(folder))
    while not place.exists():
        place = place.parent
    stats = os.statvfs(place)
    available = stats.f_bavail * stats.f_frsize
    if available < needed:
        raise ConfigError(
            f"{folder}: no space left: {needed / 1e9:.3f} GB are needed, {available / 1e9:.3f} GB are available. "
            "Free some space or choose another output"
        )


def partial_folder(out: Path) -> Path:
    """Where an output is built: its hidden sibling, so that the rename at the end stays on one file system."""
    out = Path(os.path.abspath(out))
    return out.with_name(f".{out.name}.partial")


def check_output(out: Path) -> None:
    """Raise a ConfigError when something is already there under the output's name; an empty folder is fine."""
    if os.path.lexists(out) and not (os.path.isdir(out) and not os.listdir(out)):
        kind = "is not empty" if os.path.isdir(out) else "is not a folder"
        raise ConfigError(f"{out}: the output {kind}; expected no such folder. Remove it or choose another output")


def sweep(out: Path) -> None:
    """Remove what a finished run keeps beside its output, the journal after what it accounts for.

    Does nothing while files of an unfinished run are there. A run killed right after its rename leaves such a rest.
    """
    partial = partial_folder(out)
    if not partial.exists() or (partial / "files").exists():
        return
    if (partial / "scratch").exists():
        shutil.rmtree(partial / "scratch")
    for name in ("journal.json", "lock"):
        (partial / name).unlink(missing_ok=True)
    partial.rmdir()


@contextlib.contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Make a folder where it is missing and hold it: other processes that ask wait. Ends with the block, or the process."""
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


class Staging:
    """A directory in the making. Use as a context manager; `finish()` gives it its final name.

    `folder` holds what the output will hold. `scratch` holds working files (calibration, training state) and disappears
    at the end. `journal` survives a kill: what it lists as finished was on disk, with that sha256, when it was listed.

    Args:
        out: the output; must not exist, or be an empty folder.
        resume: go on with what an earlier run of the same job left.
        identity: hash of all that decides the output's bytes; another identity is another job.

    Raises:
        ConfigError: the output is there, another process is at work, or the partial folder is of another job.
    """

    def __init__(self, out: Path, resume: bool, identity: str):
        self.out = Path(os.path.abspath(out))
        self.partial = partial_folder(self.out)
        self.folder = self.partial / "files"
        self.scratch = self.partial / "scratch"
        self.identity = identity
        check_output(self.out)
        with disk_errors(self.partial):
            self.partial.mkdir(parents=True, exist_ok=True)
            self._lock()
            try:
                self.journal = self._open_journal(resume)
                for folder in (self.folder, self.scratch):
                    folder.mkdir(exist_ok=True)
            except BaseException:
                os.close(self._lock_handle)
                raise

    def _lock(self) -> None:
        path = self.partial / "lock"
        self._lock_handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._lock_handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The holder before us may have finished and removed the file between our open and our lock.
            if os.stat(path).st_ino != os.fstat(self._lock_handle).st_ino:
                raise FileNotFoundError
        except (BlockingIOError, FileNotFoundError) as error:
            os.close(self._lock_handle)
            raise ConfigError(f"{self.out}: another process is writing it. Wait, or choose another output") from error

    def _open_journal(self, resume: bool) -> dict[str, Any]:
        path = self.partial / "journal.json"
        if path.exists():
            journal = json.loads(path.read_text(encoding="utf-8"))
            if self.folder.exists() and not resume:
                raise ConfigError(
                    f"{self.partial}: holds an unfinished run; expected no such folder. "
                    "Pass --resume to go on with it, or remove it"
                )
            if self.folder.exists() and journal["identity"] != self.identity:
                raise ConfigError(
                    f"{self.partial}: was left by another job (other base, plan, text or versions). "
                    "Remove it, or run that job again with --resume"
                )
            if self.folder.exists():
                self._remove_unfinished(journal)
                return journal
            # Killed before the first file or after the last: there is nothing of the output here.
            shutil.rmtree(self.scratch, ignore_errors=True)
        elif foreign := sorted(set(os.listdir(self.partial)) - {"lock", ".journal.json.tmp"}):
            raise ConfigError(f"{self.partial}: holds {foreign[0]!r}, not ours. Remove it or choose another output")
        journal = {"identity": self.identity, "finished": {}}
        write_json(path, journal)
        return journal

    def _remove_unfinished(self, journal: dict[str, Any]) -> None:
        # A file that the kill cut short, or the temporary name of one, would end up in the output's manifest.
        for name in set(os.listdir(self.folder)) - journal["finished"].keys():
            log.debug("%s: not finished by the run before; removed", self.folder / name)
            (self.folder / name).unlink()

    def finished(self, name: str) -> dict[str, Any] | None:
        """The record of a finished file, after its bytes were hashed again; None when it is yet to be written."""
        record = self.journal["finished"].get(name)
        path = self.folder / name
        if record is None or not path.is_file() or path.stat().st_size != record["bytes"]:
            return None
        if file_sha256(path) != record["sha256"]:
            log.warning("%s: its bytes changed since it was finished; writing it again", path)
            return None
        return record

    def record(self, name: str, record: dict[str, Any]) -> None:
        """Note a file, on disk by now, as finished; `record` holds at least `sha256` and `bytes`."""
        self.journal["finished"][name] = record
        write_json(self.partial / "journal.json", self.journal)

    def finish(self) -> Path:
        """Make everything durable, give the folder its final name and remove the rest."""
        with disk_errors(self.out):
            sync_tree(self.folder)
            os.rename(self.folder, self.out)
            sync_folder(self.out.parent)
        sweep(self.out)
        return self.out

    def __enter__(self) -> "Staging":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        # A run that failed before its first finished file has nothing worth resuming.
        if error is not None and self.partial.exists():
            if not self.journal["finished"] and not any(self.scratch.iterdir()):
                shutil.rmtree(self.partial)
        os.close(self._lock_handle)
