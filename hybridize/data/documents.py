"""Sources of text, and which of their documents are held out.

A source is a .txt, .jsonl or .parquet file, a glob of them, several with commas between, or a hub data set id
(`name` or `name:config`, its train split).
"""

import glob
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hybridize.errors import DataError, MissingDependencyError

SEPARATOR = "<|endoftext|>"
SUFFIXES = (".txt", ".jsonl", ".parquet")
# A longer document of a .txt is cut at a line end: joined again by a newline, the text stays the same.
LONGEST_CHARS = 1 << 26


def read_documents(source: str | Path) -> Iterator[str]:
    """The documents of a source, in order, one at a time.

    A .txt file holds documents between lines that are exactly `<|endoftext|>`, and one of more than LONGEST_CHARS comes in
    several; .jsonl has one object a line with key "text"; .parquet has a column "text".

    Args:
        source: path, glob, hub data set id, or several of these with commas between.

    Raises:
        DataError: a source that is missing, unreadable, empty, or without text.
    """
    for part in _parts(source):
        found = False
        for document in _read_part(part):
            if document:
                found = True
                yield document
        if not found:
            raise DataError(f"{part}: holds no text, expected at least one document")


def source_files(source: str | Path) -> list[str]:
    """What a source reads, in order: its files by their true paths, hub ids as they are. Raises DataError as reading does."""
    names: list[str] = []
    for part in _parts(source):
        files = _files(part)
        names += [part] if files is None else [str(Path(name).resolve()) for name in files]
    return names


def _parts(source: str | Path) -> list[str]:
    parts = [part.strip() for part in str(source).split(",") if part.strip()]
    if not parts:
        raise DataError(f"data: got {str(source)!r}, expected a file, a glob or a hub data set id")
    return parts


def _files(part: str) -> list[str] | None:
    """The files of one part of a source; None for a hub id."""
    if Path(part).is_file():
        return [part]
    if Path(part).is_dir():
        raise DataError(f"{part}: is a directory, expected a file; name its files with a glob such as {part.rstrip('/')}/*.txt")
    if any(mark in part for mark in "*?["):
        files = sorted(name for name in glob.glob(part, recursive=True) if Path(name).is_file())
        if not files:
            raise DataError(f"{part}: no file matches, expected at least one of {', '.join(SUFFIXES)}")
        return files
    if part.endswith(SUFFIXES) or part.startswith(("/", ".", "~")):
        raise DataError(f"{part}: no such file")
    return None


def _read_part(part: str) -> Iterator[str]:
    files = _files(part)
    if files is None:
        yield from _read_hub(part)
        return
    readers = {".txt": _read_txt, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
    for name in files:
        suffix = Path(name).suffix
        if suffix not in readers:
            raise DataError(f"{name}: the suffix is {suffix!r}, expected one of {', '.join(SUFFIXES)}")
        try:
            yield from readers[suffix](name)
        except UnicodeDecodeError as error:
            raise DataError(f"{name}: not UTF-8 at byte {error.start}; convert it first") from error
        except OSError as error:
            raise DataError(f"{name}: cannot be read ({error.strerror or error})") from error


def _read_txt(name: str) -> Iterator[str]:
    lines: list[str] = []
    chars = 0
    # Universal newlines are on, so a file with Windows line ends reads as one with \n.
    with open(name, encoding="utf-8") as file:
        for line in file:
            separator = line.rstrip("\n") == SEPARATOR
            if separator or chars >= LONGEST_CHARS:
                yield "".join(lines).removesuffix("\n")
                lines, chars = [], 0
            if not separator:
                lines.append(line)
                chars += len(line)
    yield "".join(lines).removesuffix("\n")


def _read_jsonl(name: str) -> Iterator[str]:
    with open(name, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                item = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{name}: line {number} is not JSON ({error.msg})") from error
            if not isinstance(item, dict) or not isinstance(item.get("text"), str):
                keys = ", ".join(item) if isinstance(item, dict) else type(item).__name__
                raise DataError(f"{name}: line {number} has {keys}, expected an object with a text under 'text'")
            yield item["text"]


def _read_parquet(name: str) -> Iterator[str]:
    try:
        import pyarrow as arrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise MissingDependencyError(f"{name}: reading parquet needs pyarrow: pip install 'hybridize[train]'") from error
    try:
        with parquet.ParquetFile(name) as file:
            if "text" not in file.schema_arrow.names:
                raise DataError(f"{name}: has the columns {', '.join(file.schema_arrow.names)}, expected one named 'text'")
            for batch in file.iter_batches(columns=["text"], batch_size=1024):
                yield from (text for text in batch.column(0).to_pylist() if text is not None)
    except arrow.ArrowException as error:
        raise DataError(f"{name}: not a readable parquet file ({str(error).splitlines()[0]})") from error


def _read_hub(part: str) -> Iterator[str]:
    try:
        import datasets
    except ImportError as error:
        raise MissingDependencyError(
            f"{part}: no such file, and a hub data set needs the datasets package: pip install 'hybridize[train]'"
        ) from error
    name, _, config = part.partition(":")
    try:
        rows: Any = datasets.load_dataset(name, config or None, split="train", streaming=True)
        for row in rows:
            if not isinstance(row.get("text"), str):
                raise DataError(f"{part}: its rows have {', '.join(row)}, expected a text under 'text'")
            yield row["text"]
    except (OSError, ValueError) as error:
        # Offline, unknown id and gated set all arrive here; the library's first line says which.
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise DataError(f"{part}: neither a file nor a hub data set that can be read here ({reason})") from error


def is_held_out(document: str, share: float) -> bool:
    """Whether a document is kept from training, by the hash of its text.

    The same document always falls on the same side, whatever else is in the text, in whatever source and order.

    Args:
        document: its text.
        share: share of documents to hold out, in [0, 1).

    Raises:
        DataError: the share is outside [0, 1).
    """
    if not 0 <= share < 1:
        raise DataError(f"held_out_share is {share}, expected at least 0 and below 1")
    return int.from_bytes(document_hash(document)[:8], "big") / 2**64 < share


def document_hash(document: str) -> bytes:
    """sha256 of a document's text."""
    return hashlib.sha256(document.encode()).digest()
