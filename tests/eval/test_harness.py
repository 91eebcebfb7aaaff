"""What lm-eval asks a model: the same answers in any batch, kept while they come, and never those of another model."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("lm_eval", reason="lm-eval is an optional dependency")
pytestmark = pytest.mark.filterwarnings("ignore::Warning")  # lm-eval, datasets and their imports warn at will

import torch  # noqa: E402
from lm_eval.api.instance import Instance  # noqa: E402

from hybridize.checkpoint import load_model  # noqa: E402
from hybridize.eval import PROBES, evaluate  # noqa: E402
from hybridize.eval.evaluate import items_path  # noqa: E402
from hybridize.eval.harness import Answers, Harness  # noqa: E402
from tests.eval.sets import write_sets  # noqa: E402
from tests.eval.toys import context_of, toy_base, toy_hybrid  # noqa: E402
from tests.tolerances import assert_close  # noqa: E402

ROOT = Path(__file__).parents[2]
HYBRID = [{"name": "mamba2"}, {"name": "streaming", "sink_tokens": 2, "window_tokens": 8}, {"name": "attention"}]
TASKS = ["arc_easy", "blimp", "hellaswag", "lambada_openai", "mmlu"]
SETTINGS = {"until": ["\n"], "max_gen_toks": 6, "do_sample": False}


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    return write_sets(tmp_path_factory.mktemp("sets"))


def requests(kind, count=7):
    """Requests of very different lengths."""
    texts = ["The king saw the fox near the lake. " * n + "It was" for n in range(count)]
    arguments = {"loglikelihood": lambda t: (t, " near the lake."), "loglikelihood_rolling": lambda t: (t,)}
    arguments["generate_until"] = lambda t: (t, SETTINGS)
    return [
        Instance(request_type=kind, doc={}, arguments=arguments[kind](text), idx=0, metadata=("toy", n, 1))
        for n, text in enumerate(texts)
    ]


def test_any_batch_gives_the_same_answers(base, tokenizer, tmp_path):
    """Of a hybrid, whose states see the padding of a batch unless it is masked."""
    model = load_model(toy_hybrid(base, tmp_path, HYBRID), torch.float32)
    alone, together = (Harness(context_of(model, tokenizer), size, None) for size in (1, 8))
    for kind in ("loglikelihood", "loglikelihood_rolling"):
        one, eight = (
            torch.tensor([a[0] if isinstance(a, tuple) else a for a in getattr(harness, kind)(requests(kind))])
            for harness in (alone, together)
        )
        assert_close(eight, one, "fp32")
        assert len(set(one.tolist())) == len(one)
    said = alone.generate_until(requests("generate_until"))
    assert together.generate_until(requests("generate_until")) == said

    class Unmasked(Harness):
        def _model_generate(self, *args, attention_mask, **kwargs):
            return super()._model_generate(*args, attention_mask=torch.ones_like(attention_mask), **kwargs)

    assert Unmasked(context_of(model, tokenizer), 8, None).generate_until(requests("generate_until")) != said


class Calls:
    """Counts how often a model is run."""

    def __init__(self, model):
        self.count = 0
        model.register_forward_hook(self)

    def __call__(self, *_):
        self.count += 1


class Stop(Exception):
    pass


def stop_after(answers):
    seen = []

    def progress(label, done, total):
        seen.append(label)
        if len(seen) == answers:
            raise Stop

    return progress


def test_a_stopped_evaluation_asks_only_what_is_left(base, tokenizer, sets, tmp_path):
    model = load_model(base, torch.float32)
    calls = Calls(model)
    probe = PROBES.build({"name": "lm_eval", "tasks": TASKS, "data_dir": str(sets), "batch_size": 2})
    undisturbed = probe(context_of(model, tokenizer, answers=tmp_path / "whole"))
    all_of_them, calls.count = calls.count, 0
    with pytest.raises(Stop):
        probe(context_of(model, tokenizer, answers=tmp_path / "killed", progress=stop_after(26)))
    before, calls.count = calls.count, 0
    assert 4 < before < all_of_them - 4
    # A kill may also cut the last line short.
    (kept,) = (tmp_path / "killed").rglob("*.jsonl")
    with kept.open("a") as stream:
        stream.write('\n{"half a line": [-1.')
    again = probe(context_of(model, tokenizer, answers=tmp_path / "killed"))
    # The call that was stopped is made again, no other.
    assert calls.count == all_of_them - before + 1
    assert again == undisturbed
    calls.count = 0
    assert probe(context_of(model, tokenizer, answers=tmp_path / "killed")) == undisturbed
    assert calls.count == 0
    # The line that was cut short has not swallowed the next.
    assert len(Answers(kept.parent).known) == len(Answers(next((tmp_path / "whole").rglob("*.jsonl")).parent).known)


def test_two_models_never_share_answers(base, sets, tmp_path):
    other = toy_base(tmp_path)
    model = load_model(other, torch.float32)
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight.mul_(-2)
    model.save_pretrained(other)
    probe = {"name": "lm_eval", "tasks": ["arc_easy", "hellaswag"], "data_dir": str(sets)}
    alone = [evaluate(folder, [probe]).metrics for folder in (base, other)]
    assert alone[0] != alone[1]
    cache = tmp_path / "cache"
    assert [evaluate(folder, [probe], cache=cache).metrics for folder in (base, other)] == alone
    files = sorted((cache / "answers").rglob("*.jsonl"), key=lambda path: path.stat().st_mtime_ns)
    assert len(files) == 2
    # What keeps them apart is the folder: the answers of the first under the name of the second are believed.
    for report in (cache / "reports").iterdir():
        report.unlink()
    files[1].write_bytes(files[0].read_bytes())
    assert evaluate(other, [probe], cache=cache).metrics == alone[0]


def test_answers_of_sampling_are_not_kept(base, tokenizer, tmp_path):
    harness = Harness(context_of(load_model(base, torch.float32), tokenizer), 8, tmp_path)
    drawn = requests("generate_until", 2)
    for request in drawn:
        request.arguments = (request.args[0], {**SETTINGS, "do_sample": True, "temperature": 5.0, "until": []})
    assert harness.generate_until(drawn) != harness.generate_until(drawn)
    assert Answers(tmp_path).known == {}


def start(words, processes=1):
    """`hybridize eval` in other processes."""
    starter = [sys.executable, "-m"]
    if processes > 1:
        starter += ["torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), "-m"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*starter, "hybridize.eval", *words], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip


@pytest.mark.slow
def test_two_processes_give_the_report_of_one(base, sets, tmp_path):
    """Documents are shared out, a probe that cannot be divided is measured once; every answer is kept once."""
    # Each has a document for each process.
    tasks = ["arc_easy", "blimp", "hellaswag", "lambada_openai", "mmlu_us_foreign_policy"]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("name: probes\nplan: {keep: all}\nevaluate: [{name: recall, pairs: [2], samples: 4}]\n")
    names = ["--tasks", ",".join(tasks), "--task-data", str(sets), "--recipe", str(recipe)]
    run = start([str(base), *names, "--out", str(tmp_path / "two.json"), "--cache", str(tmp_path / "two")], 2)
    probes = [{"name": "recall", "pairs": [2], "samples": 4}, {"name": "lm_eval", "tasks": tasks, "data_dir": str(sets)}]
    evaluate(base, probes, base=base, out=tmp_path / "one.json", cache=tmp_path / "one")
    assert run.wait(200) == 0, run.stderr.read()[-3000:]
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    # Rows of other lengths in a batch round a perplexity otherwise; all else is equal to the last bit.
    rounded = [report["metrics"].pop("lambada_openai/perplexity")["value"] for report in (one, two)]
    assert rounded[0] == pytest.approx(rounded[1], rel=1e-5)
    assert one == two
    assert items_path(tmp_path / "one.json").read_text() == items_path(tmp_path / "two.json").read_text()
    files = {name: sorted((tmp_path / name / "answers").rglob("*.jsonl")) for name in ("one", "two")}
    assert [path.name for path in files["two"]] == ["00000.jsonl", "00001.jsonl"]
    assert set(Answers(files["two"][0].parent).known) == set(Answers(files["one"][0].parent).known)


@pytest.mark.slow
@pytest.mark.data
def test_a_killed_command_goes_on_where_it_was(shared_data, tmp_path):
    folder, sets = shared_data / "models" / "tinystories-656k", shared_data / "eval"
    tasks = ["arc_easy", "lambada_openai"]
    killed = start(
        [str(folder), "--tasks", ",".join(tasks), "--task-data", str(sets), "--limit", "60", "--cache", str(tmp_path / "cache")]
    )
    while sum(path.stat().st_size for path in (tmp_path / "cache").rglob("0*.jsonl")) < 5_000:
        assert killed.poll() is None, killed.stderr.read()[-3000:]
        time.sleep(0.005)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    (kept,) = (tmp_path / "cache").rglob("0*.jsonl")
    at_the_kill = len(Answers(kept.parent).known)
    probe = {"name": "lm_eval", "tasks": tasks, "data_dir": str(sets)}
    again = evaluate(folder, [probe], base=folder, limit=60, cache=tmp_path / "cache")
    assert again == evaluate(folder, [probe], base=folder, limit=60)
    answered = [key for line in kept.read_text().split("\n") if line.endswith("}") for key in json.loads(line)]
    assert len(answered) == len(set(answered)) > at_the_kill > 0
