"""Cache bytes of real caches, and the shape (not the size) of what is timed."""

import json
import math
import runpy
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from hybridize.checkpoint import describe_base, load_model, skeleton
from hybridize.errors import CheckpointError, ConfigError
from hybridize.eval import bench, bench_shape, evaluate
from hybridize.eval.bench import fitted_crossover
from hybridize.eval.probes.speed import Speed
from hybridize.eval.probes.state_bytes import StateBytes
from hybridize.eval.timing import PeakMemory, prefill, random_ids
from hybridize.hub import shape_of
from hybridize.modeling import state_bytes
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
    result = bench(path, base, contexts=[64, 16], batches=[2, 1], repeats=2, new_tokens=2, out=tmp_path / "bench.json")
    assert json.loads((tmp_path / "bench.json").read_text()) == result
    assert [(row["batch"], row["context"]) for row in result["rows"]] == [(1, 16), (1, 64), (2, 16), (2, 64)]
    row = result["rows"][1]
    assert result["rows"][3]["model"]["cache_bytes"] == 2 * row["model"]["cache_bytes"]
    for name, folder in (("model", path), ("base", base)):
        assert row[name]["cache_bytes"] == state_bytes(AutoConfig.from_pretrained(folder), 64)
        assert row[name]["peak_bytes"] >= row[name]["weight_bytes"] > 0
        low, high = row[name]["decode_tokens_per_s_spread"]
        assert 0 < low <= row[name]["decode_tokens_per_s"] <= high
    assert row["cache_ratio"] == row["model"]["cache_bytes"] / row["base"]["cache_bytes"]
    assert row["decode_speedup"] > 0
    alone = bench(path, contexts=[16], repeats=1, new_tokens=1)
    assert set(alone["rows"][0]) == {"batch", "context", "model"}
    assert alone["crossover"] is None
    assert set(result["crossover"]) == {"1", "2"}
    even = result["break_even"]
    hybrid, full = (AutoConfig.from_pretrained(folder) for folder in (path, base))
    assert even["bytes"] == state_bytes(hybrid, even["tokens"]) <= state_bytes(full, even["tokens"])
    assert state_bytes(hybrid, even["tokens"] - 1) > state_bytes(full, even["tokens"] - 1)
    weights = row["base"]["weight_bytes"]
    reached = even["weights_tokens"]["base"]
    assert state_bytes(full, reached - 1) < weights <= state_bytes(full, reached)
    with pytest.raises(ConfigError, match="at least 1"):
        bench(path, contexts=[0])


def test_lines_through_the_times_meet_where_they_were_drawn_to():
    def rows(model, base):
        at = lambda t, line: {"decode_tokens_per_s": 3 / (line[0] + line[1] * t)}  # noqa: E731
        return [{"batch": 3, "context": t, "model": at(t, model), "base": at(t, base)} for t in (100, 1000, 7000)]

    assert fitted_crossover(rows((0.011, 1e-6), (0.010, 2e-6))) == 1000
    assert fitted_crossover(rows((0.009, 1e-6), (0.010, 2e-6))) == 0
    assert fitted_crossover(rows((0.009, 2e-6), (0.010, 2e-6))) is None
    assert fitted_crossover(rows((0.011, 1e-6), (0.010, 2e-6))[:1]) is None


@pytest.mark.slow
def test_a_shape_alone(tmp_path):
    small = {"hidden_size": 64, "intermediate_size": 64, "vocab_size": 128, "num_hidden_layers": 2}
    raw = json.loads((shape_of("qwen3-8b") / "config.json").read_text()) | small
    (tmp_path / "config.json").write_text(json.dumps(raw))
    config = describe_base(shape_of(str(tmp_path))).config
    result = bench_shape(config, [ATTENTION, MAMBA2], "small", contexts=[700], repeats=1, new_tokens=1)
    row = result["rows"][0]
    assert result["dtype"] == "bfloat16"
    assert row["model"]["time_to_first_token_s"] is None
    assert row["base"]["cache_bytes"] == 2 * 2 * 8 * 128 * 2 * 700
    assert row["model"]["cache_bytes"] < row["base"]["cache_bytes"]


def test_shapes_are_known_and_whole():
    config = describe_base(shape_of("llama-3.2-1b")).config
    assert sum(math.prod(shape) for shape in skeleton(config).values()) - 2048 * 128256 == 1_235_814_400
    with pytest.raises(CheckpointError, match=r"llama-3\.2-1x: .*Did you mean 'llama-3\.2-1b'"):
        shape_of("llama-3.2-1x")


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
