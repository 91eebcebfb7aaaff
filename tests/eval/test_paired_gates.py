"""The paired bounds against definitions worked out another way, how often they err, and the gates that rest on them."""

import math

import numpy as np
import pytest

from bench.gates import MODELS, SHAPES, mean_bounds, recovered, smallest_drop, smallest_rise
from hybridize.core import Metric, Report
from hybridize.errors import ConfigError
from hybridize.eval import gate, parse_rule
from hybridize.eval.gates.paired import ratio_bounds, student_quantile
from tests.eval.test_gates import correct_and_nearly, report_of

Z = 1.6448536269514722


def test_pairing_is_what_makes_the_bound_tight():
    ours, base = correct_and_nearly()
    paired, _ = ratio_bounds(ours, base, 0.0, 0.95)
    # An exact count: what is lost is near Poisson(4), and P(Poisson(4) > 8) < 0.05 of 240 right items.
    assert 1 - 9 / base.sum() < paired < 1 - 5 / base.sum()
    generator = np.random.default_rng(1)
    picks = generator.integers(400, size=(2, 4000, 400))
    unpaired = np.quantile(ours[picks[0]].mean(1) / base[picks[1]].mean(1), 0.05)
    assert unpaired < 0.92 < 0.96 < paired


@pytest.mark.parametrize("chance", [0.0, 0.25])
def test_the_bound_is_where_a_test_of_the_ratio_turns(chance):
    """By bisection on the statistic of ours - ratio * base, with two items more, instead of by the roots of a quadratic."""
    ours, base = correct_and_nearly(count=120, lost=7)
    ours, base = ours - chance, base - chance
    found = ratio_bounds(ours, base, chance, 0.95)

    def turns(extra, low, high, sign):
        def statistic(ratio):
            scores = np.append(ours, extra[0]) - ratio * np.append(base, extra[1])
            return scores.mean() / (scores.std(ddof=1) / math.sqrt(len(scores)))

        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if statistic(middle) > sign * Z else (low, middle)
        return low

    unseen = ([1 - chance, -chance], [-chance, 1 - chance])
    expected = turns(unseen, 0.0, 1.0, 1), turns(unseen, 0.5, 2.0, -1)
    assert found == pytest.approx(expected, abs=1e-9)
    without = turns(([], []), 0.0, 1.0, 1)
    assert without > found[0] + 0.005


def test_two_that_agree_on_every_item_are_not_equal_beyond_doubt():
    low, high = ratio_bounds(np.ones(100), np.ones(100), 0.0, 0.95)
    assert low == pytest.approx(1 - Z * math.sqrt(2) / 101, abs=5e-4)
    assert low < 1 < high


def test_students_quantile_and_skewness():
    for freedom, known in ((4, 2.132), (9, 1.833), (29, 1.699), (120, 1.658)):
        assert student_quantile(0.95, freedom) == pytest.approx(known, abs=0.0025)
    values = np.random.default_rng(0).normal(size=200)
    symmetric = np.concatenate([values, -values])
    low, high = mean_bounds(symmetric, 0.95)
    assert high == pytest.approx(1.6487 * symmetric.std(ddof=1) / 20, rel=1e-3)
    assert low == pytest.approx(-high)
    # A long tail upwards moves the upper bound away from the mean, and the lower one nearer to it.
    skewed = np.random.default_rng(0).exponential(size=100)
    low, high = mean_bounds(skewed, 0.95)
    assert high - skewed.mean() > 1.2 * (skewed.mean() - low)
    assert mean_bounds(np.full(40, 0.25), 0.95) == (0.25, 0.25)


def test_recovery_errs_as_seldom_as_it_says_at_100_items():
    """Row "100, 0.6, 0.25, 0.8" of the table."""
    generator, trials = np.random.default_rng(0), 400
    slack = 3 * math.sqrt(0.05 * 0.95 / trials)
    assert (recovered(generator, trials, 100, MODELS[0], 0.0) < 0.69).mean() <= 0.05 + slack
    assert (recovered(generator, trials, 100, MODELS[0], 0.31) < 0.69).mean() >= 0.9
    # The estimate in place of its bound lets every second such loss pass.
    assert 0.4 < (recovered(generator, trials, 100, MODELS[0], 0.31, confidence=0.5) < 0.69).mean() < 0.6


@pytest.mark.slow
@pytest.mark.parametrize("count", [100, 500, 2000])
def test_rates_of_the_table(count):
    generator, trials = np.random.default_rng(1), 800
    slack = 3 * math.sqrt(0.05 * 0.95 / trials)
    for model in MODELS:
        drop, alarms, caught = smallest_drop(generator, trials, count, model)
        assert drop <= {100: 0.33, 500: 0.14, 2000: 0.07}[count]
        assert alarms <= 0.05 + slack
        assert caught >= 0.9
    for draw in SHAPES.values():
        rise, alarms, caught = smallest_rise(generator, trials, count, draw)
        assert rise <= 5 / math.sqrt(count)
        assert alarms <= 0.05 + slack
        assert caught >= 0.9


def lossy(count=100, rise=0.0, spread=0.05, seed=0):
    generator = np.random.default_rng(seed)
    base = generator.normal(2.0, 0.5, count)
    return base + rise + generator.normal(0, spread, count), base


@pytest.mark.parametrize(
    ("rise", "count", "passed", "words"),
    [
        (0.0, 100, True, "at most"),
        (0.1, 100, False, "at least"),
        (0.02, 100, False, "too few to decide"),
        (0.0, 29, False, "29 items, too few to decide"),
    ],
)
def test_max_rise_is_judged_by_the_upper_bound(rise, count, passed, words):
    ours, base = lossy(count, rise)
    reports = report_of(samples={"nll_at@64": ours}), report_of(samples={"nll_at@64": base})
    result = gate(*reports, [parse_rule("max_rise nll_at 0.02")]).gates[0]
    assert result.passed is passed
    assert words in result.detail
    assert result.value is None if count < 30 else result.value > (ours - base).mean()


def test_every_length_is_judged_and_the_worst_decides():
    near, far = lossy(rise=0.0), lossy(rise=0.3)
    reports = [report_of(samples={"nll_at@64": near[i], "nll_at@512": far[i]}) for i in (0, 1)]
    assert gate(*reports, [parse_rule("max_rise nll_at@64 0.05")]).passed
    result = gate(*reports, [parse_rule("max_rise nll_at@* 0.05")]).gates[0]
    assert not result.passed
    assert 0.29 < result.value < 0.32
    assert "nll_at@512 rises by 0.297" in result.detail
    with pytest.raises(ConfigError, match="Did you mean 'nll_at@"):
        gate(*reports, [parse_rule("max_rise nll_a@* 0.05")])
    with pytest.raises(ConfigError, match="better when high; use recovery"):
        gate(report_of(samples={"m": near[0]}), report_of(samples={"m": near[1]}), [parse_rule("max_rise m 1")])


def test_small_sets_are_judged_together_each_less_its_chance():
    ours, base = correct_and_nearly(count=2400, lost=24)
    parts = [slice(0, 40), slice(40, 2400)]
    reports = [report_of(samples={"a": scores[parts[0]], "b": scores[parts[1]]}) for scores in (ours, base)]
    spec = {"name": "recovery", "metrics": ["a", "b"], "min": 0.9, "chance": {"a": 0.5, "b": 0.25}}
    assert not gate(*reports, [spec]).passed
    result = gate(*reports, [{**spec, "together": True}]).gates[0]
    assert result.passed
    chance = (40 * 0.5 + 2360 * 0.25) / 2400
    assert f"a, b recovers {(ours.mean() - chance) / (base.mean() - chance):.6g}" in result.detail


def test_parity_is_of_items_not_of_means():
    base = np.linspace(1, 3, 10)
    swing = base + np.array([0.01, -0.01] * 5)
    same = report_of(samples={"perplexity": base, "needle@64": np.ones(10)})
    other = report_of(samples={"perplexity": swing, "needle@64": np.ones(10)})
    assert gate(same, same, [parse_rule("parity 0")]).passed
    result = gate(other, same, [parse_rule("parity 0.009")]).gates[0]
    assert not result.passed
    assert result.value == pytest.approx(0.01)
    assert "of 2 metrics perplexity differs most" in result.detail
    assert gate(other, same, [{"name": "parity", "max": 0.0, "metrics": ["needle@*"]}]).passed
    with pytest.raises(ConfigError, match="share no metric"):
        gate(report_of({"a": 1}), same, [parse_rule("parity 0")])


def test_amnesia_is_at_any_length_and_in_nats_where_nothing_could_be_recalled():
    before = {"needle@64": np.ones(80), "needle@4096": np.ones(80), "recall@4": np.zeros(80), "recall_nll@4": np.full(80, 2.0)}
    short = {**before, "needle@4096": np.array([1.0, 0.0] * 40)}
    rule = [parse_rule("amnesia 0.9")]
    kept = gate(report_of(samples=before), report_of(samples=before), rule).gates[0]
    assert kept.passed
    assert (
        "recall@4 of the baseline is not above chance (0 from it), so there is nothing to recover: this says nothing"
        in kept.detail
    )
    lost = gate(report_of(samples=short), report_of(samples=before), rule).gates[0]
    assert not lost.passed
    assert "needle@4096 recovers 0.5" in lost.detail
    assert "needle@64 recovers 1 of" in lost.detail
    worse = {**before, "recall_nll@4": np.full(80, 2.2)}
    assert "recall_nll@4 rises by 0.2" in gate(report_of(samples=worse), report_of(samples=before), rule).gates[0].detail
    nothing = {"recall@4": np.zeros(80)}
    assert not gate(report_of(samples=nothing), report_of(samples=nothing), rule).passed
    with pytest.raises(ConfigError, match="share none of"):
        gate(report_of(samples={"needle@64": np.ones(80)}), report_of(samples={"needle@128": np.ones(80)}), rule)


@pytest.mark.parametrize(
    ("value", "stderr", "rounds", "passed", "words"),
    [
        (1.3, 0.02, 5, True, "at least 1.25"),
        (1.25, 0.05, 5, False, "too few rounds to decide"),
        (1.1, 0.02, 5, False, "at most 1.14"),
        (2.0, 0.01, 2, False, "2 rounds, too few to decide"),
        (2.0, None, 1, False, "1 rounds, too few to decide"),
    ],
)
def test_decode_speed_allows_for_its_spread(value, stderr, rounds, passed, words):
    metric = Metric(value=value, stderr=stderr, samples=rounds, higher_is_better=True)
    report = Report(checkpoint="x", checkpoint_hash="", metrics={"decode_speedup@8192": metric})
    result = gate(report, None, [parse_rule("decode_speed 1.2")]).gates[0]
    assert result.passed is passed
    assert words in result.detail


def test_another_tokenizer_is_a_finding_and_other_items_without_one_are_a_mistake():
    ours, base = lossy()
    rules = [parse_rule("same_tokenizer"), parse_rule("max_rise perplexity 0.1")]
    here = report_of(samples={"perplexity": ours}, items="a", versions={"tokenizer": "1" * 64})
    there = report_of(samples={"perplexity": base}, items="b", versions={"tokenizer": "2" * 64})
    verdict = gate(here, there, rules)
    assert [result.passed for result in verdict.gates] == [False, False]
    assert "the tokenizer is 111111111111, expected the baseline's 222222222222" in verdict.gates[0].detail
    assert verdict.gates[1].name == "max_rise perplexity"
    assert "not judged" in verdict.gates[1].detail
    alike = report_of(samples={"perplexity": base}, items="b", versions={"tokenizer": "1" * 64})
    with pytest.raises(ConfigError, match="other items"):
        gate(here, alike, rules)
    with pytest.raises(ConfigError, match="the baseline names no tokenizer"):
        gate(here, report_of(samples={"perplexity": base}, items="a"), rules)


def test_scores_that_are_not_finite_are_an_error():
    ours, base = lossy()
    ours[3] = math.nan
    with pytest.raises(ConfigError, match="not finite"):
        gate(report_of(samples={"nll_at@64": ours}), report_of(samples={"nll_at@64": base}), [parse_rule("max_rise nll_at 1")])
