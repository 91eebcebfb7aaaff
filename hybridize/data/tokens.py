"""Documents as one model reads them: token ids, and where each document starts.

Documents are joined by one newline and tokenised in pieces, several at once: a fast tokenizer lets go of the interpreter
while it works, so threads are enough. What comes out does not depend on their number.
"""

import bisect
import hashlib
import json
import logging
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hybridize.errors import DataError

log = logging.getLogger(__name__)

# Text is tokenised in pieces of about this size, cut between documents: a piece bounds the memory, not the result's quality.
PIECE_CHARS = 1 << 22
# A piece takes about 600 MB while it is tokenised, nearly all of it the tokenizer's own notes on each token.
MOST_THREADS = 8


class Sharded:
    """Arrays in a row, read as one: its length and its slices.

    Args:
        parts: [n] each, of one dtype; memory maps stay such.
    """

    def __init__(self, parts: list[np.ndarray]):
        self.parts = parts
        self._ends = np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, at: slice) -> np.ndarray:
        """A stretch in one piece, as numpy's: [stop - start]. Steps other than 1 are not known."""
        start, stop, step = at.indices(len(self))
        if step != 1:
            raise ValueError(f"the step is {step}, expected 1")
        found = [self.parts[0][:0]]
        shard = int(np.searchsorted(self._ends, start, side="right"))
        while start < stop:
            offset = int(self._ends[shard]) - len(self.parts[shard])
            found.append(self.parts[shard][start - offset : stop - offset])
            start, shard = int(self._ends[shard]), shard + 1
        return np.concatenate(found) if len(found) > 2 else found[-1]


@dataclass(frozen=True, kw_only=True, eq=False)
class Tokens:
    """A text as one model reads it."""

    ids: np.ndarray | Sharded
    """Token ids of all documents in order, [tokens], int32."""
    text_bytes: int
    """UTF-8 bytes of the text, for bits per byte."""
    sha256: str
    """Hash of the tokenizer's identity and the text."""
    bos_id: int | None = None
    """The tokenizer's BOS, which goes in front of every row; None when it has none."""
    starts: np.ndarray = field(default_factory=lambda: np.zeros(1, dtype=np.int64))
    """Where documents start, [documents], int64, rising from 0. A document without a token of its own is not among them."""
    largest: int | None = None
    """The largest id, where it is known."""

    @property
    def max_id(self) -> int:
        """The largest id."""
        return int(self.ids[:].max()) if self.largest is None else self.largest


def identity(tokenizer: Any) -> str:
    """Text that differs between two tokenizers that could give other ids."""
    if getattr(tokenizer, "is_fast", False):
        return tokenizer.backend_tokenizer.to_str()
    return json.dumps([type(tokenizer).__name__, tokenizer.get_vocab(), "by document"], sort_keys=True)


@dataclass(frozen=True, eq=False)
class Piece:
    """Some documents joined: the unit of tokenising."""

    text: str
    starts: list[int]
    """Where its documents start, in characters."""


def pieces(documents: Iterable[str]) -> Iterator[Piece]:
    """Documents joined by one newline, cut between two of them as soon as a piece has PIECE_CHARS characters."""
    held: list[str] = []
    starts: list[int] = []
    chars = 0
    for document in documents:
        if chars >= PIECE_CHARS:
            yield Piece("\n".join(held) + "\n", starts)
            held, starts, chars = [], [], 0
        starts.append(chars)
        held.append(document)
        chars += len(document) + 1
    if held:
        yield Piece("\n".join(held), starts)


class TextHash:
    """The hash that names a tokenised text, taken piece by piece.

    Args:
        tokenizer: its identity is hashed first.
    """

    def __init__(self, tokenizer: Any):
        self._sha = hashlib.sha256(identity(tokenizer).encode())
        self.marks: list[tuple[int, str]] = []
        """UTF-8 bytes and hash of the text up to the end of each piece."""

    def watch(self, stream: Iterable[Piece]) -> Iterator[Piece]:
        """Hand pieces on, each hashed on its way."""
        for piece in stream:
            data = piece.text.encode()
            self._sha.update(data)
            self.marks.append((self.bytes + len(data), self._sha.hexdigest()))
            yield piece

    @property
    def bytes(self) -> int:
        return self.marks[-1][0] if self.marks else 0

    @property
    def sha256(self) -> str:
        return self._sha.hexdigest()


Encoded = tuple[np.ndarray, np.ndarray]


def encode_pieces(tokenizer: Any, stream: Iterable[Piece], threads: int | None = None) -> Iterator[Encoded]:
    """Tokenise pieces, without special tokens, several at once and in order.

    A token belongs to the document in which its first character lies. A tokenizer that tells no offsets reads each document,
    with the newline behind it, alone.

    Args:
        tokenizer: of transformers.
        stream: pieces; read only a few ahead.
        threads: how many pieces at once; None is one a core, at most MOST_THREADS.

    Yields:
        (ids int32 [tokens], starts int64 [documents] as places among these ids) of each piece.
    """
    encode = _fast(tokenizer) if getattr(tokenizer, "is_fast", False) else _slow(tokenizer)
    threads = threads or min(MOST_THREADS, os.cpu_count() or 1)
    waiting: deque[Future[Encoded]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for piece in stream:
            waiting.append(pool.submit(encode, piece))
            if len(waiting) > threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _fast(tokenizer: Any) -> Callable[[Piece], Encoded]:
    # This call switches off what an earlier one left on in the backend, such as truncation; threads only read it.
    tokenizer("a", add_special_tokens=False)
    backend = tokenizer.backend_tokenizer

    def encode(piece: Piece) -> Encoded:
        # Only the call for several texts lets other threads run meanwhile.
        (encoding,) = backend.encode_batch([piece.text], add_special_tokens=False)
        ids = np.asarray(encoding.ids, dtype=np.int32)
        # Looked up one by one: a list of all offsets would take a hundred bytes a token.
        places = range(len(ids))
        starts = [bisect.bisect_left(places, start, key=lambda i: encoding.token_to_chars(i)[0]) for start in piece.starts]
        return ids, np.asarray(starts, dtype=np.int64)

    return encode


def _slow(tokenizer: Any) -> Callable[[Piece], Encoded]:
    def encode(piece: Piece) -> Encoded:
        ends = [*piece.starts[1:], len(piece.text)]
        documents = [piece.text[start:end] for start, end in zip(piece.starts, ends, strict=True)]
        # verbose=False: that a text is longer than the context is the point here, not worth a warning.
        ids = [tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"] for document in documents]
        lengths = [len(part) for part in ids]
        return np.asarray(sum(ids, []), dtype=np.int32), np.cumsum([0, *lengths[:-1]], dtype=np.int64)

    return encode


def joined_starts(parts: list[tuple[int, np.ndarray]]) -> np.ndarray:
    """Starts over a whole text from those of its parts.

    Args:
        parts: (tokens, starts within the part) each.

    Returns:
        [documents], int64: rising, each once, none at the end of the text.
    """
    offsets = np.cumsum([0, *(tokens for tokens, _ in parts)])
    starts = [part + offset for (_, part), offset in zip(parts, offsets[:-1], strict=True)]
    found = np.unique(np.concatenate(starts)) if starts else np.zeros(0, dtype=np.int64)
    return found[found < offsets[-1]]


def tokenize(tokenizer: Any, documents: Iterable[str]) -> Tokens:
    """Tokenise documents joined by one newline, without special tokens, in memory.

    Args:
        tokenizer: of transformers.
        documents: texts.

    Returns:
        Tokens; ids as int32.

    Raises:
        DataError: no document, or no token in them.
    """
    text = TextHash(tokenizer)
    parts = list(encode_pieces(tokenizer, text.watch(pieces(documents))))
    ids = np.concatenate([part for part, _ in parts]) if parts else np.zeros(0, dtype=np.int32)
    if not len(ids):
        raise DataError("data: no tokens, expected at least one document with text")
    log.info("data: %d tokens from %d bytes of text", len(ids), text.bytes)
    starts = joined_starts([(len(part), own) for part, own in parts])
    return Tokens(ids=ids, text_bytes=text.bytes, sha256=text.sha256, bos_id=tokenizer.bos_token_id, starts=starts)
