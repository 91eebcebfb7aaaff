"""lm-eval through a local YAML task, and names that do not exist."""

import json
import sys
import time

import pytest

pytest.importorskip("lm_eval", reason="lm-eval is an optional dependency")
pytestmark = pytest.mark.filterwarnings("ignore::Warning")  # lm-eval, datasets and their imports warn at will

import torch  # noqa: E402

from hybridize.checkpoint import load_model  # noqa: E402
from hybridize.errors import ConfigError, DataError, MissingDependencyError  # noqa: E402
from hybridize.eval import PROBES  # noqa: E402
from hybridize.eval.probes.lm_eval import LmEval  # noqa: E402
from tests.eval.sets import write_sets  # noqa: E402
from tests.eval.toys import context_of  # noqa: E402

TASK = """
task: toy_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - {{metric: acc}}
  - {{metric: acc_norm}}
metadata: {{version: 1}}
"""


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    """A folder with one multiple-choice task of 12 documents."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    data = tmp_path / "toy.jsonl"
    rows = [{"question": f"The king saw {n}", "choices": ["fox", "lake", "moon"], "answer": n % 3} for n in range(12)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "toy_choice.yaml").write_text(TASK.format(data=data))
    return tmp_path


def expected_hits(model, tokenizer):
    """Right answers by summed log-probabilities, computed without lm-eval."""
    hits = []
    for n in range(12):
        scores = []
        for choice in (" fox", " lake", " moon"):
            text, whole = (tokenizer(f"The king saw {n}{end}")["input_ids"] for end in ("", choice))
            logits = model(torch.tensor([whole])).logits[0].log_softmax(-1)
            scores.append(sum(logits[t - 1, whole[t]].item() for t in range(len(text), len(whole))))
        hits.append(float(scores.index(max(scores)) == n % 3))
    return hits


def test_a_local_task(base, tokenizer, tasks):
    model = load_model(base, torch.float32)
    probe = PROBES.build({"name": "lm_eval", "tasks": ["toy_choice"], "include_path": str(tasks)})
    result = probe(context_of(model, tokenizer))
    with torch.no_grad():
        hits = expected_hits(model, tokenizer)
    assert set(result.metrics) == {"toy_choice/acc", "toy_choice/acc_norm"}
    assert result.samples["toy_choice/acc"] == hits
    assert hits != hits[1:] + hits[:1]
    accuracy = result.metrics["toy_choice/acc"]
    assert accuracy.value == pytest.approx(sum(hits) / 12)
    assert accuracy.higher_is_better
    assert accuracy.samples == 12
    assert accuracy.stderr == pytest.approx(torch.tensor(hits).std().item() / 12**0.5)
    assert "lm_eval" in result.versions
    # Another number of documents is another set of items.
    fewer = probe(context_of(model, tokenizer, limit=5))
    assert len(fewer.samples["toy_choice/acc"]) == 5
    assert fewer.item_hashes["toy_choice/acc"] != result.item_hashes["toy_choice/acc"]


def test_a_task_of_ones_own_hides_one_that_is_shipped(base, tokenizer, tasks, tmp_path):
    mine = (tasks / "toy_choice.yaml").read_text()
    (tasks / "toy_choice.yaml").write_text(mine.replace("task: toy_choice", "task: piqa"))
    sets = write_sets(tmp_path / "sets")
    for folder, samples in ((str(tasks), 12), (None, 1)):
        probe = LmEval(tasks=["piqa", "boolq"], data_dir=str(sets), include_path=folder)
        result = probe(context_of(load_model(base, torch.float32), tokenizer))
        assert (result.metrics["piqa/acc"].samples, result.metrics["boolq/acc"].samples) == (samples, 2)


def test_data_that_cannot_be_read_is_one_line(base, tokenizer, tasks):
    (tasks / "toy.jsonl").unlink()
    probe = LmEval(tasks=["toy_choice"], include_path=str(tasks))
    with pytest.raises(DataError, match="toy_choice cannot be read here") as caught:
        probe(context_of(load_model(base, torch.float32), tokenizer))
    assert "\n" not in str(caught.value)


def test_unknown_names_are_refused_at_once(tasks):
    start = time.process_time()
    with pytest.raises(ConfigError, match=r"unknown lm-eval task 'arc_esy'. Did you mean 'arc_easy'"):
        PROBES.build({"name": "lm_eval", "tasks": ["hellaswag", "arc_esy"]})
    with pytest.raises(ConfigError, match=r"'toy_choise'. Did you mean 'toy_choice'.*Known in .*: toy_choice"):
        PROBES.build({"name": "lm_eval", "tasks": ["toy_choise"], "include_path": str(tasks)})
    assert time.process_time() - start < 10
    for name in ("arc_easy", "mmlu", "gsm8k", "mmlu_astronomy"):
        PROBES.build({"name": "lm_eval", "tasks": [name]})
    with pytest.raises(ConfigError, match="folder of YAML tasks"):
        PROBES.build({"name": "lm_eval", "tasks": ["a"], "include_path": str(tasks / "nowhere")})
    with pytest.raises(ConfigError, match="data_dir is .*nowhere', expected a folder of data sets"):
        PROBES.build({"name": "lm_eval", "tasks": ["piqa"], "data_dir": str(tasks / "nowhere")})
    with pytest.raises(ConfigError, match="tasks is empty"):
        PROBES.build({"name": "lm_eval", "tasks": []})


def test_names_of_a_local_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("hybridize.eval.probes.lm_eval._builtin_text", lambda: "task: toughest")
    sets = str(write_sets(tmp_path))
    for name in ("blimp", "blimp_tough", "mmlu_astronomy", "gsm8k", "tinystories_cloze"):
        PROBES.build({"name": "lm_eval", "tasks": [name], "data_dir": sets})
    with pytest.raises(ConfigError, match=r"'blimp_tought'. Did you mean 'blimp_tough'.*Known in .*: arc_challenge, ") as caught:
        PROBES.build({"name": "lm_eval", "tasks": ["arc_easy", "blimp_tought"], "data_dir": sets})
    assert "\n" not in str(caught.value)
    with pytest.raises(
        ConfigError, match=r"'tinystories_cloze' is read from tinystories_cloze/\*.jsonl in the folder that data_dir"
    ):
        PROBES.build({"name": "lm_eval", "tasks": ["tinystories_cloze"]})


def test_without_lm_eval_the_pip_line_is_given(tokenizer, tasks, monkeypatch):
    probe = LmEval(tasks=["toy_choice"], include_path=str(tasks))
    monkeypatch.setitem(sys.modules, "lm_eval.evaluator", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'hybridize\[eval\]'"):
        probe(context_of(None, tokenizer))
