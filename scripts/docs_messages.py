"""What the package may say when something is wrong, read from its source, and the page that explains the most frequent ones.

python scripts/docs_messages.py       prints the messages that docs/messages.yaml has no entry for
"""

import ast
import sys
from functools import cache
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "hybridize"
ENTRIES = ROOT / "docs" / "messages.yaml"
ERRORS = {
    "ConfigError",
    "CheckpointError",
    "DataError",
    "TrainingError",
    "MissingDependencyError",
    "GateFailedError",
    "StoppedError",
}
# What stands for a value.
HOLE = "\u2026"


def _text(node: ast.expr) -> str | None:
    """A string of the source with a hole for each value, None for another expression."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        parts = (part.value if isinstance(part, ast.Constant) else HOLE for part in node.values)
        return "".join(str(part) for part in parts)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = _text(node.left), _text(node.right)
        return None if left is None and right is None else (left or HOLE) + (right or HOLE)
    return None


@cache
def _nodes() -> dict[str, list[ast.AST]]:
    """File -> the nodes of its syntax tree."""
    files = sorted(PACKAGE.rglob("*.py"))
    return {str(path.relative_to(ROOT)): list(ast.walk(ast.parse(path.read_text(encoding="utf-8")))) for path in files}


@cache
def strings() -> frozenset[str]:
    """Every string of the package's source in one line, f-strings with holes."""
    texts = (_text(node) for nodes in _nodes().values() for node in nodes if isinstance(node, ast.expr))
    return frozenset(" ".join(text.split()) for text in texts if text)


@cache
def messages() -> dict[str, str]:
    """Message of an error that is raised in the source -> the file that raises it."""
    found: dict[str, str] = {}
    for path, nodes in _nodes().items():
        for node in nodes:
            if not isinstance(node, ast.Raise) or not isinstance(node.exc, ast.Call) or not node.exc.args:
                continue
            name = node.exc.func.id if isinstance(node.exc.func, ast.Name) else ""
            text = _text(node.exc.args[0])
            # What only puts a place before another error's words says nothing of its own.
            if name in ERRORS and text and any(letter.isalpha() for letter in text.replace(HOLE, "")):
                found.setdefault(" ".join(text.split()), path)
    return found


def fits(fragment: str, text: str) -> bool:
    """Whether the pieces of a fragment, between its holes, stand in a text in their order."""
    place = 0
    for piece in fragment.split(HOLE):
        place = text.find(piece.strip(), place)
        if place < 0:
            return False
        place += len(piece.strip())
    return True


def entries() -> dict[str, list[dict[str, str]]]:
    """Group -> entries, each with message, cause and do."""
    return yaml.safe_load(ENTRIES.read_text(encoding="utf-8"))


def gone() -> list[str]:
    """Fragments of the page that no string of the source holds any more."""
    said = [entry["message"] for group in entries().values() for entry in group]
    return [fragment for fragment in said if not any(fits(fragment, text) for text in strings())]


def without_entry() -> dict[str, str]:
    """Messages that the page does not explain, and where they are raised."""
    said = [entry["message"] for group in entries().values() for entry in group]
    return {text: path for text, path in messages().items() if not any(fits(fragment, text) for fragment in said)}


def page() -> str:
    """The entries by group, as the troubleshooting page has them."""
    out = []
    for group, found in entries().items():
        out.append(f"## {group}\n")
        for entry in found:
            out.append(f"### `{entry['message']}`\n\n{entry['cause'].strip()}\n\n**What to do.** {entry['do'].strip()}\n")
    return "\n".join(out)


def others() -> str:
    """All other messages by file, as they stand in the source."""
    by_file: dict[str, list[str]] = {}
    for text, path in without_entry().items():
        by_file.setdefault(path, []).append(text)
    parts = []
    for path, texts in by_file.items():
        body = "\n".join(texts)
        parts.append(f"### {path}\n\n```text\n{body}\n```\n")
    return "\n".join(parts)


def count() -> str:
    return f"{len(messages())} messages are raised in the source; {len(without_entry())} of them have no entry above."


if __name__ == "__main__":
    for text, path in without_entry().items():
        sys.stdout.write(f"{path}: {text}\n")
    for fragment in gone():
        sys.stdout.write(f"gone: {fragment}\n")
