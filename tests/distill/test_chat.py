"""Chats and pairs as tokens: what is learnt, how rows are filled, and what is refused."""

import json
import sys

import numpy as np
import pytest
import torch

from hybridize.data import TrainBlocks
from hybridize.distill.chat import read_chats, read_pairs
from hybridize.distill.rows import ChatBlocks, TextRows, collate, pack
from hybridize.errors import DataError, MissingDependencyError
from tests.distill.chats import TEMPLATE, tiny_tokenizer, write_chats, write_lines, write_pairs
from tests.distill.pair import tiny_tokens

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
# The template of a chat model as it is served: no marks on what the assistant says.
UNMARKED = TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "")


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def spelled(tokenizer, example):
    """The text of an example, and of what is learnt of it."""
    return tokenizer.decode(example.ids), tokenizer.decode(example.ids[example.learnt])


def read(tokenizer, tmp_path, rows, reader=read_chats, seq_tokens=64):
    return reader(tokenizer, write_lines(tmp_path / "rows.jsonl", rows), seq_tokens).items


def test_only_what_the_assistant_says_is_learnt(tokenizer, tmp_path):
    two = [*CHAT, {"role": "user", "content": "so"}, {"role": "assistant", "content": "no"}]
    rows = [
        {"messages": CHAT}, {"messages": two, "id": 7}, {"prompt": "ab", "completion": "cd"}, {"text": "abc"},
        {"prompt": CHAT[:1], "completion": CHAT[1:]},
    ]  # fmt: skip
    found = [spelled(tokenizer, item[0]) for item in read(tokenizer, tmp_path, rows)]
    assert found == [
        ("<s><|user|>hi<|assistant|>ho</s>", "ho</s>"),
        ("<s><|user|>hi<|assistant|>ho</s><|user|>so<|assistant|>no</s>", "ho</s>no</s>"),
        ("<s>abcd</s>", "cd</s>"),
        ("<s>abc</s>", "abc</s>"),
        ("<s><|user|>hi<|assistant|>ho</s>", "ho</s>"),
    ]


def test_pairs_share_their_prompt(tokenizer, tmp_path):
    other = {"role": "assistant", "content": "nay"}
    rows = [
        {"prompt": "ab", "chosen": "cd", "rejected": "e"},
        {"prompt": CHAT[:1], "chosen": CHAT[1:], "rejected": [other]},
        {"chosen": CHAT, "rejected": [CHAT[0], other]},
        {"prompt": "hi", "chosen": CHAT, "rejected": [CHAT[0], other]},
    ]
    found = [[spelled(tokenizer, example) for example in item] for item in read(tokenizer, tmp_path, rows, read_pairs)]
    assert found[0] == [("<s>abcd</s>", "cd</s>"), ("<s>abe</s>", "e</s>")]
    chat = [("<s><|user|>hi<|assistant|>ho</s>", "ho</s>"), ("<s><|user|>hi<|assistant|>nay</s>", "nay</s>")]
    assert found[1:] == [chat] * 3


def test_a_first_token_is_never_learnt(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = None
    (item,) = read(tokenizer, tmp_path, [{"text": "abc"}])
    assert item[0].learnt.tolist() == [False, True, True, True]


def test_plain_text_files_are_read_too(tokenizer, tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("ab\n<|endoftext|>\ncd\n")
    assert [spelled(tokenizer, item[0])[1] for item in read_chats(tokenizer, path, 8).items] == ["ab</s>", "cd</s>"]


def test_long_texts_are_cut_and_hopeless_ones_dropped(tokenizer, tmp_path):
    rows = [{"prompt": "a" * 20, "completion": "b"}, {"prompt": "a", "completion": "b" * 20}]
    (item,) = read(tokenizer, tmp_path, rows, seq_tokens=8)
    assert spelled(tokenizer, item[0]) == ("<s>abbbbbb", "bbbbbb")
    with pytest.raises(DataError, match=r"none of 1 items has a token to learn within seq_tokens = 8"):
        read(tokenizer, tmp_path, rows[:1], seq_tokens=8)


@pytest.mark.parametrize(
    ("rows", "reader", "message"),
    [
        ([{"text": "a"}, {"txt": "a"}], read_chats, r"line 2 has txt; expected messages, or prompt and completion, or text"),
        ([{"prompt": "a"}], read_chats, "line 1 has prompt"),
        ([{"prompt": "a", "completion": CHAT[1:]}], read_chats, "line 1 has prompt, completion"),
        ([{"text": "a"}], read_pairs, "line 1 has text; expected prompt, chosen and rejected"),
        ([{"chosen": "a", "rejected": "b"}], read_pairs, "expected prompt, chosen and rejected"),
        ([{"prompt": "a", "chosen": "b", "rejected": "b"}], read_pairs, "chosen and rejected are equal"),
        ([{"messages": CHAT[:1]}], read_chats, "none of 1 items has a token to learn"),
        ([[1]], read_chats, "line 1 is list, expected an object"),
    ],
)
def test_lines_that_cannot_be_used_are_named(tokenizer, tmp_path, rows, reader, message):
    with pytest.raises(DataError, match=message) as caught:
        read(tokenizer, tmp_path, rows, reader)
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_used_are_named(tokenizer, tmp_path):
    path = tmp_path / "a.jsonl"
    for text, message in (("", "is empty"), ("{", "line 1 is not JSON"), (None, "cannot be read")):
        path.unlink(missing_ok=True)
        if text is not None:
            path.write_text(text)
        with pytest.raises(DataError, match=message):
            read_chats(tokenizer, path, 8)
    with pytest.raises(DataError, match=r"expected \.jsonl files"):
        read_pairs(tokenizer, tmp_path / "a.txt", 8)


def test_a_tokenizer_without_a_template_is_named(tmp_path):
    for template, rows, reader, message in (
        (None, [{"messages": CHAT}], read_chats, "has no chat template; add a chat_template.jinja"),
        (None, [{"chosen": CHAT, "rejected": [*CHAT, *CHAT]}], read_pairs, "has no chat template"),
        ("{{ raise_exception('turns') }}{% generation %}", [{"messages": CHAT}], read_chats, r"cannot take it \(.*\)"),
        (UNMARKED, [{"messages": CHAT}], read_chats, "does not mark what the assistant says, and is none that trl knows"),
    ):
        with pytest.raises(DataError, match=message):
            read(tiny_tokenizer(template), tmp_path, rows, reader)


def test_without_trl_the_line_names_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    assert read(tiny_tokenizer(), tmp_path, [{"messages": CHAT}, {"prompt": "a", "completion": "b"}])
    for rows, reader in (([{"chosen": CHAT, "rejected": CHAT[:1]}], read_pairs), ([{"messages": CHAT}], read_chats)):
        with pytest.raises(MissingDependencyError, match=r"need trl: pip install 'hybridize\[train\]'"):
            read(tiny_tokenizer(UNMARKED), tmp_path, rows, reader)


def test_packing_loses_nothing_and_leaves_little_room(tokenizer, tmp_path):
    examples = [item[0] for item in read_chats(tokenizer, write_chats(tmp_path / "c.jsonl", 60), 64).items]
    rows = pack(examples, 64)
    assert sorted(id(e) for row in rows for e in row) == sorted(id(e) for e in examples)
    sizes = [sum(len(e.ids) for e in row) for row in rows]
    assert max(sizes) <= 64
    # No two rows would fit into one, or the texts would have been put there.
    assert sorted(sizes)[0] + sorted(sizes)[1] > 64
    assert [[id(e) for e in row] for row in pack(examples, 64)] == [[id(e) for e in row] for row in rows]


def test_a_row_holds_its_texts_from_their_own_beginnings(tokenizer, tmp_path):
    one, two = (item[0] for item in read(tokenizer, tmp_path, [{"text": "abc"}, {"prompt": "d", "completion": "e"}]))
    batch = collate([([one, two],), ([two],)])
    assert batch.ids.shape == (2, 1, 9)
    assert batch.positions[0, 0].tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3]
    assert batch.positions[1, 0].tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 4]
    assert batch.learnt[0, 0].tolist() == [False, True, True, True, True, False, False, True, True]
    assert batch.learnt[1].sum() == 2


@pytest.mark.parametrize("packed", [True, False])
def test_a_step_sees_what_seed_and_number_say(tokenizer, tmp_path, packed):
    examples = read_chats(tokenizer, write_chats(tmp_path / "c.jsonl", 30), 48)
    blocks = ChatBlocks(examples, 48, 4, seed=3, packed=packed)
    seen = [blocks.batch(step) for step in range(20)]
    for step in (13, 0, 19):
        again = ChatBlocks(examples, 48, 4, seed=3, packed=packed).batch(step)
        assert torch.equal(again.ids, seen[step].ids)
        assert torch.equal(again.learnt, seen[step].learnt)
    assert any(not torch.equal(ChatBlocks(examples, 48, 4, 4, packed).batch(s).ids, seen[s].ids) for s in range(3))
    # An epoch visits each row once.
    rows = [seen[n // 4].ids[n % 4, 0].tolist() for n in range(2 * len(blocks.rows))]
    keys = [tuple(np.trim_zeros(row, "b")) for row in rows]
    assert sorted(keys[: len(blocks.rows)]) == sorted(keys[len(blocks.rows) :])
    assert keys[: len(blocks.rows)] != keys[len(blocks.rows) :]


def test_a_change_of_the_data_changes_its_hash(tokenizer, tmp_path):
    first = read_pairs(tokenizer, write_pairs(tmp_path / "a.jsonl"), 32)
    assert first.sha256 == read_pairs(tokenizer, write_pairs(tmp_path / "b.jsonl"), 32).sha256
    assert first.sha256 != read_pairs(tokenizer, write_pairs(tmp_path / "c.jsonl", seed=2), 32).sha256
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    # Where the prompt ends is part of the data.
    lines[0]["prompt"], lines[0]["chosen"] = lines[0]["prompt"] + lines[0]["chosen"][0], lines[0]["chosen"][1:]
    assert first.sha256 != read_pairs(tokenizer, write_lines(tmp_path / "d.jsonl", lines), 32).sha256


def test_text_is_learnt_whole():
    batch = TextRows(TrainBlocks(tiny_tokens(), 16, 4, 0, 1)).batch(2)
    assert torch.equal(batch.ids[:, 0], TrainBlocks(tiny_tokens(), 16, 4, 0, 1).batch(2).ids)
    assert batch.learnt[..., 1:].all()
    assert not batch.learnt[..., 0].any()
    # Of documents kept apart none is foretold by the one before.
    blocks = TrainBlocks(tiny_tokens(), 16, 4, 0, 1, "reset")
    batch, rows = TextRows(blocks).batch(2), blocks.batch(2)
    assert torch.equal(batch.positions[:, 0], rows.positions)
    assert torch.equal(batch.learnt[:, 0], rows.positions != 0)
