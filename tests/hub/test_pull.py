"""Pull against a Hub on the loopback: pinned revisions, gates, cut downloads, the cache, and hybrids by their id."""

import json

import pytest

from hybridize.checkpoint import open_base
from hybridize.cli import app
from hybridize.conversions import convert, plan
from hybridize.core import Plan
from hybridize.errors import CheckpointError
from hybridize.hub import base_of, resolve_base, teacher_for
from hybridize.hub.fetch import ALIASES
from hybridize.lineage import origin, read_lineage

STREAMING = {"keep": {"layers": [1]}, "mixer": {"name": "streaming", "sink_tokens": 2, "window_tokens": 6}}


@pytest.fixture(scope="session")
def files(base):
    return {path.name: path.read_bytes() for path in base.iterdir()}


def test_a_revision_is_pinned_and_recorded(hub, files, tmp_path, capsys):
    first = hub.add("some/base", files)
    second = hub.add("some/base", {**files, "notes.txt": b"new"})
    folder = resolve_base(f"some/base@{first}")
    assert origin(folder) == {"repo": "some/base", "revision": first}
    assert resolve_base("some/base").name == second
    assert resolve_base("some/base", first[:40]) == folder
    with pytest.raises(CheckpointError, match="names the revision .* Give one of them"):
        resolve_base(f"some/base@{first}", "main")
    with pytest.raises(CheckpointError, match="some/base@nope: has no such branch, tag or commit"):
        resolve_base("some/base@nope")
    assert app(["plan", f"some/base@{first}", "--recipe", "streaming", "--out", str(tmp_path / "p.json")]) == 0
    assert f"base: some/base@{first} (licence: mit)" in capsys.readouterr().err
    assert Plan.read(tmp_path / "p.json").origin == {"repo": "some/base", "revision": first}
    made = plan(open_base(folder), STREAMING, "streaming", 0)
    convert(made, tmp_path / "h", base_path=folder)
    record = read_lineage(tmp_path / "h")["base"]
    assert (record["repo"], record["revision"]) == ("some/base", first)
    # The plan is the same wherever its base came from.
    assert Plan.from_dict({**made.to_dict(), "origin": {}, "base": "x"}).digest() == made.digest()


def test_a_hybrids_base_is_found_again_where_it_came_from(hub, files, hybrid, tmp_path):
    sha = hub.add("some/base", files)
    there = {path.name: path.read_bytes() for path in hybrid.iterdir()}
    lineage = json.loads(there["lineage.json"])
    lineage["base"] = {**lineage["base"], "location": "some/base", "repo": "some/base", "revision": sha}
    hub.add("me/hybrid", {**there, "lineage.json": json.dumps(lineage).encode()}, private=True)
    folder = resolve_base("me/hybrid")
    assert base_of(folder).name == sha
    assert teacher_for(folder, None) == str(base_of(folder))
    assert teacher_for(hybrid, None) is None
    assert teacher_for(None, "some/base") == str(base_of(folder))
    assert teacher_for(folder, str(hybrid)) == str(hybrid)
    lineage["base"] = {"name": "x", "location": "gone", "hash": "0"}
    hub.add("me/hybrid", {**there, "lineage.json": json.dumps(lineage).encode()}, private=True)
    with pytest.raises(CheckpointError, match="its base 'gone' is not here, and its lineage names no repository"):
        base_of(resolve_base("me/hybrid"))


def test_a_gated_model_says_what_to_do(hub, files):
    hub.add("meta-llama/Llama-3.2-1B", files, gated=True)
    with pytest.raises(
        CheckpointError, match="gated. Accept its licence on https://huggingface.co/meta-llama/Llama-3.2-1B, then"
    ):
        resolve_base("llama-3.2-1b")
    assert ALIASES["llama-3.2-1b"] == "meta-llama/Llama-3.2-1B"
    assert hub.asked("GET", "model.safetensors") == 0


def test_a_cut_download_goes_on_where_it_was(hub, files, monkeypatch):
    hub.add("some/base", files)
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1024)
    size = len(files["model.safetensors"])
    hub.fail("GET", "/resolve/.*model.safetensors", cut=size // 3, times=2)
    folder = resolve_base("some/base")
    assert (folder / "model.safetensors").read_bytes() == files["model.safetensors"]
    # The second cut came a third further on; what is asked for last is all but what was read.
    assert hub.last_range == f"bytes={2 * (size // 3 // 1024) * 1024}-"


def test_a_download_that_failed_keeps_the_files_that_came(hub, files):
    hub.add("some/base", files)
    hub.fail("GET", "/resolve/.*model.safetensors", status=503)
    with pytest.raises(CheckpointError, match="trouble of its own"):
        resolve_base("some/base")
    hub.failures.clear()
    assert hub.asked("GET", "/resolve/.*/config.json") == 1
    resolve_base("some/base")
    assert hub.asked("GET", "/resolve/.*/config.json") == 1


def test_the_cache_serves_without_a_network_and_is_not_copied(hub, files, monkeypatch):
    hub.add("some/base", {**files, "README.md": b"---\nlicense: mit\n---\n"})
    folder = resolve_base("some/base")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    seen = len(hub.requests)
    assert resolve_base("some/base") == folder
    assert len(hub.requests) == seen
    assert open_base(folder).tensors["model.norm.weight"].file.resolve().parent.name == "blobs"
    with pytest.raises(CheckpointError, match="not in the local cache"):
        resolve_base("some/other")


@pytest.mark.parametrize(
    ("name", "status", "message"),
    [("nobody/nothing", None, "no such repository on the Hub"), ("some/base", 500, "has trouble of its own"),
     ("some/base", 429, "too many requests"), ("a b/c", None, "is no name of a repository"), ("a-word", None, "no such dir"),
     ("https://me:hf_0123456789abcdefgh@huggingface.co/a/b", None, "no such directory, and not a hub id"),
     ("some/base@", None, "not a hub id such as me/model")],
)  # fmt: skip
def test_errors_are_one_line(hub, files, name, status, message):
    hub.add("some/base", files)
    if status:
        hub.fail("GET", "/api/models/", status)
    with pytest.raises(CheckpointError, match=message) as caught:
        resolve_base(name)
    assert "\n" not in str(caught.value)
    assert "hf_0123456789abcdefgh" not in str(caught.value)


def test_a_full_disk_is_one_line(hub, files, monkeypatch):
    import errno

    hub.add("some/base", files)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("huggingface_hub.file_download.http_get", full)
    with pytest.raises(CheckpointError, match="the disk of the Hub's cache is full. Make room or set HF_HOME"):
        resolve_base("some/base")


@pytest.mark.slow
def test_every_verb_takes_a_hub_id(hub, files, hybrid, tmp_path, capsys):
    sha = hub.add("some/base", files)
    there = {path.name: path.read_bytes() for path in hybrid.iterdir()}
    lineage = json.loads(there["lineage.json"])
    lineage["base"] = {**lineage["base"], "location": "base", "repo": "some/base", "revision": sha}
    hub.add("me/hybrid", {**there, "lineage.json": json.dumps(lineage).encode()}, private=True)
    (tmp_path / "t.txt").write_text("w1 w2 w3 w4 " * 200)
    recipe = ["--recipe", "streaming", "--set", "distill=[{name: kl, tokens: 64, seq_tokens: 16, rows: 2}]"]
    text = ["--data", str(tmp_path / "t.txt")]
    for words in (
        ["info", "me/hybrid"],
        ["eval", "me/hybrid", *text, "--limit", "2"],
        ["distill", "me/hybrid", *recipe, *text, "--out", str(tmp_path / "d")],
        ["teach", "me/hybrid", *recipe, *text, "--out", str(tmp_path / "s"), "--dry-run"],
        ["generate", "me/hybrid", "--prompt", "w1", "--tokens", "2"],
    ):
        assert app(["--quiet", *words]) == 0, (words, capsys.readouterr().err)
    assert read_lineage(tmp_path / "d")["teachers"] == [{"name": sha, "repo": "some/base", "revision": sha}]
