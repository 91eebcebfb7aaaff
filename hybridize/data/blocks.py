"""Tokens in, rows out: blocks to measure on and batches to train on. Nothing is padded.

Letters: B rows of a batch, T tokens of a row.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from hybridize.data.mixture import Mixture
from hybridize.data.tokens import Tokens
from hybridize.errors import DataError

Documents = Literal["joined", "reset"]
ROW_ORDER = 1
"""Raised whenever the same seed and number would give another row than before: stored rows then no longer fit."""


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows of tokens as a model reads them."""

    ids: Tensor
    """[B, T], int64."""
    positions: Tensor | None = None
    """[B, T], int64, from 0 at each document's start; None is one document a row."""
    numbers: Tensor | None = None
    """[B], int64, on the CPU: each row's number in its stage, from 0; None for rows that are of no sequence."""

    def inputs(self) -> dict[str, Tensor]:
        """The arguments of a decoder. Without a mask and a cache it keeps documents apart by their positions."""
        return {"input_ids": self.ids} | ({} if self.positions is None else {"position_ids": self.positions})

    def to(self, device: torch.device) -> "Batch":
        return Batch(self.ids.to(device), None if self.positions is None else self.positions.to(device), self.numbers)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, rows: slice) -> "Batch":
        positions, numbers = (None if x is None else x[rows] for x in (self.positions, self.numbers))
        return Batch(self.ids[rows], positions, numbers)

    def split(self, rows: int) -> Iterator["Batch"]:
        """Parts of at most so many rows, in order."""
        return (self[start : start + rows] for start in range(0, len(self), rows))


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
    count = _count(len(ids), body)
    return _with_bos(ids[: count * body].reshape(count, body), bos_id)


def spread_blocks(tokens: Tokens, context: int, bos_id: int | None, wanted: int) -> Tensor:
    """At most `wanted` of the blocks that `eval_blocks` cuts, spread evenly over the text; only those are read.

    Returns:
        [min(N, wanted), context], int64.

    Raises:
        DataError: less than one block of text.
    """
    body = _body(context, bos_id)
    count = _count(len(tokens.ids), body)
    chosen = range(count) if count <= wanted else torch.linspace(0, count - 1, wanted).long().tolist()
    return _with_bos(np.stack([tokens.ids[block * body : (block + 1) * body] for block in chosen]), bos_id)


def _count(tokens: int, body: int) -> int:
    if tokens < body:
        raise DataError(f"data: {tokens} tokens, expected at least one block of {body}; give more text or a shorter context")
    return tokens // body


class TrainBlocks:
    """An endless, seeded sequence of training batches; which tokens a step sees depends on (seed, step) alone.

    Each epoch cuts a text, taken as a ring, into blocks from a new offset and visits them in a new order, so that over
    epochs a token is met at every place of the context. Of a mixture, each text has epochs of its own.

    There are no workers and nothing to save: any process can make any step's batch from its number, and a batch is a few
    slices of memory, far below a step's time.

    Args:
        text: a text, or several with weights.
        seq_tokens: tokens of a row, BOS counted.
        rows: rows of a batch.
        seed: of offsets and orders.
        bos_id: id of BOS, put in front of each row; None for none.
        documents: "joined" reads a row as one stretch of text. With "reset" positions begin again at each document, BOS in
            front of it, and nothing is seen across.

    Raises:
        DataError: less than one row of text.
    """

    def __init__(
        self, text: Tokens | Mixture, seq_tokens: int, rows: int, seed: int, bos_id: int | None, documents: Documents = "joined"
    ):  # fmt: skip
        self.mixture = text if isinstance(text, Mixture) else Mixture(names=("data",), parts=(text,), weights=(1,))
        self.rows, self.bos_id, self.documents = rows, bos_id, documents
        body = _body(seq_tokens, bos_id)
        kind = _Joined if documents == "joined" else _Apart
        self.rings = []
        for index, (name, tokens) in enumerate(zip(self.mixture.names, self.mixture.parts, strict=True)):
            stream = kind(tokens, bos_id)
            if len(stream) < body:
                raise DataError(
                    f"{name}: {len(stream)} tokens, expected at least one row of {body}; give more text or fewer seq_tokens"
                )
            self.rings.append(_Ring(stream, body, (seed, index)))

    def batch(self, step: int) -> Batch:
        """The rows of one step, [rows, seq_tokens]."""
        return self.take(step * self.rows, (step + 1) * self.rows)

    def take(self, start: int, stop: int) -> Batch:
        """Rows `start` to before `stop` of the whole sequence, which does not depend on how it is cut into steps."""
        found = []
        for row in range(start, stop):
            part, number = self.mixture.place(row)
            found.append(self.rings[part].row(number))
        numbers = torch.arange(start, stop)
        ids = _with_bos(np.stack([ids for ids, _ in found]), self.bos_id)
        if self.documents == "joined":
            return Batch(ids, None, numbers)
        places = torch.arange(ids.shape[1]).expand_as(ids)
        begins = torch.zeros_like(ids)
        for row, (_, starts) in enumerate(found):
            at = torch.from_numpy(starts) + (self.bos_id is not None)
            begins[row, at] = at
        return Batch(ids, places - begins.cummax(dim=1).values, numbers)


class _Joined:
    """A text as it is."""

    def __init__(self, tokens: Tokens, bos_id: int | None):
        self.ids = tokens.ids

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids of a stretch, the places in it where documents start)."""
        return self.ids[start:stop], np.zeros(0, dtype=np.int64)


class _Apart:
    """A text with BOS in front of each document."""

    def __init__(self, tokens: Tokens, bos_id: int | None):
        self.ids, self.bos_id = tokens.ids, bos_id
        self.starts = tokens.starts if bos_id is None else tokens.starts + np.arange(len(tokens.starts))

    def __len__(self) -> int:
        return len(self.ids) + (0 if self.bos_id is None else len(self.starts))

    def take(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """As of _Joined; each document starts with its BOS."""
        first, last = (int(place) for place in np.searchsorted(self.starts, [start, stop]))
        starts = self.starts[first:last] - start
        if self.bos_id is None:
            return self.ids[start:stop], starts
        return np.insert(self.ids[start - first : stop - last], starts - np.arange(len(starts)), self.bos_id), starts


class _Ring:
    """The rows of one text, epoch after epoch."""

    def __init__(self, stream: Any, body: int, seed: tuple[int, int]):
        self.stream, self.body, self.seed = stream, body, seed
        self.blocks = len(stream) // body
        self._epoch = -1
        self._starts = np.zeros(0, dtype=np.int64)

    def row(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids [body], places where documents start) of a row, counted from 0 over all epochs."""
        epoch, index = divmod(number, self.blocks)
        size = len(self.stream)
        if epoch != self._epoch:
            seed, part = self.seed
            # numpy reads [seed, epoch, 0] as [seed, epoch].
            draw = np.random.default_rng([seed, epoch, part])
            offset = draw.integers(size)
            self._starts = (offset + draw.permutation(self.blocks) * self.body) % size
            self._epoch = epoch
        start = int(self._starts[index])
        stop = start + self.body
        ids, starts = self.stream.take(start, min(stop, size))
        if stop > size:
            rest, more = self.stream.take(0, stop - size)
            ids, starts = np.concatenate([ids, rest]), np.concatenate([starts, more + (size - start)])
        return ids, starts
