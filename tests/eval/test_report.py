"""The HTML report of a made-up working directory, whole and in parts."""

import base64
import json
import re

import pytest

from hybridize.core import GateResult, LayerPlan, Metric, Plan, Report, Verdict
from hybridize.errors import CheckpointError
from hybridize.eval import comparison_table, report
from hybridize.storage import write_json, write_text


def plan():
    kinds = ["attention", "mamba2", "streaming", "attention"]
    layers = tuple(
        LayerPlan(
            index=i, mixer={"name": name}, conversion={"name": "x"}, parameters=10,
            state_bytes={"1024": 1 << 20, "32768": (32 << 20) if name == "attention" else 4096 * (i + 1)},
        )
        for i, name in enumerate(kinds)
    )  # fmt: skip
    return Plan(
        base="some/<base>",
        base_hash="0",
        family="llama",
        recipe="mamba2",
        seed=0,
        layers=layers,
        kv_share=0.5,
        base_state_bytes={},
    )


def measured(scale):
    metrics = {"perplexity": Metric(value=5.0 * scale, stderr=0.125, unit="per token", samples=9)}
    for tokens in (1024, 8192, 32768):
        metrics[f"state_bytes@{tokens}"] = Metric(value=tokens * 1024 / scale, unit="bytes")
        metrics[f"decode_tokens_per_s@{tokens}"] = Metric(value=100 * scale, unit="tokens/s", higher_is_better=True)
    if scale != 1:
        metrics["kl_to_base"] = Metric(value=0.01, unit="nats per token")
    return Report(checkpoint="here", checkpoint_hash="abc", metrics=metrics, versions={"torch": "2.13"})


def fill(folder):
    write_json(folder / "plan.json", plan().to_dict())
    for name, scale in (("report-base", 1), ("report-converted", 2.5), ("report", 1.25)):
        write_json(folder / f"{name}.json", measured(scale).to_dict())
    verdict = Verdict(
        passed=False,
        gates=(
            GateResult(name="max_ratio perplexity", passed=False, value=1.25, limit=1.15, detail="above the <limit>"),
            GateResult(name="max_ratio state_bytes", passed=True, value=0.25, limit=0.3, detail="within"),
        ),
    )
    write_json(folder / "verdict.json", verdict.to_dict())
    rows = [
        {"stage": stage, "name": name, "step": step, "tokens": step * 512, "loss": 1.0 / step}
        for stage, name in enumerate(("align", "kl"))
        for step in range(1, 20)
    ]
    write_text(folder / "distilled.metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows) + '{"stage": 1, "na')
    write_text(folder / "recipe.yaml", "name: mamba2\nseed: 0\n")


def pictures(page):
    return {
        alt: base64.b64decode(data) for alt, data in re.findall(r'<img alt="([^"]+)" src="data:image/png;base64,([^"]+)"', page)
    }


def test_a_whole_report(tmp_path):
    fill(tmp_path)
    out = report(tmp_path, tmp_path / "report.html")
    page = out.read_text()
    found = pictures(page)
    assert set(found) == {
        "layers and their mixers", "loss against tokens", "decode speed against context", "cache bytes against context",
    }  # fmt: skip
    for data in found.values():
        assert data.startswith(b"\x89PNG\r\n\x1a\n")
        assert len(data) > 4000
    for text in (
        "FAIL",
        "1.25",
        "1.15",
        "above the &lt;limit&gt;",
        "some/&lt;base&gt;",
        "name: mamba2",
        "2.13",
        "5 ± 0.12",
    ):
        assert text in page
    # Nothing is fetched from elsewhere, and what was read cannot add markup.
    assert not re.search(r'(?:src|href)="(?!data:)', page)
    assert "<limit>" not in page
    assert report(tmp_path, tmp_path / "again.html").read_text() == page


def test_parts_that_are_missing_are_left_out(tmp_path):
    fill(tmp_path)
    for name in ("report.json", "report-converted.json", "distilled.metrics.jsonl", "verdict.json", "recipe.yaml"):
        (tmp_path / name).unlink()
    page = report(tmp_path, tmp_path / "report.html").read_text()
    assert "loss against tokens" not in pictures(page)
    assert len(pictures(page)) == 3
    assert "No verdict yet" in page
    (tmp_path / "plan.json").unlink()
    (tmp_path / "report-base.json").unlink()
    write_json(tmp_path / "verdict.json", Verdict(passed=True, gates=()).to_dict())
    page = report(tmp_path, tmp_path / "report.html").read_text()
    assert not pictures(page)
    assert "PASS" in page


def test_a_folder_with_nothing_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="holds no plan, report or verdict"):
        report(tmp_path, tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_the_table_puts_reports_side_by_side():
    rows = comparison_table({"base": measured(1), "converted": measured(2.5), "distilled": measured(1.25)})
    assert rows[0] == ["metric", "base", "converted", "distilled", "distilled / base"]
    assert rows[1] == ["perplexity", "5 ± 0.12", "12.5 ± 0.12", "6.25 ± 0.12", "1.25"]
    assert rows[2] == ["kl_to_base", "-", "0.01", "0.01", "-"]
    assert rows[3] == ["state_bytes@1024", "1 MiB", "409.6 KiB", "819.2 KiB", "0.8"]
    assert [row[0] for row in rows[3:6]] == ["state_bytes@1024", "state_bytes@8192", "state_bytes@32768"]
    assert len({len(row) for row in rows}) == 1
    assert comparison_table({"base": measured(1)})[0] == ["metric", "base"]
