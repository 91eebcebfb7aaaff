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
CONTEXT = multiprocessing.get_context("fork")
SECTION = {"keep": {"every": 3}, "mixer": {"name": "mamba2"}}


def hashes(folder):
    return {name: file_sha256(folder / name) for name in sorted(os.listdir(folder))}


def campaign(tmp_path, monkeypatch, kills):
    """Kill at moments spread over a whole run, each time on the way from nothing to complete. Returns what was seen."""
    monkeypatch.setattr(shards.plan_shards, "__defaults__", (20_000,))
    path = tiny_base("llama", tmp_path, num_hidden_layers=6)
    made = plan(open_base(path), SECTION, "test", 0)
    text = torch.randint(0, 64, (4, 32), generator=torch.Generator().manual_seed(0))
    start = time.monotonic()
    convert(made, tmp_path / "whole", text=text, workers=2)
    span = time.monotonic() - start
    expected = hashes(tmp_path / "whole")
    rng = random.Random(0)
    seen = {"killed": 0, "partial": 0, "resumed": 0}
    number = 0
    while seen["killed"] < kills:
        out = tmp_path / f"out-{number}"
        number += 1
        for attempt in range(rng.randint(1, 3)):
            child = CONTEXT.Process(target=convert, args=(made, out), kwargs={"text": text, "resume": True, "workers": 2})
            child.start()
            child.join(rng.uniform(0, 1.1) * span)
            if child.is_alive():
                os.kill(child.pid, signal.SIGKILL)
                child.join()
                seen["killed"] += 1
                seen["partial"] += partial_folder(out).exists()
            if out.exists():
                assert hashes(out) == expected, f"attempt {attempt}: complete under its name, but not the same"
        seen["resumed"] += convert(made, out, text=text, resume=True, workers=2).resumed_shards > 0
        assert hashes(out) == expected
        assert not partial_folder(out).exists()
    return seen


def test_a_few_kills(tmp_path, monkeypatch):
    assert campaign(tmp_path, monkeypatch, 5)["partial"] > 0


@pytest.mark.slow
def test_thirty_kills(tmp_path, monkeypatch):
    seen = campaign(tmp_path, monkeypatch, 30)
    assert seen["partial"] > 5
    assert seen["resumed"] > 5
