"""Spikes, numbers that are none, and signals: what a run does about them, in real processes where that matters."""

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from safetensors.torch import load_file, save_file

from hybridize import cli
from hybridize.data import Tokens, TrainBlocks
from hybridize.distill import distill, guards, metrics_path, saves
from hybridize.distill.guards import MOST_SKIPPED, Guard, judge, worst_rows
from hybridize.distill.loop import seed_of
from hybridize.distill.saves import Position, State, read_latest_state, write_state
from hybridize.errors import ConfigError, StoppedError, TrainingError
from hybridize.storage import file_sha256, partial_folder
from tests.distill import test_distill
from tests.distill.pair import KEEP, tiny_pair, tiny_tokens

ROOT = Path(__file__).parents[2]
RARE = 63
ROWS, STEPS, BEHIND = 4, 22, 16
STAGE = {
    "name": "kl", "tokens": STEPS * ROWS * 16, "seq_tokens": 16, "rows": 2, "accumulate": 2, "lr": 1e-5,
    "save_tokens": 5 * ROWS * 16, "train": ["*.self_attn.*"],
}  # fmt: skip
# Wider than a row: the student is the teacher but for the noise on its weights, and its loss is small and even.
WIDE = {"name": "streaming", "sink_tokens": 1, "window_tokens": 32}


def rare_text() -> Tokens:
    """Random tokens with one row of a token that occurs nowhere else; the seed's order puts it into a late step."""
    ids = tiny_tokens(8 * STEPS * 15 * ROWS).ids % (RARE - 3) + 3
    # Where each token lies, as the tokens themselves, says which of them row 2 of step 18 has.
    numbered = Tokens(ids=np.arange(len(ids)), text_bytes=1, sha256="", bos_id=1)
    ids[TrainBlocks(numbered, 16, ROWS, seed_of(0, 0), 1).batch(18).ids[2, 1:].numpy()] = RARE
    return Tokens(ids=ids, text_bytes=1, sha256="rare", bos_id=1)


def reads_rarely(folder, tmp_path, value):
    """A copy of a model that reads the rare token as something else."""
    copy = tmp_path / f"{folder.name}-{value}"
    shutil.copytree(folder, copy)
    weights = load_file(copy / "model.safetensors")
    weights["model.embed_tokens.weight"][RARE] = value
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return tiny_pair(tmp_path_factory.mktemp("pair"), (WIDE, KEEP, WIDE), noise=0.05)


def rows_of(out):
    return [json.loads(line) for line in metrics_path(out).read_text().splitlines()]


def hashes(folder):
    return {path.name: file_sha256(path) for path in sorted(folder.iterdir())}


def filled(count=128, mean=2.0, sigma=0.1):
    guard = Guard()
    draw = random.Random(0)
    for _ in range(count):
        guard.taken(draw.gauss(mean, sigma))
    return guard


def test_a_spike_is_six_sigma_above_the_last_128_steps():
    guard = filled(300)
    assert len(guard.losses) == 128
    mean = torch.tensor(guard.losses, dtype=torch.float64).mean().item()
    sigma = torch.tensor(guard.losses, dtype=torch.float64).std(correction=0).item()
    assert guard.spike(mean + 5.99 * sigma) is None
    assert "6 sigma above the last 128 steps" in guard.spike(mean + 6.01 * sigma)
    assert guard.spike(mean - 100 * sigma) is None
    # With too few steps behind it nothing is a spike; and one that was left out does not widen the band.
    assert filled(63).spike(1e9) is None
    assert filled(64).spike(1e9) is not None
    where = {"name": "loss", "losses": {"loss": 9.0}, "rows": "row 1", "norm": 1.0, "gradients": {}, "where": "here"}
    assert judge(guard, "skip", **where) is False
    assert guard.spike(mean + 6.01 * sigma) is not None


def test_what_each_choice_does():
    spike = {"name": "layer.5", "losses": {"layer.5": 17.0}, "rows": "rows 4 to 7", "norm": 1.0, "gradients": {}}
    nan = {**spike, "losses": {"layer.5": math.nan}}
    grad = {**spike, "losses": {"layer.5": 2.0}, "norm": math.inf, "gradients": {"w": torch.tensor([math.inf])}}
    with pytest.raises(
        TrainingError, match=r"step 9: the loss 'layer.5' is 17, more .* \(rows 4 to 7\).*on_spike=skip or ignore"
    ):
        judge(filled(), "stop", **spike, where="step 9")
    assert judge(filled(), "ignore", **spike, where="") is True
    assert judge(filled(), "skip", **spike, where="") is False
    for choice in ("stop", "ignore"):
        with pytest.raises(TrainingError, match=r"the loss 'layer.5' is nan.*\(rows 4 to 7\). With on_spike=skip"):
            judge(filled(), choice, **nan, where="")
        with pytest.raises(TrainingError, match="the gradient of w is not finite"):
            judge(filled(), choice, **grad, where="")
    guard = filled()
    for _ in range(MOST_SKIPPED):
        assert judge(guard, "skip", **nan, where="") is False
    with pytest.raises(TrainingError, match="no spike, the run has gone wrong"):
        judge(guard, "skip", **grad, where="")
    guard.taken(2.0)
    assert judge(guard, "skip", **nan, where="") is False


def test_the_rows_that_stand_out():
    assert worst_rows([1.0, 1.0, 3.0, 3.0, 2.0, 2.0], 2) == "rows 2 to 3"
    assert worst_rows([1.0, 1.0, 3.0, 3.0, math.nan, math.nan], 2) == "rows 4 to 5"
    assert worst_rows([1.0, 5.0, 3.0], 1) == "row 1"
    assert worst_rows([5.0, 5.0, 5.0, 5.0], 2) == "rows 0 to 1"


def test_a_state_keeps_the_losses_exactly_and_nothing_that_is_not_finite(tmp_path):
    guard = Guard(losses=[0.1, 1 / 3, 1e-38], skipped=3)
    state = State(position=Position(stage=0, step=5), weights={"w": torch.ones(3)}, moments={}, guards={"layer.3": guard})
    write_state(tmp_path, state)
    assert read_latest_state(tmp_path).guards == {"layer.3": guard}
    for weights, moments in (
        ({"w": torch.tensor([1.0, math.nan])}, {}),
        ({"w": torch.ones(1)}, {"w": {"exp_avg": torch.tensor([math.inf])}}),
    ):
        bad = State(position=Position(stage=0, step=6), weights=weights, moments=moments)
        with pytest.raises(TrainingError, match=r"step 6: \w+/w holds a value that is not finite; nothing was saved"):
            write_state(tmp_path, bad)
    assert [path.name for path in tmp_path.iterdir()] == ["state-00-000000005.safetensors"]


@pytest.fixture
def few_steps(monkeypatch):
    """A spike is told by fewer steps, so that a run is short."""
    monkeypatch.setattr(guards, "WINDOW_STEPS", BEHIND)


@pytest.mark.slow
@pytest.mark.usefixtures("few_steps")
@pytest.mark.parametrize("finite", [True, False])
def test_a_spike_in_the_data_is_named_and_skipped(folders, tmp_path, finite):
    teacher = reads_rarely(folders[0], tmp_path, 100.0 if finite else math.inf)
    text, out = rare_text(), tmp_path / "out"
    said = "the loss 'loss' is .* more than 6 sigma" if finite else "the loss 'loss' is nan"
    with pytest.raises(TrainingError, match=rf"\(kl\), step 19, stopped.*step 15: {said}.*\(rows 2 to 3\)"):
        distill(folders[1], [STAGE], text, out, teacher=teacher)
    # The same job goes on past it, from its last state, to the bytes of a run that skipped it at once.
    skip = {**STAGE, "on_spike": "skip"}
    distill(folders[1], [skip], text, out, teacher=teacher, resume=True)
    whole = distill(folders[1], [skip], text, tmp_path / "whole", teacher=teacher)
    assert hashes(out) == hashes(whole)
    rows = rows_of(out)
    assert [row["step"] for row in rows if "skipped" in row] == [19]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    ignore = {**STAGE, "on_spike": "ignore"}
    if finite:
        taken = distill(folders[1], [ignore], text, tmp_path / "taken", teacher=teacher)
        assert hashes(taken)["model.safetensors"] != hashes(whole)["model.safetensors"]
    else:
        with pytest.raises(TrainingError, match="is nan"):
            distill(folders[1], [ignore], text, tmp_path / "taken", teacher=teacher)


@pytest.mark.usefixtures("few_steps")
def test_a_resume_that_lost_its_losses_would_miss_the_spike(folders, tmp_path, monkeypatch):
    teacher = reads_rarely(folders[0], tmp_path, 100.0)
    text, out = rare_text(), tmp_path / "out"
    with pytest.raises(TrainingError):
        distill(folders[1], [STAGE], text, out, teacher=teacher)
    monkeypatch.setattr(saves, "Guard", lambda **kept: Guard())
    distill(folders[1], [{**STAGE, "on_spike": "skip"}], text, out, teacher=teacher, resume=True)
    assert not [row for row in rows_of(out) if "skipped" in row]


WORKER = """
import sys, time, torch
torch.set_num_threads(1)
from hybridize.distill import distill
from hybridize.errors import HybridizeError
from tests.distill.pair import tiny_tokens
from tests.distill.test_distill import STAGES
pause = float(sys.argv[3])
def progress(label, done, total):
    print(label, done, flush=True)
    time.sleep(pause)
try:
    distill(sys.argv[1], STAGES, tiny_tokens(), sys.argv[2], resume=True, progress=progress)
except HybridizeError as error:
    print(error, flush=True)
    sys.exit(2)
except KeyboardInterrupt:
    sys.exit(130)
"""


def start(student, out, pause=0.0):
    return subprocess.Popen(
        [sys.executable, "-c", WORKER, str(student), str(out), str(pause)], cwd=ROOT, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def finish(process):
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


@pytest.mark.slow
def test_sigterm_saves_and_leaves_and_the_lock_holds_until_then(folders, tmp_path):
    out = tmp_path / "out"
    first = start(folders[1], out, pause=1.5)
    assert first.stdout.readline().startswith("distill align")
    # The first step is done and its process sleeps: another run finds the output taken.
    with pytest.raises(ConfigError, match="another process is writing it"):
        distill(folders[1], test_distill.STAGES, tiny_tokens(), out, resume=True)
    first.send_signal(signal.SIGTERM)
    code, _, err = finish(first)
    assert code == 143, err
    assert "SIGTERM: finishing the step" in err
    states = sorted(path.name for path in (partial_folder(out) / "scratch").glob("state-*"))
    # Which step it was follows from how busy the machine is.
    assert states
    assert not out.exists()
    distill(folders[1], test_distill.STAGES, tiny_tokens(), out, resume=True)
    whole = distill(folders[1], test_distill.STAGES, tiny_tokens(), tmp_path / "whole")
    assert hashes(out) == hashes(whole)


@pytest.mark.slow
def test_a_second_ctrl_c_stops_at_once(folders, tmp_path):
    process = start(folders[1], tmp_path / "out", 60.0)
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    # Python takes a signal up between two steps of its own; the second must not be sent before that.
    assert any("SIGINT: finishing" in line for line in iter(process.stderr.readline, ""))
    process.send_signal(signal.SIGINT)
    code, _, err = finish(process)
    assert code == 130, err
    assert not list((partial_folder(tmp_path / "out") / "scratch").glob("state-*"))


@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [
        (StoppedError("stopped by SIGTERM after stage 1 (kl), step 7", 143), 143, "step 7; the same command with --resume"),
        (StoppedError("stopped by SIGINT after stage 1 (kl), step 7", 130), 130, "SIGINT"),
        (KeyboardInterrupt(), 130, "stopped; the same command with --resume goes on"),
        (typer.Abort(), 130, "stopped"),
    ],
)
def test_the_command_line_says_how_it_was_stopped(monkeypatch, capsys, raised, code, said):
    def stopped(**options):
        raise raised

    monkeypatch.setattr(cli, "cli", stopped)
    assert cli.app(["distill"]) == code
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("verb", "said"), [("eval", "stopped; what --cache kept is not measured again\n"), ("gate", "stopped\n")]
)
def test_a_verb_that_begins_again_does_not_promise_to_go_on(monkeypatch, capsys, verb, said):
    def stopped(**options):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "cli", stopped)
    assert cli.app([verb]) == 130
    assert capsys.readouterr().err.endswith(said)
