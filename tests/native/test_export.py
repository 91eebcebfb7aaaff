"""The verb: what it promises whatever the class."""

import json
import os

import pytest
import torch
from safetensors import safe_open

from hybridize import shards
from hybridize.checkpoint import load_model, open_base, open_checkpoint
from hybridize.cli import app
from hybridize.errors import CheckpointError, ConfigError
from hybridize.families import FAMILIES, NATIVE_TYPES
from hybridize.lineage import read_lineage, verify_files
from hybridize.mixers import MIXERS
from hybridize.modeling import state_bytes
from hybridize.native import NO_CLASS, TARGETS, granite, target
from hybridize.native.export import export
from hybridize.native.target import ENGINES
from hybridize.storage import Staging, file_sha256, partial_folder
from tests.native.exported import needs_groups
from tests.native.hybrids import random_hybrid
from tests.tiny import tiny_base
from tests.tolerances import assert_close

MAMBA = {"keep": {"every": 3}, "mixer": {"name": "mamba2"}}


def hashes(folder):
    return {name: file_sha256(folder / name) for name in sorted(os.listdir(folder))}


@pytest.fixture
def hybrid(tmp_path, monkeypatch):
    if reason := granite.no_groups():
        pytest.skip(reason)
    monkeypatch.setattr(shards.plan_shards, "__defaults__", (20_000,))
    return random_hybrid("llama", tmp_path, MAMBA)


class Killed(BaseException):
    """What no handler of the program catches."""


@pytest.mark.parametrize("after", [1, 2])
def test_killed_and_resumed_it_has_the_same_bytes(hybrid, tmp_path, monkeypatch, after):
    whole = export(hybrid, "auto", tmp_path / "whole")
    keep, count = Staging.record, 0

    def record(self, name, record):
        nonlocal count
        count += 1
        keep(self, name, record)
        if count == after:
            raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(Staging, "record", record)
        with pytest.raises(Killed):
            export(hybrid, "auto", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match="unfinished run"):
        export(hybrid, "auto", tmp_path / "out")
    assert export(hybrid, "auto", tmp_path / "out", resume=True).resumed_shards == after
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")
    assert export(hybrid, "auto", tmp_path / "out", resume=True).resumed_shards == whole.shards > after
    verify_files(tmp_path / "out")


def test_a_difference_is_refused_and_leaves_nothing(hybrid, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(granite, "_stacked", lambda gate, up: torch.cat([up, gate]))
    out = tmp_path / "out"
    assert app(["export", str(hybrid), "--out", str(out)]) == 2
    said = capsys.readouterr().err
    assert "logits differ by up to" in said
    assert "--allow-approximate" in said
    assert not out.exists()
    assert not partial_folder(out).exists()
    assert app(["export", str(hybrid), "--out", str(out), "--allow-approximate", "--json"]) == 0
    said = capsys.readouterr()
    assert "approximate: on random text logits differ" in said.err
    assert json.loads(said.out)["proof"][0]["max_difference"] > 1e-3
    assert "logits differ" in read_lineage(out)["approximate"]


def test_dry_run_writes_nothing(hybrid, tmp_path):
    before = sorted(os.listdir(tmp_path))
    assert export(hybrid, "auto", tmp_path / "out", dry_run=True).proof == ()
    assert sorted(os.listdir(tmp_path)) == before


def test_a_class_that_does_not_fit_is_refused(hybrid, tmp_path):
    with pytest.raises(ConfigError, match="ministral does not hold this hybrid: .*these fit: granitemoehybrid"):
        export(hybrid, "ministral", tmp_path / "out")
    with pytest.raises(ConfigError, match="Did you mean 'granitemoehybrid'"):
        export(hybrid, "granitemoehybrd", tmp_path / "out")
    with pytest.raises(CheckpointError, match="not a hybrid"):
        export(tmp_path / "llama-base", "auto", tmp_path / "out")


def test_a_text_too_short_to_prove_anything_is_refused(hybrid, tmp_path):
    with pytest.raises(ConfigError, match=r"text 'mine' has shape \[1, 9\], expected sequences of at least 128 tokens"):
        export(hybrid, "auto", tmp_path / "out", texts={"mine": torch.zeros(1, 9, dtype=torch.int64)})
    texts = {"mine": torch.randint(0, 64, (3, 200))}
    assert [proof.text for proof in export(hybrid, "auto", tmp_path / "out", texts=texts).proof] == [
        "random",
        "mine",
        "left-padded",
    ]


def test_no_class_names_the_reason(tmp_path):
    path = random_hybrid("llama", tmp_path, {"keep": {"every": 3}, "mixer": {"name": "gla"}})
    with pytest.raises(ConfigError, match="no native class holds this hybrid: .*linear attention"):
        export(path, "auto", tmp_path / "out")


def test_a_lost_tensor_is_an_error(hybrid, tmp_path, monkeypatch):
    kind = type(target("granitemoehybrid"))
    whole = kind.tensors
    lose = {"model.layers.0.mlp.down_proj.weight"}
    monkeypatch.setattr(kind, "tensors", lambda self, *args: [m for m in whole(self, *args) if not lose & {*m.sources}])
    with pytest.raises(CheckpointError, match="down_proj.weight has no place"):
        export(hybrid, "auto", tmp_path / "out")


@needs_groups
def test_decays_stay_in_fp32(tmp_path):
    path = random_hybrid("llama", tmp_path, MAMBA, dtype=torch.bfloat16)
    export(path, "auto", tmp_path / "out")
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert file.get_tensor("model.layers.0.mamba.A_log").dtype == torch.float32
        assert file.get_tensor("model.layers.0.mamba.in_proj.weight").dtype == torch.bfloat16


def test_the_verbs_read_an_export(hybrid, tmp_path, capsys):
    out = tmp_path / "out"
    export(hybrid, "auto", out)
    ids = torch.randint(3, 64, (2, 20))
    with torch.no_grad():
        assert_close(load_model(out)(ids).logits, load_model(hybrid)(ids).logits, "fp32")
    assert app(["info", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["family"] == "granitemoehybrid"
    with pytest.raises(CheckpointError, match="an export of a hybrid.*Give the base it came from"):
        open_base(out)
    with pytest.raises(ConfigError, match="ask of that"):
        state_bytes(open_checkpoint(out).config, 8)


def test_the_native_types_are_the_targets():
    assert set(NATIVE_TYPES) == set(TARGETS.names()) - set(FAMILIES)


def test_every_mixer_has_a_class_or_a_reason():
    """A new mixer stands in some target's list, or in NO_CLASS."""
    held = set().union(*(target(name).mixers for name in TARGETS.entries))
    assert held | NO_CLASS.keys() | {"attention"} == set(MIXERS.names())
    assert not held & NO_CLASS.keys()


@pytest.mark.parametrize("name", TARGETS.names())
def test_every_target_speaks_of_every_engine(name, tmp_path):
    kind, config = target(name), open_base(tiny_base(name if name in FAMILIES else "llama", tmp_path)).config
    specs = [MIXERS.spec(mixer, MIXERS.load(mixer)()) for mixer in ["attention", *sorted(kind.mixers)]]
    for engine in ENGINES:
        runs, how = kind.engine(engine, config, specs)
        assert type(runs) is bool
        assert how
    assert kind.about
    assert not kind.about.endswith(".")
