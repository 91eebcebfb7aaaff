"""Which names of a statement are the module's own, and not a function's or a class's.

Python decides that for a whole scope at once: a name that is bound anywhere in a function is the function's everywhere in it.
"""

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
PACKAGE = "hybridize"


@dataclass(frozen=True, kw_only=True)
class Reference:
    """A name in the source that means something outside its scope.

    `line` counts from 1, `column` from 0 in bytes of UTF-8, as ast has them. `source` is the (module, name) that an import inside
    a function gave it, None where it is the module's.
    """

    name: str
    line: int
    column: int
    source: tuple[str, str] | None = None
    shadows: frozenset[str] = frozenset()
    """Names that scopes around it have bound: it cannot be called one of these."""


@dataclass
class Scope:
    """One function, comprehension or class body."""

    names: set[str]
    is_class: bool = False
    imported: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Names that an import of the package, inside the function, has bound."""


def is_own_import(node: ast.AST) -> bool:
    """Whether a statement imports names from this package."""
    return isinstance(node, ast.ImportFrom) and node.level == 0 and (node.module or "").split(".")[0] == PACKAGE


class References(ast.NodeVisitor):
    """Collects the references of one top-level statement.

    Attributes:
        found: the references, in the order of the tree.
        removed: imports of the package inside functions, each with the list of statements it is one of.
    """

    def __init__(self, skipped: frozenset[ast.AST] = frozenset()):
        self.found: list[Reference] = []
        self.removed: list[tuple[ast.ImportFrom, list[ast.stmt]]] = []
        self._skipped = skipped
        self._scopes: list[Scope] = []

    def visit(self, node: ast.AST) -> None:
        if node in self._skipped:
            return
        for _, value in ast.iter_fields(node):
            if isinstance(value, list):
                self.removed += [(child, value) for child in value if is_own_import(child)]
        super().visit(node)

    def _refer(self, name: str, line: int, column: int) -> None:
        around = [scope for at, scope in enumerate(self._scopes) if not scope.is_class or at == len(self._scopes) - 1]
        shadows = frozenset().union(*(scope.names for scope in around))
        for scope in reversed(around):
            if name in scope.imported:
                self.found.append(Reference(name=name, line=line, column=column, source=scope.imported[name], shadows=shadows))
                return
            if name in scope.names:
                return
        self.found.append(Reference(name=name, line=line, column=column, shadows=shadows))

    def visit_Name(self, node: ast.Name) -> None:  # noqa: D102
        self._refer(node.id, node.lineno, node.col_offset)

    def visit_Global(self, node: ast.Global) -> None:  # noqa: D102
        raise AssertionError(f"line {node.lineno}: a function rebinds {node.names[0]}, which a module of the runtime must not")

    def _within(self, scope: Scope, nodes: list[ast.AST]) -> None:
        self._scopes.append(scope)
        for node in nodes:
            self.visit(node)
        self._scopes.pop()

    def _function(self, node: ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) -> None:
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        arguments += [one for one in (node.args.vararg, node.args.kwarg) if one is not None]
        outside = [*node.args.defaults, *(one for one in node.args.kw_defaults if one is not None)]
        if not isinstance(node, ast.Lambda):
            outside = [*node.decorator_list, *outside]
            self._annotations([*(one.annotation for one in arguments), node.returns])
        for child in outside:
            self.visit(child)
        body = node.body if isinstance(node.body, list) else [node.body]
        scope = scope_of(body)
        scope.names |= {one.arg for one in arguments}
        self._within(scope, list(body))

    visit_FunctionDef = visit_AsyncFunctionDef = visit_Lambda = _function

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:  # noqa: D102
        self._annotations([node.annotation])
        for child in (node.target, node.value):
            if child is not None:
                self.visit(child)

    def _annotations(self, annotations: list[ast.expr | None]) -> None:
        """An annotation may be the name of a class in quotes."""
        for annotation in annotations:
            if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
                assert annotation.value.isidentifier(), f"line {annotation.lineno}: cannot follow {annotation.value!r}"
                self._refer(annotation.value, annotation.lineno, annotation.col_offset + 1)
            elif annotation is not None:
                self.visit(annotation)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:  # noqa: D102
        for child in (*node.decorator_list, *node.bases, *node.keywords):
            self.visit(child)
        scope = scope_of(node.body)
        scope.is_class = True
        self._within(scope, list(node.body))

    def _comprehension(self, node: ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp) -> None:
        first, *others = node.generators
        self.visit(first.iter)
        targets = {name for one in node.generators for name in bound(one.target)}
        inside: list[ast.AST] = [*first.ifs, *(part for one in others for part in (one.iter, *one.ifs))]
        inside += [node.key, node.value] if isinstance(node, ast.DictComp) else [node.elt]
        self._within(Scope(names=targets), inside)

    visit_ListComp = visit_SetComp = visit_DictComp = visit_GeneratorExp = _comprehension


def scope_of(body: list[ast.stmt] | list[ast.expr]) -> Scope:
    """What a body binds: names of its own, and apart from them what it imports from the package."""
    imported = {}
    for node in (child for statement in body for child in _here(statement)):
        if isinstance(node, ast.ImportFrom) and is_own_import(node):
            imported |= {alias.asname or alias.name: (str(node.module), alias.name) for alias in node.names}
    names = {name for node in body for name in bound(node)}
    return Scope(names=names - imported.keys(), imported=imported)


def _here(node: ast.AST) -> Iterator[ast.AST]:
    """A node and those below it that are of the same scope."""
    yield node
    if isinstance(node, (*FUNCTIONS, ast.ClassDef)):
        return
    if isinstance(node, COMPREHENSIONS):
        # A walrus in a comprehension binds around it.
        yield from (below for child in ast.walk(node) if isinstance(child, ast.NamedExpr) for below in _here(child.target))
        return
    for child in ast.iter_child_nodes(node):
        yield from _here(child)


def bound(node: ast.AST) -> Iterator[str]:
    """Names that a statement or a target binds in the scope it stands in."""
    for child in _here(node):
        if isinstance(child, ast.Name) and not isinstance(child.ctx, ast.Load):
            yield child.id
        elif isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield child.name
        elif isinstance(child, (ast.Import, ast.ImportFrom)):
            yield from (alias.asname or alias.name.split(".")[0] for alias in child.names)
        elif isinstance(child, (ast.ExceptHandler, ast.MatchAs, ast.MatchStar)) and child.name:
            yield child.name
        elif isinstance(child, ast.MatchMapping) and child.rest:
            yield child.rest
