"""Batches of chats: rows of packed texts, the same for the same (seed, step) and nothing else.

Texts of a row do not see each other: positions begin again with each, which is what attention and mixers go by. What is
left of a row is padding, a text of its own that nothing is learnt from.

Letters: B rows, L texts side by side in an item (1, or chosen and rejected), T tokens.
"""

import bisect
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hybridize.data import Batch, TrainBlocks
from hybridize.distill.chat import Example, Examples


@dataclass(frozen=True, kw_only=True, eq=False)
class ChatBatch:
    """Rows of a step, or some of them."""

    ids: Tensor
    """[B, L, T], int64."""
    learnt: Tensor
    """[B, L, T], bool: tokens whose prediction counts."""
    positions: Tensor
    """[B, L, T], int64: place of a token in its own text."""

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, rows: slice) -> "ChatBatch":
        return ChatBatch(ids=self.ids[rows], learnt=self.learnt[rows], positions=self.positions[rows])

    def split(self, rows: int) -> list["ChatBatch"]:
        return [self[start : start + rows] for start in range(0, len(self), rows)]

    def to(self, device: torch.device) -> "ChatBatch":
        return ChatBatch(ids=self.ids.to(device), learnt=self.learnt.to(device), positions=self.positions.to(device))


Lane = list[Example]


def pack(examples: list[Example], tokens: int) -> list[Lane]:
    """Texts gathered into rows of at most so many tokens: the longest first, each where it leaves the least room.

    Args:
        examples: texts, none longer than `tokens`.
        tokens: length of a row.

    Returns:
        Rows, in an order that depends on the texts alone.
    """
    rows: list[Lane] = []
    # (room left, row), sorted.
    room: list[tuple[int, int]] = []
    for index in sorted(range(len(examples)), key=lambda i: (-len(examples[i].ids), i)):
        size = len(examples[index].ids)
        place = bisect.bisect_left(room, (size, -1))
        if place == len(room):
            rows.append([])
            left, row = tokens, len(rows) - 1
        else:
            left, row = room.pop(place)
        rows[row].append(examples[index])
        if left > size:
            bisect.insort(room, (left - size, row))
    return rows


class ChatBlocks:
    """An endless, seeded sequence of batches; each epoch visits all rows in a new order.

    Args:
        examples: the data set.
        tokens: length of a row.
        rows: rows of a batch.
        seed: of the orders.
        packed: put several texts in a row; only for items of one text.
    """

    def __init__(self, examples: Examples, tokens: int, rows: int, seed: int, packed: bool):
        self.count, self.seed = rows, seed
        if packed:
            self.rows: list[tuple[Lane, ...]] = [(lane,) for lane in pack([item[0] for item in examples.items], tokens)]
        else:
            self.rows = [tuple([example] for example in item) for item in examples.items]
        self._epoch = -1
        self._order = np.zeros(0, dtype=np.int64)

    def batch(self, step: int) -> ChatBatch:
        """The rows of one step, as wide as the longest of them."""
        return collate([self._row(step * self.count + index) for index in range(self.count)])

    def _row(self, number: int) -> tuple[Lane, ...]:
        epoch, index = divmod(number, len(self.rows))
        if epoch != self._epoch:
            self._order = np.random.default_rng([self.seed, epoch]).permutation(len(self.rows))
            self._epoch = epoch
        return self.rows[self._order[index]]


def collate(rows: list[tuple[Lane, ...]]) -> ChatBatch:
    """Rows side by side, padded on the right to the longest."""
    width = max(sum(len(example.ids) for example in lane) for row in rows for lane in row)
    shape = (len(rows), len(rows[0]), width)
    ids, learnt, positions = np.zeros(shape, np.int64), np.zeros(shape, bool), np.zeros(shape, np.int64)
    for b, row in enumerate(rows):
        for lane, texts in enumerate(row):
            start = 0
            for text in texts:
                stop = start + len(text.ids)
                ids[b, lane, start:stop], learnt[b, lane, start:stop] = text.ids, text.learnt
                positions[b, lane, start:stop] = np.arange(stop - start)
                start = stop
            positions[b, lane, start:] = np.arange(width - start)
    return ChatBatch(ids=torch.from_numpy(ids), learnt=torch.from_numpy(learnt), positions=torch.from_numpy(positions))


class PartBlocks:
    """Blocks of a stage whose rows grow: each part has its own, from their beginning."""

    def __init__(self, options: Any, parts: list[TrainBlocks]):
        self.options, self.parts = options, parts

    def batch(self, step: int) -> Batch:
        """The rows of one step of the stage."""
        part, number = self.options.place(step)
        return self.parts[part].batch(number)


class TextRows:
    """Blocks of plain text as such batches: every token but a document's first is learnt."""

    def __init__(self, blocks: TrainBlocks | PartBlocks):
        self.blocks = blocks

    def batch(self, step: int) -> ChatBatch:
        """The rows of one step."""
        rows = self.blocks.batch(step)
        ids = rows.ids[:, None]
        positions = torch.arange(ids.shape[-1]).expand_as(ids) if rows.positions is None else rows.positions[:, None]
        return ChatBatch(ids=ids, learnt=positions != 0, positions=positions)
