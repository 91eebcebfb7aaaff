"""Mixtures: how many rows of each text, in what order, and that it all follows from (seed, step)."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from hybridize.data import Mixture, Tokens, TrainBlocks, eval_blocks, read_tokens, spread_blocks, weighted_sources
from hybridize.distill.loop import own_rows
from hybridize.errors import ConfigError, DataError
from hybridize.pipeline import calibration_rows, split_text
from hybridize.recipe import parse_recipe, text_sources
from tests.test_data import letters

LENGTHS = [61, 47, 103]


def parts():
    """Texts whose tokens are all different, over all three: every token tells where it comes from."""
    ends = np.cumsum([0, *LENGTHS])
    return tuple(
        Tokens(ids=np.arange(a, b, dtype=np.int32), text_bytes=1, sha256=str(a), bos_id=999, starts=np.arange(0, b - a, 9))
        for a, b in zip(ends[:-1], ends[1:], strict=True)
    )


def mixture(*weights):
    texts = parts()[: len(weights)]
    return Mixture(names=tuple("abc"[: len(weights)]), parts=texts, weights=weights)


def widest(places, weights):
    """The largest distance of any text from its share over all prefixes of rows, in rows."""
    total = sum(Fraction(str(w)) for w in weights)
    counts = [0] * len(weights)
    worst = Fraction(0)
    for row, (part, _) in enumerate(places, 1):
        counts[part] += 1
        shares = (row * Fraction(str(weight)) / total for weight in weights)
        worst = max([worst, *(abs(count - share) for count, share in zip(counts, shares, strict=True))])
    return worst


@pytest.mark.parametrize("weights", [(0.7, 0.3), (1, 1, 1), (3, 2), (0.01, 0.99), (5, 0.25, 1.5), (0.33, 0.33, 0.34), (1000, 1)])
def test_every_prefix_of_rows_holds_the_shares(weights):
    text = mixture(*weights)
    window = len(text.order)
    places = [text.place(row) for row in range(3 * window + 17)]
    assert widest(places, weights) < 1
    total = sum(Fraction(str(w)) for w in weights)
    assert [3 * window * Fraction(str(w)) / total for w in weights] == [3 * count for count in text.counts]
    # One after the other, as a mixture by concatenation would have it, is far away.
    if window > 4:
        assert widest(sorted(places), weights) > 1


@pytest.mark.parametrize("seed", range(6))
def test_many_texts_with_odd_weights(seed):
    draw = np.random.default_rng(seed)
    weights = tuple(int(w) for w in draw.integers(1, 30, size=draw.integers(4, 9)))
    text = Mixture(names=weights, parts=(parts()[0],) * len(weights), weights=weights)
    assert widest([text.place(row) for row in range(2 * len(text.order))], weights) < 1


def test_weights_without_a_short_window_are_rounded():
    weights = (math.pi, math.e, 0.577)
    text = mixture(*weights)
    assert len(text.order) == 4096
    # To within one row a window: the order's own, and at most one for the rounding.
    assert widest([text.place(row) for row in range(4096)], weights) < 2
    with pytest.raises(ConfigError, match="the weight of b is below 1/4096"):
        mixture(1_000_000, 1.5)


@pytest.mark.parametrize("documents", ["joined", "reset"])
def test_each_text_has_epochs_in_which_each_sample_comes_once(documents):
    text = mixture(0.6, 0.3, 0.1)
    blocks = TrainBlocks(text, 8, 10, 3, 999, documents)
    rows = [row for step in range(50) for row in blocks.batch(step).ids[:, 1:].tolist()]
    ends = np.cumsum([0, *LENGTHS])
    for part, (a, b) in enumerate(zip(ends[:-1], ends[1:], strict=True)):
        own = [row for row in rows if any(a <= token < b for token in row)]
        assert all(token == 999 or a <= token < b for row in own for token in row)
        assert len(own) == [300, 150, 50][part]
        size = (b - a) + (len(parts()[part].starts) if documents == "reset" else 0)
        count = size // 7
        epochs = [[t for row in own[i : i + count] for t in row if t != 999] for i in range(0, len(own) - count, count)]
        assert len(epochs) >= 2
        for epoch in epochs:
            assert len(set(epoch)) == len(epoch)
        assert len({tuple(epoch) for epoch in epochs}) == len(epochs)


def test_a_mixture_of_one_is_the_text_itself():
    text = parts()[2]
    one = Mixture(names=("a",), parts=(text,), weights=(0.2,))
    for step in (0, 3, 40):
        assert torch.equal(TrainBlocks(one, 6, 4, 5, 999).batch(step).ids, TrainBlocks(text, 6, 4, 5, 999).batch(step).ids)


def test_a_text_draws_as_its_seed_says():
    """From the definition; another order would make earlier runs ones that cannot be repeated or resumed."""
    text, seed, body = parts()[2], 2**61 + 12345, 5
    rows = TrainBlocks(text, body + 1, 1, seed, 999)
    for epoch in (0, 1, 7):
        draw = np.random.default_rng([seed, epoch])
        offset = int(draw.integers(103))
        for index, block in enumerate(draw.permutation(20)):
            expected = text.ids[(offset + block * body + np.arange(body)) % 103]
            assert rows.batch(epoch * 20 + index).ids[0, 1:].tolist() == expected.tolist()


def test_rows_to_calibrate_on_are_spread_over_each_text():
    text = mixture(0.6, 0.3, 0.1)
    whole = eval_blocks(text.parts[0], 5, 999)
    assert torch.equal(spread_blocks(text.parts[0], 5, 999, 4), whole[torch.linspace(0, len(whole) - 1, 4).long()])
    assert torch.equal(spread_blocks(text.parts[0], 5, 999, 400), whole)
    recipe = parse_recipe({"name": "x", "plan": {}, "data": {"calibration_tokens": 50, "calibration_seq_tokens": 5}}, "x")
    config = type("Config", (), {"max_position_embeddings": 64})
    expected = [spread_blocks(part, 5, 999, count) for part, count in zip(text.parts, (6, 3, 1), strict=True)]
    assert torch.equal(calibration_rows(text, recipe, config), torch.cat(expected))
    assert torch.equal(calibration_rows(text.parts[0], recipe, config), spread_blocks(text.parts[0], 5, 999, 10))


@pytest.mark.parametrize("documents", ["joined", "reset"])
def test_any_process_at_any_step_sees_the_same_rows(documents):
    def make():
        return TrainBlocks(mixture(0.7, 0.2, 0.1), 8, 8, 11, 999, documents)

    def equal(a, b):
        assert torch.equal(a.ids, b.ids)
        assert documents == "joined" or torch.equal(a.positions, b.positions)

    whole = [make().batch(step) for step in range(25)]
    for world in (1, 2, 4):
        processes = [make() for _ in range(world)]
        for step, expected in enumerate(whole):
            shares = [own_rows(blocks.batch(step), rank, world) for rank, blocks in enumerate(processes)]
            assert torch.equal(torch.cat([share.ids for share in shares]), expected.ids)
    for start in np.random.default_rng(0).integers(1, 25, size=5):
        resumed = make()
        for step in range(start, 25):
            equal(resumed.batch(step), whole[step])
    # Order that depended on what was drawn before would show.
    assert not torch.equal(make().batch(3).ids, whole[4].ids)


@pytest.fixture
def files(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text("\n<|endoftext|>\n".join(f"{name} document {i} of many" for i in range(60)))
    (tmp_path / "shared.txt").write_text((tmp_path / "a.txt").read_text() + "\n<|endoftext|>\nonly here, the last one")
    return tmp_path


def test_bad_mixtures_are_one_line(files):
    a, b = str(files / "a.txt"), str(files / "b.txt")
    for sources, message in (
        ({}, "the mixture is empty"),
        ({a: 0}, "a.txt is 0, expected a number above 0"),
        ({a: 0.5, b: -1.0}, "b.txt is -1.0, expected a number above 0"),
        ({a: float("nan")}, "expected a number above 0"),
        ({a: float("inf")}, "expected a number above 0"),
        ({a: True}, "expected a number above 0"),
        ({a: "1"}, "expected a number above 0"),
        ({a: 1, f"{files}/./a.txt": 2}, "a.txt is in the mixture twice, under"),
        ({b: 1, f"{files}/*.txt": 2}, "b.txt is in the mixture twice, under"),
        ({"some/set": 1, "some/set, other/set": 1}, "some/set is in the mixture twice"),
    ):
        with pytest.raises(ConfigError, match=message) as caught:
            weighted_sources(sources)
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="the mixture is empty"):
        Mixture(names=(), parts=(), weights=())
    with pytest.raises(DataError, match=r"missing.txt: no such file"):
        weighted_sources({a: 1, f"{files}/missing.txt": 1})
    assert weighted_sources({a: 3, b: 0.5}) == {a: 3, b: 0.5}


def test_a_call_spells_a_mixture_as_a_recipe_does(files):
    plain = parse_recipe({"name": "x", "plan": {}}, "x")
    mixed = parse_recipe({"name": "x", "plan": {}, "data": {"mixture": {"a.txt": 2, "b.txt": 0.5}}}, "x")
    assert text_sources(mixed, None) == {"a.txt": 2, "b.txt": 0.5}
    assert text_sources(plain, "{a.txt: 2, web/x*.jsonl: 0.5, some/set:config: 1}") == {
        "a.txt": 2, "web/x*.jsonl": 0.5, "some/set:config": 1,
    }  # fmt: skip
    assert text_sources(plain, "0.7*a.txt") == "0.7*a.txt"
    for recipe, data, message in (
        (plain, None, "--data is missing"),
        (mixed, "a.txt", "given twice"),
        (plain, "{a.txt: 1, a.txt: 2}", "the key 'a.txt' is given twice"),
        (plain, "{a.txt: 1, b.txt", None),
        (plain, "{1: 2}", "expected {source: weight"),
        (plain, "{a.txt: }x}", "not valid YAML"),
    ):
        if message is None:
            assert text_sources(recipe, data) == data
            continue
        with pytest.raises(ConfigError, match=message):
            text_sources(recipe, data)
    with pytest.raises(ConfigError, match="data.mixture.a.txt"):
        parse_recipe({"name": "x", "plan": {}, "data": {"mixture": {"a.txt": "much"}}}, "x")


def documents_of(tokenizer, tokens):
    stretches = zip(tokens.starts, [*tokens.starts[1:], len(tokens.ids)], strict=True)
    return ["".join(tokenizer.convert_ids_to_tokens(tokens.ids[a:b].tolist())).rstrip("\n") for a, b in stretches]


def test_what_is_held_out_is_never_trained_on(files):
    tokenizer = letters()
    sources = {f"{files}/{name}.txt": weight for name, weight in (("a", 2), ("b", 1), ("shared", 1))}
    train, test = split_text(tokenizer, sources, None, 0.2, files / "tokens")
    kept = documents_of(tokenizer, test)
    trained = [documents_of(tokenizer, part) for part in train.parts]
    assert 15 < len(kept) < 55
    assert {text[0] for text in kept} >= {"a", "b"}
    assert not set(kept) & {text for part in trained for text in part}
    # Nothing is lost, and a document that two sources hold falls on one side in both.
    assert {text for part in trained for text in part} | set(kept) >= {f"b document {i} of many" for i in range(60)}
    assert set(trained[0]) == set(trained[2]) - {"only here, the last one"}
    # The same split whatever it is mixed with.
    alone = split_text(tokenizer, f"{files}/a.txt", None, 0.2)[0]
    assert alone.sha256 == train.parts[0].sha256
    assert sorted(path.name for path in (files / "tokens").iterdir()) == sorted(t.sha256 for t in (*train.parts, test))


def test_text_held_out_by_name_is_never_trained_on(files):
    tokenizer = letters()
    (files / "held.txt").write_text("a document 3 of many\n<|endoftext|>\na document 7 of many\n<|endoftext|>\nnew")
    train, test = split_text(tokenizer, {f"{files}/a.txt": 1, f"{files}/b.txt": 1}, f"{files}/held.txt", 0.05)
    kept = documents_of(tokenizer, test)
    assert kept == ["a document 3 of many", "a document 7 of many", "new"]
    assert [len(part.starts) for part in train.parts] == [58, 60]
    assert not set(kept) & set(documents_of(tokenizer, train.parts[0]))
    with pytest.raises(DataError, match=r"a.txt: all of it is in .*a.txt"):
        split_text(tokenizer, f"{files}/a.txt", f"{files}/a.txt", 0.05)


def test_a_source_is_named_when_it_is_too_short(files):
    text = read_tokens(letters(), {f"{files}/a.txt": 1, f"{files}/b.txt": 1})
    with pytest.raises(DataError, match=r"a.txt: \d+ tokens, expected at least one row of 99999"):
        TrainBlocks(text, 100_000, 1, 0, 0)
