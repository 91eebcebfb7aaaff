"""Pieces of Markdown for the site: tables, prose of docstrings, options of a component with the text under each field."""

import ast
import dataclasses
import inspect
import re
import textwrap
from typing import Any

SPECIAL = re.compile(r"([\\*_<>$\[\]{}~#|])")


def plain(text: str) -> str:
    """Text of a docstring in a paragraph or a cell: what stands in backticks stays, signs of Markdown elsewhere are text."""
    pieces = " ".join(text.split()).split("`")
    return "`".join(piece.replace("|", "\\|") if place % 2 else SPECIAL.sub(r"\\\1", piece) for place, piece in enumerate(pieces))


def code(text: str) -> str:
    """As code in a cell."""
    return "`" + text.replace("|", "\\|") + "`"


def table(rows: list[list[str]]) -> str:
    """Cells that are Markdown already; the heading first, numbers to the right."""
    numbers = [all(re.match(r"^[-\d]", row[place]) for row in rows[1:]) for place in range(len(rows[0]))]
    lines = [rows[0], ["---:" if number and place else "---" for place, number in enumerate(numbers)], *rows[1:]]
    return "\n".join("| " + " | ".join(row) + " |" for row in lines) + "\n"


def prose(text: str) -> str:
    """A docstring as Markdown: paragraphs, and indented lines as they are."""
    out = []
    for part in re.split(r"\n\s*\n", inspect.cleandoc(text)):
        if part.startswith("    "):
            out.append(f"```text\n{textwrap.dedent(part)}\n```")
            continue
        head, _, rest = part.partition("\n    ")
        out.append(plain(head))
        if rest:
            out.append(f"```text\n{textwrap.dedent('    ' + rest)}\n```")
    return "\n\n".join(out) + "\n"


def field_texts(cls: type) -> dict[str, str]:
    """Field -> the string under it, of a dataclass and those that it is made from."""
    found: dict[str, str] = {}
    for kind in reversed(cls.__mro__[:-1]):
        body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0].body
        for line, below in zip(body, [*body[1:], None], strict=True):
            is_text = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant) and isinstance(below.value.value, str)
            if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and is_text:
                found[line.target.id] = below.value.value
    return found


def kind_of(kind: Any) -> str:
    """A field's type as people write it."""
    text = kind if isinstance(kind, str) else getattr(kind, "__name__", str(kind)) if isinstance(kind, type) else str(kind)
    text = text.replace("typing.", "").replace("NoneType", "None")
    # One of several words, as the words.
    return re.sub(r"Literal\[([^\[\]]*)\]", lambda found: found[1].replace(", ", " | "), text)


def default_of(field: dataclasses.Field) -> str:
    if field.default is not dataclasses.MISSING:
        return code(repr(field.default))
    if field.default_factory is not dataclasses.MISSING:
        return code(repr(field.default_factory()))
    return "needed"


def options(cls: type, leave: frozenset[str] = frozenset()) -> str:
    """A table of a component's options, without those in `leave`."""
    texts = field_texts(cls)
    rows = [["option", "type", "default", "what it is"]]
    for field in dataclasses.fields(cls):
        if field.name not in leave:
            said = plain(texts.get(field.name, ""))
            rows.append([code(field.name), code(kind_of(field.type)), default_of(field), said])
    return table(rows) if len(rows) > 1 else "No options.\n"
