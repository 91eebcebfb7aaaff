"""One file out of the runtime: what a hybrid's classes need, and nothing else, as it is written in the package.

From the family's classes and the mixers of a config every top-level definition that they need is followed by name; modules come
in the order of their imports. Text is copied with its comments and changed in four places: imports of the package fall away, a
name that two modules use for different things gets its module's name behind it, a table of components finds its entries in this
file, and tables lose the entries of mixers and families that are not there.
"""

import ast
import builtins
import functools
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

from hybridize.families import FAMILIES
from hybridize.mixers import MIXERS
from hybridize.modeling import HYBRIDS
from hybridize.remote.scopes import Reference, References, is_own_import
from hybridize.remote.sources import ENTRY, Definition, External, Module, Statement, module
from hybridize.version import __version__

WIDTH = 130
RULE = "# " + "-" * (WIDTH - 2)

Entry = tuple[ast.expr, ast.expr]

HEADER = '''\
# SPDX-License-Identifier: Apache-2.0
"""The code of a hybrid: {prefix} with the mixers {mixers}.

Made by hybridize {version} out of its own modules, which are under the Apache License, Version 2.0
(https://www.apache.org/licenses/LICENSE-2.0); weights beside this file have a licence of their own. With torch and
transformers alone it is read by

    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

After `import hybridize` the package's own classes are used, and this file is not read.
"""
'''


def mixers_of(config: Any) -> tuple[str, ...]:
    """Names of the mixers that a hybrid's config uses, those inside others too, sorted.

    Raises:
        ConfigError: an entry of `mixers` cannot be built.
    """
    found: set[str] = set()
    specs = list(config.mixers)
    while specs:
        spec = specs.pop()
        options = MIXERS.build(spec)
        found.add(spec["name"])
        specs += [getattr(options, name) for name in getattr(options, "nested", {})]
    return tuple(sorted(found))


def bundle(config: Any) -> str:
    """The text of the file that loads a hybrid where only torch and transformers are; the same for the same mixers and family.

    Args:
        config: a hybrid's.

    Raises:
        ConfigError: an entry of `mixers` cannot be built.
    """
    return _bundle(config.model_type.removeprefix("hybrid_"), mixers_of(config))


@functools.cache
def _bundle(family: str, mixers: tuple[str, ...]) -> str:
    classes = [Definition("hybridize.modeling", found.__name__) for found in HYBRIDS[family]]
    entries = [Definition(*MIXERS.entries[name].split(":")) for name in mixers]
    kept = Kept(family, entries, classes)
    header = HEADER.format(prefix=FAMILIES[family].prefix, mixers=", ".join(mixers), version=__version__)
    return "\n\n".join(["\n".join([header, *kept.imports(), ""]), *(kept.section(one) for one in kept.modules)])


@functools.cache
def _references(statement: Statement, skipped: frozenset[ast.AST]) -> References:
    references = References(skipped)
    references.visit(statement.node)
    return references


class Kept:
    """What goes into the file.

    Args:
        family: key of FAMILIES.
        entries: the mixers' options.
        classes: the config, the decoder and the causal LM.
    """

    def __init__(self, family: str, entries: list[Definition], classes: list[Definition]):
        self.family, self.entries = family, set(entries)
        self.statements: dict[str, set[int]] = defaultdict(set)
        self.externals: set[External] = set()
        self.used: set[Definition] = set()
        self._references: dict[tuple[str, int], References] = {}
        waiting: list[Definition | External] = [*entries, *classes]
        while waiting:
            one = waiting.pop()
            if isinstance(one, External):
                self.externals.add(one)
                continue
            own = module(one.module)
            statement = own.defined[one.name]
            if statement.first not in self.statements[one.module]:
                self.statements[one.module].add(statement.first)
                self.used |= {Definition(one.module, name) for name in statement.names}
                waiting += self._needed(own, statement)
        self.modules = list(self._ordered([one.module for one in (*entries, *classes)]))
        self.names = self._named()

    def _ordered(self, names: Iterable[str]) -> Iterator[Module]:
        """Every module that something is kept of, those that it imports before it."""
        seen: set[str] = set()

        def visit(name: str) -> Iterator[Module]:
            if name in seen:
                return
            seen.add(name)
            for below in module(name).imports:
                yield from visit(below)
            if name in self.statements:
                yield module(name)

        # Those that only a function imports may come last.
        for name in (*names, *sorted(self.statements)):
            yield from visit(name)

    def _needed(self, own: Module, statement: Statement) -> Iterator[Definition | External]:
        references = _references(statement, frozenset(part for entry in self._entries(statement)[1] for part in entry))
        self._references[own.name, statement.first] = references
        for reference in references.found:
            if (target := self._target(own, reference)) is not None:
                yield target

    def _target(self, own: Module, reference: Reference) -> Definition | External | None:
        if reference.source is not None:
            return module(reference.source[0]).resolve(reference.source[1])
        target = own.resolve(reference.name)
        known = target is not None or hasattr(builtins, reference.name) or reference.name == "__file__"
        assert known, f"{own.path}: line {reference.line}: {reference.name} is nobody's"
        return target

    def _entries(self, statement: Statement) -> tuple[list[Entry], list[Entry]]:
        """What stays and what goes of the tables of components and of families that an assignment holds."""
        stay: list[Entry] = []
        gone: list[Entry] = []
        for node in ast.walk(statement.node) if isinstance(statement.node, ast.Assign) else ():
            if not isinstance(node, ast.Dict) or not node.keys or None in node.keys:
                continue
            entries = [(key, value) for key, value in zip(node.keys, node.values, strict=True) if key is not None]
            if all(_text(key) in FAMILIES for key, _ in entries):
                known = [_text(key) == self.family for key, _ in entries]
            elif all(ENTRY.fullmatch(_text(value)) for _, value in entries):
                known = [Definition(*_text(value).split(":")) in self.entries for _, value in entries]
            else:
                continue
            for entry, stays in zip(entries, known, strict=True):
                (stay if stays else gone).append(entry)
        return stay, gone

    def _named(self) -> dict[Definition | External, str]:
        """A name for each thing, its own where no other has it. Names of imports stay, and so do those of Python."""
        wanted: dict[str, list[Definition | External]] = defaultdict(list)
        for one in sorted(self.externals, key=lambda one: (one.name, one.module)):
            wanted[one.name].append(one)
        for own in self.modules:
            for statement in own.statements:
                if statement.first in self.statements[own.name]:
                    for name in sorted(statement.names):
                        wanted[name].append(Definition(own.name, name))
        named: dict[Definition | External, str] = {}
        for name, found in wanted.items():
            imported = [one for one in found if isinstance(one, External)]
            assert len(imported) < 2, f"{name} is imported from {imported}, and one name can mean one thing"
            for one in found:
                alone = len(found) == 1 and not hasattr(builtins, name)
                named[one] = name if alone or isinstance(one, External) else _renamed(name, one.module)
        assert len(set(named.values())) == len(named), "two things of one name are left"
        return named

    def imports(self) -> list[str]:
        """Import lines, Python's own first, then the others'."""
        plain: list[str] = []
        attributes: dict[str, list[str]] = defaultdict(list)
        for one in self.externals:
            tail = "" if one.name == (one.attribute or one.module) else f" as {one.name}"
            if one.attribute is None:
                plain.append(f"import {one.module}{tail}")
            else:
                attributes[one.module].append(f"{one.attribute}{tail}")
        lines = sorted(plain)
        for name, members in sorted(attributes.items()):
            lines += [f"from {name} import {member}" for member in sorted(members) if " as " in member]
            if together := sorted(member for member in members if " as " not in member):
                line = f"from {name} import {', '.join(together)}"
                assert len(line) <= WIDTH, f"{name}: its import is longer than a line"
                lines.append(line)
        groups = (
            [line for line in lines if (line.split()[1].split(".")[0] in ("torch", "transformers")) is other]
            for other in (False, True)
        )
        return "\n\n".join("\n".join(group) for group in groups).splitlines()

    def section(self, own: Module) -> str:
        """A module's definitions that are needed, under its docstring as a comment."""
        about = [f"# {line}".rstrip() for line in (own.path, "", *own.docstring.splitlines())]
        text, before = "\n".join([RULE, *about, RULE, ""]), None
        for statement in own.statements:
            if statement.first not in self.statements[own.name]:
                continue
            if before is None or before.is_block or statement.is_block:
                text += "\n\n"
            elif statement.first < statement.code_first:
                text += "\n"
            text += self._rewritten(own, statement) + "\n"
            before = statement
        return text

    def _rewritten(self, own: Module, statement: Statement) -> str:
        """A statement's lines with its names as they are called here."""
        lines = {number: own.lines[number - 1].encode() for number in range(statement.first, statement.last + 1)}
        stay, gone = self._entries(statement)
        references = self._references[own.name, statement.first]
        edits = list(self._edits(own, statement, references, stay))
        for line, start, old, new in sorted(edits, reverse=True):
            found = lines[line][start : start + len(old)]
            assert found == old, f"{own.path}: line {line} has {found!r} where {old!r} was read"
            lines[line] = lines[line][:start] + new.encode() + lines[line][start + len(old) :]
        kept = {line for entry in stay for node in entry for line in _lines(node)}
        for key, value in gone:
            for line in {*_lines(key), *_lines(value)}:
                assert line not in kept, f"{own.path}: line {line} has two entries of a table, expected one"
                del lines[line]
        for node, siblings in references.removed:
            for line in _lines(node):
                del lines[line]
            if all(map(is_own_import, siblings)):
                lines[node.lineno] = b" " * node.col_offset + b"pass"
        return b"\n".join(lines[number] for number in sorted(lines)).decode()

    def _edits(
        self, own: Module, statement: Statement, references: References, stay: list[Entry]
    ) -> Iterator[tuple[int, int, bytes, str]]:
        """(line, column, what is there, what comes in its place)."""
        for reference in references.found:
            target = self._target(own, reference)
            new = reference.name if target is None else self.names[target]
            if new != reference.name:
                assert new not in reference.shadows, f"{own.path}: line {reference.line}: {new} is taken"
                yield reference.line, reference.column, reference.name.encode(), new
        if statement.is_block:
            (name,) = statement.names
            line, start = statement.node.lineno, statement.node.col_offset
            start += len("class " if isinstance(statement.node, ast.ClassDef) else "def ")
            yield line, start, name.encode(), self.names[Definition(own.name, name)]
        for _, value in stay:
            if ENTRY.fullmatch(text := _text(value)):
                new = f'f"{{__name__}}:{self.names[Definition(*text.split(":"))]}"'
                yield value.lineno, value.col_offset, f'"{text}"'.encode(), new


def _lines(node: ast.expr | ast.stmt) -> range:
    """Numbers of the lines that something takes."""
    return range(node.lineno, int(node.end_lineno or node.lineno) + 1)


def _text(node: ast.AST) -> str:
    """A string in the source, or nothing."""
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def _renamed(name: str, owner: str) -> str:
    """A name with its module's behind it, in the name's own case."""
    place = re.sub(r"^(kernels|mixers)_", "", "_".join(owner.split(".")[1:]).removesuffix("_torch_impl"))
    if name.isupper():
        return f"{name}_{place.upper()}"
    return f"{name}{place.title().replace('_', '')}" if name[0].isupper() else f"{name}_{place}"
