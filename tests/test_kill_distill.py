"""SIGKILL at any moment of a distillation, then the same call again: the bytes of a run that was never disturbed."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hybridize.storage import file_sha256, partial_folder
from tests.distill.chats import chat_pair, write_chats, write_pairs
from tests.distill.test_distill import STAGES

ROOT = Path(__file__).parents[1]

# One interpreter serves every run of the campaign: each is a fork of it, killed or not, so that no time goes into imports.
SERVER = """
import os, sys, torch
torch.set_num_threads(1)
from hybridize.distill import distill
from tests.distill.pair import tiny_tokens
from tests.distill.test_distill import STAGES
from tests.test_kill_distill import after, from_disk
tokens = tiny_tokens()
for line in sys.stdin:
    kind, student, out = line.split()
    stages = {"distill": lambda: STAGES, "after": lambda: after(student), "disk": from_disk}[kind]()
    child = os.fork()
    if child == 0:
        # With what measures recall: a stopped run must not measure it again on other weights.
        recall = lambda model, pairs: {"recall@4": float(model.lm_head.weight.sum())}
        distill(student, stages, tokens, out, resume=True, recall=recall)
        os._exit(0)
    print(child, flush=True)
    # Not reaped before the other side says so: its number stays its own, even when it ends before it is killed.
    if sys.stdin.readline() == "wait\\n":
        print(os.waitpid(child, 0)[1], flush=True)
"""


def after(student):
    """Adapters, then a stage on chats with the queries and keys put back, then preferences against the student of that time."""
    lora = {"targets": ["*.self_attn.[qv]_proj", "*.mlp.down_proj"], "rank": 4, "dropout": 0.1}
    data = Path(student).parent
    return [
        {"name": "kl", "tokens": 4 * 64, "seq_tokens": 16, "rows": 4, "lr": 1e-2, "save_tokens": 64, "lora": lora},
        {"name": "sft", "tokens": 4 * 96, "seq_tokens": 48, "rows": 2, "lr": 1e-2, "save_tokens": 96, "restore_qk": 0.5,
         "data": str(data / "chats.jsonl")},
        {"name": "dpo", "tokens": 4 * 128, "seq_tokens": 32, "rows": 2, "lr": 1e-2, "save_tokens": 128, "lora": lora,
         "data": str(data / "pairs.jsonl")},
    ]  # fmt: skip


def from_disk():
    """A stage layer by layer, another one on what it made, and one that holds the model again."""
    align = {**STAGES[0], "engine": "disk", "save_tokens": 64}
    return [align, {**align, "losses": [{"name": "mixer_output"}]}, STAGES[1]]


class Server:
    def __init__(self, log):
        self.log = log
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER], cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    def run(self, kind, student, out, kill_after=None):
        """Run distill to its end, or kill it after so many seconds; return its wait status and its time."""
        began = time.perf_counter()
        self.process.stdin.write(f"{kind} {student} {out}\n")
        self.process.stdin.flush()
        child = int(self.process.stdout.readline())
        if kill_after is not None:
            time.sleep(max(0.0, began + kill_after - time.perf_counter()))
            os.kill(child, signal.SIGKILL)
        self.process.stdin.write("wait\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline()), time.perf_counter() - began

    def tail(self):
        return Path(self.log.name).read_text()[-2000:]

    def close(self):
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait(30)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with open(tmp_path_factory.mktemp("server") / "log", "wb") as log:
        server = Server(log)
        yield server
        server.close()


@pytest.fixture(scope="module", params=["distill", "after", pytest.param("disk", marks=pytest.mark.slow)])
def campaign(request, server, tmp_path_factory):
    folder = tmp_path_factory.mktemp("kill")
    _, student = chat_pair(folder)
    write_chats(folder / "chats.jsonl")
    write_pairs(folder / "pairs.jsonl")
    status, _ = server.run(request.param, student, folder / "whole")
    assert status == 0, server.tail()
    _, seconds = server.run(request.param, student, folder / "timed")
    return request.param, folder, student, server, seconds


def hashes(folder):
    return {path.name: file_sha256(path) for path in sorted(folder.iterdir())}


def campaign_of(campaign, kills, seed):
    kind, folder, student, server, seconds = campaign
    expected = hashes(folder / "whole")
    draw = random.Random(seed)
    killed = number = 0
    while killed < kills:
        assert number < 10 * kills, f"{killed} kills in {number} runs: they come too late"
        out = folder / f"out-{seed}-{number}"
        number += 1
        # A fifth of the runs are killed a second time, while resuming.
        for attempt in range(2 if number % 5 == 0 else 1):
            status, took = server.run(kind, student, out, kill_after=draw.uniform(0.02, 1.0) * seconds)
            killed += os.WIFSIGNALED(status)
            if not os.WIFSIGNALED(status) and attempt == 0:
                # The machine has less to do now than when the time was taken.
                seconds = min(seconds, took)
            # Under the final name there is the whole output or nothing.
            assert not out.exists() or hashes(out) == expected
        status, _ = server.run(kind, student, out)
        assert status == 0, server.tail()
        assert hashes(out) == expected
        assert not partial_folder(out).exists()


def test_five_kills(campaign):
    campaign_of(campaign, 5, seed=0)


@pytest.mark.slow
def test_thirty_kills(campaign):
    campaign_of(campaign, 30, seed=1)
