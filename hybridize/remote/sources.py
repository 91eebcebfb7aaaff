"""Modules of the package as top-level statements: what each defines, what it needs, and the lines it is written in."""

import ast
import functools
import re
from dataclasses import dataclass
from pathlib import Path

from hybridize.remote.scopes import PACKAGE, bound, is_own_import

ROOT = Path(__file__).parents[1]
# An entry of a table of components.
ENTRY = re.compile(rf"({PACKAGE}(?:\.\w+)*):(\w+)")


@dataclass(frozen=True)
class Definition:
    """A name that a module of the package defines at its top level."""

    module: str
    name: str


@dataclass(frozen=True)
class External:
    """A name that an import from another package binds: `import <module>` where `attribute` is None."""

    module: str
    attribute: str | None
    name: str


class Statement:
    """A top-level definition, with the comment above it.

    Attributes:
        node: the syntax tree.
        first: number of its first line, of the comment above or of a decorator; from 1.
        last: number of its last line.
        names: what it defines.
    """

    def __init__(self, node: ast.stmt, lines: list[str]):
        self.node = node
        decorators = getattr(node, "decorator_list", [])
        self.code_first = min([node.lineno, *(one.lineno for one in decorators)])
        self.first, self.last = self.code_first, int(node.end_lineno or node.lineno)
        while self.first > 1 and lines[self.first - 2].startswith("#"):
            self.first -= 1
        self.names = set(bound(node))

    @property
    def is_block(self) -> bool:
        """Whether blank lines go around it."""
        return isinstance(self.node, (ast.FunctionDef, ast.ClassDef))


class Module:
    """One file of the package.

    Attributes:
        name: dotted.
        path: of the file, from the package's folder's parent.
        lines: of its source.
        docstring: of the module.
        imports: dotted names of the package's modules that it imports at its top level, in order.
        statements: its definitions, in order.
    """

    def __init__(self, name: str):
        self.name = name
        path = ROOT.joinpath(*name.split(".")[1:])
        file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        self.path = file.relative_to(ROOT.parent).as_posix()
        source = file.read_text(encoding="utf-8")
        self.lines = source.splitlines()
        tree = ast.parse(source)
        self.docstring = ast.get_docstring(tree) or ""
        self.imports: list[str] = []
        self.statements: list[Statement] = []
        self._imported: dict[str, Definition | External] = {}
        for node in tree.body[1:] if self.docstring else tree.body:
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                self._import(node)
            elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and self.statements:
                # What is said of the assignment above it.
                self.statements[-1].last = int(node.end_lineno or node.lineno)
            else:
                assert isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)), self._at(
                    node, "defines nothing"
                )
                self.statements.append(Statement(node, self.lines))
        self.defined = {name: statement for statement in self.statements for name in statement.names}

    def _at(self, node: ast.stmt, what: str) -> str:
        return f"{self.path}: line {node.lineno} {what}, which the file beside the weights has no place for"

    def _import(self, node: ast.Import | ast.ImportFrom) -> None:
        if is_own_import(node):
            own = str(getattr(node, "module", None))
            self.imports.append(own)
            self._imported |= {alias.asname or alias.name: Definition(own, alias.name) for alias in node.names}
            return
        for alias in node.names:
            name = alias.asname or alias.name
            if isinstance(node, ast.ImportFrom):
                known, source = node.level == 0 and alias.name != "*", (str(node.module), alias.name)
            else:
                known, source = alias.name.split(".")[0] != PACKAGE and name.isidentifier(), (alias.name, None)
            assert known, self._at(node, "imports what cannot be followed by name")
            self._imported[name] = External(*source, name)

    def resolve(self, name: str) -> Definition | External | None:
        """What a name means in this module, however often it was handed on; None for Python's own."""
        if name in self.defined:
            return Definition(self.name, name)
        found = self._imported.get(name)
        if not isinstance(found, Definition):
            return found
        target = module(found.module).resolve(found.name)
        assert target is not None, f"{self.path}: imports {found.name} from {found.module}, which has no such name"
        return target


@functools.cache
def module(name: str) -> Module:
    """A module by its dotted name."""
    return Module(name)
