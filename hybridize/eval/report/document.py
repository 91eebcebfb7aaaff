"""What a report says, before it is HTML or Markdown: sections of a few kinds of blocks. All text in it is plain text."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from hybridize.core import GateResult


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One cell of a table that is more than its text."""

    text: str
    tone: str = ""
    """"good" or "bad": how it is to be taken; "" is neither."""
    bar: float | None = None
    """0 to 1: a bar of that length under the text."""
    shade: float | None = None
    """0 to 1: how strongly the cell is shaded."""


@dataclass(frozen=True, kw_only=True)
class Prose:
    """A paragraph."""

    text: str


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of cells, the heading first; the first cell of a row says what the row is about."""

    label: str
    rows: Sequence[Sequence[str | Cell]]


@dataclass(frozen=True, kw_only=True)
class Code:
    """Text that is to stay as it is."""

    label: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One layer in a layer map."""

    number: int
    name: str
    colour: int
    bar: float
    """0 to 1: its cache beside the largest one."""
    note: str


@dataclass(frozen=True, kw_only=True)
class LayerMap:
    """The layers in order."""

    label: str
    entries: list[Entry]


@dataclass(frozen=True, kw_only=True)
class Chart:
    """One picture with its title."""

    title: str
    svg: str
    about: str
    """The picture in words, for those who do not see it."""


@dataclass(frozen=True, kw_only=True)
class Charts:
    """Pictures that share a legend."""

    label: str
    """Above them; nothing where the section's title says it."""
    legend: list[tuple[int, str]]
    """(colour, what has it); empty where there is one line only."""
    charts: list[Chart]
    figures: Table | None
    """What is drawn, as numbers; None where a table before it has them."""


@dataclass(frozen=True, kw_only=True)
class Quotes:
    """Texts under short headings."""

    entries: list[tuple[str, str]]


@dataclass(frozen=True, kw_only=True)
class Fold:
    """Blocks that are shown when asked for."""

    title: str
    blocks: "list[Block]"
    open: bool = False


Block = Prose | Table | Code | LayerMap | Charts | Quotes | Fold


@dataclass(frozen=True, kw_only=True)
class Section:
    """A heading and what is under it."""

    title: str
    blocks: list[Block]

    @property
    def slug(self) -> str:
        """Its name in an address."""
        return re.sub(r"[^a-z0-9]+", "-", self.title.lower()).strip("-")


@dataclass(frozen=True, kw_only=True)
class Banner:
    """The verdict on one run."""

    run: str
    """Its name where there are several runs, else nothing."""
    word: str
    tone: str
    """"good", "bad" or ""."""
    sentence: str
    gates: tuple[GateResult, ...]


@dataclass(frozen=True, kw_only=True)
class Document:
    """A whole report."""

    title: str
    subtitle: str
    banners: list[Banner]
    sections: list[Section]
