"""kill -9 at random moments of a conversion; resumed, the bytes are those of a run that was never killed."""

import multiprocessing
import os
import random
import signal
import time

import pytest
import torch
from transformers.utils import logging

from hybridize import shards
from hybridize.checkpoint import open_base
from hybridize.conversions import convert, plan
from hybridize.storage import file_sha256, partial_folder
from tests.tiny import tiny_base

torch.set_num_threads(1)
logging.disable_progress_bar()

# A child by fork has torch imported already. Its memory is a copy: what the test changes here holds there too.
pytestmark = pytest.mark.usefixtures("real_fsync")

CONTEXT = multiprocessing.get_context("fork")
SECTION = {"keep": {"every": 3}, "mixer": {"name": "mamba2"}}


def hashes(folder):
    return {name: file_sha256(folder / name) for name in sorted(os.listdir(folder))}


def campaign(tmp_path, monkeypatch, kills, resumed):
    """Kill at moments spread over a whole run, each time on the way from nothing to complete.

    Goes on until there were `kills` kills, and `resumed` runs that found shards which a killed one had finished.
    """
    monkeypatch.setattr(shards.plan_shards, "__defaults__", (20_000,))
    path = tiny_base("llama", tmp_path, num_hidden_layers=6)
    made = plan(open_base(path), SECTION, "test", 0)
    text = torch.randint(0, 64, (4, 32), generator=torch.Generator().manual_seed(0))
    start = time.monotonic()
    convert(made, tmp_path / "whole", text=text, workers=2)
    span = time.monotonic() - start
    expected = hashes(tmp_path / "whole")
    rng = random.Random(0)
    seen = {"killed": 0, "resumed": 0}
    number = 0
    while seen["killed"] < kills or seen["resumed"] < resumed:
        assert number < 20 * kills, f"the kills do not fall where they should: {seen}"
        out = tmp_path / f"out-{number}"
        number += 1
        for attempt in range(rng.randint(1, 3)):
            child = CONTEXT.Process(target=convert, args=(made, out), kwargs={"text": text, "resume": True, "workers": 2})
            child.start()
            start = time.monotonic()
            child.join(rng.uniform(0, 1.1) * span)
            if child.is_alive():
                os.kill(child.pid, signal.SIGKILL)
                child.join()
                seen["killed"] += 1
            elif attempt == 0:
                # The machine has less to do now than when the span was taken.
                span = min(span, time.monotonic() - start)
            if out.exists():
                assert hashes(out) == expected, f"attempt {attempt}: complete under its name, but not the same"
        seen["resumed"] += convert(made, out, text=text, resume=True, workers=2).resumed_shards > 0
        assert hashes(out) == expected
        assert not partial_folder(out).exists()


@pytest.mark.slow
def test_thirty_kills(tmp_path, monkeypatch):
    campaign(tmp_path, monkeypatch, kills=30, resumed=6)
