"""Rules of the repository that are kept because they are tests."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path, PurePath

import pytest

from hybridize.conversions import CONVERSIONS, SCORES
from hybridize.distill import LOSSES, STAGES
from hybridize.eval import GATES, PROBES
from hybridize.mixers import MIXERS

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "hybridize"
RANK = {
    "errors": 0, "redact": 0, "version": 0,
    "static_cache": 0.5, "core": 1, "registry": 1, "families": 1, "cache": 1, "kernels": 1, "storage": 1,
    "mixers": 2, "config": 2, "graphs": 2,
    "shards": 2, "modeling": 3, "untrusted": 3.3, "companions": 3.5, "lineage": 3.6, "remote": 3.8,
    "checkpoint": 4, "capture": 4, "data": 4, "fingerprint": 4.2, "vllm_plugin": 4.4, "native": 4.5,
    "conversions": 5, "distill": 5, "eval": 5, "hub": 5, "recipe": 5, "talk": 5,
    "demo": 6, "pipeline": 6, "console": 6,
    "cli": 7, "__main__": 8,
}  # fmt: skip
# Started by torchrun, these only hand over to the command line.
STARTERS = {"distill/__main__.py", "eval/__main__.py"}
FILES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))
TABLES = [MIXERS, CONVERSIONS, SCORES, LOSSES, STAGES, PROBES, GATES]


def part(path: Path) -> str:
    return path.parts[0].removesuffix(".py")


def imported_parts(source: str) -> set[str]:
    """First-level parts of the package that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "hybridize":
            names = node.module.split(".")[1:2] or [alias.name for alias in node.names]
            found.update(names)
        if isinstance(node, ast.Import):
            found.update(a.name.split(".")[1] for a in node.names if a.name.startswith("hybridize."))
    return found & set(RANK)


def wrong_imports(path: Path, source: str) -> list[str]:
    own = part(path)
    return [other for other in sorted(imported_parts(source)) if other != own and RANK[other] >= RANK[own]]


@pytest.mark.parametrize("path", [f for f in FILES if str(f) not in STARTERS | {"__init__.py"}], ids=str)
def test_imports_point_down(path):
    assert wrong_imports(path, (PACKAGE / path).read_text(encoding="utf-8")) == []


def test_the_import_rule_sees_a_wrong_import():
    assert wrong_imports(Path("mixers/x.py"), "from hybridize.eval.gate import gate") == ["eval"]


@pytest.mark.parametrize("path", FILES, ids=str)
def test_file_length(path):
    limit = 700 if path.name.startswith("triton") else 400
    assert len((PACKAGE / path).read_text(encoding="utf-8").splitlines()) <= limit


@pytest.mark.parametrize("path", [f for f in FILES if part(f) not in ("cli", "console")], ids=str)
def test_no_print(path):
    assert not re.search(r"^\s*print\(", (PACKAGE / path).read_text(encoding="utf-8"), re.M)


@pytest.mark.parametrize("path", FILES, ids=str)
def test_one_module_writes(path):
    """Every write goes through storage.py (the demonstration's text, made from the interpreter, aside)."""
    if path.name in ("storage.py", "stdlib_text.py"):
        return
    source = (PACKAGE / path).read_text(encoding="utf-8")
    assert not re.search(r"open\([^)]*[\"'][wax]b?\+?[\"']|\.write_text\(|\.write_bytes\(|save_file\(", source)


@pytest.mark.parametrize("table", TABLES, ids=lambda t: t.kind)
def test_every_entry_loads_and_is_documented(table):
    for name in table.names():
        assert table.load(name).__doc__, name


@pytest.mark.slow
def test_importing_the_package_is_cheap():
    heavy = ["triton", "lm_eval", "datasets", "matplotlib", "typer", "pydantic", "peft", "trl"]
    # Where triton is installed, transformers' own modelling files load it.
    own = "import sys, transformers.models.llama.modeling_llama; before = set(sys.modules); import hybridize"
    code = f"{own}; print([n for n in {heavy} if n in sys.modules and n not in before])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_modules_have_docstrings():
    for path in FILES:
        if path.name in ("__main__.py",) or (PACKAGE / path).stat().st_size == 0:
            continue
        module = ast.parse((PACKAGE / path).read_text(encoding="utf-8"))
        assert ast.get_docstring(module), path


def test_package_version_is_one():
    assert importlib.import_module("hybridize").__version__ == importlib.import_module("hybridize.version").__version__


def test_every_file_of_data_goes_into_the_package():
    patterns = re.findall(
        r'"([^"]+)"', re.search(r"package-data\]\nhybridize = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(), re.S)[1]
    )
    tracked = subprocess.run(
        ["git", "ls-files", "hybridize"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    data = [name.removeprefix("hybridize/") for name in tracked if not name.endswith(".py")]
    assert len(data) > 50
    assert [name for name in data if not any(PurePath(name).match(pattern) for pattern in patterns)] == []
    assert [pattern for pattern in patterns if not any(PurePath(name).match(pattern) for name in data)] == []
