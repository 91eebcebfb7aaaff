"""What the command line shows: progress on stderr, results on stdout, one JSON document when asked."""

import json
import logging
import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from hybridize.redact import scrub


class _Scrubbed(logging.Formatter):
    """Log lines without tokens."""

    def format(self, record: logging.LogRecord) -> str:
        return scrub(super().format(record))


class Screen:
    """Output of one command.

    Args:
        as_json: print results as one JSON document and nothing else on stdout.
        quiet: no progress and no tables.
        verbose: 1 shows what each step does, 2 everything.
    """

    def __init__(self, as_json: bool = False, quiet: bool = False, verbose: int = 0):
        self.as_json, self.quiet = as_json, quiet
        self.out = Console(highlight=False, soft_wrap=True)
        if not self.out.is_terminal:
            # In a file or a pipe nothing limits a row; folded cells would only be harder to read.
            self.out = Console(highlight=False, soft_wrap=True, width=240)
        self.err = Console(stderr=True, highlight=False)
        self._bars: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._last: dict[str, tuple[float, int]] = {}
        level = logging.WARNING if verbose == 0 else logging.INFO if verbose == 1 else logging.DEBUG
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(_Scrubbed("%(message)s"))
        logger = logging.getLogger("hybridize")
        logger.handlers[:] = [handler]
        logger.setLevel(level)
        logger.propagate = False

    def progress(self, label: str, done: float, total: float) -> None:
        """Draw a bar on a terminal; elsewhere a line now and then, and always the last."""
        if self.quiet:
            return
        if self.err.is_terminal:
            if self._bars is None:
                self._bars = Progress(
                    TextColumn("{task.description:<24}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"),
                    TimeElapsedColumn(), TimeRemainingColumn(), console=self.err, transient=False,
                )  # fmt: skip
                self._bars.start()
            if label not in self._tasks:
                self._tasks[label] = self._bars.add_task(label, total=total)
            self._bars.update(self._tasks[label], completed=done, total=total)
            return
        now = time.monotonic()
        when, percent = self._last.get(label, (0.0, -1))
        share = int(100 * done / total) if total else 100
        if (done >= total and percent < 100) or (now - when >= 5 and share > percent):
            self._last[label] = (now, share)
            print(f"{label}: {share}%", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bars is not None:
            self._bars.stop()
            self._bars = None
            self._tasks = {}

    def say(self, text: str) -> None:
        """A line of the result, unless JSON was asked for."""
        if not self.as_json and not self.quiet:
            self.close()
            self.out.print(scrub(text), markup=False)

    def write(self, piece: str) -> None:
        """A piece of a text that is being made, as it comes, unless JSON was asked for."""
        if not self.as_json:
            self.close()
            print(piece, end="", flush=True)

    def note(self, text: str) -> None:
        """A line beside the result, on stderr."""
        if not self.as_json and not self.quiet:
            self.close()
            print(text, file=sys.stderr, flush=True)

    def table(self, rows: list[list[str]], title: str = "") -> None:
        """Rows of text, the heading first; numbers to the right."""
        if self.as_json or self.quiet or not rows:
            return
        self.close()
        table = Table(title=title or None, title_justify="left", header_style="bold", box=None, pad_edge=False)
        for place, name in enumerate(rows[0]):
            table.add_column(name, justify="left" if place == 0 else "right", overflow="fold")
        for row in rows[1:]:
            table.add_row(*map(scrub, row))
        self.out.print(table)

    def result(self, value: Any) -> None:
        """The command's result as one JSON document, if asked for."""
        self.close()
        if self.as_json:
            print(scrub(json.dumps(value, indent=1, default=str)), flush=True)
