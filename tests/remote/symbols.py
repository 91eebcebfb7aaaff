"""What is wrong with a file that has to stand alone, found by Python's own symbol tables."""

import ast
import builtins
import re
import symtable
import sys
from collections import Counter
from collections.abc import Iterator

OTHERS = {"torch", "transformers"}


def tables(table: symtable.SymbolTable) -> Iterator[symtable.SymbolTable]:
    yield table
    for child in table.get_children():
        yield from tables(child)


def defined(tree: ast.Module) -> Counter:
    """How often each name is bound at the top level."""
    found = Counter()
    for node in tree.body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            found.update(alias.asname or alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found[node.name] += 1
        else:
            found.update(n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store))
    return found


def problems(text: str) -> list[str]:
    """Names nobody defines, names defined twice, imports of other packages, table entries that lead nowhere."""
    tree = ast.parse(text)
    top = defined(tree)
    found = {f"{name} is defined {count} times" for name, count in top.items() if count > 1}
    for table in tables(symtable.symtable(text, "file", "exec")):
        for symbol in table.get_symbols():
            name = symbol.get_name()
            own = table.get_type() == "module" and name in top
            if symbol.is_referenced() and (symbol.is_global() or table.get_type() == "module") and not own:
                if name not in top and not hasattr(builtins, name) and name not in ("__file__", "__name__"):
                    found.add(f"{name} is nobody's")
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [node.module or "."] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            found |= {f"imports {name}" for name in names if name.split(".")[0] not in OTHERS | sys.stdlib_module_names}
    found |= {f"no {name} for the table" for name in re.findall(r'f"\{__name__\}:(\w+)"', text) if name not in top}
    if re.search(r'["\']hybridize(\.\w+)*:\w+["\']', text):
        found.add("a table names a module of the package")
    return sorted(found)
