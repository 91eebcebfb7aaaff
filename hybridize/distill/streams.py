"""What alignment from disk keeps in files: rows that are written and read by number, how many bytes, how far it has come."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hybridize.distill.align import Align
from hybridize.distill.saves import Position, read_latest_state
from hybridize.errors import ConfigError
from hybridize.shards import tensor_bytes
from hybridize.storage import flush, open_anywhere, write_at


def on_disk(options: Any) -> bool:
    """Whether a stage runs layer by layer from disk."""
    return isinstance(options, Align) and options.engine == "disk"


def disk_folder(scratch: Path, stage: int) -> Path:
    """Where a stage keeps its streams, layers and states."""
    return scratch / f"disk-{stage:02d}"


def reached(scratch: Path, position: Position, options: Any) -> Position:
    """How far a stage has come, by what lies in its folder; steps count over layers."""
    folder = disk_folder(scratch, position.stage)
    if not on_disk(options) or not folder.exists():
        return position
    state = read_latest_state(folder)
    done = len(list(folder.glob("layer-*.safetensors"))) * options.steps
    return replace(position, step=done if state is None else max(done, state.position.step))


def readers_of(options: list[Any]) -> dict[int, int]:
    """The last reader of each layer that is read, by the options of each layer's mixer."""
    return {own.reads: index for index, own in enumerate(options) if getattr(own, "reads", None) is not None}


def scratch_bytes(options: Align, config: Any, mixers: list[Any], trained: dict[int, int], itemsize: int) -> float:
    """Bytes of files that a stage keeps at its most: two streams, memories, trained layers, states.

    Args:
        options: the stage's.
        config: the student's.
        mixers: the options of each layer's mixer.
        trained: numbers that are trained, by layer.
        itemsize: bytes of a number of the stream.
    """
    until = readers_of(mixers)
    widths = {read: mixers[read].memory_width(config) for read in until}
    widest = max((sum(widths[read] for read, last in until.items() if read <= at <= last) for at in until), default=0)
    streams = options.steps * options.step_tokens * (2.0 * config.hidden_size * itemsize + 4.0 * widest)
    # Every layer by itself and all together at the end, in fp32; and three states with moments, the third one in the making.
    return streams + 8.0 * sum(trained.values()) + 3 * 12.0 * max(trained.values())


class Rows:
    """A tensor [rows, T, D] in a file that grows, a few rows of it in memory. Read by pread, as all files are: no map.

    Args:
        path: made where it is missing.
        tokens: T.
        width: D.
        dtype: of the numbers.
    """

    def __init__(self, path: Path, tokens: int, width: int, dtype: torch.dtype):
        self.path, self.shape, self.dtype = path, (tokens, width), dtype
        self.row_bytes = tokens * width * dtype.itemsize
        self._handle = open_anywhere(path)

    def read(self, row: int, count: int) -> Tensor:
        """Rows from `row` on, [count, T, D]. Raises ConfigError when they are not there."""
        rows = torch.empty(count, *self.shape, dtype=self.dtype)
        view, offset = tensor_bytes(rows), row * self.row_bytes
        while len(view):
            got = os.preadv(self._handle, [view], offset)
            if got == 0:
                self.require(row + count)
            view, offset = view[got:], offset + got
        return rows

    def write(self, row: int, rows: Tensor) -> None:
        """Put rows [n, T, D] from `row` on. Raises ConfigError when the disk is full."""
        assert rows.dtype == self.dtype, f"{self.path.name} holds {self.dtype}, the layer gave {rows.dtype}"
        assert rows.shape[1:] == self.shape
        write_at(self.path, self._handle, tensor_bytes(rows), row * self.row_bytes)

    def require(self, rows: int) -> None:
        """Raise ConfigError when there are fewer rows."""
        if (size := os.fstat(self._handle).st_size) < rows * self.row_bytes:
            raise ConfigError(
                f"{self.path}: has {size} bytes, expected {rows * self.row_bytes}: it was cut or removed. Remove the folder "
                f"{self.path.parents[2].name} beside the output and start again"
            )

    def sync(self) -> None:
        """Put on disk what was written."""
        flush(self.path, self._handle)

    def close(self) -> None:
        """Let the file go; what was written may not be on disk yet."""
        os.close(self._handle)
