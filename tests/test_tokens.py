"""Text tokenised once: places of documents, the cache of shards, and what becomes of it when a run dies or a file rots."""

import copy
import os
import shutil
import signal
import time
import tracemalloc
from itertools import count
from pathlib import Path

import numpy as np
import pytest
from tokenizers import normalizers
from transformers import AutoTokenizer, PreTrainedTokenizer

import hybridize.data.stored as stored
import hybridize.data.tokens as tokens
from hybridize.data import read_documents, tokenize
from hybridize.data.stored import stored_tokens
from hybridize.data.tokens import Sharded
from hybridize.errors import ConfigError, DataError
from tests.eval.toys import DOCUMENTS, save_tokenizer
from tests.test_data import letters

ODD = ["été à l'œuvre 🙂🙂 naïve", "\n\nbegins with empty lines", "", "x", "ﬁn\u0301al é", "a" * 50 + "\n", "end"]


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(path)
    return AutoTokenizer.from_pretrained(path)


@pytest.fixture
def small_pieces(monkeypatch):
    """Several pieces a shard and several shards a text."""
    monkeypatch.setattr(tokens, "PIECE_CHARS", 300)
    monkeypatch.setattr(stored, "SHARD_PIECES", 3)


def same(found, expected):
    assert np.array_equal(found.ids[:], expected.ids)
    assert np.array_equal(found.starts, expected.starts)
    assert (found.text_bytes, found.sha256, found.bos_id) == (expected.text_bytes, expected.sha256, expected.bos_id)
    assert found.max_id == expected.max_id == expected.ids.max()


@pytest.mark.parametrize("normalise", [False, True])
def test_documents_start_where_the_offsets_say(bpe, normalise):
    if normalise:
        bpe = copy.deepcopy(bpe)
        bpe.backend_tokenizer.normalizer = normalizers.NFKC()
    documents = [*ODD, *DOCUMENTS[:5]]
    text = "\n".join(documents)
    offsets = bpe.backend_tokenizer.encode(text, add_special_tokens=False).offsets
    begins = np.cumsum([0, *(len(document) + 1 for document in documents[:-1])])
    # From the definition: the first token whose first character lies in the document or behind its start.
    expected = [next((i for i, (start, _) in enumerate(offsets) if start >= begin), None) for begin in begins]
    found = tokenize(bpe, documents)
    assert found.starts.tolist() == sorted({place for place in expected if place is not None})
    assert found.starts.dtype == np.int64
    assert len(found.starts) > len(documents) - 3
    # Counting from each document tokenised alone would be another thing where tokens meet a newline.
    assert found.ids.tolist() == bpe(text, add_special_tokens=False)["input_ids"]


def test_pieces_and_threads_change_nothing(bpe, monkeypatch):
    whole = tokenize(letters(), DOCUMENTS)
    monkeypatch.setattr(tokens, "PIECE_CHARS", 100)
    same(tokenize(letters(), iter(DOCUMENTS)), whole)
    pieces = list(tokens.pieces(DOCUMENTS))
    assert "".join(piece.text for piece in pieces) == "\n".join(DOCUMENTS)
    one, four = (list(tokens.encode_pieces(bpe, pieces, threads)) for threads in (1, 4))
    assert len(one) == len(pieces) > 20
    for (ids, starts), (more_ids, more_starts) in zip(one, four, strict=True):
        assert np.array_equal(ids, more_ids)
        assert np.array_equal(starts, more_starts)


class Letters(PreTrainedTokenizer):
    """A tokenizer in Python: one letter a token, and no offsets."""

    def __init__(self, **kwargs):
        self.table = {"<s>": 0, **{chr(c): i for i, c in enumerate([10, *range(32, 127)], 1)}}
        super().__init__(bos_token="<s>", **kwargs)

    @property
    def vocab_size(self):
        return len(self.table)

    def get_vocab(self):
        return dict(self.table)

    def _tokenize(self, text, **kwargs):
        return list(text)

    def _convert_token_to_id(self, token):
        return self.table[token]

    def _convert_id_to_token(self, index):
        return list(self.table)[index]


def test_a_tokenizer_without_offsets_reads_each_document_alone():
    slow = Letters()
    assert not slow.is_fast
    found, fast = tokenize(slow, DOCUMENTS[:7]), tokenize(letters(), DOCUMENTS[:7])
    assert np.array_equal(found.starts, fast.starts)
    assert np.array_equal(found.ids, fast.ids)


def test_shards_read_as_one_array():
    whole = np.arange(20)
    joined = Sharded([whole[:3], whole[3:4], whole[4:4], whole[4:15], whole[15:]])
    assert len(joined) == 20
    for start in range(0, 21):
        for stop in range(0, 21):
            assert np.array_equal(joined[start:stop], whole[start:stop])
    assert np.array_equal(joined[:], whole)
    assert np.array_equal(joined[:-3], whole[:-3])
    with pytest.raises(ValueError, match="step"):
        joined[::2]


def test_the_cache_holds_what_tokenize_gives(bpe, tmp_path, small_pieces, monkeypatch):
    expected = tokenize(bpe, DOCUMENTS)
    told = []
    first = stored_tokens(bpe, lambda: DOCUMENTS, tmp_path, lambda *call: told.append(call))
    same(first, expected)
    (folder,) = tmp_path.iterdir()
    assert folder.name == expected.sha256
    assert len(list(folder.glob("*.tokens"))) == len(told) > 5
    assert [done for _, done, _ in told] == sorted(done for _, done, _ in told)
    assert told[-1] == ("tokenise", expected.text_bytes, expected.text_bytes)
    assert isinstance(first.ids.parts[0], np.memmap)
    # The second time nothing is tokenised; another text and another tokenizer have places of their own.
    monkeypatch.setattr(stored, "encode_pieces", None)
    same(stored_tokens(bpe, lambda: iter(DOCUMENTS), tmp_path), expected)
    monkeypatch.undo()
    stored_tokens(bpe, lambda: DOCUMENTS[1:], tmp_path)
    stored_tokens(letters(), lambda: DOCUMENTS, tmp_path)
    assert len(list(tmp_path.iterdir())) == 3
    with pytest.raises(DataError, match="no tokens"):
        stored_tokens(bpe, lambda: [], tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="expected a folder"):
        stored_tokens(bpe, lambda: DOCUMENTS, tmp_path / "file")


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["00001.tokens", "index.json"])
@pytest.mark.parametrize(
    "damage", [flip, lambda p: p.write_bytes(p.read_bytes()[:-4]), Path.unlink, lambda p: p.write_text("[]")]
)
def test_a_damaged_cache_is_refused_in_one_line(bpe, tmp_path, small_pieces, name, damage):
    stored_tokens(bpe, lambda: DOCUMENTS, tmp_path)
    (folder,) = tmp_path.iterdir()
    damage(folder / name)
    with pytest.raises(DataError, match="damaged.*remove that folder and run again") as caught:
        stored_tokens(bpe, lambda: DOCUMENTS, tmp_path)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("after", [1, 4])
def test_a_killed_run_goes_on_behind_its_last_shard(bpe, tmp_path, small_pieces, monkeypatch, after):
    expected, calls = tokenize(bpe, DOCUMENTS), count(1)

    def kill(*told):
        if next(calls) == after:
            os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        try:
            stored_tokens(bpe, lambda: DOCUMENTS, tmp_path, kill)
        finally:
            os._exit(0)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    assert not (tmp_path / expected.sha256).exists()
    partial = tmp_path / f".{expected.sha256}.partial" / "files"
    # What a kill cuts short in the middle of a file.
    (partial / "00009.tokens").write_bytes(b"123")
    taken, real = [], stored.encode_pieces

    def counted(tokenizer, stream):
        for part in real(tokenizer, stream):
            taken.append(part)
            yield part

    monkeypatch.setattr(stored, "encode_pieces", counted)
    same(stored_tokens(bpe, lambda: DOCUMENTS, tmp_path), expected)
    assert len(taken) == len(list(tokens.pieces(DOCUMENTS))) - 3 * after
    assert [path.name for path in tmp_path.iterdir()] == [expected.sha256]


def test_a_text_that_changes_while_it_is_read_leaves_nothing(bpe, tmp_path, small_pieces):
    for other in ([*DOCUMENTS[:-1], "changed"], DOCUMENTS[:-1], [*DOCUMENTS, "more"], ["changed", *DOCUMENTS[1:]]):
        versions = iter([DOCUMENTS, other])
        with pytest.raises(DataError, match="changed while it was read"):
            stored_tokens(bpe, lambda versions=versions: next(versions), tmp_path)
        # Shards of before the change may stay; they are those of the text that names the cache.
        same(stored_tokens(bpe, lambda: DOCUMENTS, tmp_path), tokenize(bpe, DOCUMENTS))
        shutil.rmtree(tmp_path / tokenize(bpe, DOCUMENTS).sha256)


def peak(work):
    """Bytes that Python and numpy hold at the highest point of a call; memory maps are not among them."""
    tracemalloc.start()
    try:
        result = work()
        return tracemalloc.get_traced_memory()[1], result
    finally:
        tracemalloc.stop()


@pytest.mark.slow
def test_memory_does_not_grow_with_the_text(bpe, tmp_path, monkeypatch):
    monkeypatch.setattr(tokens, "PIECE_CHARS", 1 << 12)
    monkeypatch.setattr(stored, "SHARD_PIECES", 4)
    monkeypatch.setattr(tokens, "MOST_THREADS", 2)

    def text(documents):
        return (f"{i} " + DOCUMENTS[i % 9] * 20 for i in range(documents))

    tokenize(bpe, text(1))
    short, _ = peak(lambda: stored_tokens(bpe, lambda: text(100), tmp_path))
    long, found = peak(lambda: stored_tokens(bpe, lambda: text(800), tmp_path))
    whole, held = peak(lambda: tokenize(bpe, text(800)))
    assert np.array_equal(found.ids[:], held.ids)
    size = held.ids.nbytes
    assert size > 1_000_000
    # What both hold is the buffer that files are hashed through.
    assert long - short < 0.2 * size
    # The same text in memory.
    assert whole > size


def test_a_long_document_of_a_txt_comes_in_parts_that_join_to_it(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    lines = "".join(f"line {i}\n" for i in range(100))
    path.write_text(lines + "<|endoftext|>\nshort\n")
    whole = list(read_documents(path))
    monkeypatch.setattr("hybridize.data.documents.LONGEST_CHARS", 100)
    parts = list(read_documents(path))
    assert len(parts) > 5
    assert "\n".join(parts) == "\n".join(whole)
    assert tokenize(letters(), parts).sha256 == tokenize(letters(), whole).sha256


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_processes_that_want_the_same_text_wait_for_one(bpe, tmp_path, small_pieces, monkeypatch):
    expected = tokenize(bpe, DOCUMENTS)
    read, write = os.pipe()

    def slowly(*told):
        os.write(write, b".")
        time.sleep(0.02)

    child = os.fork()
    if child == 0:
        try:
            stored_tokens(bpe, lambda: DOCUMENTS, tmp_path, slowly)
        finally:
            os._exit(0)
    os.read(read, 1)
    # The other one is at work by now; this one could not do it.
    monkeypatch.setattr(stored, "encode_pieces", None)
    same(stored_tokens(bpe, lambda: DOCUMENTS, tmp_path), expected)
    assert os.waitpid(child, 0)[1] == 0
    os.close(read)
    os.close(write)
