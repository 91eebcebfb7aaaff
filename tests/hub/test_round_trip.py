"""A base pulled, converted, trained, judged, pushed, pulled again and measured: the same report, to the digit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.hub.conftest import TOKEN
from tests.hub.server import LoopbackHub

ROOT = Path(__file__).parents[2]
RECIPE = [
    "--set", "plan={keep: {layers: [1]}, mixer: {name: streaming, sink_tokens: 2, window_tokens: 6}}",
    "--set", "distill=[{name: kl, tokens: 512, seq_tokens: 32, rows: 4}]",
    "--set", "evaluate=[{name: perplexity, context: 32}, {name: kl_to_base, context: 32}, {name: state_bytes}]",
    "--set", "gates=[{name: max_ratio, metric: perplexity, max: 1.5}]",
]  # fmt: skip


@pytest.mark.slow
def test_a_model_comes_back_as_it_went(base, tmp_path):
    draw = torch.randint(0, 62, (60, 80), generator=torch.Generator().manual_seed(0))
    rows = [" ".join(f"w{int(i)}" for i in row) for row in draw]
    for name, part in (("t.txt", rows[:50]), ("held.txt", rows[50:])):
        (tmp_path / name).write_text("\n<|endoftext|>\n".join(part))
    with LoopbackHub() as hub:
        hub.tokens[TOKEN] = {"name": "me", "write": True}
        sha = hub.add("some/base", {path.name: path.read_bytes() for path in base.iterdir()})
        env = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        env |= {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "hf"),
                "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}  # fmt: skip

        def call(*words, **more):
            done = subprocess.run([sys.executable, "-m", "hybridize", *words], env={**env, **more}, cwd=tmp_path,
                                  capture_output=True, text=True, check=False)  # fmt: skip
            assert done.returncode == 0, done.stderr
            return done

        said = call(
            "run", "streaming", "--base", f"some/base@{sha}", "--data", "t.txt", "--held-out", "held.txt", "--out", "w", *RECIPE
        )
        assert f"base: some/base@{sha} (licence: mit)" in said.stderr
        call("push", "w", "me/back-and-forth")
        card = hub.repos["me/back-and-forth"].files("main")["README.md"].decode()
        assert "base_model: some/base\n" in card
        assert "license: mit\n" in card
        # Another machine: no directory of the run, an empty cache.
        (tmp_path / "w").rename(tmp_path / "away")
        call("eval", "me/back-and-forth", "--recipe", "streaming", *RECIPE, "--data", "held.txt", "--out", "again.json",
             HF_HOME=str(tmp_path / "hf2"))  # fmt: skip
    first, again = (json.loads((tmp_path / name).read_text()) for name in ("away/report.json", "again.json"))
    assert again["checkpoint"].startswith("me/back-and-forth@")
    first.pop("checkpoint"), again.pop("checkpoint")
    assert again == first
    assert again["metrics"]["kl_to_base"]["value"] > 0
