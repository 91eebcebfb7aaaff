"""Made-up directories of runs that hold everything a report can show, with text in them that tries to be markup."""

import json
from pathlib import Path

from hybridize.core import GateResult, LayerPlan, LayerScore, Metric, Plan, Report, Scores, ScoreTable, Verdict
from hybridize.storage import write_json, write_text

EVIL = "<script>console.error('evil')</script><img src='http://evil.example/x.png'>"
# A line in JSON may hold what ends a line elsewhere.
PROMPTS = [f"Which word? {EVIL}", "two\u2028lines | and a `tick`", "third", "fourth"]
SCALES = {"report-base": 1.0, "report-converted": 2.5, "report": 1.25}


def plan(mixer="mamba2", layers=4):
    kinds = ["attention" if i % 3 == 0 else mixer for i in range(layers)]
    built = tuple(
        LayerPlan(
            index=i, mixer={"name": name, "option": None}, conversion={"name": name}, parameters=10,
            state_bytes={"1024": 1 << 20, "32768": (32 << 20) if name == "attention" else 4096 * (i + 1)},
        )
        for i, name in enumerate(kinds)
    )  # fmt: skip
    sizes = {"1024": layers << 20, "32768": layers * 32 << 20}
    return Plan(base=f"/home/someone/{EVIL.split('/')[0]}<base>", base_hash="0" * 64, family="llama", recipe=mixer, seed=0,
                layers=built, kv_share=0.5, base_state_bytes=sizes)  # fmt: skip


def measured(scale):
    """A report in which everything is `scale` times worse than the base's."""
    metrics = {"perplexity": Metric(value=5.0 * scale, stderr=0.125, unit="per token", samples=4)}
    samples, hashes = {}, {}

    def paired(name, values, unit, higher):
        mean = sum(values) / len(values)
        metrics[name] = Metric(value=mean, stderr=0.05, unit=unit, higher_is_better=higher, samples=len(values))
        samples[name], hashes[name] = values, f"{name:_<64}"

    for length in (4, 16, 64):
        right = [1.0, 1.0, 1.0, 0.0] if scale == 1 else [0.0, 1.0, 0.0, 0.0]
        paired(f"recall@{length}", right, "share of values", True)
        paired(f"recall_nll@{length}", [scale * (i + 1) for i in range(4)], "nats per token", False)
    for position in (16, 32, 64, 128):
        metrics[f"nll_at@{position}"] = Metric(value=3 * scale / position**0.1, stderr=0.01, unit="nats per token", samples=4)
    for tokens in (1024, 8192, 32768):
        metrics[f"perplexity@{tokens}"] = Metric(value=5 * scale, stderr=0.1, unit="per token", samples=4)
        metrics[f"state_bytes@{tokens}"] = Metric(value=tokens * 1024 / scale, unit="bytes")
        metrics[f"decode_tokens_per_s@{tokens}"] = Metric(value=100 * scale, unit="tokens/s", higher_is_better=True)
        if scale != 1:
            metrics[f"decode_speedup@{tokens}"] = Metric(value=tokens / 8192, unit="x the base", higher_is_better=True)
    if scale != 1:
        metrics["kl_to_base"] = Metric(value=0.01, unit="nats per token")
    return Report(checkpoint="here", checkpoint_hash="abc" if scale == 1 else f"{scale}", metrics=metrics, samples=samples,
                  item_hashes=hashes, versions={"torch": "2.13", "tokenizer": "f" * 64})  # fmt: skip


def items(report):
    """The lines of a report's items, whose answers are the report's own."""
    return [
        {"metric": name, "score": score, "prompt": prompt, "expected": "yes", "given": "yes" if score else EVIL}
        for name, scores in report.samples.items()
        for score, prompt in zip(scores, PROMPTS, strict=True)
    ]


def scores():
    def row(layer, candidate, **values):
        return LayerScore(layer=layer, candidate=candidate, values=values)

    tables = (
        ScoreTable(metric={"name": "fisher"}, text="0", rows=tuple(row(i, None, k_proj=0.5 * i, v_proj=1.0) for i in range(4))),
        ScoreTable(
            metric={"name": "energy"},
            text=None,
            rows=tuple(row(i, {"name": "mla", "rank": 8}, joint=[1.0 * i, 3.0]) for i in range(3)),
        ),
    )
    return Scores(base="b", base_hash="0", tables=tables)


def benched():
    def figures(speed, size):
        return {"prefill_tokens_per_s": 1000.0, "prefill_tokens_per_s_spread": [900.0, 1100.0], "decode_tokens_per_s": speed,
                "decode_tokens_per_s_spread": [speed - 1, speed + 2], "time_to_first_token_s": None, "cache_bytes": size,
                "weight_bytes": 1 << 20, "peak_bytes": 2 * size}  # fmt: skip

    rows = [
        {"batch": 1, "context": context, "model": figures(50.0, context * 512), "base": figures(5e4 / context, context * 1024),
         "prefill_speedup": 1.0, "decode_speedup": context / 1000, "cache_ratio": 0.5, "peak_ratio": 0.5}
        for context in (512, 65536)
    ]  # fmt: skip
    crossover = {"1": {"measured_tokens": 65536, "fitted_tokens": 2}}
    return {"checkpoint": "/home/someone/d", "against": "/home/someone/b", "device": "cpu", "dtype": "float32", "rows": rows,
            "crossover": crossover, "break_even": {"tokens": 300, "bytes": 9}, "versions": {}}  # fmt: skip


def fill(folder: Path, mixer="mamba2", stages=("align", "kl"), final=1.25) -> Path:
    """Write all that a run's directory can hold."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "distilled").mkdir(exist_ok=True)
    write_json(folder / "plan.json", plan(mixer).to_dict())
    for name, scale in (SCALES | {"report": final}).items():
        report = measured(scale)
        write_json(folder / f"{name}.json", report.to_dict())
        write_text(folder / f"{name}.items.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in items(report)))
    gates = (
        GateResult(name="max_ratio perplexity", passed=False, value=1.25, limit=1.15, detail="above the <limit>"),
        GateResult(name="max_ratio state_bytes", passed=True, value=0.25, limit=0.3, detail="within"),
    )
    write_json(folder / "verdict.json", Verdict(passed=False, gates=gates).to_dict())
    rows = [
        {"stage": stage, "name": name, "step": step, "tokens": step * 512, "loss": None if step == 7 else 1.0 / step}
        for stage, name in enumerate(stages)
        for step in range(1, 500)
    ]
    write_text(folder / "distilled.metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows) + '{"stage": 1, "na')
    write_text(folder / "recipe.yaml", f"name: {mixer}\nabout: {EVIL}\n")
    write_json(folder / "scores.json", scores().to_dict())
    write_json(folder / "bench.json", benched())
    return folder
