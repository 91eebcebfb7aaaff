"""What distill trains on: sources by way of the cache, mixtures, rows of documents apart, and rows beyond the context."""

import json
import random

import numpy as np
import pytest

import hybridize.data.stored as stored
from hybridize.cli import app
from hybridize.data import Mixture, Tokens
from hybridize.distill import distill, metrics_path
from hybridize.errors import ConfigError
from hybridize.lineage import read_lineage
from hybridize.pipeline import fitted
from hybridize.storage import file_sha256
from tests.distill.pair import tiny_pair, tiny_tokens
from tests.distill.test_distill import Stop, hashes, stop_after
from tests.eval.toys import DOCUMENTS, save_tokenizer

STAGES = [
    {"name": "align", "tokens": 4 * 64, "seq_tokens": 16, "rows": 4, "save_tokens": 64, "documents": "reset"},
    {"name": "kl", "tokens": 4 * 64, "seq_tokens": 16, "rows": 2, "accumulate": 2, "save_tokens": 64, "documents": "reset"},
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("pair")
    base, student = tiny_pair(root, vocab_size=320)
    for folder in (base, student):
        save_tokenizer(folder)
    for name, part in (("a", DOCUMENTS[:60]), ("b", DOCUMENTS[60:])):
        (root / f"{name}.txt").write_text("\n<|endoftext|>\n".join(part))
    return root, student


def mixture():
    texts = [tiny_tokens(900, seed) for seed in (0, 1)]
    starts = [[0, 7, 20, 21, 300], list(range(0, 900, 11))]
    parts = tuple(
        Tokens(ids=text.ids, text_bytes=900, sha256=text.sha256, bos_id=1, starts=np.array(own))
        for text, own in zip(texts, starts, strict=True)
    )  # fmt: skip
    return Mixture(names=("a", "b"), parts=parts, weights=(0.75, 0.25))


@pytest.mark.slow
def test_a_run_on_a_mixture_stopped_at_any_step_ends_with_the_same_bytes(folders, tmp_path):
    whole = distill(folders[1], STAGES, mixture(), tmp_path / "whole")
    for steps in random.Random(0).sample(range(1, 8), 2):
        out = tmp_path / f"out{steps}"
        with pytest.raises(Stop):
            distill(folders[1], STAGES, mixture(), out, progress=stop_after(steps))
        distill(folders[1], STAGES, mixture(), out, resume=True)
        assert hashes(out) == hashes(whole)
    assert read_lineage(whole)["distill"][0]["text"] == mixture().sha256
    # Rows read as one stretch are another training.
    joined = distill(folders[1], [{**stage, "documents": "joined"} for stage in STAGES], mixture(), tmp_path / "joined")
    assert file_sha256(joined / "model.safetensors") != file_sha256(whole / "model.safetensors")


def test_sources_are_tokenised_once(folders, tmp_path, monkeypatch):
    root, student = folders
    sources = {str(root / "a.txt"): 2, str(root / "b.txt"): 1}
    cache = tmp_path / "cache"
    told = []
    first = distill(student, STAGES[1:], sources, tmp_path / "one", token_cache=cache, progress=lambda *call: told.append(call))
    assert [label for label, _, _ in told if label == "tokenise"] == ["tokenise"] * 2
    assert not (tmp_path / "one.tokens").exists()
    monkeypatch.setattr(stored, "encode_pieces", None)
    again = distill(student, STAGES[1:], sources, tmp_path / "two", token_cache=cache)
    assert hashes(again) == hashes(first)
    monkeypatch.undo()
    distill(student, STAGES[1:], root / "a.txt", tmp_path / "three")
    (kept,) = (tmp_path / "three.tokens").iterdir()
    assert (cache / kept.name).is_dir()
    with pytest.raises(ConfigError, match="the mixture is empty"):
        distill(student, STAGES, {}, tmp_path / "four")


def test_rows_go_beyond_the_context_only_where_a_stage_says_so(folders, tmp_path):
    root, student = folders
    long = {"name": "kl", "tokens": 160, "seq_tokens": 160, "rows": 1}
    with pytest.raises(ConfigError, match="seq_tokens is 160, expected at most the student's max_position_embeddings of 128"):
        distill(student, [long], mixture(), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    config = type("Config", (), {"max_position_embeddings": 128})
    told = {**long, "beyond_context": True}
    assert fitted([long, told], config) == [{**long, "seq_tokens": 128}, told]
    distill(student, [told], mixture(), tmp_path / "out")
    assert json.loads(metrics_path(tmp_path / "out").read_text())["tokens"] == 160


@pytest.mark.slow
def test_the_whole_line_on_a_mixture(folders, tmp_path, capsys):
    root, _ = folders
    base = root / "llama-base"
    text = f"{{{root}/a.txt: 3, {root}/b.txt: 1}}"
    small = [
        "--set", "distill=[{name: align, tokens: 512, seq_tokens: 32, rows: 4, documents: reset}]",
        "--set", "evaluate=[{name: perplexity, context: 32}]", "--set", "gates=[]", "--set", "data.held_out_share=0.2",
    ]  # fmt: skip

    def run(*words):
        capsys.readouterr()
        return app([str(word) for word in ("run", "mamba2", "--base", base, *words, *small)]), capsys.readouterr().err

    assert run("--data", text, "--out", tmp_path / "w")[0] == 0
    assert len(list((tmp_path / "w" / "tokens").iterdir())) == 3
    mixed = f"data.mixture={text}"
    assert run("--set", mixed, "--out", tmp_path / "v")[0] == 0
    lineages = [read_lineage(tmp_path / name / "distilled")["distill"] for name in "wv"]
    assert lineages[0] == lineages[1]
    for words, message in (
        (["--data", text, "--set", mixed], "given twice"),
        (["--data", f"{{{root}/a.txt: 0}}"], "expected a number above 0"),
        (["--data", f"{{{root}/a.txt: 1, '{root}/?.txt': 1}}"], "in the mixture twice"),
        (["--data", f"{{{root}/a.txt: 1, {root}/?.txt: 1}}"], "in quotes"),
        (["--data", "{*.txt: 1}"], "in quotes"),
        (["--data", "{}"], "the mixture is empty"),
    ):
        code, err = run(*words, "--out", tmp_path / "x")
        assert code == 2
        assert message in err
        assert err.count("\n") == 1
        assert not (tmp_path / "x").exists()
