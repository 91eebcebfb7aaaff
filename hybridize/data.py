"""Text in, blocks of tokens out.

A source is a .txt, .jsonl or .parquet file, a glob of them, several with commas between, or a hub data set id
(`name` or `name:config`, its train split). Documents are joined by one newline and cut into blocks; nothing is padded.
"""

import glob
import hashlib
import json
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hybridize.errors import DataError, MissingDependencyError

log = logging.getLogger(__name__)

SEPARATOR = "<|endoftext|>"
SUFFIXES = (".txt", ".jsonl", ".parquet")
# Text is tokenised in pieces of about this size, cut between documents: a piece bounds the memory, not the result's quality.
PIECE_CHARS = 1 << 22


@dataclass(frozen=True, kw_only=True, eq=False)
class Tokens:
    """A text as one model reads it."""

    ids: np.ndarray
    """Token ids of all documents in order, [tokens], int32."""
    text_bytes: int
    """UTF-8 bytes of the text, for bits per byte."""
    sha256: str
    """Hash of the tokenizer's identity and the text."""
    bos_id: int | None = None
    """The tokenizer's BOS, which goes in front of every row; None when it has none."""


def read_documents(source: str | Path) -> Iterator[str]:
    """The documents of a source, in order, one at a time.

    A .txt file holds documents between lines that are exactly `<|endoftext|>`; .jsonl has one object a line with key
    "text"; .parquet has a column "text".

    Args:
        source: path, glob, hub data set id, or several of these with commas between.

    Raises:
        DataError: a source that is missing, unreadable, empty, or without text.
    """
    parts = [part.strip() for part in str(source).split(",") if part.strip()]
    if not parts:
        raise DataError(f"data: got {str(source)!r}, expected a file, a glob or a hub data set id")
    for part in parts:
        found = False
        for document in _read_part(part):
            if document:
                found = True
                yield document
        if not found:
            raise DataError(f"{part}: holds no text, expected at least one document")


def _read_part(part: str) -> Iterator[str]:
    if Path(part).is_file():
        files = [part]
    elif Path(part).is_dir():
        raise DataError(f"{part}: is a directory, expected a file; name its files with a glob such as {part.rstrip('/')}/*.txt")
    elif any(mark in part for mark in "*?["):
        files = sorted(name for name in glob.glob(part, recursive=True) if Path(name).is_file())
        if not files:
            raise DataError(f"{part}: no file matches, expected at least one of {', '.join(SUFFIXES)}")
    elif part.endswith(SUFFIXES) or part.startswith(("/", ".", "~")):
        raise DataError(f"{part}: no such file")
    else:
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
    # Universal newlines are on, so a file with Windows line ends reads as one with \n.
    with open(name, encoding="utf-8") as file:
        for line in file:
            if line.rstrip("\n") == SEPARATOR:
                yield "".join(lines).removesuffix("\n")
                lines = []
            else:
                lines.append(line)
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


def split_documents(documents: Iterable[str], held_out_share: float) -> tuple[list[str], list[str]]:
    """Split documents into those to train on and those held out, by the hash of each one's text.

    The same document always falls on the same side, whatever else is in the set and in whatever order.

    Args:
        documents: texts.
        held_out_share: share of documents to hold out, in [0, 1).

    Returns:
        (train, held_out), each in the order given.

    Raises:
        DataError: the share is outside [0, 1).
    """
    if not 0 <= held_out_share < 1:
        raise DataError(f"held_out_share is {held_out_share}, expected at least 0 and below 1")
    train: list[str] = []
    held_out: list[str] = []
    for document in documents:
        place = int.from_bytes(hashlib.sha256(document.encode()).digest()[:8], "big") / 2**64
        (held_out if place < held_out_share else train).append(document)
    return train, held_out


def _identity(tokenizer: Any) -> str:
    """Text that differs between two tokenizers that could give other ids."""
    if getattr(tokenizer, "is_fast", False):
        return tokenizer.backend_tokenizer.to_str()
    return json.dumps([type(tokenizer).__name__, tokenizer.get_vocab()], sort_keys=True)


def tokenize(tokenizer: Any, documents: Iterable[str]) -> Tokens:
    """Tokenise documents joined by one newline, without special tokens.

    Args:
        tokenizer: of transformers.
        documents: texts.

    Returns:
        Tokens; ids as int32.

    Raises:
        DataError: no document, or no token in them.
    """
    sha = hashlib.sha256(_identity(tokenizer).encode())
    ids: list[np.ndarray] = []
    total_bytes = 0

    def encode(piece: str) -> None:
        nonlocal total_bytes
        data = piece.encode()
        sha.update(data)
        total_bytes += len(data)
        # verbose=False: that a text is longer than the context is the point here, not worth a warning.
        ids.append(np.asarray(tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"], dtype=np.int32))

    piece: list[str] = []
    chars = 0
    for document in documents:
        if chars >= PIECE_CHARS:
            encode("\n".join(piece) + "\n")
            piece, chars = [], 0
        piece.append(document)
        chars += len(document) + 1
    if piece:
        encode("\n".join(piece))
    joined = np.concatenate(ids) if ids else np.zeros(0, dtype=np.int32)
    if not len(joined):
        raise DataError("data: no tokens, expected at least one document with text")
    log.info("data: %d tokens from %d bytes of text", len(joined), total_bytes)
    return Tokens(ids=joined, text_bytes=total_bytes, sha256=sha.hexdigest(), bos_id=tokenizer.bos_token_id)


def _body(context: int, bos_id: int | None) -> int:
    body = context - (bos_id is not None)
    if body < 1:
        raise DataError(f"context is {context} tokens, expected at least 2")
    return body


def _with_bos(blocks: np.ndarray, bos_id: int | None) -> Tensor:
    ids = torch.from_numpy(blocks.astype(np.int64))
    return ids if bos_id is None else torch.cat([torch.full((len(ids), 1), bos_id), ids], dim=1)


def eval_blocks(tokens: Tokens, context: int, bos_id: int | None, limit_tokens: int | None = None) -> Tensor:
    """Blocks for perplexity: neighbours that do not overlap, BOS in front of each, the last partial one dropped.

    Args:
        tokens: a text.
        context: tokens of a block, BOS counted.
        bos_id: id of BOS; None for a tokenizer without one, and then a block is all text.
        limit_tokens: use only so many tokens from the start of the text.

    Returns:
        [N, context], int64.

    Raises:
        DataError: less than one block of text.
    """
    body = _body(context, bos_id)
    ids = tokens.ids[:limit_tokens]
    count = len(ids) // body
    if count == 0:
        raise DataError(f"data: {len(ids)} tokens, expected at least one block of {body}; give more text or a shorter context")
    return _with_bos(ids[: count * body].reshape(count, body), bos_id)


class TrainBlocks:
    """An endless, seeded sequence of training batches; which tokens a step sees depends on (seed, step) alone.

    Each epoch cuts the text, taken as a ring, into blocks from a new offset and visits them in a new order, so that over
    epochs a token is met at every place of the context.

    Args:
        tokens: a text.
        seq_tokens: tokens of a row, BOS counted.
        rows: rows of a batch.
        seed: of offsets and orders.
        bos_id: id of BOS, put in front of each row; None for none.

    Raises:
        DataError: less than one row of text.
    """

    def __init__(self, tokens: Tokens, seq_tokens: int, rows: int, seed: int, bos_id: int | None):
        self.ids, self.rows, self.seed, self.bos_id = tokens.ids, rows, seed, bos_id
        self.body = _body(seq_tokens, bos_id)
        self.blocks = len(self.ids) // self.body
        if self.blocks == 0:
            raise DataError(
                f"data: {len(self.ids)} tokens, expected at least one row of {self.body}; give more text or fewer seq_tokens"
            )
        self._epoch = -1
        self._starts = np.zeros(0, dtype=np.int64)

    def batch(self, step: int) -> Tensor:
        """The token ids of one step, [rows, seq_tokens], int64."""
        place = np.arange(self.body)
        rows = [self.ids[(self._start(step * self.rows + row) + place) % len(self.ids)] for row in range(self.rows)]
        return _with_bos(np.stack(rows), self.bos_id)

    def _start(self, row: int) -> int:
        epoch, index = divmod(row, self.blocks)
        if epoch != self._epoch:
            draw = np.random.default_rng([self.seed, epoch])
            offset = draw.integers(len(self.ids))
            self._starts = (offset + draw.permutation(self.blocks) * self.body) % len(self.ids)
            self._epoch = epoch
        return int(self._starts[index])
