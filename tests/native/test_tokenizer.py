"""An export's tokenizer reads as the hybrid's, though transformers picks its class by the model's."""

import json

import pytest
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer

from hybridize.errors import CheckpointError
from hybridize.native import tokenizer as module
from hybridize.native.tokenizer import keep_tokenizer

TEXT = "a b  ab"


def folder(path, model_type, settings):
    """A tokenizer without a pipeline, so that a class that builds one of its own reads otherwise."""
    path.mkdir()
    vocab = {token: place for place, token in enumerate(["<unk>", "<s>", "</s>", "a", "b", " ", "\u2581"])}
    Tokenizer(models.BPE(vocab, [], unk_token="<unk>")).save(str(path / "tokenizer.json"))
    specials = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (path / "tokenizer_config.json").write_text(json.dumps({**specials, **settings}))
    (path / "config.json").write_text(json.dumps({"model_type": model_type}))
    return path


def copied(source, path, model_type):
    path.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (path / name).write_text((source / name).read_text())
    (path / "config.json").write_text(json.dumps({"model_type": model_type}))
    return path


def test_a_tokenizer_that_would_read_otherwise_is_spelled_out(tmp_path):
    source = folder(tmp_path / "a", "llama", {"tokenizer_class": "LlamaTokenizer"})
    out = copied(source, tmp_path / "b", "granitemoehybrid")
    own = AutoTokenizer.from_pretrained(source)
    assert AutoTokenizer.from_pretrained(out)(TEXT)["input_ids"] != own(TEXT)["input_ids"]
    assert keep_tokenizer(source, out)
    assert AutoTokenizer.from_pretrained(out)(TEXT)["input_ids"] == own(TEXT)["input_ids"]


def test_one_that_reads_alike_is_left_as_it_is(tmp_path):
    source = folder(tmp_path / "a", "llama", {"tokenizer_class": "PreTrainedTokenizerFast"})
    out = copied(source, tmp_path / "b", "granitemoehybrid")
    before = (out / "tokenizer_config.json").read_bytes()
    assert not keep_tokenizer(source, out)
    assert (out / "tokenizer_config.json").read_bytes() == before


def test_one_that_cannot_be_mended_is_an_error(tmp_path, monkeypatch):
    source = folder(tmp_path / "a", "llama", {"tokenizer_class": "LlamaTokenizer"})
    out = copied(source, tmp_path / "b", "granitemoehybrid")
    monkeypatch.setattr(module, "write_text", lambda path, text: None)
    monkeypatch.setattr(module, "write_json", lambda path, value: None)
    with pytest.raises(CheckpointError, match="reads text otherwise"):
        keep_tokenizer(source, out)


def test_no_tokenizer_is_nothing_to_keep(tmp_path):
    assert not keep_tokenizer(tmp_path, tmp_path)
