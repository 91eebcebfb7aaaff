"""The one file: every name in it is its own, it changes nothing, and it says what the package says."""

import ast
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers.dynamic_module_utils import get_imports, get_relative_imports

from hybridize.config import CODE_FILE
from hybridize.families import FAMILIES
from hybridize.mixers import MIXERS
from hybridize.remote import bundle, flatten, mixers_of, sources
from hybridize.remote.flatten import Kept
from hybridize.remote.scopes import References
from hybridize.remote.sources import Definition
from hybridize.version import __version__
from tests.remote.elsewhere import same, says
from tests.remote.hybrids import CASES, KEEP, config_of, model_of, specs_of
from tests.remote.symbols import problems

MIXED = [{"name": "mamba2"}, {"name": "gdn"}, {"name": "parallel", "window_tokens": 5, "recurrent": {"name": "kda"}}]
SMALL_FILE = [{"name": "mamba2"}, KEEP, KEEP]
# One file for all that is in the package: whatever is called alike there meets here.
EVERYTHING = [specs_of(name)[at] for name in MIXERS.names() for at in (0, 2)]


def file_of(folder, name="modeling_alone"):
    """The file beside weights as a module of its own, the package's classes not asked."""
    spec = importlib.util.spec_from_file_location(name, folder / CODE_FILE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        del sys.modules[name]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    model = model_of("llama", MIXED)
    model.save_pretrained(folder)
    return folder, model


@pytest.fixture(scope="module")
def alone(saved):
    yield from file_of(saved[0])


def text_of(family, specs):
    config = config_of(family, [KEEP] * 3)
    config.mixers = specs
    return bundle(config)


@pytest.mark.slow
def test_every_name_is_its_own():
    texts = [text_of("llama", EVERYTHING), text_of("qwen3", MIXED), *(text_of(family, [KEEP]) for family in FAMILIES)]
    assert [problems(text) for text in texts] == [[]] * len(texts)
    ast.parse(texts[0], feature_version=(3, 10))


def test_transformers_finds_no_other_file_in_it(tmp_path):
    """It looks for imports in the text, and would find one in a docstring."""
    file = tmp_path / CODE_FILE
    file.write_text(text_of("llama", EVERYTHING))
    assert get_relative_imports(file) == []
    assert {name for name in get_imports(file) if name not in sys.stdlib_module_names} == {"torch", "transformers"}


@pytest.mark.slow
def test_every_name_is_its_own_in_every_file():
    for family, name in CASES:
        assert problems(text_of(family, specs_of(name))) == [], (family, name)


@pytest.mark.parametrize(
    ("old", "new", "count", "says"),
    [
        ("_forward_ssd(", "_forward(", 1, "_forward_ssd is nobody's"),
        ("_forward_ssd(", "_forward_conv(", -1, "_forward_conv is defined 2 times"),
        ("import math\n", "", 1, "math is nobody's"),
        ("import math\n", "import math\nfrom hybridize.errors import DataError\n", 1, "imports hybridize.errors"),
        ('f"{__name__}:Mamba2"', 'f"{__name__}:Mamba3"', 1, "no Mamba3 for the table"),
        ('f"{__name__}:Mamba2"', '"hybridize.mixers.mamba2:Mamba2"', 1, "a table names a module of the package"),
    ],
)
def test_a_wrong_file_would_show(old, new, count, says):
    text = text_of("llama", SMALL_FILE)
    assert old in text
    assert says in problems(text.replace(old, new, count))


def test_it_holds_what_the_config_uses_and_nothing_else():
    text = text_of("qwen2", MIXED)
    assert mixers_of(config_of("qwen2", MIXED)) == ("gdn", "kda", "mamba2", "parallel")
    for there in (
        "class Mamba2Mixer",
        "class KDAMixer",
        "class HybridQwen2Model",
        "Qwen2ForCausalLM",
        f"hybridize {__version__}",
    ):
        assert there in text
    for absent in (
        "class LoLCATs",
        "HybridLlama",
        "Mistral",
        "def hybrid_config",
        "CheckpointError",
        "ssd_reference",
        str(sources.ROOT),
    ):
        assert absent not in text
    # A mixer's default that holds another one.
    assert mixers_of(config_of("llama", [{"name": "parallel"}, KEEP, KEEP])) == ("attention", "mamba2", "parallel")


def test_the_words_are_the_sources(saved):
    """Every function and class is in the file as it is written in the package, but for names."""
    text = (saved[0] / CODE_FILE).read_text()
    source = Path(sources.ROOT / "mixers" / "gdn.py").read_text()
    body = source[source.index("class DeltaMixer") : source.index("class GatedNorm")]
    assert body in text
    assert "# The native class's latent norm" not in text
    assert "# Of the L2 norm of q and k, as the native class has it.\nL2_EPS = 1e-6" in text
    assert "# Parameter names, order and function are those of transformers' Qwen3_5GatedDeltaNet:" in text
    assert text.startswith("# SPDX-License-Identifier: Apache-2.0\n")


def test_it_is_formatted():
    command = [sys.executable, "-m", "ruff", "format", "--check", "--config", str(sources.ROOT.parent / "pyproject.toml"), "-"]
    for specs in (EVERYTHING, MIXED):
        assert subprocess.run(command, input=text_of("qwen3", specs), text=True, capture_output=True).returncode == 0


def test_it_says_what_the_package_says(saved, alone):
    folder, model = saved
    loaded = alone.HybridLlamaForCausalLM.from_pretrained(folder).eval()
    assert type(loaded.model.layers[0].self_attn).__module__ == "modeling_alone"
    expected = says(model)
    assert same(says(loaded), expected)
    with_other_weights = alone.HybridLlamaForCausalLM.from_pretrained(folder).eval()
    with_other_weights.model.layers[0].self_attn.D.data.add_(1e-3)
    assert not same(says(with_other_weights), expected)


def test_its_errors_are_the_packages(alone):
    with pytest.raises(alone.ConfigError, match="unknown mixer 'mamba'. Did you mean 'mamba2'"):
        alone.MIXERS.build({"name": "mamba"})
    with pytest.raises(ValueError, match="mixer 'mamba2': unknown option 'taps'"):
        alone.MIXERS.build({"name": "mamba2", "taps": 4})
    # What this checkpoint does not use, its file does not have.
    with pytest.raises(alone.ConfigError, match="unknown mixer 'mla'"):
        alone.MIXERS.build({"name": "mla"})


def test_bytes_follow_from_mixers_and_family():
    first = text_of("llama", MIXED)
    for cache in (flatten._bundle, flatten._references, sources.module):
        cache.cache_clear()
    assert text_of("llama", MIXED[::-1]) == first
    assert text_of("mistral", MIXED) != first


@pytest.mark.slow
def test_bytes_do_not_follow_the_process():
    code = """
import hashlib
from tests.remote.test_bundle import MIXED, text_of
print(hashlib.sha256(text_of("llama", MIXED).encode()).hexdigest())
"""
    found = set()
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", code]
        out = subprocess.run(command, capture_output=True, text=True, check=True, env=environment, cwd=sources.ROOT.parent)
        found.add(out.stdout.strip())
    assert len(found) == 1


MODULES = {
    "a": '''
        """Says a."""
        import math
        from hybridize.b import helper as other

        LIMIT = 3  # of a

        def helper(limit=LIMIT):
            return limit + math.floor(other(1))
        ''',
    "b": '''
        """Says b."""
        from math import floor

        LIMIT = 10

        # Above
        # helper.
        def helper(x):
            LIMITS = [LIMIT for LIMIT in range(x)]
            return LIMIT + x + len(LIMITS)
        ''',
    "c": """
        from dataclasses import dataclass

        class sum:
            value = 7
            def again(self) -> "sum":
                return self

        SMALL = {
            "llama": sum,
            "qwen2": nobodys,
        }
        TABLE = {
            "x": "hybridize.c:Top",
            "y": "hybridize.nowhere:X",
        }

        @dataclass
        class Top:
            LIMIT: int = 5
            helper = LIMIT + 1

            def run(self, floor=lambda LIMIT: LIMIT + 1):
                from hybridize.a import LIMIT, helper as first
                from hybridize.b import helper
                told = f"{LIMIT}{helper(2):>3}"
                assert told == "3 14" and [*SMALL] == ["llama"] and TABLE == {"x": f"{__name__}:Top"}
                return [first(), helper(2), LIMIT, self.LIMIT, self.helper, floor(1), sum().again().value]

        def only():
            from hybridize.a import helper
            from hybridize.b import helper
        """,
}


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Three modules in the package's place."""
    root = tmp_path / "hybridize"
    root.mkdir()
    for name, text in MODULES.items():
        lines = [line[8:] for line in text.splitlines()[1:]]
        (root / f"{name}.py").write_text("\n".join(lines))
    monkeypatch.setattr(sources, "ROOT", root)
    sources.module.cache_clear()
    yield root
    sources.module.cache_clear()


def flat(*names):
    kept = Kept("llama", [Definition("hybridize.c", names[0])], [Definition("hybridize.c", name) for name in names])
    return "\n\n".join(["\n".join(kept.imports()), *(kept.section(own) for own in kept.modules)])


def test_names_that_collide_are_told_apart(package):
    text = flat("Top", "only")
    space = {"__name__": "flat"}
    exec(compile(text, "flat", "exec"), space)
    assert space["Top"]().run() == [15, 14, 3, 5, 6, 2, 7]
    assert space["only"]() is None
    assert problems(text) == []
    assert {"helper_a", "helper_b", "LIMIT_A", "LIMIT_B", "sum_c"} <= space.keys()
    assert "# Above\n# helper.\ndef helper_b(x):\n    LIMITS = [LIMIT for LIMIT in range(x)]\n    return LIMIT_B" in text
    assert "LIMIT_A = 3  # of a" in text
    assert 'def again(self) -> "sum_c":' in text
    assert "def only():\n    pass\n    pass\n" in text


def test_what_cannot_be_flattened_is_refused(package):
    for line, message in (
        ("print('side effect')", "defines nothing"),
        ("import hybridize.b", "imports what cannot be followed by name"),
        ("from math import *", "imports what cannot be followed by name"),
        ("def f():\n    return nobodys", "nobodys is nobody's"),
        ("def f():\n    global LIMIT\n    LIMIT = 2", "a function rebinds LIMIT"),
        ("from hybridize.b import absent\ndef f():\n    return absent", "has no such name"),
    ):
        sources.module.cache_clear()
        (package / "c.py").write_text(f"{line}\n\n\ndef Top():\n    return {'f()' if 'def f' in line else 1}\n")
        with pytest.raises(AssertionError, match=message):
            flat("Top")


def test_scopes_are_pythons():
    """Of each name, whether the module's is meant: y is, x is not."""
    source = """
def f(x=y, *, k: y = y) -> y:
    x = [x for x in y if x]
    (lambda x: x + y)(x)
    {x: y for x, z in y}
    with y as (x, z): z
    try: y
    except y as x: x
    if (n := y): n
    class C(y):
        x = y
        def g(self): return y
    match y:
        case {"a": x, **z}: x
    for z in y: z
    def h():
        nonlocal x
        return x, z, n, C, h, y
    import a.b as x
    del x
    [q := y for z in y]
    return q
"""
    references = References()
    references.visit(ast.parse(source).body[0])
    assert {reference.name for reference in references.found} == {"y"}
    assert len(references.found) == source.count("y") - source.count("try")
