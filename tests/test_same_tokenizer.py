"""Two directories that read text as the same tokens, and the first thing that says they do not."""

import json
import shutil

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hybridize.checkpoint import load_model
from hybridize.data import Batch, check_same_tokenizer, tokenizer_hash
from hybridize.data.same_tokenizer import differences
from hybridize.distill import distill
from hybridize.distill.run import load_pair
from hybridize.distill.stages import STAGES
from hybridize.distill.teachers import check_teacher
from hybridize.errors import ConfigError
from tests.distill.pair import tiny_pair, tiny_tokens
from tests.tiny import tiny_base

VOCAB = ["<s>", "<unk>", "</s>", "a", "b", "c", "ab", "bc", "abc"]
MERGES = [("a", "b"), ("b", "c"), ("ab", "c")]


def bpe(vocab=VOCAB, merges=MERGES, pre=pre_tokenizers.Whitespace, bos="<s>", normalizer=None, added=(), eos="</s>", **model):
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(vocab)}, list(merges), unk_token="<unk>", **model))
    tokenizer.pre_tokenizer = pre()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, unk_token="<unk>", eos_token=eos)
    fast.add_tokens(list(added))
    return fast


def unigram(scores):
    tokenizer = Tokenizer(models.Unigram(list(zip(VOCAB, scores, strict=True)), unk_id=1))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>")


SWAPPED = ["<s>", "<unk>", "</s>", "a", "b", "c", "bc", "ab", "abc"]


@pytest.mark.parametrize(
    ("own", "other", "said"),
    [
        (bpe(), bpe(vocab=SWAPPED), "token 'ab' has id 7, expected id 6"),
        (bpe(), bpe(VOCAB[:-1], MERGES[:2]), "token 'abc' is missing, expected id 8"),
        (bpe(), bpe(added=["<think>"]), "token '<think>' has id 9, expected no such token"),
        (bpe(), bpe(merges=[MERGES[1], MERGES[0], MERGES[2]]), "merge 0 is 'b c', expected 'a b'"),
        (bpe(), bpe(merges=MERGES[:2]), "merge 2 is missing, expected 'ab c'"),
        (bpe(), bpe(byte_fallback=True), "the model's byte_fallback is true, expected false"),
        (bpe(), bpe(pre=pre_tokenizers.Punctuation), 'pre_tokenizer is {"behavior":"Isolated","type":"Punctuation"}, expected'),
        (bpe(), bpe(normalizer=normalizers.Lowercase()), 'normalizer is {"type":"Lowercase"}, expected missing'),
        (bpe(), bpe(bos="</s>"), "bos_token_id is 2, expected 0"),
        (unigram(range(9)), unigram([*range(8), 9]), 'id 8 with its score is ["abc",9.0], expected ["abc",8.0]'),
        (bpe(), unigram(range(9)), "the model is Unigram, expected BPE"),
    ],
    ids=lambda value: value[:24] if isinstance(value, str) else "",
)  # fmt: skip
def test_the_first_difference_is_named(own, other, said):
    assert next(differences(own, other)).startswith(said)
    assert list(differences(own, own)) == []


def test_what_puts_no_id_into_a_row_may_differ(tmp_path):
    """EOS and template, as instruct models have them, and the older spelling of merges."""
    own, other = bpe(), bpe(eos="abc")
    other.chat_template = "{{ messages }}"
    # EOS is a special token of another name only: it is an added token in both.
    own.add_special_tokens({"additional_special_tokens": ["abc"]})
    other.add_special_tokens({"additional_special_tokens": ["</s>"]})
    own.save_pretrained(tmp_path / "own")
    other.save_pretrained(tmp_path / "other")
    path = tmp_path / "other" / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]
    content["post_processor"] = None
    path.write_text(json.dumps(content))
    assert check_same_tokenizer(tmp_path / "own", tmp_path / "other") == len(VOCAB) - 1


def test_directories_without_a_tokenizer(tmp_path, caplog):
    base, student = tiny_pair(tmp_path)
    other = tmp_path / "other"
    shutil.copytree(base, other)
    assert tokenizer_hash(other) is None
    # Of the base there is no question; of another, one line that it was taken on trust.
    check_teacher(student, base)
    assert caplog.text == ""
    check_teacher(student, other)
    assert "nothing shows that both read the same tokens" in caplog.text
    assert len(caplog.text.strip().splitlines()) == 1
    bpe().save_pretrained(other)
    with pytest.raises(ConfigError, match=r"student: has no tokenizer.json, .* copy its own tokenizer files there"):
        check_teacher(student, other)


def test_a_teacher_of_another_tokenizer_is_refused_and_padding_is_left_out(tmp_path):
    base, student = tiny_pair(
        tmp_path, mixers=({"name": "streaming", "window_tokens": 4}, {"name": "attention"}), num_hidden_layers=2
    )
    wide = tiny_base("llama", tmp_path / "wide", vocab_size=80, num_hidden_layers=2)
    stage = {"name": "kl", "tokens": 128, "seq_tokens": 16, "rows": 2}
    with pytest.raises(ConfigError, match="without tokenizer files nothing shows that the surplus is padding"):
        distill(student, [stage], tiny_tokens(), tmp_path / "out", teacher=wide)
    bpe().save_pretrained(student)
    bpe(vocab=SWAPPED).save_pretrained(wide)
    with pytest.raises(
        ConfigError, match=r"wide/llama-base/tokenizer.json: token 'ab' has id 7, expected id 6 as .*student has it"
    ):
        distill(student, [stage], tiny_tokens(), tmp_path / "out", teacher=wide)
    assert not (tmp_path / "out").exists()
    words = [*VOCAB, *(f"w{i}" for i in range(60))]
    for folder in (student, wide):
        bpe(vocab=words).save_pretrained(folder)
    with pytest.raises(ConfigError, match="token 68 is among the surplus, expected padding"):
        distill(student, [stage], tiny_tokens(), tmp_path / "out", teacher=wide)
    for folder in (student, wide):
        bpe().save_pretrained(folder)
    # As if the teacher had never had those rows.
    model = load_model(wide)
    model.resize_token_embeddings(64)
    model.save_pretrained(tmp_path / "cut")
    batch, options = Batch(torch.arange(3, 35).view(2, 16)), STAGES.build(stage)
    pairs = (load_pair(student, teacher, options, "kl", {}, torch.device("cpu")) for teacher in (wide, tmp_path / "cut"))
    one, two = (options.start(own, other, batch)(batch, 1.0)["kl"] for own, other, _ in pairs)
    assert torch.equal(one, two)
    narrow = tiny_base("llama", tmp_path / "narrow", vocab_size=48, num_hidden_layers=2)
    bpe().save_pretrained(narrow)
    with pytest.raises(ConfigError, match="vocab_size is 64 in .* and 48 in .*, expected no fewer in the teacher"):
        load_pair(student, narrow, STAGES.build(stage), "kl", {}, torch.device("cpu"))
