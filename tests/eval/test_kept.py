"""Reports that are read back: only when all that they follow from is the same."""

import importlib
import json
import logging
import os
import shutil
import time

import pytest
import torch

import hybridize
from hybridize.checkpoint import load_model, open_checkpoint
from hybridize.cli import app
from hybridize.errors import CheckpointError, ConfigError
from hybridize.eval import PROBES, evaluate
from hybridize.eval.evaluate import items_path
from hybridize.eval.kept import Kept
from tests.eval.sets import ROWS, write_sets
from tests.eval.toys import toy_text

RECALL = {"name": "recall", "pairs": [2], "samples": 3}
PERPLEXITY = {"name": "perplexity", "context": 32, "tokens": 64}
# The function of the same name hides the module.
module = importlib.import_module("hybridize.eval.evaluate")


@pytest.fixture
def own(base, tmp_path):
    """A copy of the tiny base, to be changed."""
    return shutil.copytree(base, tmp_path / "base")


@pytest.fixture
def loads(monkeypatch):
    """The checkpoints that were loaded, that is: measured."""
    found = []
    load = module.load_for_test
    monkeypatch.setattr(module, "load_for_test", lambda path: found.append(path) or load(path))
    return found


def test_the_same_is_measured_once(own, tokenizer, tmp_path, loads, caplog):
    text, cache = toy_text(tokenizer), tmp_path / "cache"
    first = evaluate(own, [RECALL, PERPLEXITY], text, out=tmp_path / "1.json", cache=cache)
    assert evaluate(own, [RECALL, PERPLEXITY], text) == first  # what is kept changes no number
    assert not caplog.records
    loads.clear()
    moved = shutil.copytree(own, tmp_path / "moved")
    with caplog.at_level(logging.WARNING):
        again = evaluate(moved, [RECALL, PERPLEXITY], text, out=tmp_path / "2.json", cache=cache)
    assert loads == []
    (record,) = caplog.records
    assert record.getMessage() == f"eval: {moved}: the same was measured before; its report is read from {cache}"
    assert again.to_dict() == {**first.to_dict(), "checkpoint": str(moved)}
    assert json.loads((tmp_path / "2.json").read_text()) == again.to_dict()
    assert items_path(tmp_path / "1.json").read_bytes() == items_path(tmp_path / "2.json").read_bytes()


def test_the_command_says_where_it_read(own, tmp_path, loads, capsys):
    (tmp_path / "text.txt").write_text("The king saw the fox near the lake.\n" * 40)
    words = ["eval", str(own), "--data", str(tmp_path / "text.txt"), "--cache", str(tmp_path / "cache"), "--json"]
    assert app(words) == 0
    first = capsys.readouterr()
    assert app(words) == 0
    second = capsys.readouterr()
    assert first.out == second.out
    assert "was measured before" not in first.err
    assert second.err.count("the same was measured before; its report is read from") == 1
    assert loads == [own]
    assert app(["eval", str(own), "--task-data", str(tmp_path)]) == 2
    assert "--task-data and --include-path are for tasks of lm-eval" in capsys.readouterr().err


def changed_weight(folder):
    model = load_model(folder, torch.float32)
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    before = open_checkpoint(folder).hash
    model.save_pretrained(folder)
    assert open_checkpoint(folder).hash == before  # the headers say nothing of it


def test_anything_else_is_another_measurement(own, tokenizer, tmp_path, loads, monkeypatch):
    text, cache = toy_text(tokenizer), tmp_path / "cache"

    def measured(probes=(PERPLEXITY,), text=text, **options):
        loads.clear()
        evaluate(own, list(probes), text, cache=cache, **options)
        return bool(loads)

    assert measured()
    assert not measured()
    assert measured(text=text.__class__(**{**vars(text), "sha256": "0" * 64}))
    assert measured([{**PERPLEXITY, "tokens": 96}])
    assert measured(seed=1)
    assert measured(limit=1)
    assert measured(base=own)
    with monkeypatch.context() as patch:
        patch.setattr(hybridize, "__version__", "9.9.9")
        assert measured()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: 7)
        assert measured()
    (own / "tokenizer_config.json").write_text((own / "tokenizer_config.json").read_text() + "\n")
    assert measured()
    assert not measured()
    changed_weight(own)
    assert measured()
    assert not measured()


def test_the_weights_of_the_base_count_too(own, base, tokenizer, tmp_path, loads):
    probes = [{"name": "kl_to_base", "context": 32, "tokens": 64}]
    found = []
    for _ in range(2):
        loads.clear()
        found.append(evaluate(base, probes, toy_text(tokenizer), base=own, cache=tmp_path / "cache").metrics["kl_to_base"].value)
        assert loads == [base, own]
        changed_weight(own)
    assert found[0] == 0 < found[1]


@pytest.mark.filterwarnings("ignore::Warning")
def test_rows_of_a_data_set_count_too(own, tmp_path, loads):
    pytest.importorskip("lm_eval", reason="lm-eval is an optional dependency")
    sets, cache = write_sets(tmp_path / "sets"), tmp_path / "cache"
    probe = {"name": "lm_eval", "tasks": ["mmlu"], "data_dir": str(sets), "num_fewshot": 1}
    for file in ("mmlu/test/astronomy.jsonl", "mmlu/dev/astronomy.jsonl"):
        evaluate(own, [probe], cache=cache)
        loads.clear()
        evaluate(own, [probe], cache=cache)
        assert loads == []
        # One letter.
        (sets / file).write_text(json.dumps({**ROWS[file][0], "question": "Which?"}) + "\n")
        evaluate(own, [probe], cache=cache)
        assert loads == [own]


def test_a_file_is_hashed_once_unless_it_is_young(own, tmp_path, monkeypatch):
    kept = Kept(tmp_path / "cache")
    first = kept.weights(open_checkpoint(own))
    # Just written: it may change once more before the clock of the file system ticks.
    assert not (kept.folder / "hashes.json").exists()
    monkeypatch.setattr("hybridize.eval.kept.SETTLED_NS", 0)
    time.sleep(0.02)
    assert kept.weights(open_checkpoint(own)) == first
    known = json.loads((kept.folder / "hashes.json").read_text())
    weights = str(own.resolve() / "model.safetensors")
    known[weights][-1] = "believed"
    (kept.folder / "hashes.json").write_text(json.dumps(known))
    assert kept.weights(open_checkpoint(own)) != first
    stat = os.stat(weights)
    time.sleep(0.02)
    with open(weights, "r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        stream.write(b"\x01")
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    changed = kept.weights(open_checkpoint(own))
    (kept.folder / "hashes.json").unlink()
    assert changed == kept.weights(open_checkpoint(own)) != first


def test_a_cache_that_cannot_be_used(own, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="file: is a file, expected a folder for reports and answers"):
        evaluate(own, [RECALL], cache=tmp_path / "file")
    cache = tmp_path / "cache"
    evaluate(own, [RECALL], cache=cache)
    (report,) = (path for path in (cache / "reports").glob("*.json"))
    report.write_text("{")
    with pytest.raises(CheckpointError, match=report.name) as caught:
        evaluate(own, [RECALL], cache=cache)
    assert "\n" not in str(caught.value)


def test_probes_that_depend_on_files_say_so():
    for name in PROBES.names():
        fields = PROBES.load(name).__dataclass_fields__
        outside = {"data_dir", "include_path", "file", "path"} & set(fields)
        assert not outside or hasattr(PROBES.load(name), "follows_from"), name
