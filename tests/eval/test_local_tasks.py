"""Tasks that read a local folder: the rows they read, the prompts they ask, and the accuracies of known models."""

import json
from pathlib import Path

import pytest

pytest.importorskip("lm_eval", reason="lm-eval is an optional dependency")
pytestmark = pytest.mark.filterwarnings("ignore::Warning")  # lm-eval, datasets and their imports warn at will

import lm_eval  # noqa: E402
import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from lm_eval.api.task import ConfigurableTask  # noqa: E402
from lm_eval.tasks._yaml_loader import load_yaml  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402

from hybridize.checkpoint import load_model  # noqa: E402
from hybridize.errors import ConfigError, DataError  # noqa: E402
from hybridize.eval import PROBES  # noqa: E402
from hybridize.eval.context import EvalContext, Item  # noqa: E402
from hybridize.eval.harness import Harness  # noqa: E402
from hybridize.eval.local_tasks import load_local, templates  # noqa: E402
from tests.eval.sets import ROWS, write_sets  # noqa: E402
from tests.eval.toys import context_of  # noqa: E402
from tests.tolerances import assert_close  # noqa: E402

GENERATING = "gsm8k"


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    return write_sets(tmp_path_factory.mktemp("sets"))


@pytest.fixture(scope="module")
def model(base):
    return load_model(base, torch.float32)


def measure(model, tokenizer, tasks, folder, limit=None, **options):
    probe = PROBES.build({"name": "lm_eval", "tasks": tasks, "data_dir": str(folder), **options})
    return probe(context_of(model, tokenizer, limit=limit))


def test_every_shipped_task_is_measured(model, tokenizer, sets):
    names = sorted(set(templates()) - {GENERATING})
    result = measure(model, tokenizer, names, sets)
    measured = {name.split("/")[0] for name in result.metrics}
    inside = {"blimp_tough", "blimp_wh_vs_that_no_gap", "mmlu_astronomy", "mmlu_us_foreign_policy"}
    assert measured == {*names, *inside}
    assert result.metrics["arc_easy/acc"].samples == len(ROWS["arc_easy/test.jsonl"])
    assert result.metrics["arc_easy_validation/acc"].samples == 1
    assert result.metrics["openbookqa/acc"].samples == 1  # no test split is there, so the validation split
    parts = [result.metrics[f"blimp_{name}/acc"].value for name in ("tough", "wh_vs_that_no_gap")]
    assert result.metrics["blimp/acc"].value == sum(parts) / 2
    assert {name: len(items) for name, items in result.items.items()} == {k: len(v) for k, v in result.samples.items()}
    for name, items in result.items.items():
        for item, score in zip(items, result.samples[name], strict=True):
            assert (item.given == item.expected) == (score == 1.0), (name, item)
    assert result.items["winogrande/acc"][0].prompt == "The fox saw the king, so the "
    assert result.items["winogrande/acc"][0].expected == "king was away."
    assert result.items["boolq/acc"][0] == Item(
        prompt="The fox is near the lake.\nQuestion: is the fox near?\nAnswer:", expected="yes",
        given=result.items["boolq/acc"][0].given,
    )  # fmt: skip
    assert result.items["mmlu/acc"][2].prompt.endswith("Where?\nA. a\nB. b\nC. c\nD. d\nAnswer:")
    assert "about us foreign policy.\n\n" in result.items["mmlu/acc"][2].prompt
    assert result.items["hellaswag/acc"][0].prompt == "Sea: The ship"


@pytest.mark.parametrize(
    ("task", "shots", "file", "content", "message"),
    [
        ("piqa", 0, "piqa/validation.jsonl", None, r"piqa/validation.jsonl: not found; task 'piqa' is read from it. "
         "Put it there: JSON lines with goal, sol1, sol2, label, as in the published set"),
        ("blimp", 0, "blimp/*.jsonl", None, r"blimp/\*.jsonl: not found; task 'blimp'"),
        ("mmlu", 1, "mmlu/dev/astronomy.jsonl", None, r"mmlu/dev/astronomy.jsonl: not found; task 'mmlu_astronomy'"),
        ("piqa", 1, "piqa/train.jsonl", None, r"piqa/train.jsonl: not found; task 'piqa'"),
        ("lambada_openai", 1, "none", None, r"lambada_openai has no split to draw examples from; leave num_fewshot out"),
        ("gsm8k", None, "gsm8k/train*.jsonl", None, r"gsm8k/train\*.jsonl: not found; task 'gsm8k'"),
        ("gsm8k", None, "gsm8k/train_b.jsonl", "{}", r"train\*.jsonl: got train_b.jsonl, train_first.jsonl, expected one"),
        ("piqa", 0, "piqa/validation.jsonl", '{"goal": "a", "sol1": "b"}\n', r"line 1 has goal, sol1; expected an object with"),
        ("piqa", 0, "piqa/validation.jsonl", "\n[1]\n", r"line 2 has list; expected an object"),
        ("piqa", 0, "piqa/validation.jsonl", "goal\n", r"line 1 is not JSON \(Expecting value\)"),
        ("piqa", 0, "piqa/validation.jsonl", "\n", r"has no lines"),
    ],
)  # fmt: skip
def test_data_that_cannot_be_used_is_one_line(model, tokenizer, tmp_path, task, shots, file, content, message):
    folder = write_sets(tmp_path)
    if content is None:
        for path in folder.glob(file):
            path.unlink()
    else:
        (folder / file).write_text(content)
    with pytest.raises(DataError, match=message) as caught:
        measure(model, tokenizer, [task], folder, num_fewshot=shots)
    assert "\n" not in str(caught.value)


def test_what_a_model_has_no_room_for_is_one_line(model, tokenizer, sets, tmp_path):
    with pytest.raises(ConfigError, match="gsm8k generates up to 256 tokens, the model's context has 256; leave that task out"):
        measure(model, tokenizer, ["gsm8k"], sets)
    with pytest.raises(ConfigError, match="task 'blimp_tough' is in 'blimp' and in 'blimp_tough', expected it once"):
        measure(model, tokenizer, ["blimp", "blimp_tough"], sets)
    long = [{**ROWS["piqa/validation.jsonl"][0], "sol2": "~" * 300}]
    (tmp_path / "piqa").mkdir()
    (tmp_path / "piqa" / "validation.jsonl").write_text(json.dumps(long[0]) + "\n")
    with pytest.raises(DataError, match=r"the answer ' ~~~.*' has 301 tokens, expected 1 to 255"):
        measure(model, tokenizer, ["piqa"], tmp_path)


def asked(task, limit=40):
    """Every request of a task: (prompt, answer) pairs or, of generation, (prompt, settings)."""
    task.set_config("num_fewshot", task.config.num_fewshot or 0)
    task.set_fewshot_seed(1234)
    task.build_all_requests(limit=limit)
    return [request.args for request in task.instances]


OWN = {
    "arc_easy": "arc/arc_easy.yaml", "arc_challenge": "arc/arc_challenge.yaml", "boolq": "super_glue/boolq/default.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml", "lambada_openai": "lambada/lambada_openai.yaml", "piqa": "piqa/piqa.yaml",
    "openbookqa": "openbookqa/openbookqa.yaml", "winogrande": "winogrande/default.yaml", "gsm8k": "gsm8k/gsm8k.yaml",
    "mmlu_us_foreign_policy": "mmlu/default/mmlu_us_foreign_policy.yaml",
    "mmlu_astronomy": "mmlu/default/mmlu_astronomy.yaml", "blimp_wh_vs_that_no_gap": "blimp/wh_vs_that_no_gap.yaml",
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(OWN))
def test_prompts_and_answers_are_those_of_lm_eval(name, sets):
    """lm-eval's own definition on the same rows; where ours is another on purpose, the difference is all there is."""
    compare(name, sets)


@pytest.mark.slow
@pytest.mark.data
@pytest.mark.parametrize("name", ["arc_easy", "hellaswag", "mmlu_astronomy", "winogrande"])
def test_prompts_and_answers_of_the_real_sets_are_those_of_lm_eval(name, shared_data):
    compare(name, shared_data / "eval")


def compare(name, folder):
    ours = load_local(folder, name)

    class Own(ConfigurableTask):
        def download(self, dataset_kwargs=None, **kwargs):
            self.dataset = {**ours.dataset, "train": ours.dataset.get("train") or next(iter(ours.dataset.values()))}
            if name == "boolq":
                self.dataset["validation"] = ours.dataset["validation"].map(lambda row: {"label": int(row["answer"])})
            if name == "hellaswag":
                self.dataset["validation"] = Dataset.from_list(
                    [{**row, "ctx_a": row["ctx"], "ctx_b": ""} for row in ours.dataset["validation"]]
                )

    config = load_yaml(Path(lm_eval.__file__).parent / "tasks" / OWN[name], resolve_func=True)
    config = {key: value for key, value in config.items() if key not in ("tag", "group")}
    config |= {key: None for key in ("test_split", "training_split") if config.get(key) not in (None, *ours.dataset)}
    theirs = Own(config=config)
    assert [row["metric"] for row in theirs.config.metric_list] == [row["metric"] for row in ours.config.metric_list]
    assert theirs.VERSION == ours.VERSION
    assert str(theirs.config.filter_list) == str(ours.config.filter_list)
    expected = asked(theirs)
    if name.startswith("blimp"):
        expected = [(prompt, answer.removeprefix(" ")) for prompt, answer in expected]
    if name == "hellaswag":
        # Endings as they stand.
        endings = [ending for row in ours.dataset["validation"] for ending in row["endings"]]
        assert any(f" {e}" != answer for (_, answer), e in zip(expected, endings, strict=False))
        expected = [(prompt, f" {ending}") for (prompt, _), ending in zip(expected, endings, strict=False)]
    assert asked(ours) == expected
    targets = [[task.doc_to_target(row) for row in task.eval_docs] for task in (ours, theirs)]
    assert list(map(str, targets[0])) == list(map(str, targets[1]))


@torch.no_grad()
def log_likelihood(model, tokenizer, prompt, answer):
    """log p of the tokens from the first that is not the prompt's own, in fp64, one sequence at a time, without lm-eval."""
    own, whole = (tokenizer(text)["input_ids"] for text in (prompt, prompt + answer))
    same = next((t for t in range(len(own)) if own[t] != whole[t]), len(own))
    learnt = len(whole) - same
    whole = whole[-model.config.max_position_embeddings :]
    scores = model(torch.tensor([whole])).logits[0].log_softmax(-1)
    return sum(scores[t - 1, whole[t]].item() for t in range(len(whole) - learnt, len(whole)))


@pytest.mark.data
def test_a_tokenizer_that_merges_prompt_and_answer(shared_data):
    """Pieces of several words, and texts longer than the context, against the definition; lm-eval's split is another number."""
    folder = shared_data / "models" / "tinystories-656k"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = load_model(folder, torch.float32)
    context = EvalContext(checkpoint=folder, model=model, tokenizer=tokenizer)
    task = load_local(shared_data / "eval", "tinystories_cloze")
    task.set_config("num_fewshot", 0)
    task.build_all_requests()
    long = sorted(task.instances, key=lambda request: len(request.args[0]))[-1:]
    assert all(len(tokenizer("".join(request.args))["input_ids"]) > 512 for request in long)
    requests = [*task.instances[:4], *long]
    harness = Harness(context, 3, None)
    got = torch.tensor([score for score, _ in harness.loglikelihood(requests)], dtype=torch.float64)
    exact = load_model(folder, torch.float64)
    expected = torch.tensor([log_likelihood(exact, tokenizer, *request.args) for request in requests], dtype=torch.float64)
    assert_close(got, expected, "fp32")

    class Theirs(Harness):
        _encode_pair = Harness.__mro__[1]._encode_pair

    other = torch.tensor([score for score, _ in Theirs(context, 3, None).loglikelihood(requests)], dtype=torch.float64)
    with pytest.raises(AssertionError):
        assert_close(other, expected, "fp32")


# The README of the shared data, to the document; each depends on one of the rules that are not lm-eval's own.
REFERENCE = [
    ("tinystories-656k", "tinystories_cloze", None, 16, (106 / 279, 116 / 279)),
    ("tinystories-656k", "hellaswag", 200, 16, (55 / 200, 61 / 200)),
    ("stories260K", "blimp", 200, 64, (1763 / 2400,)),
]


@pytest.mark.slow
@pytest.mark.data
@pytest.mark.parametrize(("name", "task", "limit", "batch", "expected"), REFERENCE)
def test_known_models_have_their_known_accuracies(name, task, limit, batch, expected, shared_data):
    folder = shared_data / "models" / name
    probe = PROBES.build({"name": "lm_eval", "tasks": [task], "data_dir": str(shared_data / "eval"), "batch_size": batch})
    result = probe(EvalContext(checkpoint=folder, model=load_model(folder, torch.float32),
                               tokenizer=AutoTokenizer.from_pretrained(folder), limit=limit))  # fmt: skip
    found = [result.metrics[f"{task}/{metric}"].value for metric in ("acc", "acc_norm")[: len(expected)]]
    assert found == pytest.approx(expected, abs=1e-12)
