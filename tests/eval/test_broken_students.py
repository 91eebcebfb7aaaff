"""Students that are wrong in one known way fail the gates of the suite `offline`, those that are not pass.

On real models, through `hybridize eval` and `hybridize gate`. Probes have fewer and shorter items here than in the suite; its
gates are as they are.
"""

import json

import pytest

from hybridize.cli import app
from hybridize.recipe import load_suite
from tests.eval.broken import BROKEN, GOOD, forgetful

pytestmark = pytest.mark.data

CUT = {
    "perplexity": {"context": 96},
    "kl_to_base": {"context": 128},
    "nll_by_position": {"context": 128},
    "copying": {"lengths_tokens": [64]},
    "induction": {"lengths_tokens": [64]},
    "needle": {"lengths_tokens": [96], "samples": 6},
    "recall": {"pairs": [2], "queries": 2},
    "state_bytes": {"check_tokens": 64},
}
SMALLEST, OTHERS = "stories260K", ("tinystories-656k", "babyllama-tok105")


@pytest.fixture(scope="module")
def measured(shared_data, tmp_path_factory):
    """A function that measures a directory against a base, and the suite it does so with."""
    folder = tmp_path_factory.mktemp("suite")
    suite = load_suite("offline").model_dump()
    suite["evaluate"] = [{**probe, **CUT.get(probe["name"], {})} for probe in suite["evaluate"]]
    (folder / "cut.yaml").write_text(json.dumps(suite))
    text = (shared_data / "text" / "tinystories" / "v1_dev.txt").read_text(encoding="utf-8")
    (folder / "text.txt").write_text(text[:20_000], encoding="utf-8")

    def measure(path, base, out):
        words = ["--quiet", "eval", path, "--base", base, "--suite", folder / "cut.yaml", "--data", folder / "text.txt",
                 "--limit", 32, "--out", out]  # fmt: skip
        assert app([str(word) for word in words]) == 0
        return out

    return measure


@pytest.fixture(scope="module")
def baselines(measured, shared_data, tmp_path_factory):
    """A function that gives the report of a base, measured once."""
    made = {}

    def baseline(name):
        if name not in made:
            base = shared_data / "models" / name
            made[name] = measured(base, base, tmp_path_factory.mktemp("baseline") / "base.json")
        return made[name]

    return baseline


def judged(path, base, measured, baseline, tmp_path):
    """Exit code of the gates of `offline` on a directory, and their results by name."""
    report, verdict = measured(path, base, tmp_path / "report.json"), tmp_path / "verdict.json"
    words = ["--quiet", "gate", report, "--baseline", baseline, "--suite", "offline", "--out", verdict]
    code = app([str(word) for word in words])
    return code, {gate["name"]: gate for gate in json.loads(verdict.read_text())["gates"]}


def check(student, name, shared_data, measured, baselines, monkeypatch, tmp_path):
    base, path = shared_data / "models" / name, tmp_path / "student"
    (GOOD | BROKEN)[student](base, path)
    if student == "reset every 64":
        forgetful(monkeypatch, path)
    code, gates = judged(path, base, measured, baselines(name), tmp_path)
    failed = [gate for gate in gates.values() if not gate["passed"]]
    if student in GOOD:
        assert code == 0, failed
        return
    assert code == 1
    if student == "another tokenizer":
        assert "the same text gives other ids" in gates["same_tokenizer"]["detail"]
        assert "not judged: the tokenizer" in gates["max_rise perplexity"]["detail"]
        return
    # Not for want of items: what is lost is shown.
    assert any("at least" in gate["detail"] or "at most" in gate["detail"] for gate in failed)
    assert not gates["max_rise kl_to_base"]["passed"]


@pytest.mark.slow
def test_the_least_of_them_on_the_smallest(shared_data, measured, baselines, monkeypatch, tmp_path):
    check("heads swapped", SMALLEST, shared_data, measured, baselines, monkeypatch, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", [SMALLEST, *OTHERS])
@pytest.mark.parametrize("student", [*GOOD, *BROKEN])
def test_broken_students_fail_and_sound_ones_pass(student, name, shared_data, measured, baselines, monkeypatch, tmp_path):
    check(student, name, shared_data, measured, baselines, monkeypatch, tmp_path)
