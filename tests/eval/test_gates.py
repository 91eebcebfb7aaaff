"""Gates just under, at and just over their limits, and the paired bound against one that is not paired."""

import numpy as np
import pytest

from hybridize.core import Metric, Report
from hybridize.errors import CheckpointError, ConfigError
from hybridize.eval import GATES, gate, parse_rule
from hybridize.eval.gates.recovery import Recovery


def report_of(metrics=None, samples=None, items="same", **fields):
    samples = samples or {}
    values = {name: Metric(value=value) for name, value in (metrics or {}).items()}
    for name, scores in samples.items():
        low = "nll" in name or name.startswith(("perplexity", "kl"))
        values[name] = Metric(value=float(np.mean(scores)), higher_is_better=not low, samples=len(scores))
    hashes = dict.fromkeys(samples, items)
    return Report(
        checkpoint="x", checkpoint_hash="0", metrics=values, item_hashes=hashes,
        samples={name: [float(score) for score in scores] for name, scores in samples.items()}, **fields,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("rule", "value", "passed"),
    [
        ("max_ratio perplexity 1.05", 10.4999, True),
        ("max_ratio perplexity 1.05", 10.5, True),
        ("max_ratio perplexity 1.05", 10.5001, False),
        ("max_value perplexity 10.5", 10.5, True),
        ("max_value perplexity 10.5", 10.50001, False),
        ("min_value perplexity 10.5", 10.5, True),
        ("min_value perplexity 10.5", 10.49999, False),
    ],
)
def test_limits_are_sharp(rule, value, passed):
    verdict = gate(report_of({"perplexity": value}), report_of({"perplexity": 10.0}), [parse_rule(rule)])
    assert verdict.passed is passed
    assert verdict.gates[0].passed is passed
    assert "perplexity is 10." in verdict.gates[0].detail
    assert f"limit of {rule.split()[-1]}" in verdict.gates[0].detail


def test_one_failed_gate_fails_the_verdict(tmp_path):
    rules = [parse_rule("max_value a 1"), parse_rule("max_value b 1")]
    assert gate(report_of({"a": 1, "b": 1}), None, rules).passed
    verdict = gate(report_of({"a": 1, "b": 2}), None, rules, out=tmp_path / "verdict.json")
    assert not verdict.passed
    assert '"passed": false' in (tmp_path / "verdict.json").read_text()


def test_a_name_without_its_length_is_the_largest_that_both_have():
    ours = report_of({"state_bytes@1024": 10, "state_bytes@8192": 20, "state_bytes@32768": 1})
    base = report_of({"state_bytes@1024": 10, "state_bytes@8192": 100})
    result = gate(ours, base, [parse_rule("max_ratio state_bytes 0.2")]).gates[0]
    assert result.value == pytest.approx(0.2)
    assert "state_bytes@8192" in result.detail
    assert gate(ours, None, [parse_rule("max_value state_bytes 1")]).passed
    with pytest.raises(ConfigError, match="no length that both"):
        gate(ours, report_of({"state_bytes@7": 1}), [parse_rule("max_ratio state_bytes 0.2")])


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("max_ratio perplexty 1.05", "'perplexty' is not in the report. Did you mean 'perplexity'"),
        ("max_ratio only_here 1", "'only_here' is not in the baseline"),
        ("max_ratio zero 1", "expected above 0; use max_value"),
        ("recovery perplexity 0.9", "better when low"),
    ],
)
def test_what_cannot_be_compared_is_an_error(rule, message):
    ours, base = report_of({"perplexity": 1, "only_here": 1, "zero": 0}), report_of({"perplexity": 1, "zero": 0})
    with pytest.raises(ConfigError, match=message):
        gate(ours, base, [parse_rule(rule)])


def test_a_gate_that_compares_needs_a_baseline():
    with pytest.raises(ConfigError, match="--baseline"):
        gate(report_of({"perplexity": 1}), None, [parse_rule("max_ratio perplexity 1")])
    with pytest.raises(ConfigError, match="at least one"):
        gate(report_of({"perplexity": 1}), None, [])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "max_ratio perplexity 1.05"),
        ("max_rato a 1", "Did you mean 'max_ratio'"),
        ("max_ratio a", "expected 'max_ratio METRIC MAX'"),
        ("max_ratio a b", "'b', expected a number"),
    ],
)
def test_a_rule_that_cannot_be_read_is_an_error(text, message):
    with pytest.raises(ConfigError, match=message):
        parse_rule(text)


def test_rules_and_recipes_say_the_same():
    assert parse_rule("recovery arc_easy,recall@8 0.97") == {
        "name": "recovery", "tasks": ["arc_easy", "recall@8"], "min": 0.97,
    }  # fmt: skip
    for name in GATES.names():
        words = {"metric": "m", "tasks": "m"}
        rule = " ".join([name, *(words.get(key, "1") for key in GATES.load(name).rule)])
        assert GATES.build(parse_rule(rule))


def correct_and_nearly(count=400, lost=4):
    """A baseline that is right on 60 % of the items, and one that loses a few of those."""
    base = np.random.default_rng(0).random(count) < 0.6
    ours = base.copy()
    ours[np.flatnonzero(base)[:lost]] = False
    return ours.astype(float), base.astype(float)


def test_recovery_is_judged_by_the_lower_bound():
    ours, base = correct_and_nearly()
    reports = report_of(samples={"arc/acc": ours}), report_of(samples={"arc/acc": base})
    spec = {"name": "recovery", "tasks": ["arc"], "min": 0.5}
    bound = gate(*reports, [spec]).gates[0].value
    assert bound < ours.mean() / base.mean()
    for limit, passed in (
        (bound - 1e-9, True),
        (bound, True),
        (bound + 1e-9, False),
        (ours.mean() / base.mean() - 1e-9, False),
    ):
        result = gate(*reports, [{**spec, "min": float(limit)}]).gates[0]
        assert result.value == bound
        assert result.passed is passed
        assert "400 items" in result.detail


def test_chance_is_taken_off_both():
    ours, base = correct_and_nearly(count=2000, lost=100)
    plain, guess = ({"name": "recovery", "metrics": ["m"], "min": 0.5, "chance": chance} for chance in (0.0, {"m": 0.25}))
    reports = report_of(samples={"m": ours}), report_of(samples={"m": base})
    values = [gate(*reports, [spec]).gates[0] for spec in (plain, guess)]
    assert values[1].value < values[0].value
    ratio = (ours.mean() - 0.25) / (base.mean() - 0.25)
    assert values[1].value == pytest.approx(ratio, abs=0.05)
    assert values[1].value < ratio


@pytest.mark.parametrize(
    ("ours", "base", "chance", "message"),
    [
        ([1.0] * 29, [1.0] * 29, 0.0, "29 items, too few to decide"),
        ([1.0] * 200, [0.0] * 200, 0.0, "not above chance"),
        ([1.0] * 200, [0.0, 1.0] * 100, 0.5, "not above chance"),
        # Above chance, but nobody would be shown to keep 95 % of so little, the baseline included.
        ([1.0] * 20 + [0.0] * 180, [1.0] * 20 + [0.0] * 180, 0.0, "the baseline itself would be shown to recover 0.88"),
        ([1.0] * 40, [1.0] * 40, 0.0, "40 items, too few to decide (at least 47 are needed)"),
    ],
)
def test_what_cannot_be_decided_fails_and_says_so(ours, base, chance, message):
    spec = {"name": "recovery", "metrics": ["m"], "min": 0.95, "chance": chance}
    reports = report_of(samples={"m": ours}), report_of(samples={"m": base})
    result = gate(*reports, [spec]).gates[0]
    assert not result.passed
    assert result.value is None
    assert message in result.detail
    # What is too little to lose may be passed over; too few items may not.
    passed_over = gate(*reports, [{**spec, "at_chance": "pass"}]).gates[0]
    assert passed_over.passed is ("too few" not in message)
    assert (passed_over.value, message in passed_over.detail) == (None, True)


def test_only_equal_items_are_paired():
    ours, base = correct_and_nearly()
    spec = {"name": "recovery", "metrics": ["m"], "min": 0.9}
    with pytest.raises(ConfigError, match="other items"):
        gate(report_of(samples={"m": ours}), report_of(samples={"m": base}, items="other"), [spec])
    with pytest.raises(ConfigError, match="other items"):
        gate(report_of(samples={"m": ours[:-1]}), report_of(samples={"m": base}), [spec])
    plain = Report(checkpoint="x", checkpoint_hash="", metrics={"m": Metric(value=1.0, higher_is_better=True)})
    with pytest.raises(ConfigError, match="no per-item scores"):
        gate(plain, report_of(samples={"m": base}), [spec])


def test_the_worst_of_several_decides_and_acc_norm_stands_for_its_task():
    ours, base = correct_and_nearly()
    worse = ours.copy()
    worse[:200] = 0
    spec = {"name": "recovery", "tasks": ["a", "b"], "min": 0.9}
    report = report_of(samples={"a/acc": worse, "a/acc_norm": ours, "b/acc": ours})
    baseline = report_of(samples={"a/acc": base, "a/acc_norm": base, "b/acc": base})
    assert gate(report, baseline, [spec]).passed
    spec["metrics"] = ["a/acc"]
    result = gate(report, baseline, [spec]).gates[0]
    assert not result.passed
    assert result.value < 0.7


def test_options_of_recovery_are_checked():
    for options in ({"tasks": [], "min": 1.0}, {"tasks": ["a"], "min": 1.0, "confidence": 1.0}):
        with pytest.raises(ConfigError):
            Recovery(**options)
    with pytest.raises(ConfigError, match="chance names 'b'"):
        Recovery(tasks=["a"], min=1.0, chance={"b": 0.5})


def test_reports_survive_json(tmp_path):
    ours, _ = correct_and_nearly()
    report = report_of({"perplexity": 3.0}, {"m": ours})
    assert Report.from_dict(report.to_dict()) == report
    with pytest.raises(CheckpointError, match="hybridize eval"):
        Report.from_dict({"verdict": 1})
