"""A token is nowhere but in the header of requests: not printed, not logged at DEBUG, not written, not uploaded.

The Hub here repeats the token in its errors and warnings, as a careless one might.
"""

import os
import shutil
import subprocess
import sys
import traceback
import warnings
from pathlib import Path

import pytest

from hybridize import cli, console, redact
from hybridize.cli import app
from hybridize.errors import HybridizeError
from hybridize.hub import Evidence, Statement, answers, bundle_model, push
from hybridize.lineage import read_lineage
from hybridize.storage import file_sha256, write_json
from tests.hub.conftest import TOKEN, judged
from tests.hub.server import LoopbackHub

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def model(hybrid, tmp_path):
    """A hybrid with its documents, as the command line takes them."""
    folder = tmp_path / "model"
    shutil.copytree(hybrid, folder)
    for name, document in judged(folder).items():
        write_json(tmp_path / f"{name}.json", document.to_dict())
    return folder


def words(model, repo="me/tiny", *more):
    beside = model.parent
    said = ["--base-model", "someone/tiny", "--report", beside / "report.json", "--verdict", beside / "verdict.json"]
    return ["-vv", "push", model, repo, *said, *more]


def with_token(folder, name):
    """Put the token into a file of a hybrid whose lineage knows the file."""
    path = folder / name
    text = path.read_text().rstrip()
    path.write_text(text[:-1] + f', "note": "{TOKEN}"}}' if name.endswith(".json") else f"{text}\n{TOKEN}")
    lineage = read_lineage(folder)
    if name in lineage["files"]:
        write_json(folder / "lineage.json", {**lineage, "files": {**lineage["files"], name: file_sha256(path)}})


# What to break -> the words of the command, where they are not those of a push that works.
STATUSES = [
    ("POST", "/repos/create", 401), ("POST", "/repos/create", 403), ("POST", "/repos/create", 500), ("GET", "/api/models/", 404),
    ("GET", "/api/models/", 429), ("POST", "/preupload/", 400), ("POST", "/preupload/", 403), ("POST", "/batch", 401),
    ("POST", "/batch", 503), ("PUT", "/lfs/", 403), ("PUT", "/lfs/", 500), ("POST", "/commit/", 400), ("POST", "/commit/", 409),
    ("POST", "/commit/", 412), ("POST", "/commit/", 429), ("POST", "/validate-yaml", 500),
]  # fmt: skip


def paths(hub, model, monkeypatch):
    """Every way to fail, one after the other: each sets the stage and gives the words of the command."""
    for method, pattern, status in STATUSES:
        hub.failures.clear()
        hub.fail(method, pattern, status)
        yield words(model)
    hub.failures.clear()
    hub.objects.clear()
    hub.fail("PUT", "/lfs/", cut=10)
    yield words(model)
    hub.failures.clear()
    hub.fail("POST", "/commit/", 403)
    yield words(model, "me/tiny", "--revision", TOKEN)
    hub.failures.clear()
    yield [*words(model), "--token", TOKEN]
    yield [*words(model), f"--license={TOKEN}"]
    yield words(model, f"me/{TOKEN}")
    yield words(model, f"https://me:{TOKEN}@huggingface.co/me/tiny")
    yield ["-vv", "push", f"https://{TOKEN}@huggingface.co/me/tiny", "me/tiny"]
    yield ["-vv", "eval", f"https://me:{TOKEN}@huggingface.co/me/tiny"]
    yield ["-vv", "info", f"me/{TOKEN}"]
    yield ["-vv", TOKEN]
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url.replace("//", f"//me:{TOKEN}@"))
    yield words(model)
    yield ["-vv", "info", "some/base"]
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    yield words(model)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
    monkeypatch.setenv("HF_TOKEN", f"{TOKEN}\u00e9")  # no header can hold it
    yield words(model)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    for name in ("config.json", "lineage.json", "LICENSE", "tokenizer_config.json"):
        kept = {name: (model / name).read_bytes(), "lineage.json": (model / "lineage.json").read_bytes()}
        with_token(model, name)
        yield words(model)
        for file, data in kept.items():
            (model / file).write_bytes(data)


def leaks(place, text):
    return [f"{place}: {line[:300]}" for line in text.splitlines() if TOKEN in line]


def found_in(folder):
    """Files under a folder that hold the token, but for those where a test put it."""
    return [str(path) for path in folder.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]


def uploaded(hub):
    return [
        name for repo in hub.repos.values() for files in repo.commits.values() for name, data in files.items()
        if TOKEN.encode() in data or TOKEN in name
    ] + [oid for oid, data in hub.objects.items() if TOKEN.encode() in data]  # fmt: skip


def run_all(hub, model, monkeypatch, capsys, logged, every=1):
    """The leaks of every failing path, or of each so many, and of a push that works; and how many failed."""
    hub.echo = True
    failed, found = 0, []
    for number, command in enumerate(paths(hub, model, monkeypatch)):
        if number % every:
            continue
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            code = app([str(word) for word in command])
        said = capsys.readouterr()
        failed += code == 2
        place = " ".join(str(word) for word in command[1:3]).replace(TOKEN, "TOKEN")
        found += leaks(place, said.out + said.err + "\n".join(str(one.message) for one in warned))
        assert code == 2, (place, said.err)
        assert len([line for line in said.err.splitlines() if line.startswith("hybridize: ")]) == 1, said.err
    hub.failures.clear()
    assert app([str(word) for word in words(model)]) == 0
    said = capsys.readouterr()
    found += leaks("success", said.out + said.err) + leaks("log", logged.getvalue()) + uploaded(hub) + found_in(model.parent)
    return failed, found


@pytest.mark.parametrize("every", [12, pytest.param(1, marks=pytest.mark.slow)])
def test_no_byte_of_a_token_gets_out(hub, model, monkeypatch, capsys, logged, every):
    failed, found = run_all(hub, model, monkeypatch, capsys, logged, every)
    assert found == []
    assert failed >= 20 // every
    # It was sent, and the log was listening.
    assert hub.asked("POST", "/commit/") > 1
    assert "HTTP" in logged.getvalue()
    assert "/preupload/" in logged.getvalue()


@pytest.mark.slow
def test_the_canary_sees_a_leak(hub, model, monkeypatch, capsys, logged):
    for module in (redact, cli, console, answers):
        monkeypatch.setattr(module, "scrub", lambda text, secrets=None: text)
    _, found = run_all(hub, model, monkeypatch, capsys, logged)
    # In what is printed, and in the log.
    assert any(not line.startswith("log: ") for line in found)
    assert any(line.startswith("log: ") for line in found)


def test_errors_of_the_python_side_hold_none(hub, model):
    hub.echo = True
    bundle = bundle_model(model, "me/tiny", Evidence(**judged(model)), Statement(base_model="someone/tiny"))
    for method, pattern, status in STATUSES[:: len(STATUSES) // 3]:
        hub.failures.clear()
        hub.fail(method, pattern, status)
        with pytest.raises(HybridizeError) as caught:
            push(bundle)
        error = caught.value
        while error is not None:
            assert TOKEN not in "".join(traceback.format_exception_only(error))
            error = error.__cause__ or error.__context__


@pytest.mark.slow
def test_a_whole_process_at_debug_prints_none(model, tmp_path):
    with LoopbackHub() as hub:
        hub.echo = True
        hub.tokens[TOKEN] = {"name": "me", "write": True}
        env = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        env |= {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "hf"),
                "HF_DEBUG": "1", "PYTHONPATH": str(ROOT)}  # fmt: skip
        for place, status in (("/commit/", 400), (None, 0)):
            if place:
                hub.fail("POST", place, status)
            done = subprocess.run(
                [sys.executable, "-m", "hybridize", *map(str, words(model))], env=env, capture_output=True, text=True, check=False
            )  # fmt: skip
            assert done.returncode == (2 if place else 0), done.stderr
            assert "POST" in done.stderr  # the library's own debug lines
            assert TOKEN not in done.stdout + done.stderr
            hub.failures.clear()
        assert uploaded(hub) == []
        assert found_in(tmp_path) == []
