"""Where the package is not: a fresh environment with torch and transformers reads what was saved, and says the same bits."""

import json
import os
import re
import subprocess
import sys
import sysconfig
from importlib import metadata
from pathlib import Path

import pytest
import torch
from packaging.version import Version
from transformers import AutoModelForCausalLM

from hybridize.checkpoint import load_model, open_base
from hybridize.config import CODE_FILE
from hybridize.conversions import convert, plan
from hybridize.data import eval_blocks, read_documents, tokenize
from hybridize.families import FAMILIES
from hybridize.mixers import MIXERS
from hybridize.pipeline import load_tokenizer
from hybridize.remote import bundle
from tests.remote import elsewhere
from tests.remote.hybrids import KEEP, model_of, specs_of

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
OLDEST = "5.16.0"
# What a release of transformers brings along in a version of its own.
OF_TRANSFORMERS = ("transformers", "huggingface_hub", "tokenizers", "safetensors")


def environment(folder, without=()):
    """A virtual environment with this one's packages, but the package itself and those of `without`."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = folder / "bin" / "python"
    packages = folder / "packages"
    packages.mkdir()
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        name = re.split(r"-|\.", entry.name)[0].lower()
        if name not in ("hybridize", "__pycache__", *without) and not name.startswith("__editable__") and entry.suffix != ".pth":
            (packages / entry.name).symlink_to(entry)
    command = [python, "-I", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    site = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    (Path(site) / "packages.pth").write_text(f"{packages}\n")
    return python


def run(python, *arguments, **extra):
    out = python.parents[1]
    settings = {**os.environ, "HF_HOME": str(out / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **extra}
    found = subprocess.run([str(python), "-I", *map(str, arguments)], capture_output=True, text=True, env=settings, cwd=out)
    return found


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    return environment(tmp_path_factory.mktemp("clean"))


@pytest.fixture(scope="module")
def oldest(tmp_path_factory):
    """As `clean`, with the oldest transformers that is supported; needs a package index."""
    python = environment(tmp_path_factory.mktemp("oldest"), OF_TRANSFORMERS)
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        str(python),
        "install",
        "--quiet",
        # What is imported is compiled then; the rest of transformers is never run.
        "--no-compile",
        "--disable-pip-version-check",
        "--retries",
        "0",
    ]
    made = subprocess.run([*pip, f"transformers=={OLDEST}"], capture_output=True, text=True)
    if made.returncode != 0:
        pytest.skip(f"transformers {OLDEST} cannot be installed here: {made.stderr.strip().splitlines()[-1]}")
    return python


@pytest.fixture(scope="module")
def hybrids(tmp_path_factory):
    """Directory -> what the package makes of it: every mixer on one family, two of them on the others."""
    root = tmp_path_factory.mktemp("hybrids")
    cases = [("llama", specs_of(name), name) for name in MIXERS.names()]
    mixed = [{"name": "gdn"}, {"name": "mla"}, KEEP]
    cases += [(family, mixed, "mixed") for family in FAMILIES if family != "llama"]
    found = {}
    for family, specs, name in cases:
        model = model_of(family, specs)
        folder = root / f"{family}-{name}"
        model.save_pretrained(folder)
        found[str(folder)] = elsewhere.says(model)
    return found


def differing(python, expected, version):
    """Directories that say something else there than what is expected."""
    out = python.parents[1] / "said.pt"
    ran = run(python, elsewhere.__file__, out, *expected)
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert ran.stdout.splitlines()[-1] == version
    found = torch.load(out)
    assert found.keys() == expected.keys()
    return [folder for folder in expected if not elsewhere.same(found[folder], expected[folder])]


def test_every_mixer_and_family(clean, hybrids):
    assert differing(clean, hybrids, metadata.version("transformers")) == []


def test_on_the_oldest_transformers(oldest, hybrids):
    assert Version(OLDEST) < Version(metadata.version("transformers"))
    assert differing(oldest, hybrids, OLDEST) == []


@pytest.mark.data
def test_a_real_model(clean, shared_data, tmp_path):
    base = shared_data / "models" / "stories260K"
    text = tokenize(load_tokenizer(base), read_documents(shared_data / "text" / "tinystories" / "v1_dev.txt"))
    section = {"keep": {"every": 2}, "mixer": {"name": "mamba2"}}
    convert(plan(open_base(base), section, "test", 0), tmp_path / "hybrid", eval_blocks(text, 128, 1, 4096))
    model = load_model(tmp_path / "hybrid")
    expected = {str(tmp_path / "hybrid"): elsewhere.says(model)}
    assert differing(clean, expected, metadata.version("transformers")) == []
    tokenizer = load_tokenizer(tmp_path / "hybrid")
    ids = tokenizer("Once upon a time", return_tensors="pt", return_token_type_ids=False)
    here = tokenizer.decode(model.generate(**ids, max_new_tokens=20, do_sample=False)[0])
    code = f"""
from transformers import AutoTokenizer, pipeline
tokenizer = AutoTokenizer.from_pretrained({str(tmp_path / "hybrid")!r}, trust_remote_code=True)
made = pipeline("text-generation", {str(tmp_path / "hybrid")!r}, tokenizer=tokenizer, trust_remote_code=True)
ids = tokenizer("Once upon a time", return_tensors="pt", return_token_type_ids=False)
print(tokenizer.decode(made.model.generate(**ids, max_new_tokens=20, do_sample=False)[0]))
"""
    there = run(clean, "-c", code)
    assert there.returncode == 0, there.stderr[-2000:]
    assert "Lily" in here
    assert there.stdout.strip() == here.strip()


def test_without_the_flag_it_is_not_read(clean, hybrids):
    code = (
        f"from transformers import AutoModelForCausalLM as A; A.from_pretrained({next(iter(hybrids))!r}, trust_remote_code=False)"
    )
    ran = run(clean, "-c", code)
    assert ran.returncode != 0
    assert "trust_remote_code=True" in ran.stderr


def test_a_config_of_another_class_is_refused_there(clean, hybrids, tmp_path):
    """With our map, the class in the file is asked; without the flag, transformers reads a llama, which nobody can stop there."""
    source = Path(next(folder for folder in hybrids if folder.endswith("llama-streaming")))
    folders = {}
    for kind in ("llama", "hybrid_mistral", "mixers"):
        folder = folders[kind] = tmp_path / kind
        folder.mkdir()
        for file in source.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        fields = json.loads((source / "config.json").read_text())
        edit = {"mixers": [KEEP] * 3} if kind == "mixers" else {"model_type": kind}
        (folder / "config.json").write_text(json.dumps({**fields, **edit}))
    code = f"""
from transformers import AutoModelForCausalLM
for folder in {[str(folder) for folder in folders.values()]!r}:
    try:
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    except ValueError as error:
        print(type(error).__name__, error)
print(type(AutoModelForCausalLM.from_pretrained({str(folders["llama"])!r})).__module__)
"""
    ran = run(clean, "-c", code)
    assert ran.returncode == 0, ran.stderr[-2000:]
    first, second, third, plain = ran.stdout.strip().splitlines()
    assert first.startswith("ConfigError config.json: model_type is 'llama', expected 'hybrid_llama'")
    assert second.startswith("ConfigError config.json: model_type is 'hybrid_mistral', expected 'hybrid_llama'")
    assert third.startswith("ConfigError config.json: mixers is not what the weights were made for")
    assert plain == "transformers.models.llama.modeling_llama"


def test_two_checkpoints_in_one_process_have_their_own_code(clean, hybrids):
    """Files of one family with different mixers; and hybridize's classes are not in anybody's way."""
    folders = [folder for folder in hybrids if folder.endswith(("llama-mamba2", "llama-mla"))]
    code = f"""
from transformers import AutoModelForCausalLM
models = [AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True) for folder in {folders!r} * 2]
assert type(models[0]) is not type(models[1])
print(*sorted(type(model.model.layers[2].self_attn).__name__ for model in models))
"""
    ran = run(clean, "-c", code)
    assert ran.stdout.split() == ["LatentAttention"] * 2 + ["Mamba2Mixer"] * 2, ran.stderr[-2000:]


def test_the_package_comes_first_where_it_is(hybrids):
    """No flag is needed, and with it the package's classes are used all the same."""
    code = f"""
import sys
import hybridize
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
for folder in {list(hybrids)[:2]!r}:
    for auto in (AutoConfig, AutoModel, AutoModelForCausalLM):
        for flag in ({{}}, {{"trust_remote_code": True}}, {{"trust_remote_code": False}}):
            print(type(auto.from_pretrained(folder, **flag)).__module__)
assert not any(name.startswith("transformers_modules") for name in sys.modules)
"""
    command = [sys.executable, "-c", code]
    ran = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, stdin=subprocess.DEVNULL)
    assert ran.stdout.split() == ["hybridize.modeling"] * 2 * 3 * 3


def test_imported_later_it_takes_over(hybrids):
    """Code of a directory was used before the package was imported: what is read from then on is the package's."""
    folder = next(iter(hybrids))
    code = f"""
from transformers import AutoModelForCausalLM
before = AutoModelForCausalLM.from_pretrained({folder!r}, trust_remote_code=True)
import hybridize
after = AutoModelForCausalLM.from_pretrained({folder!r}, trust_remote_code=True)
print(type(before).__module__.split(".")[0], type(after).__module__)
"""
    settings = {**os.environ, "HF_HOME": str(Path(folder).parent / "hf"), "HF_HUB_OFFLINE": "1"}
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT, env=settings)
    assert ran.stdout.split() == ["transformers_modules", "hybridize.modeling"]


def test_a_file_with_a_wrong_rename_says_something_else(clean, hybrids, tmp_path):
    """The comparison sees it: one function called by another's name, or one word changed."""
    source = Path(next(folder for folder in hybrids if folder.endswith("llama-mamba2")))
    text = (source / CODE_FILE).read_text()
    assert text == bundle(AutoModelForCausalLM.from_pretrained(source).config)
    wrong = {"undone": text.replace("    y_BTHP, last, _ = _forward_ssd(", "    y_BTHP, last, _ = _forward_conv(")}
    wrong["word"] = text.replace("A = -torch.exp(self", "A = -torch.exp2(self")
    for name, changed in wrong.items():
        assert changed != text, name
        folder = tmp_path / name
        folder.mkdir()
        for file in source.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        (folder / CODE_FILE).write_text(changed)
        with pytest.raises(AssertionError):
            assert differing(clean, {str(folder): hybrids[str(source)]}, metadata.version("transformers")) == []
