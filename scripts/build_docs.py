"""The documentation site: docs/ with what the package says of itself put in, then Sphinx with every warning an error.

    python scripts/build_docs.py            build/docs, then site/
    python scripts/build_docs.py --text     build/docs alone, which needs no Sphinx

A page asks for a generated part by a comment on a line of its own, `<!-- make: PART ARGUMENT -->`; PARTS says which there are.
"""

import argparse
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from hybridize.recipe import builtin_recipes  # noqa: E402
from scripts import docs_messages, docs_parts  # noqa: E402

DOCS, TEXT, SITE = ROOT / "docs", ROOT / "build" / "docs", ROOT / "site"
# Scripts, styles, pictures and fonts of another host.
FETCHED = re.compile(r"(?:src=[\"']|<link[^>]+href=[\"']|url\([\"']?|@import [\"'])((?:https?:)?//[^\"')\s]+)")
MAKE = re.compile(r"^<!-- make: (\w+)(?: (.*?))? -->$", re.M)


def _component(argument: str) -> str:
    """A section under a label that recipes' pages point to."""
    kind, name = argument.split()
    return f"({kind}-{name.replace('_', '-')})=\n### {name}\n\n{docs_parts.component(kind, name)}"


PARTS: dict[str, Callable[[str], str]] = {
    "options": lambda argument: docs_parts.component(*argument.split()),
    "component": _component,
    "shared": lambda _: docs_parts.stage_options(),
    "costs": lambda argument: docs_parts.costs(yaml.safe_load(argument)),
    "all_costs": lambda _: docs_parts.all_costs(),
    "recipe_costs": lambda _: docs_parts.recipe_costs(),
    "kernels": lambda _: docs_parts.kernels(),
    "native": docs_parts.native,
    "all_natives": lambda _: docs_parts.all_natives(),
    "recipe_natives": lambda _: docs_parts.recipe_natives(),
    "verdicts": lambda argument: docs_parts.verdicts(yaml.safe_load(argument)),
    "recipes": lambda _: docs_parts.recipe_list(),
    "suite": docs_parts.suite,
    "commands": lambda _: docs_parts.commands(),
    "messages": lambda _: docs_messages.page(),
    "messages_count": lambda _: docs_messages.count(),
    "other_messages": lambda _: docs_messages.others(),
}


def asked(text: str) -> list[tuple[str, str]]:
    """(part, argument) of every generated part that a page asks for."""
    return [(match[1], match[2] or "") for match in MAKE.finditer(text)]


def filled(text: str) -> str:
    """A page with its generated parts in place."""
    return MAKE.sub(lambda match: PARTS[match[1]](match[2] or "").rstrip() + "\n", text)


def without_page(kind: str, names: Iterable[str]) -> list[str]:
    """Those of a table's names that no page asks for."""
    if kind == "mixer":
        return [name for name in names if not (DOCS / "mixers" / f"{name}.md").is_file()]
    part = {"conversion": "options", "suite": "suite"}.get(kind, "component")
    pages = [page.read_text(encoding="utf-8") for page in DOCS.rglob("*.md")]
    said = {argument for page in pages for what, argument in asked(page) if what == part}
    return [name for name in names if (name if kind == "suite" else f"{kind} {name}") not in said]


def from_outside(site: Path) -> list[str]:
    """What pages or styles would fetch from elsewhere: each file and address. Links that a reader follows are none."""
    found = []
    for path in sorted(site.rglob("*")):
        if path.suffix in (".html", ".css"):
            text = path.read_text(encoding="utf-8")
            found += [f"{path.name}: {match}" for match in FETCHED.findall(text)]
    return found


def write_text(out: Path = TEXT) -> None:
    """All pages as Markdown, into a new folder."""
    if out.exists():
        shutil.rmtree(out)
    shutil.copytree(DOCS, out, ignore=shutil.ignore_patterns("__pycache__"))
    for page in sorted(out.rglob("*.md")):
        page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")
    for name in builtin_recipes():
        (out / "recipes" / f"{name}.md").write_text(docs_parts.recipe_page(name), encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", action="store_true", help="stop before Sphinx")
    arguments = parser.parse_args()
    write_text()
    if arguments.text:
        return 0
    if SITE.exists():
        shutil.rmtree(SITE)
    command = [
        sys.executable,
        "-m",
        "sphinx",
        "-W",
        "--keep-going",
        "-q",
        "-E",
        "-b",
        "html",
        "-d",
        str(ROOT / "build" / "doctrees"),
    ]
    if code := subprocess.call([*command, str(TEXT), str(SITE)], cwd=ROOT):
        return code
    if found := from_outside(SITE):
        sys.stderr.write("\n".join(["the site would fetch from elsewhere:", *found]) + "\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
