"""A text tokenised once: shards of tokens on disk, memory-mapped when they are read.

A cache is a folder that holds one folder a text, named by `Tokens.sha256`, whole or not there. A run that was killed while
it tokenised goes on behind its last finished shard. The folders may be removed at any time; they are then made again.
"""

import json
import logging
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from hybridize.core import digest
from hybridize.data.tokens import Encoded, Sharded, TextHash, Tokens, encode_pieces, joined_starts, pieces
from hybridize.errors import ConfigError, DataError
from hybridize.storage import LargeFile, Staging, exclusive, file_sha256, write_json

log = logging.getLogger(__name__)

FORMAT = 1
INDEX = "index.json"
# Pieces of a shard: what a killed run has to do again is less than this.
SHARD_PIECES = 8

Documents = Callable[[], Iterable[str]]
Progress = Callable[[str, float, float], None]


def stored_tokens(tokenizer: Any, documents: Documents, cache: Path, progress: Progress | None = None) -> Tokens:
    """What `tokenize` gives, from the cache if it is there, else by way of it; ids are memory-mapped.

    The text is read once to know its hash and, where it is new, once more to tokenise it; a few pieces of it are in memory
    at a time. Processes that want the same text wait for the one that tokenises it.

    Args:
        tokenizer: of transformers.
        documents: starts reading the documents from the first one.
        cache: the cache's folder; made when it is not there.
        progress: called with (label, bytes tokenised, bytes in all).

    Raises:
        DataError: no token in the text, a text that changes while it is read, or a cache that was damaged.
        ConfigError: the disk is full, or the cache is no folder.
    """
    if cache.exists() and not cache.is_dir():
        raise ConfigError(f"{cache}: is a file, expected a folder for tokens; choose another")
    text = TextHash(tokenizer)
    for _ in text.watch(pieces(documents())):
        pass
    folder = cache / text.sha256
    with exclusive(cache):
        if not folder.exists():
            _write(folder, tokenizer, documents, text, progress)
        return _open(folder, tokenizer.bos_token_id)


def _name(shard: int) -> str:
    return f"{shard:05d}.tokens"


def _write(folder: Path, tokenizer: Any, documents: Documents, text: TextHash, progress: Progress | None) -> None:
    again = TextHash(tokenizer)

    def check(count: int) -> None:
        """Nothing counts as finished that was made from another text than the one hashed before."""
        if again.marks[:count] != text.marks[:count]:
            raise DataError("data: the text changed while it was read, expected it to stay as it is; run again")

    with Staging(folder, True, digest([FORMAT, text.sha256, SHARD_PIECES])) as staging:
        shards: list[dict[str, Any]] = []
        while (record := staging.finished(_name(len(shards)))) is not None:
            shards.append(record)
        stream = again.watch(pieces(documents()))
        done = sum(1 for _ in islice(stream, len(shards) * SHARD_PIECES))
        encoded = encode_pieces(tokenizer, stream)
        while group := list(islice(encoded, SHARD_PIECES)):
            done += len(group)
            check(done)
            path = staging.folder / _name(len(shards))
            shards.append(_put(path, group))
            staging.record(path.name, shards[-1])
            if progress is not None:
                progress("tokenise", text.marks[done - 1][0], text.bytes)
        check(max(len(text.marks), len(again.marks)))
        tokens = sum(shard["tokens"] for shard in shards)
        if not tokens:
            raise DataError("data: no tokens, expected at least one document with text")
        content = {"format": FORMAT, "text_bytes": text.bytes, "shards": shards}
        write_json(staging.folder / INDEX, {**content, "sha256": digest([text.sha256, content])})
        staging.finish()
    log.info("data: %d tokens from %d bytes of text, in %s", tokens, text.bytes, folder)


def _put(path: Path, group: list[Encoded]) -> dict[str, Any]:
    """Write a shard: starts, then ids, so that both lie at a multiple of their size. Returns its record."""
    ids = np.concatenate([ids for ids, _ in group])
    starts = joined_starts([(len(ids), starts) for ids, starts in group])
    with LargeFile(path) as file:
        file.write(starts.tobytes())
        file.write(ids.tobytes())
    return {
        "sha256": file_sha256(path), "bytes": path.stat().st_size, "tokens": len(ids), "documents": len(starts),
        "largest": int(ids.max(initial=-1)),
    }  # fmt: skip


def _open(folder: Path, bos_id: int | None) -> Tokens:
    remedy = "remove that folder and run again"
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        mark = index.pop("sha256")
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise DataError(f"{folder}: damaged: {INDEX} cannot be read, expected an index of tokens; {remedy}") from error
    if mark != digest([folder.name, index]):
        raise DataError(f"{folder}: damaged: {INDEX} is not what was written; {remedy}")
    if index["format"] != FORMAT:
        raise DataError(f"{folder}: {INDEX} has format {index['format']!r}, expected {FORMAT}; {remedy}")
    ids: list[np.ndarray] = []
    starts: list[tuple[int, np.ndarray]] = []
    for number, shard in enumerate(index["shards"]):
        path = folder / _name(number)
        if not path.is_file() or path.stat().st_size != shard["bytes"] or file_sha256(path) != shard["sha256"]:
            raise DataError(f"{path}: damaged: its bytes are not those that were written; {remedy}")
        if not shard["tokens"]:
            continue  # an empty file cannot be mapped
        border = 2 * shard["documents"]
        whole = np.memmap(path, dtype=np.int32, mode="r")
        ids.append(whole[border:])
        starts.append((shard["tokens"], np.array(whole[:border]).view(np.int64)))
    return Tokens(
        ids=ids[0] if len(ids) == 1 else Sharded(ids), text_bytes=index["text_bytes"], sha256=folder.name, bos_id=bos_id,
        starts=joined_starts(starts), largest=max(shard["largest"] for shard in index["shards"]),
    )  # fmt: skip
