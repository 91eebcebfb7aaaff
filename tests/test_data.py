"""Sources, tokens and blocks."""

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hybridize.data import Tokens, TrainBlocks, eval_blocks, is_held_out, read_documents, tokenize
from hybridize.errors import DataError

DATA = Path(os.environ.get("HYBRIDIZE_DATA", Path(__file__).parents[2] / "shared" / "data"))


def tokens(count):
    return Tokens(ids=np.arange(count, dtype=np.int32), text_bytes=count, sha256="x")


def letters(max_length=16):
    vocab = {"<s>": 0, **{chr(c): i for i, c in enumerate([10, *range(32, 127)], 1)}}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<s>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", model_max_length=max_length)


def test_every_format_gives_the_same_documents(tmp_path):
    documents = ["one\ntwo", "three <|endoftext|> in line", "four"]
    (tmp_path / "a.txt").write_text("one\ntwo\n<|endoftext|>\nthree <|endoftext|> in line\n<|endoftext|>\nfour\n<|endoftext|>\n")
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": d}) for d in documents) + "\n\n")
    pq = pytest.importorskip("pyarrow.parquet")
    pq.write_table(__import__("pyarrow").table({"text": documents}), tmp_path / "a.parquet")
    for suffix in ("txt", "jsonl", "parquet"):
        assert list(read_documents(tmp_path / f"a.{suffix}")) == documents
    assert list(read_documents(f"{tmp_path}/a.*")) == documents * 3
    assert list(read_documents(f"{tmp_path}/a.txt, {tmp_path}/a.jsonl")) == documents * 2


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.txt", None, "no such file"),
        ("empty.txt", "", "holds no text"),
        ("only.txt", "<|endoftext|>\n<|endoftext|>\n", "holds no text"),
        ("bad.jsonl", '{"text": "a"}\n{"txt": "b"}\n', "line 2 has txt"),
        ("broken.jsonl", '{"text": "a"}\n{"te', "line 2 is not JSON"),
        ("list.jsonl", "[1]\n", "line 1 has list"),
        ("file.csv", "a,b\n", "the suffix is '.csv'"),
        ("bad.parquet", "not parquet", "not a readable parquet file"),
        ("*.nothing", None, "no file matches"),
    ],
)
def test_a_bad_source_is_one_line(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message.replace("(", r"\(")) as caught:
        list(read_documents(tmp_path / name))
    assert "\n" not in str(caught.value)
    assert name.strip("*") in str(caught.value)


def test_other_bad_sources(tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    with pytest.raises(DataError, match="not UTF-8 at byte 3"):
        list(read_documents(tmp_path / "latin.txt"))
    with pytest.raises(DataError, match="is a directory"):
        list(read_documents(tmp_path))
    with pytest.raises(DataError, match="expected a file"):
        list(read_documents(" , "))
    pq = pytest.importorskip("pyarrow.parquet")
    pq.write_table(__import__("pyarrow").table({"body": ["a"]}), tmp_path / "b.parquet")
    with pytest.raises(DataError, match="has the columns body"):
        list(read_documents(tmp_path / "b.parquet"))


def test_a_hub_id_offline_is_one_line(monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="neither a file nor a hub data set") as caught:
        list(read_documents("nobody/no-such-set"))
    assert "\n" not in str(caught.value)


def test_the_split_depends_on_each_document_alone():
    documents = [f"document {i}" for i in range(500)]
    kept = [document for document in documents if is_held_out(document, 0.2)]
    assert 60 < len(kept) < 140
    # The very ones, so that no later version splits a text another way.
    assert kept[:4] == ["document 0", "document 5", "document 8", "document 9"]
    assert not any(is_held_out(document, 0) for document in documents)
    with pytest.raises(DataError, match="held_out_share is 1"):
        is_held_out("a", 1)


def test_tokens_are_the_text_joined_by_newlines(monkeypatch, recwarn):
    tokenizer = letters()
    whole = tokenize(tokenizer, ["abc", "de" * 20])
    assert tokenizer.decode(whole.ids).replace(" ", "") == "abc\n" + "de" * 20
    assert whole.ids.dtype == np.int32
    assert whole.text_bytes == 44
    assert whole.bos_id == 0
    monkeypatch.setattr("hybridize.data.tokens.PIECE_CHARS", 2)
    pieces = tokenize(tokenizer, iter(["abc", "de" * 20]))
    assert np.array_equal(pieces.ids, whole.ids)
    assert (pieces.text_bytes, pieces.sha256) == (whole.text_bytes, whole.sha256)
    assert tokenize(tokenizer, ["abd", "de" * 20]).sha256 != whole.sha256
    with pytest.raises(DataError, match="no tokens"):
        tokenize(tokenizer, [])
    assert not recwarn.list


def test_eval_blocks_do_not_overlap():
    blocks = eval_blocks(tokens(23), 6, bos_id=99)
    assert blocks.tolist() == [[99, *range(i, i + 5)] for i in (0, 5, 10, 15)]
    assert eval_blocks(tokens(23), 6, bos_id=None).tolist() == [list(range(i, i + 6)) for i in (0, 6, 12)]
    assert len(eval_blocks(tokens(23), 6, bos_id=99, limit_tokens=12)) == 2
    for bad in (lambda: eval_blocks(tokens(4), 6, 99), lambda: TrainBlocks(tokens(4), 6, 1, 0, 99)):
        with pytest.raises(DataError, match="expected at least one"):
            bad()
    with pytest.raises(DataError, match="expected at least 2"):
        eval_blocks(tokens(9), 1, 99)


def test_a_training_batch_depends_on_seed_and_step_alone():
    def make(seed=0, rows=3):
        return TrainBlocks(tokens(50), 6, rows, seed, 99)

    forward = [make().batch(step).ids for step in range(12)]
    one = make()
    backward = [one.batch(step).ids for step in reversed(range(12))][::-1]
    assert all(torch.equal(a, b) for a, b in zip(forward, backward, strict=True))
    assert not torch.equal(forward[0], make(seed=1).batch(0).ids)
    wide = make(rows=6)
    assert torch.equal(wide.batch(0).ids, torch.cat(forward[:2]))
    assert forward[0].shape == (3, 6)
    assert (forward[0][:, 0] == 99).all()


def test_every_epoch_visits_every_block_once_at_a_new_offset():
    blocks = TrainBlocks(tokens(50), 6, 10, 0, 99)
    epochs = [blocks.batch(step).ids[:, 1:] for step in range(6)]
    for epoch in epochs:
        assert sorted(epoch.flatten().tolist()) == list(range(50))
    assert len({int(epoch.min(dim=1).values[0]) % 5 for epoch in epochs}) > 1
    assert len({tuple(epoch[:, 0].tolist()) for epoch in epochs}) == 6


@pytest.mark.slow
@pytest.mark.data
@pytest.mark.skipif(not DATA.is_dir(), reason=f"no test material at {DATA}; set HYBRIDIZE_DATA")
def test_the_published_perplexity_of_a_real_model_is_reproduced():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = DATA / "models" / "stories260K"
    expected = json.loads((folder / "reference.json").read_text())["perplexity"]["text/tinystories/v1_dev.txt"]
    text = tokenize(AutoTokenizer.from_pretrained(folder), read_documents(DATA / "text" / "tinystories" / "v1_dev.txt"))
    blocks = eval_blocks(text, 512, text.bos_id, limit_tokens=60_000)
    assert blocks[:, 1:].numel() == expected["tokens"]
    model = AutoModelForCausalLM.from_pretrained(folder)

    def perplexity(blocks):
        total = 0.0
        with torch.no_grad():
            for rows in blocks.split(16):
                logits = model(rows[:, :-1]).logits
                total += torch.nn.functional.cross_entropy(logits.mT, rows[:, 1:], reduction="sum").item()
        return math.exp(total / blocks[:, 1:].numel())

    assert perplexity(blocks) == pytest.approx(expected["ppl"], abs=1e-4)
    # Without BOS, and with blocks of another length, it is another number.
    assert perplexity(blocks[:24, 1:]) != pytest.approx(perplexity(blocks[:24]), abs=1e-2)
