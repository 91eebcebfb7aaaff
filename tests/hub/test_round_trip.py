"""A base pulled, converted, trained, judged, pushed, pulled again and measured: the same report, to the digit."""

import json

import pytest
import torch

from hybridize.cli import app

RECIPE = [
    "--set", "plan={keep: {layers: [1]}, mixer: {name: streaming, sink_tokens: 2, window_tokens: 6}}",
    "--set", "distill=[{name: kl, tokens: 512, seq_tokens: 32, rows: 4}]",
    "--set", "evaluate=[{name: perplexity, context: 32}, {name: kl_to_base, context: 32}, {name: state_bytes}]",
    "--set", "gates=[{name: max_ratio, metric: perplexity, max: 1.5}]",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
def test_a_model_comes_back_as_it_went(hub, base, tmp_path, capsys, monkeypatch):
    draw = torch.randint(0, 62, (60, 80), generator=torch.Generator().manual_seed(0))
    rows = [" ".join(f"w{int(i)}" for i in row) for row in draw]
    for name, part in (("t.txt", rows[:50]), ("held.txt", rows[50:])):
        (tmp_path / name).write_text("\n<|endoftext|>\n".join(part))
    sha = hub.add("some/base", {path.name: path.read_bytes() for path in base.iterdir()})
    monkeypatch.chdir(tmp_path)
    text = ["--data", "t.txt", "--held-out", "held.txt"]
    assert app(["run", "streaming", "--base", f"some/base@{sha}", *text, "--out", "w", *RECIPE]) == 0
    assert f"base: some/base@{sha} (licence: mit)" in capsys.readouterr().err
    assert app(["push", "w", "me/back-and-forth"]) == 0
    card = hub.repos["me/back-and-forth"].files("main")["README.md"].decode()
    assert "base_model: some/base\n" in card
    assert "license: mit\n" in card
    # Another machine: no directory of the run, an empty cache.
    (tmp_path / "w").rename(tmp_path / "away")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "another"))
    assert app(["eval", "me/back-and-forth", "--recipe", "streaming", *RECIPE, "--data", "held.txt", "--out", "again.json"]) == 0
    first, again = (json.loads((tmp_path / name).read_text()) for name in ("away/report.json", "again.json"))
    assert again["checkpoint"].startswith("me/back-and-forth@")
    first.pop("checkpoint"), again.pop("checkpoint")
    assert again == first
    assert again["metrics"]["kl_to_base"]["value"] > 0
    # The base was found by the lineage, at the same commit.
    assert (tmp_path / "another" / "models--some--base" / "snapshots" / sha).is_dir()
