"""A document as Markdown: pictures are the figures that they draw, in words where a table has them already."""

import re
from typing import Any

from hybridize.eval.report.document import (
    Banner,
    Cell,
    Charts,
    Code,
    Document,
    Fold,
    LayerMap,
    Prose,
    Quotes,
    Table,
)


def markdown(document: Document) -> str:
    """The text, whole. What was read from files cannot add markup, Markdown's or HTML's."""
    parts = [f"# {_text(document.title)}", _text(document.subtitle), *(_banner(banner) for banner in document.banners)]
    for section in document.sections:
        parts += [f"## {_text(section.title)}", *(_block(block) for block in section.blocks)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _text(text: str) -> str:
    """Plain text as Markdown shows it unchanged, in one line."""
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"([\\`*\[\]|~])", r"\\\1", text)
    # Inside a word an underscore is only itself.
    text = re.sub(r"(?<!\w)_|_(?!\w)", r"\\_", text)
    return re.sub(r"\s+", " ", text).strip()


def _banner(banner: Banner) -> str:
    heading = f"## {_text(banner.run)}: {_text(banner.word)}" if banner.run else f"## {_text(banner.word)}"
    return "\n\n".join([heading, _text(banner.sentence), _gates(banner)]).strip()


def _gates(banner: Banner) -> str:
    rows = [
        [
            gate.name, "pass" if gate.passed else "FAIL", "-" if gate.value is None else f"{gate.value:.6g}",
            "-" if gate.limit is None else f"{gate.limit:g}", gate.detail,
        ]
        for gate in banner.gates
    ]  # fmt: skip
    return _table(Table(label="Gates", rows=[["gate", "", "value", "limit", "in words"], *rows])) if rows else ""


def _block(block: Any) -> str:
    return _BLOCKS[type(block)](block)


def _prose(block: Prose) -> str:
    return _text(block.text)


def _table(block: Table) -> str:
    rows = [[_text(cell.text if isinstance(cell, Cell) else cell) or " " for cell in row] for row in block.rows]
    lines = [f"| {' | '.join(row)} |" for row in rows]
    lines.insert(1, "|" + "---|" * len(rows[0]))
    return f"**{_text(block.label)}**\n\n" + "\n".join(lines)


def _code(block: Code) -> str:
    return _fenced(block.text)


def _fenced(text: str) -> str:
    """A code block with a longer fence than any in the text."""
    longest = max([2, *map(len, re.findall(r"`+", text))])
    fence = "`" * (longest + 1)
    return f"{fence}\n{text.rstrip()}\n{fence}"


def _layers(block: LayerMap) -> str:
    rows: list[list[str | Cell]] = [["layer", "mixer", "cache"], *([str(e.number), e.name, e.note] for e in block.entries)]
    return _table(Table(label=block.label, rows=rows))


def _charts(block: Charts) -> str:
    if block.figures is not None:
        return _table(block.figures)
    return "\n".join(
        [f"**{_text(block.label)}**", "", *(f"- {_text(chart.title)}. {_text(chart.about)}" for chart in block.charts)]
    )


def _quotes(block: Quotes) -> str:
    return "\n\n".join(f"{_text(name)}:\n\n{_fenced(text)}" for name, text in block.entries)


def _fold(block: Fold) -> str:
    return "\n\n".join([f"### {_text(block.title)}", *(_block(part) for part in block.blocks)])


_BLOCKS: dict[type, Any] = {
    Prose: _prose, Table: _table, Code: _code, LayerMap: _layers, Charts: _charts, Quotes: _quotes, Fold: _fold,
}  # fmt: skip
