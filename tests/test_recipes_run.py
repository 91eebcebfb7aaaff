"""Recipes from the command line on the bundled model at toy budgets: whole, and killed amid training and resumed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hybridize.checkpoint import describe_base
from hybridize.core import read_json
from hybridize.distill import build_stages
from hybridize.distill.cost import Machine
from hybridize.pipeline import preview
from hybridize.recipe import builtin_recipes, load_recipe
from hybridize.storage import file_sha256, partial_folder
from tests.tiny import tiny_base

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
STEPS, ROWS, TOKENS = 4, 2, 64
# What a text this short has room for, where a recipe's own figure is far beyond it.
FITTED = {
    "lolcats": {"plan.mixer.window_tokens": 8},
    "lighttransfer": {"plan.mixer.window_tokens": 8},
    # A row of preferences is two texts.
    "mamba-in-llama": {"distill.2.data": "PAIRS", "distill.2.accumulate": 1, "distill.2.tokens": 2 * STEPS * ROWS * TOKENS},
}
RECIPES = [
    "zebra-llama", "hylo", "mamba-in-llama", "mohawk", "radlads", "lolcats", "mmmamba", "matvlm", "transmla", "lighttransfer",
]  # fmt: skip

# One interpreter serves all runs: each is a fork of it that gets its words as the command line does.
SERVER = """
import json, os, sys, torch
torch.set_num_threads(1)
# A process that is killed leaves its bytes with the kernel; no test takes the machine's power away.
os.fsync = os.fstat
from hybridize.cli import app
import hybridize.pipeline
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        os.dup2(2, 1)
        os._exit(app(json.loads(line)))
    print(child, flush=True)
    # Not reaped before the other side says so: its number stays its own, even when it ends before it is killed.
    if sys.stdin.readline() == "wait\\n":
        print(os.waitpid(child, 0)[1], flush=True)
"""
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """(runs words to their end or until so many steps are trained, what it has printed)."""
    with open(tmp_path_factory.mktemp("server") / "log", "wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", SERVER], cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
            env=ENVIRONMENT,
        )  # fmt: skip

        def tell(line):
            process.stdin.write(line + "\n")
            process.stdin.flush()

        def run(words, metrics=None, kill_at=None):
            tell(json.dumps(words))
            child = int(process.stdout.readline())
            while kill_at is not None and steps_in(metrics) < kill_at and Path(f"/proc/{child}").exists():
                time.sleep(0.002)
            if kill_at is not None:
                os.kill(child, signal.SIGKILL)
            tell("wait")
            return int(process.stdout.readline())

        yield run, lambda: Path(log.name).read_text()[-2000:]
        process.stdin.close()
        process.stdout.close()
        process.wait(30)


def steps_in(metrics):
    return metrics.read_text().count('"lr"') if metrics.exists() else 0


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """(a text, a file of preference pairs) made of this package's sources."""
    folder = tmp_path_factory.mktemp("text")
    sources = [path.read_text() for path in sorted((ROOT / "hybridize" / "conversions").glob("*.py"))]
    (folder / "text.txt").write_text("\n<|endoftext|>\n".join(source[:6000] for source in sources))
    pairs = [{"prompt": source[:40], "chosen": source[40:80], "rejected": source[200:230]} for source in sources]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return folder / "text.txt", folder / "pairs.jsonl"


def rows_of(stage, tokens):
    return {"contexts": f"[{tokens}]"} if "contexts" in stage else {"seq_tokens": tokens}


def words_of(recipe, texts, out):
    """The command line of a toy run: budgets and evaluation cut, gates that a toy can pass."""
    text, pairs = texts
    budget = {"tokens": STEPS * ROWS * TOKENS, "rows": ROWS, "accumulate": 1, "save_tokens": ROWS * TOKENS}
    changes = {}
    for i, stage in enumerate(load_recipe(recipe).distill):
        changes |= {f"distill.{i}.{key}": value for key, value in {**budget, **rows_of(stage, TOKENS)}.items()}
    changes |= FITTED.get(recipe, {})
    changes |= {
        "evaluate": "[{name: perplexity, context: 64, tokens: 512}, {name: state_bytes, contexts: [64]}]",
        "gates": "[{name: max_ratio, metric: perplexity, max: 1e9}, {name: max_ratio, metric: state_bytes, max: 1e9}]",
        "data.calibration_tokens": 1024, "data.calibration_seq_tokens": 64,
        "data.held_out_share": 0.2,
    }  # fmt: skip
    words = ["run", recipe, "--base", "demo", "--data", str(text), "--out", str(out)]
    for key, value in changes.items():
        words += ["--set", f"{key}={pairs if value == 'PAIRS' else value}"]
    return words


def hashes(folder):
    return {path.name: file_sha256(path) for path in sorted(folder.iterdir())}


def same_run(work, whole):
    """Both checkpoints, byte for byte, and what was measured on them."""
    for name in ("converted", "distilled"):
        assert hashes(work / name) == hashes(whole / name)
        assert not partial_folder(work / name).exists()
    for name in ("report-base.json", "report-converted.json", "report.json"):
        metrics = [read_json(folder / name, "a report")["metrics"] for folder in (work, whole)]
        assert metrics[0] == metrics[1]
    assert read_json(work / "verdict.json", "a verdict")["passed"] is True


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_run_that_is_killed_amid_training_ends_as_one_that_is_not(recipe, server, texts, tmp_path):
    run, tail = server
    whole, work = tmp_path / "whole", tmp_path / "work"
    if recipe == RECIPES[-1]:
        # Of all these, one is a process of its own.
        done = subprocess.run(
            [sys.executable, "-m", "hybridize", *words_of(recipe, texts, whole)], cwd=ROOT, env=ENVIRONMENT, text=True,
            capture_output=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stdout.rstrip().endswith("PASS")
    else:
        assert run(words_of(recipe, texts, whole)) == 0, tail()
    steps = steps_in(whole / "distilled.metrics.jsonl")
    assert steps == STEPS * len(load_recipe(recipe).distill)
    metrics = work / "distilled.metrics.jsonl"
    assert os.WIFSIGNALED(run(words_of(recipe, texts, work), metrics, kill_at=steps // 2)), tail()
    assert steps // 2 <= steps_in(metrics) < steps
    assert not (work / "distilled").exists()
    assert list((partial_folder(work / "distilled") / "scratch").glob("state-*"))
    assert run([*words_of(recipe, texts, work), "--resume"]) == 0, tail()
    same_run(work, whole)


@pytest.mark.parametrize("recipe", builtin_recipes())
def test_every_recipe_says_what_it_costs(recipe, tmp_path):
    base = tiny_base("llama", tmp_path, num_hidden_layers=4)
    short = [f"distill.{i}.{key}={value}" for i, stage in enumerate(load_recipe(recipe).distill)
             for key, value in {"tokens": 2048, "rows": 2, "accumulate": 1, **rows_of(stage, 32)}.items()]  # fmt: skip
    chosen = load_recipe(recipe, short, describe_base(base).config)
    plan, costs = preview(chosen, base, Machine(bytes_each=1e9))
    assert len(plan.layers) == 4
    assert [cost.name for cost in costs] == [name for name, _ in (build_stages(chosen.distill) if chosen.distill else [])]
    assert all(cost.flops > 0 and not cost.advice for cost in costs)
