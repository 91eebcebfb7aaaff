"""A document as one HTML page that fetches nothing and runs nothing: its own policy forbids both."""

import html
import re
from typing import Any

from hybridize.core import GateResult
from hybridize.eval.pictures import COLOURS, SIGNS
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
    Section,
    Table,
)
from hybridize.eval.report.style import STYLE

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
# Longer cells are text to read, which may go over several lines.
WORDS = 48
NUMBER = re.compile(r"[-+−]?[\d.,]+(e[-+]?\d+)?( ± [\d.e+-]+)?\s?(%|x|B|[KMG]iB)?|-")


def page(document: Document) -> str:
    """The page, whole."""
    links = [("verdict", "Verdict"), *((section.slug, section.title) for section in document.sections)]
    contents = "".join(f'<li><a href="#{slug}">{_text(title)}</a></li>' for slug, title in links)
    body = "\n".join(_section(section) for section in document.sections)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{_text(document.title)}</title>\n'
        f'<link rel="icon" href="data:,">\n<style>{STYLE}</style>\n</head>\n<body>\n'
        f'<a class="skip" href="#main">Skip to the report</a>\n'
        f'<header>\n<h1>{_text(document.title)}</h1>\n<p class="quiet">{_text(document.subtitle)}</p>\n'
        f'<nav aria-label="Contents"><ul>{contents}</ul></nav>\n</header>\n'
        f'<main id="main" tabindex="-1">\n{_banners(document.banners)}\n{body}\n</main>\n'
        f'<footer><p class="quiet">Written by hybridize. The same figures are in the .md and .all.json files beside this page.'
        f"</p></footer>\n"
        f"</body>\n</html>\n"
    )


def _text(text: str) -> str:
    return html.escape(text, quote=True)


def _section(section: Section) -> str:
    blocks = "\n".join(_block(block) for block in section.blocks)
    slug = section.slug
    heading = f'<h2 id="{slug}-title">{_text(section.title)}</h2>'
    return f'<section id="{slug}" aria-labelledby="{slug}-title">{heading}\n{blocks}</section>'


def _banners(banners: list[Banner]) -> str:
    parts = []
    for place, banner in enumerate(banners):
        name = f'<p class="run">{_text(banner.run)}</p>' if banner.run else ""
        said = f'<p class="sentence">{_text(banner.sentence)}</p>' if banner.sentence else ""
        gates = "".join(_gate(gate) for gate in banner.gates)
        gates = f'<ul class="gates">{gates}</ul>' if gates else ""
        slug = "verdict" if place == 0 else f"verdict-{place + 1}"
        parts.append(
            f'<section class="verdict {banner.tone}" id="{slug}" aria-labelledby="{slug}-title">{name}'
            f'<h2 id="{slug}-title">{_text(banner.word)}</h2>{said}{gates}</section>'
        )
    return "\n".join(parts)


def _gate(gate: GateResult) -> str:
    word = '<b class="good">pass</b>' if gate.passed else '<b class="bad">FAIL</b>'
    numbers = [f"{gate.value:.6g}"] if gate.value is not None else []
    numbers += [f"limit {gate.limit:g}"] if gate.limit is not None else []
    told = f'<p class="quiet">{_text(gate.detail)}</p>' if gate.detail else ""
    return f'<li>{word} <span class="gate">{_text(gate.name)}</span> <span class="numbers">{", ".join(numbers)}</span>{told}</li>'


def _block(block: Any) -> str:
    return _BLOCKS[type(block)](block)


def _prose(block: Prose) -> str:
    return f'<p class="quiet">{_text(block.text)}</p>'


def _box(label: str, inner: str) -> str:
    """A box of its own to scroll in, which the keyboard reaches."""
    return f'<div class="box" role="region" tabindex="0" aria-label="{_text(label)}">{inner}</div>'


def _table(block: Table) -> str:
    heading, *rows = [[cell if isinstance(cell, Cell) else Cell(text=cell) for cell in row] for row in block.rows]
    kinds = [_kind([row[place].text for row in rows]) for place in range(len(heading))]
    top = "".join(f'<th scope="col"{kind}>{_text(cell.text)}</th>' for cell, kind in zip(heading, kinds, strict=True))
    body = "".join(
        f'<tr><th scope="row">{_breakable(row[0].text)}</th>'
        + "".join(_cell(cell, kind) for cell, kind in zip(row[1:], kinds[1:], strict=True))
        + "</tr>"
        for row in rows
    )
    return f"<h3>{_text(block.label)}</h3>" + _box(
        block.label, f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"
    )


def _breakable(name: str) -> str:
    """A name that may go on in another line after an underscore and before its length."""
    return re.sub(r"_(?=.)|(?=@)", r"\g<0><wbr>", _text(name))


def _kind(texts: list[str]) -> str:
    if texts and all(NUMBER.fullmatch(text) for text in texts):
        return ' class="number"'
    return ' class="words"' if any(len(text) > WORDS for text in texts) else ""


def _cell(cell: Cell, kind: str) -> str:
    names = [*re.findall(r'"(.*)"', kind), *([cell.tone] if cell.tone else []), *(["shaded"] if cell.shade is not None else [])]
    named = f' class="{" ".join(names)}"' if names else ""
    shade = "" if cell.shade is None else f' style="--v:{cell.shade:.3f}"'
    return f"<td{named}{shade}>{_text(cell.text)}</td>"


def _code(block: Code) -> str:
    return f'<pre role="region" tabindex="0" aria-label="{_text(block.label)}">{_text(block.text)}</pre>'


def _layers(block: LayerMap) -> str:
    entries = "".join(
        f'<li style="--k:var(--c{entry.colour % COLOURS})"><span class="at">{entry.number}</span><b>{_text(entry.name)}</b>'
        f'{_text(entry.note)}<i style="--w:{100 * entry.bar:.1f}%"></i></li>'
        for entry in block.entries
    )
    return f'<h3>{_text(block.label)}</h3><ol class="layers" start="0" role="list">{entries}</ol>'


def _charts(block: Charts) -> str:
    legend = "".join(
        f'<li><span style="--k:var(--c{colour % COLOURS})" aria-hidden="true">{SIGNS[colour % len(SIGNS)]}</span>'
        f"{_text(label)}</li>"
        for colour, label in block.legend
    )
    charts = "".join(
        f'<figure role="img" aria-label="{_text(f"{chart.title}. {chart.about}")}">'
        f"<figcaption>{_text(chart.title)}</figcaption>{chart.svg}</figure>"
        for chart in block.charts
    )
    title = f"<h3>{_text(block.label)}</h3>" if block.label else ""
    key = f'<ul class="legend">{legend}</ul>' if legend else ""
    figures = "" if block.figures is None else _fold(Fold(title="In figures", blocks=[block.figures]))
    return f'{title}{key}<div class="charts">{charts}</div>{figures}'


def _quotes(block: Quotes) -> str:
    return "<dl>" + "".join(f"<dt>{_text(name)}</dt><dd>{_text(text)}</dd>" for name, text in block.entries) + "</dl>"


def _fold(block: Fold) -> str:
    inner = "\n".join(_block(part) for part in block.blocks)
    return f"<details{' open' if block.open else ''}><summary>{_text(block.title)}</summary>{inner}</details>"


_BLOCKS: dict[type, Any] = {
    Prose: _prose, Table: _table, Code: _code, LayerMap: _layers, Charts: _charts, Quotes: _quotes, Fold: _fold,
}  # fmt: skip
