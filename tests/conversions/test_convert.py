"""The engine: bit-equal where nothing changes, equal bytes however it is run, and books that must balance."""

import hashlib
import json
import os
from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import load_file
from transformers.utils import logging

from hybridize import shards, storage
from hybridize.checkpoint import load_model, open_base
from hybridize.conversions import convert, plan
from hybridize.conversions.keep import Keep
from hybridize.conversions.layer import convert_layer, layer_generator
from hybridize.conversions.plan import build_mixer
from hybridize.core import digest
from hybridize.errors import CheckpointError, ConfigError
from hybridize.families import FAMILIES
from hybridize.lineage import read_lineage, verify_files
from hybridize.mixers import MIXERS
from hybridize.storage import file_sha256, partial_folder
from tests.tiny import tiny_base

torch.set_num_threads(1)
logging.disable_progress_bar()

MAMBA = {"keep": {"layers": [1]}, "mixer": {"name": "mamba2", "method": "mamba_in_llama"}}
IDS = torch.arange(2, 42)[None] % 64


def hashes(folder):
    return {name: file_sha256(folder / name) for name in sorted(os.listdir(folder))}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    path = tiny_base("qwen2", tmp_path_factory.mktemp("base"), num_hidden_layers=6)
    (path / "tokenizer.json").write_text("{}")
    return path


@pytest.fixture
def small_shards(monkeypatch):
    """Shards of about one layer, so that there is something to divide and to resume."""
    monkeypatch.setattr(shards.plan_shards, "__defaults__", (30_000,))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_keeping_every_layer_is_the_base_bit_for_bit(family, tied, tmp_path):
    path = tiny_base(family, tmp_path, tie_word_embeddings=tied)
    made = plan(open_base(path), {"keep": "all"}, "test", 0)
    summary = convert(made, tmp_path / "out")
    source, copy = load_file(path / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert source.keys() == copy.keys()
    assert all(torch.equal(source[name], copy[name]) and source[name].dtype == copy[name].dtype for name in source)
    assert (summary.copied, summary.computed, summary.dropped) == (len(source), 0, 0)
    with torch.no_grad():
        expected, actual = load_model(path)(IDS).logits, load_model(tmp_path / "out")(IDS).logits
    assert torch.equal(actual, expected)


def test_window_wider_than_the_text_is_the_base_and_a_narrow_one_is_not(base, tmp_path):
    with torch.no_grad():
        expected = load_model(base)(IDS).logits
        for window, equal in ((40, True), (8, False)):
            mixer = {"name": "streaming", "sink_tokens": 0, "window_tokens": window}
            convert(plan(open_base(base), {"keep": {"every": 2}, "mixer": mixer}, "t", 0), tmp_path / str(window))
            actual = load_model(tmp_path / str(window))(IDS).logits
            assert torch.allclose(actual, expected, atol=1e-5) == equal


def test_bytes_do_not_depend_on_workers_threads_or_repetition(base, tmp_path, small_shards):
    made = plan(open_base(base), MAMBA, "test", 5)
    summary = convert(made, tmp_path / "a", workers=1)
    assert summary.shards > 4
    first = hashes(tmp_path / "a")
    assert first.keys() >= {"config.json", "hybridize.manifest.json", "lineage.json", "tokenizer.json"}
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    convert(made, tmp_path / "b", workers=4)
    assert torch.get_num_threads() == 2
    torch.set_num_threads(threads)
    assert hashes(tmp_path / "b") == first
    other = plan(open_base(base), MAMBA, "test", 6)
    convert(other, tmp_path / "c")
    assert hashes(tmp_path / "c")["lineage.json"] != first["lineage.json"]
    weights = [name for name in first if name.endswith(".safetensors")]
    assert any(hashes(tmp_path / "c")[name] != first[name] for name in weights)


def test_what_is_written_down_is_true(base, tmp_path, small_shards):
    out = tmp_path / "out"
    summary = convert(plan(open_base(base), MAMBA, "test", 0), out, lineage_extra={"recipe": "r"})
    verify_files(out)
    manifest = json.loads((out / "hybridize.manifest.json").read_text())
    lineage = read_lineage(out)
    assert set(os.listdir(out)) == {*manifest["files"], "hybridize.manifest.json", "lineage.json"}
    assert lineage["recipe"] == "r"
    assert lineage["base"] == {"name": base.name, "location": str(base), "hash": open_base(base).hash}
    stored = {name: t for file in out.glob("*.safetensors") for name, t in load_file(file).items()}
    for name, record in manifest["files"].items():
        data = (out / name).read_bytes()
        assert record == {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    assert stored["model.layers.0.self_attn.A_log"].dtype == torch.float32
    assert str(tmp_path) not in (out / "config.json").read_text() + (out / "hybridize.manifest.json").read_text()
    assert summary.copied + summary.computed == len(stored)
    assert [layer.computed for layer in summary.layers] == [9, 0, 9, 9, 9, 9, 0]
    assert [layer.copied for layer in summary.layers][:2] == [0, 7]


class Broken(Exception):
    pass


def break_after(monkeypatch, count):
    """Fail when the shard after `count` is finished."""
    from hybridize.storage import Staging

    record, left = Staging.record, [count]

    def failing(self, name, entry):
        if left[0] == 0:
            raise Broken
        left[0] -= 1
        record(self, name, entry)

    monkeypatch.setattr(Staging, "record", failing)


def test_resumed_bytes_are_those_of_an_undisturbed_run(base, tmp_path, monkeypatch, small_shards):
    made = plan(open_base(base), MAMBA, "test", 0)
    convert(made, tmp_path / "whole")
    with monkeypatch.context() as patch:
        break_after(patch, 3)
        with pytest.raises(Broken):
            convert(made, tmp_path / "out", workers=1)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match="--resume"):
        convert(made, tmp_path / "out")
    other = plan(open_base(base), MAMBA, "test", 1)
    with pytest.raises(ConfigError, match="another job"):
        convert(other, tmp_path / "out", resume=True)
    assert convert(made, tmp_path / "out", resume=True).resumed_shards == 3
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")
    assert not partial_folder(tmp_path / "out").exists()
    # Once complete, the same command with resume finds nothing to do.
    assert convert(made, tmp_path / "out", resume=True).resumed_shards > 3


@pytest.mark.slow
def test_stopped_before_any_rename_the_resumed_bytes_are_the_same(base, tmp_path, monkeypatch):
    """Every file has a moment at which its bytes lie under a temporary name; no resumed run may take that one along."""
    made = plan(open_base(base), MAMBA, "test", 0)
    convert(made, tmp_path / "whole")
    replace, stopped = os.replace, 0
    while True:
        left = [stopped]

        def failing(source, target, left=left):
            if left[0] == 0:
                raise Broken
            left[0] -= 1
            replace(source, target)

        out = tmp_path / f"out-{stopped}"
        with monkeypatch.context() as patch:
            patch.setattr(storage.os, "replace", failing)
            try:
                convert(made, out, workers=1)
                break
            except Broken:
                stopped += 1
        convert(made, out, resume=True)
        assert hashes(out) == hashes(tmp_path / "whole")
    # Of the journal (twice), weights, config, code, generation config, tokenizer, manifest and lineage.
    assert stopped == 9


def test_resume_does_not_mix_two_bases_of_one_shape(base, tmp_path, monkeypatch, small_shards):
    path = tiny_base("llama", tmp_path)
    made = plan(open_base(path), {"keep": "all"}, "test", 0)
    with monkeypatch.context() as patch:
        break_after(patch, 1)
        with pytest.raises(Broken):
            convert(made, tmp_path / "out", workers=1)
    weights = path / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert open_base(path).config_hash == made.base_hash
    with pytest.raises(ConfigError, match="another job"):
        convert(made, tmp_path / "out", resume=True)


def test_dry_run_writes_nothing(base, tmp_path):
    made = plan(open_base(base), MAMBA, "test", 0)
    dry = convert(made, tmp_path / "out", dry_run=True)
    assert os.listdir(tmp_path) == []
    assert dry == convert(made, tmp_path / "out")
    with pytest.raises(ConfigError, match="not empty"):
        convert(made, tmp_path / "out", dry_run=True)


def test_base_may_have_moved(base, tmp_path):
    made = plan(open_base(base), {"keep": "all"}, "test", 0)
    os.symlink(base, tmp_path / "moved")
    convert(made, tmp_path / "out", base_path=tmp_path / "moved")
    assert read_lineage(tmp_path / "out")["base"]["location"] == str(tmp_path / "moved")


def test_progress_ends_at_the_total(base, tmp_path):
    seen = []
    summary = convert(
        plan(open_base(base), MAMBA, "test", 0), tmp_path / "out", progress=lambda *step: seen.append(step), workers=1
    )
    done = [step[1] for step in seen]
    assert done == sorted(done)
    assert seen[-1][0] == "convert"
    # Headers are no tensor's bytes.
    assert seen[-1][1] == seen[-1][2] < summary.bytes


def test_calibrated_needs_text_and_follows_it(tmp_path, small_shards):
    path = tiny_base("llama", tmp_path)
    made = plan(open_base(path), {"keep": {"layers": [1]}, "mixer": {"name": "mamba2"}}, "test", 0)
    with pytest.raises(ConfigError, match=r"layer 0: its conversion is calibrated and needs text"):
        convert(made, tmp_path / "out")
    with pytest.raises(ConfigError, match=r"text has shape \[4\]"):
        convert(made, tmp_path / "out", text=torch.zeros(4, dtype=torch.int64))
    text = torch.randint(0, 64, (8, 48), generator=torch.Generator().manual_seed(0))
    convert(made, tmp_path / "a", text=text, workers=1)
    convert(made, tmp_path / "b", text=text, workers=2)
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b")
    assert read_lineage(tmp_path / "a")["calibration"]["sequences"] == 8
    convert(made, tmp_path / "c", text=text.flip(1))
    assert digest(hashes(tmp_path / "c")) != digest(hashes(tmp_path / "a"))
    load_model(tmp_path / "a")


@dataclass(frozen=True, kw_only=True)
class Careless:
    """A conversion with one mistake."""

    mistake: str
    drops = frozenset({"q_norm.weight"})
    calibrated = False

    def __call__(self, source, mixer, config, generator, calibration):
        made = {name: source[name].clone() for name in source if name != "k_proj.weight" or self.mistake != "lost"}
        if self.mistake == "lost":
            made["k_proj.weight"] = torch.ones(16, 32)
        if self.mistake == "missing":
            del made["v_proj.weight"]
        if self.mistake == "extra":
            made["sinks"] = torch.ones(4)
        if self.mistake == "misshapen":
            made["o_proj.weight"] = made["o_proj.weight"][:4]
        if self.mistake == "infinite":
            made["o_proj.weight"][0, 0] = float("inf")
        return made


@pytest.mark.parametrize(
    ("mistake", "says"),
    [
        ("none", None),
        ("lost", "layer 1: Careless neither used nor dropped k_proj.weight"),
        ("missing", "layer 1: v_proj.weight is missing"),
        ("extra", "layer 1: sinks is extra"),
        ("misshapen", r"layer 1: o_proj.weight came out as \[4, 32\], expected \[32, 32\]"),
        ("infinite", "layer 1: o_proj.weight came out with values that are not finite"),
    ],
)
def test_books_of_a_layer_must_balance(mistake, says, tmp_path):
    checkpoint = open_base(tiny_base("llama", tmp_path))
    mixer = build_mixer(MIXERS.build({"name": "streaming"}), checkpoint.config, 1)
    prefix = "self_attn."
    source = {n.removeprefix(prefix): t for n, t in checkpoint.layer(1).items() if n.startswith(prefix)}
    arguments = (source, mixer, checkpoint.config, layer_generator(0, 1), None, "layer 1")
    if says is None:
        assert all(torch.equal(t, source[n]) for n, t in convert_layer(Careless(mistake=mistake), *arguments).items())
        assert convert_layer(Keep(), *arguments).keys() == source.keys()
        # A tensor named in `drops` may stay unused.
        extended = ({**source, "q_norm.weight": torch.ones(8)}, *arguments[1:])
        with pytest.raises(CheckpointError, match=r"q_norm\.weight is extra"):
            convert_layer(Keep(), *extended)
    else:
        with pytest.raises(CheckpointError, match=says):
            convert_layer(Careless(mistake=mistake), *arguments)


def test_each_layer_draws_its_own(base):
    draws = [torch.rand(4, generator=layer_generator(seed, index)) for seed in (0, 1) for index in (0, 1)]
    assert all(not torch.equal(a, b) for i, a in enumerate(draws) for b in draws[:i])
    assert torch.equal(draws[0], torch.rand(4, generator=layer_generator(0, 0)))
