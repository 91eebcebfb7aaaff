"""SIGKILL at any step of a distillation, then the same call again: states, samples and bytes of a run that was never disturbed.

What a run does is written down while it runs: of each step the rows it took and the random numbers' state behind it, of each
saved state its bytes (weights, AdamW's moments, the last losses). Threads that tokenise and threads of torch are others in
every process.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from hybridize.distill import metrics_path
from hybridize.storage import file_sha256, partial_folder
from tests.distill.chats import chat_pair, words, write_chats, write_pairs
from tests.distill.pair import BOTH

ROOT = Path(__file__).parents[1]

# One interpreter serves every run of a campaign: each is a fork of it, killed or not, so that no time goes into imports.
SERVER = """
import json, os, sys
from tests.test_kill_distill import child
for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        child(**json.loads(line))
        os._exit(0)
    print(pid, flush=True)
    # Not reaped before the other side says so: its number stays its own, even when it ends before it is killed.
    if sys.stdin.readline() == "wait\\n":
        print(os.waitpid(pid, 0)[1], flush=True)
"""


def text_stages(data):
    """Layers, logits, then chats."""
    return [
        {"name": "align", "tokens": 5 * 64, "seq_tokens": 16, "rows": 4, "lr": 3e-3, "save_tokens": 128},
        {"name": "kl", "tokens": 5 * 64, "seq_tokens": 16, "rows": 2, "accumulate": 2, "lr": 1e-3, "save_tokens": 128},
        {"name": "sft", "tokens": 5 * 96, "seq_tokens": 48, "rows": 2, "lr": 1e-3, "save_tokens": 96,
         "data": str(data / "chats.jsonl")},
    ]  # fmt: skip


def adapter_stages(data):
    """Adapters, then a stage on chats with the queries and keys put back, then preferences against the student of that time."""
    lora = {"targets": ["*.self_attn.[qv]_proj", "*.mlp.down_proj"], "rank": 4, "dropout": 0.1}
    return [
        {"name": "kl", "tokens": 4 * 64, "seq_tokens": 16, "rows": 4, "lr": 1e-2, "save_tokens": 64, "lora": lora},
        {"name": "sft", "tokens": 4 * 96, "seq_tokens": 48, "rows": 2, "lr": 1e-2, "save_tokens": 96, "restore_qk": 0.5,
         "data": str(data / "chats.jsonl")},
        {"name": "dpo", "tokens": 4 * 128, "seq_tokens": 32, "rows": 2, "lr": 1e-2, "save_tokens": 128, "lora": lora,
         "data": str(data / "pairs.jsonl")},
    ]  # fmt: skip


def disk_stages(data):
    """Layer by layer from disk, once more on what that made, then one that holds the model."""
    align, kl = text_stages(data)[:2]
    align |= {"engine": "disk", "save_tokens": 64}
    return [align, {**align, "losses": BOTH}, kl]


# (stages, kills) of each campaign.
CAMPAIGNS = {"text": (text_stages, 40), "adapters": (adapter_stages, 12), "disk": (disk_stages, 12)}


def child(kind, folder, out, workers, threads, kill_step, delay):
    """One run, in a fork: what it does goes to `<out>.trace`; from step `kill_step` on it has `delay` seconds to live."""
    import hashlib
    import threading

    import torch

    import hybridize.data.stored as stored
    import hybridize.data.tokens as tokens
    from hybridize.distill import distill, loop

    folder, steps = Path(folder), iter(range(1 << 30))
    trace = os.open(f"{out}.trace", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    gradients, write_state = loop.gradients, loop.write_state

    def noted(what, key, data):
        os.write(trace, f"{what} {key} {hashlib.sha256(data).hexdigest()}\n".encode())

    def watched_gradients(run, options, micro_step, trained, batch, asked):
        if next(steps) == kill_step:
            threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)).start()
        found = gradients(run, options, micro_step, trained, batch, asked)
        # The seed of a step names its stage and its place, before anything is drawn.
        where = f"{torch.initial_seed():x}"
        for place, row in enumerate(batch.ids):
            noted("row", f"{where}.{place}", row.numpy().tobytes())
        noted("random", where, torch.get_rng_state().numpy().tobytes())
        return found

    def watched_state(scratch, state):
        path = write_state(scratch, state)
        noted("state", path.name, path.read_bytes())
        return path

    loop.gradients, loop.write_state = watched_gradients, watched_state
    tokens.PIECE_CHARS, stored.SHARD_PIECES, tokens.MOST_THREADS, os.cpu_count = 300, 2, workers, lambda: 64
    torch.set_num_threads(threads)
    # With what measures recall: a stopped run must not measure it again on other weights.
    recall = lambda model, pairs: {"recall@4": float(model.lm_head.weight.detach().sum())}  # noqa: E731
    sources = {str(folder / "a.txt"): 2, str(folder / "b.txt"): 1}
    distill(folder / "student", CAMPAIGNS[kind][0](folder), sources, out, resume=True, recall=recall)


class Server:
    def __init__(self, log):
        self.log = log
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER], cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"},
        )  # fmt: skip

    def run(self, kill_after=None, workers=1, threads=1, kill_step=None, delay=0.0, **call):
        """Run distill to its end, or kill it after so many seconds, or from a step on; return its wait status and its time."""
        began = time.perf_counter()
        call |= {"workers": workers, "threads": threads, "kill_step": kill_step, "delay": delay}
        self.process.stdin.write(json.dumps(call) + "\n")
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


@pytest.fixture(scope="module", params=list(CAMPAIGNS))
def campaign(request, server, tmp_path_factory):
    """(what the runs have in common, the undisturbed one's folder, its seconds)."""
    folder = tmp_path_factory.mktemp("kill")
    chat_pair(folder)
    write_chats(folder / "chats.jsonl")
    write_pairs(folder / "pairs.jsonl")
    draw = np.random.default_rng(5)
    for name in "ab":
        (folder / f"{name}.txt").write_text("\n<|endoftext|>\n".join(words(draw, 20, 60) for _ in range(60)))
    call = {"kind": request.param, "folder": str(folder)}
    for name in ("whole", "timed"):
        status, seconds = server.run(**call, out=str(folder / name))
        assert status == 0, server.tail()
    return call, folder / "whole", seconds


def hashes(folder):
    return {path.name: file_sha256(path) for path in sorted(folder.iterdir())}


def trace_of(out):
    """{what and of which step or state: hash}, and how often each came. A line that a kill cut short is left out."""
    lines = [line.split() for line in Path(f"{out}.trace").read_text().split("\n")[:-1]]
    found = {}
    for what, where, value in lines:
        assert found.setdefault((what, where), value) == value, f"{what} {where} of a resumed run is not what it was"
    return found


def steps_of(out):
    """What the metrics say of each step that was taken, the clock's figure aside."""
    rows = [json.loads(line) for line in metrics_path(out).read_text().splitlines()] if metrics_path(out).exists() else []
    return [{key: value for key, value in row.items() if key != "tokens_per_s"} for row in rows if "loss" in row]


def check(out, whole):
    """The killed run did what the undisturbed one did: the same rows in the same steps, each once, to the same bytes."""
    assert hashes(out) == hashes(whole)
    found, expected = trace_of(out), trace_of(whole)
    # A kill may come between a state and its note.
    unnoted = expected.keys() - found.keys()
    assert {what for what, _ in unnoted} <= {"state"}
    assert found == {key: value for key, value in expected.items() if key not in unnoted}
    assert steps_of(out) == steps_of(whole)
    assert not partial_folder(out).exists()


@pytest.mark.slow
def test_kills_at_any_step(campaign, server):
    """Chains of up to six processes; four of five kills come at a drawn step, the others at a drawn moment of the run."""
    call, whole, seconds = campaign
    kills = CAMPAIGNS[call["kind"]][1]
    steps = len(steps_of(whole))
    stages = [step["stage"] for step in steps_of(whole)]
    middle = stages.index(2) + stages.count(2) // 2
    draw = random.Random(1)
    killed = chain = 0
    at = set()
    while killed < kills:
        out = whole.with_name(f"out-{chain}")
        chain += 1
        assert chain <= kills, f"{killed} kills in {chain} chains: they come too late"
        for place in range(draw.randint(3, 6)):
            settings = {"workers": draw.randint(1, 4), "threads": 1 + (place == 1 and chain % 4 == 0)}
            left = steps - len(steps_of(out))
            if place % 5 == 4:
                settings["kill_after"] = draw.uniform(0.02, 1.0) * seconds
            elif place == 0:
                # In the first stage, however fast the machine is by now.
                settings["kill_step"] = draw.randint(0, 2)
            elif place == 1 and (ahead := middle - len(steps_of(out))) > 0:
                # In the second stage, for the same reason.
                settings["kill_step"] = ahead
            else:
                settings |= {"kill_step": draw.randint(0, left // 3), "delay": draw.uniform(0, 2 * seconds / steps)}
            status, _ = server.run(**call, **settings, out=str(out))
            assert os.WIFSIGNALED(status) or status == 0, server.tail()
            # Under the final name there is the whole output or nothing.
            assert not out.exists() or hashes(out) == hashes(whole)
            if not os.WIFSIGNALED(status):
                break
            killed += 1
            at.add(len(steps_of(out)))
        status, _ = server.run(**call, workers=draw.randint(1, 4), out=str(out))
        assert status == 0, server.tail()
        check(out, whole)
    # They came in all stages, and behind many a step.
    assert {steps_of(whole)[min(step, steps - 1)]["stage"] for step in at} == {1, 2, 3}
    assert len(at) > kills / 8


@pytest.mark.slow
def test_each_sample_is_seen_once(campaign):
    _, whole, _ = campaign
    rows = [value for (what, _), value in trace_of(whole).items() if what == "row"]
    assert len(rows) == len(set(rows)) >= 2 * len(steps_of(whole))
