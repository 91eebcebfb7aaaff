"""Ranks that follow layer scores: how a total is shared out, and what a plan asks for."""

import itertools
import re

import pytest
import torch

from hybridize.checkpoint import load_model
from hybridize.conversions import convert, plan
from hybridize.conversions.ranks import share_out, step_for
from hybridize.conversions.scores.energy import SHARES
from hybridize.core import Scores
from hybridize.errors import ConfigError
from hybridize.mixers import MIXERS


def test_share_out_by_hand():
    """16 of 64 dimensions by 5 : 2 : 1 : 0, one each at least."""
    assert share_out([5, 2, 1, 0], 16, 0.25, 1) == [9, 4, 2, 1]
    # A full one leaves its excess to the others, in turn.
    assert share_out([97, 1, 1, 1], 16, 0.5, 1) == [16, 6, 5, 5]
    assert share_out([5, 2, 1, 0], 16, 0.25, 2) == [8, 4, 2, 2]
    assert share_out([1, 1, 1, 1], 16, 0.25, 4) == [4, 4, 4, 4]
    assert share_out([0, 0, 0], 10, 0.5, 1) == [5, 5, 5]
    assert share_out([9, 1], 10, 0.99, 4) == [10, 4]
    assert [step_for(width, 32) for width in (8, 16, 32, 96, 512, 4096)] == [1, 1, 2, 4, 32, 32]
    with pytest.raises(ConfigError, match="less than 8 each"):
        share_out([1, 1], 32, 0.2, 8)


def test_share_out_keeps_the_total_and_the_order():
    generator = torch.Generator().manual_seed(3)
    for share, multiple in itertools.product((0.1, 0.37, 0.5, 0.93), (1, 2, 4)):
        weights = torch.rand(9, generator=generator).pow(3).tolist()
        ranks = share_out(weights, 64, share, multiple)
        assert sum(ranks) == min(int(share * 64 * 9 / multiple + 1e-9) * multiple, 9 * 64)
        assert all(multiple <= rank <= 64 and rank % multiple == 0 for rank in ranks)
        by_weight = [rank for _, rank in sorted(zip(weights, ranks, strict=True))]
        assert all(low <= high + multiple for low, high in itertools.pairwise(by_weight))


def settled(base, scores, **options):
    made = plan(base, {"keep": {"layers": []}, "mixer": {"name": "low_rank_kv", **options}}, "t", 0, scores)
    config = base.config
    return made, [MIXERS.build(layer.mixer).ranks(config) for layer in made.layers]


def test_ranks_follow_fisher(bases, scores):
    """Keys and values of every layer by their scores, at half of all dimensions; the plan holds numbers alone."""
    base = bases["llama"]
    made, ranks = settled(base, scores, rank={"fisher": 0.5, "multiple": 4}, method="svd")
    rows = scores.table("fisher").rows
    weights = [row.values[part] for row in rows for part in ("k_proj", "v_proj")]
    assert [rank for pair in ranks for rank in pair] == share_out(weights, 32, 0.5, 4)
    assert len(set(ranks)) > 1
    assert sum(map(sum, ranks)) == 3 * 32
    assert all(type(layer.mixer["rank"]) is int for layer in made.layers)
    assert plan(base, {"layers": {i: {**layer.mixer, "method": "svd"} for i, layer in enumerate(made.layers)}}, "t", 0) == made
    # A share of the values that is given stays, and layers still differ in all.
    _, fixed = settled(base, scores, rank={"fisher": 0.5, "multiple": 1}, v_share=0.5)
    assert all(keys == values for keys, values in fixed)
    # Layers of another spec share among themselves.
    section = {
        "layers": {
            0: {"name": "low_rank_kv", "rank": {"fisher": 0.25}},
            "default": {"name": "low_rank_kv", "rank": {"fisher": 0.5}},
        }
    }
    apart = [MIXERS.build(layer.mixer).ranks(base.config) for layer in plan(base, section, "t", 0, scores).layers]
    assert [sum(apart[0]), sum(map(sum, apart[1:]))] == [16, 64]


def test_ranks_follow_energy(bases, scores, tmp_path):
    base = bases["llama"]
    _, ranks = settled(base, scores, rank={"energy": 0.6, "multiple": 4})
    rows = [row for row in scores.table("energy").rows if row.candidate == {"name": "low_rank_kv", "group_heads": 4}]
    place = SHARES.index(0.6)
    assert ranks == [tuple(-(-row.values[part][place] // 4) * 4 for part in ("k_proj", "v_proj")) for row in rows]
    section = {"keep": {"layers": [1]}, "mixer": {"name": "mla", "method": "svd", "kv_rank": {"energy": 0.9}}}
    made = plan(base, section, "t", 0, scores)
    rows = [row for row in scores.table("energy").rows if row.candidate == {"name": "mla", "rope_dim": 8}]
    assert [made.layers[i].mixer["kv_rank"] for i in (0, 2)] == [
        -(-rows[i].values["kv"][SHARES.index(0.9)] // 2) * 2 for i in (0, 2)
    ]
    convert(made, tmp_path / "out")
    with torch.no_grad():
        assert torch.isfinite(load_model(tmp_path / "out")(torch.arange(3, 20)[None]).logits).all()


@pytest.mark.parametrize("total", range(20, 30))
def test_odd_sums_are_evened_within_the_total(bases, scores, total):
    _, ranks = settled(bases["llama"], scores, rank={"fisher": total / 192, "multiple": 1})
    assert total - 2 <= sum(map(sum, ranks)) <= total
    assert all(1 <= rank <= 32 for pair in ranks for rank in pair)


@pytest.mark.parametrize(
    ("mixer", "words"),
    [
        ({"name": "low_rank_kv", "rank": {"lazy": 0.5}}, "rank cannot follow 'lazy'. Known: energy, fisher"),
        ({"name": "low_rank_kv", "rank": {"energi": 0.5}}, "Did you mean 'energy'"),
        ({"name": "low_rank_kv", "rank": {"fisher": 1.5}}, "rank.fisher is 1.5, expected a share between 0 and 1"),
        ({"name": "low_rank_kv", "rank": {"fisher": "half"}}, "rank.fisher is 'half', expected a share"),
        (
            {"name": "low_rank_kv", "rank": {"fisher": 0.5, "energy": 0.5}},
            "expected one metric with a share, such as {energy: 0.5}",
        ),
        ({"name": "low_rank_kv", "rank": {}}, "rank is {}, expected one metric with a share"),
        ({"name": "low_rank_kv", "rank": {"fisher": 0.5, "multiple": 0}}, "rank.multiple is 0, expected an integer >= 1"),
        ({"name": "low_rank_kv", "rank": {"fisher": 0.01}}, "share 0.01 of 32 dimensions is less than 2 each"),
        ({"name": "low_rank_kv", "rank": {"energy": 0.9995}}, "energy is 0.9995, expected at most 0.999"),
        (
            {"name": "low_rank_kv", "rank": {"energy": 0.9}, "group_heads": 1},
            "none for {'name': 'low_rank_kv', 'group_heads': 1}",
        ),
        ({"name": "low_rank_kv", "rank": {"energy": 0.9}, "group_heads": "x"}, "group_heads is 'x', expected"),
        ({"name": "mla", "kv_rank": {"fisher": 0.9}, "method": "svd"}, "kv_rank cannot follow 'fisher'. Known: energy"),
        ({"name": "mla", "kv_rank": {"energy": 0.9}}, "kv_rank by energy follows the spectrum that method svd truncates"),
        ({"name": "mla", "kv_rank": {"energy": 0.9}, "method": "svd", "rope_dim": 4}, "Score again: .* --recipe RECIPE"),
        ({"name": ["mla"], "kv_rank": {"energy": 0.9}}, "expected a mapping with a name"),
        ({"name": "mamba2", "conv_tokens": {"energy": 0.9}}, "conv_tokens is {'energy': 0.9}, expected int"),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_requests_that_are_refused(bases, scores, mixer, words):
    with pytest.raises(ConfigError, match=words.replace("{", r"\{").replace("}", r"\}")) as caught:
        plan(bases["llama"], {"keep": {"layers": [0]}, "mixer": mixer}, "t", 0, scores)
    assert "\n" not in str(caught.value)


def test_without_scores_the_command_is_named(bases, scores):
    section = {"keep": {"layers": [0]}, "mixer": {"name": "low_rank_kv", "rank": {"fisher": 0.5}}}
    command = "hybridize score BASE --metric fisher --data TEXT --out scores.json, then --scores scores.json"
    with pytest.raises(ConfigError, match=f"plan: layer 1: mixer 'low_rank_kv': needs layer scores of metric fisher: {command}"):
        plan(bases["llama"], section, "t", 0)
    energy = Scores(base="", base_hash=scores.base_hash, tables=(scores.table("energy"),))
    with pytest.raises(ConfigError, match=re.escape(f"metric fisher (have energy): {command}")):
        plan(bases["llama"], section, "t", 0, energy)
    with pytest.raises(ConfigError, match="scores: are of another base"):
        plan(bases["qwen2"], section, "t", 0, scores)
    # Where no layer takes the mixer nothing is needed, and its other options are checked all the same.
    assert plan(bases["llama"], {**section, "keep": "all"}, "t", 0).kv_share == 1
    with pytest.raises(ConfigError, match="has no option 'grup'"):
        plan(bases["llama"], {"keep": "all", "mixer": {**section["mixer"], "grup": 1}}, "t", 0)


def test_scores_that_nothing_follows_are_spoken_of(bases, scores, caplog):
    plan(bases["llama"], {"keep": {"layers": [0]}, "mixer": {"name": "low_rank_kv", "rank": 4}}, "palu", 0, scores)
    assert "palu: nothing in the plan follows the scores given" in caplog.text
    caplog.clear()
    settled(bases["llama"], scores, rank={"fisher": 0.5})
    assert caplog.text == ""
