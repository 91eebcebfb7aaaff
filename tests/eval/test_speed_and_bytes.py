"""Cache bytes of real caches, and the shape (not the size) of what is timed."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from hybridize.checkpoint import load_model
from hybridize.errors import ConfigError
from hybridize.eval import bench, evaluate
from hybridize.eval.probes.speed import Speed
from hybridize.eval.probes.state_bytes import StateBytes, promised_bytes
from hybridize.eval.timing import PeakMemory, prefill, random_ids
from tests.eval.toys import context_of, toy_base, toy_hybrid

ATTENTION = {"name": "attention"}
STREAMING = {"name": "streaming", "sink_tokens": 2, "window_tokens": 6}
MAMBA2 = {"name": "mamba2"}
MIXERS = {
    "streaming": [STREAMING, ATTENTION, STREAMING],
    "mamba2": [MAMBA2, ATTENTION, MAMBA2],
    "both": [ATTENTION, MAMBA2, STREAMING],
}


@pytest.mark.parametrize("tokens", [1, 5, 40])
@pytest.mark.parametrize("mixers", MIXERS)
def test_a_real_cache_holds_what_is_promised(base, tokenizer, tmp_path, mixers, tokens):
    path = toy_hybrid(base, tmp_path, MIXERS[mixers])
    context = context_of(load_model(path, torch.float32), tokenizer)
    context.checkpoint = path
    result = StateBytes(contexts=[tokens, 1000])(context)
    row = 2 * 2 * 8 * 4
    mamba = 4 * 8 * 8 * 4 + (2 * 2 + 4) * 8 * 3 * 4
    by_hand = {
        "streaming": lambda t: row * (t + 2 * min(t, 8)),
        "mamba2": lambda t: row * t + 2 * mamba,
        "both": lambda t: row * (t + min(t, 8)) + mamba,
    }[mixers]
    for length in (tokens, 1000):
        assert result.metrics[f"state_bytes@{length}"].value == by_hand(length)


def test_a_promise_that_is_not_kept_is_caught(base, tokenizer, tmp_path):
    path = toy_hybrid(base, tmp_path, MIXERS["streaming"])
    model = load_model(path, torch.float32)
    model.config.mixers = [{**spec, "window_tokens": 7} if spec["name"] == "streaming" else spec for spec in MIXERS["streaming"]]
    context = context_of(model, tokenizer)
    context.checkpoint = path
    with pytest.raises(AssertionError, match="promised"):
        StateBytes(contexts=[40])(context)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_a_base_holds_keys_and_values(tmp_path, family):
    report = evaluate(toy_base(tmp_path, family), [{"name": "state_bytes", "contexts": [8, 40]}])
    for tokens in (8, 40):
        assert report.metrics[f"state_bytes@{tokens}"].value == 3 * 2 * 2 * 8 * 4 * tokens


def test_bytes_are_those_of_the_stored_dtype(tmp_path):
    path = toy_base(tmp_path, dtype="bfloat16")
    load_model(path).to(torch.bfloat16).save_pretrained(path)
    report = evaluate(path, [{"name": "state_bytes", "contexts": [8]}])
    assert report.metrics["state_bytes@8"].value == 3 * 2 * 2 * 8 * 2 * 8


def test_speed_is_measured_against_the_base(base, tokenizer, tmp_path):
    model = load_model(toy_hybrid(base, tmp_path, MIXERS["both"]), torch.float32)
    probe = Speed(contexts=[16, 600], new_tokens=2, repeats=3)
    alone = probe(context_of(model, tokenizer)).metrics
    assert set(alone) == {f"{what}_tokens_per_s@{t}" for what in ("prefill", "decode") for t in (16, 600)}
    both = probe(context_of(model, tokenizer, load_base=lambda: load_model(base, torch.float32))).metrics
    assert set(both) - set(alone) == {f"{what}_speedup@{t}" for what in ("prefill", "decode") for t in (16, 600)}
    assert all(metric.value > 0 and metric.higher_is_better for metric in both.values())
    assert both["decode_speedup@16"].samples == 3


def test_chunked_prefill_ends_in_the_same_state(base, tmp_path):
    model = load_model(toy_hybrid(base, tmp_path, MIXERS["both"]), torch.float32)
    ids = random_ids(model, 2, 600, 0)
    cache, seconds = prefill(model, ids)
    with torch.no_grad():
        next_logits = model(ids[:, :1], past_key_values=cache).logits[:, -1]
        expected = model(torch.cat([ids, ids[:, :1]], 1)).logits[:, -1]
    assert seconds > 0
    torch.testing.assert_close(next_logits, expected, rtol=1e-3, atol=1e-4)


def test_bench(base, tmp_path):
    path = toy_hybrid(base, tmp_path, MIXERS["mamba2"])
    result = bench(path, base, contexts=[64, 16], repeats=2, new_tokens=2, out=tmp_path / "bench.json")
    assert json.loads((tmp_path / "bench.json").read_text()) == result
    assert list(result["contexts"]) == ["16", "64"]
    row = result["contexts"]["64"]
    for name, folder in (("model", path), ("base", base)):
        assert row[name]["cache_bytes"] == promised_bytes(AutoConfig.from_pretrained(folder), 64)
        assert row[name]["peak_bytes"] >= row[name]["weight_bytes"] > 0
        low, high = row[name]["decode_tokens_per_s_spread"]
        assert 0 < low <= row[name]["decode_tokens_per_s"] <= high
    assert row["cache_ratio"] == row["model"]["cache_bytes"] / row["base"]["cache_bytes"]
    assert row["decode_speedup"] > 0
    alone = bench(path, contexts=[16], repeats=1, new_tokens=1)
    assert set(alone["contexts"]["16"]) == {"model"}
    with pytest.raises(ConfigError, match="at least 1"):
        bench(path, contexts=[0])


def test_peak_memory_sees_what_was_held_and_freed():
    with PeakMemory(torch.device("cpu")) as peak:
        block = torch.ones(16 << 20)
        for _ in range(5):
            block.add_(1)
        del block
    assert 60 << 20 < peak.bytes < 200 << 20


def test_the_decode_benchmark_runs(tmp_path, monkeypatch):
    script = Path(__file__).parents[2] / "bench" / "decode.py"
    out = tmp_path / "decode.json"
    arguments = "--contexts 16,64 --layers 4 --hidden 64 --heads 4 --kv-heads 2 --vocab 64 --repeats 2 --new-tokens 1"
    monkeypatch.setattr(sys, "argv", ["decode.py", "--json", str(out), *arguments.split()])
    runpy.run_path(str(script), run_name="__main__")
    result = json.loads(out.read_text())
    assert set(result["ratio"]) == {"16", "64"}
    assert result["peak_rss_bytes"] > 0
    assert result["rows"][1]["cache_bytes"]["base"] == 4 * 2 * 2 * 16 * 4 * 64
