"""The report verb: a working directory as one HTML file that needs nothing beside it."""

import base64
import html
import json
from pathlib import Path

from hybridize.core import Plan, Report, Verdict, read_json
from hybridize.errors import CheckpointError
from hybridize.eval.pictures import against_context, layer_map, loss_curves
from hybridize.eval.table import comparison_table
from hybridize.storage import write_text

__all__ = ["comparison_table", "report"]

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1d2733; background: #f4f6f8; margin: 0; }
main { max-width: 960px; margin: 0 auto; padding: 24px 20px 60px; }
h1 { font-size: 26px; margin: 8px 0 2px; } h2 { font-size: 18px; margin: 0 0 10px; }
section { background: #fff; border: 1px solid #e1e6eb; border-radius: 10px; padding: 18px 20px; margin: 18px 0; }
.banner { border-left: 8px solid #8a94a0; } .pass { border-left-color: #1a7f4b; } .fail { border-left-color: #c2352b; }
.word { font-size: 22px; font-weight: 700; }
.pass .word, td.pass { color: #1a7f4b; } .fail .word, td.fail { color: #c2352b; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 5px 10px 5px 0; border-bottom: 1px solid #edf0f3; vertical-align: top; }
th { color: #5b6773; font-weight: 600; } td.pass, td.fail { font-weight: 700; }
.wide { overflow-x: auto; } img { max-width: 100%; height: auto; } .muted { color: #5b6773; }
pre { background: #f4f6f8; padding: 12px; border-radius: 6px; overflow-x: auto; font-size: 13px; }
"""


def report(workdir: Path, out: Path) -> Path:
    """Write the report of a working directory; parts that are not there yet are left out.

    Args:
        workdir: directory of `hybridize run`: plan.json, report-base.json, report-converted.json, report.json,
            verdict.json, distilled.metrics.jsonl (any `*.metrics.jsonl`), recipe.yaml.
        out: the HTML file.

    Returns:
        `out`.

    Raises:
        CheckpointError: `workdir` holds none of these, or one that cannot be read.
        MissingDependencyError: matplotlib is absent.
    """
    workdir, out = Path(workdir), Path(out)
    plan = Plan.read(workdir / "plan.json") if (workdir / "plan.json").is_file() else None
    verdict = None
    if (workdir / "verdict.json").is_file():
        found = read_json(workdir / "verdict.json", "a verdict written by `hybridize gate`")
        verdict = Verdict.from_dict(found, str(workdir / "verdict.json"))
    final = "distilled" if (workdir / "distilled").is_dir() else "converted"
    files = {"base": "report-base.json", "converted": "report-converted.json", final: "report.json"}
    reports = {name: Report.read(workdir / file) for name, file in files.items() if (workdir / file).is_file()}
    if plan is None and verdict is None and not reports:
        raise CheckpointError(f"{workdir}: holds no plan, report or verdict; expected a directory of `hybridize run`")
    sections = [
        _banner(verdict),
        _section("Layers", _picture(None if plan is None else layer_map(plan), "layers and their mixers")),
        _section("Before and after", _table(comparison_table(reports)) if reports else ""),
        _section("Distillation", _picture(_losses(workdir), "loss against tokens")),
        _section("Decode speed", _picture(_decode_picture(reports), "decode speed against context")),
        _section("Cache", _picture(_state_picture(reports), "cache bytes against context")),
        _section("Recipe", _text_file(workdir / "recipe.yaml")),
        _section("Versions", _versions(reports)),
    ]
    title = "hybridize: " + (plan.recipe if plan is not None else workdir.resolve().name)
    subtitle = "" if plan is None else f'<p class="muted">{html.escape(plan.family)}, base {html.escape(plan.base)}</p>'
    page = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{html.escape(title)}</title>'
        f"<style>{STYLE}</style></head>\n<body><main><h1>{html.escape(title)}</h1>{subtitle}\n"
        + "\n".join(part for part in sections if part)
        + "\n</main></body></html>\n"
    )
    write_text(out, page)
    return out


def _section(title: str, body: str) -> str:
    return f"<section><h2>{title}</h2>{body}</section>" if body else ""


def _banner(verdict: Verdict | None) -> str:
    if verdict is None:
        return '<section class="banner"><span class="word">No verdict yet</span></section>'
    word = "pass" if verdict.passed else "fail"
    rows = "".join(
        f"<tr><td>{html.escape(gate.name)}</td><td>{'-' if gate.value is None else f'{gate.value:.6g}'}</td>"
        f"<td>{'-' if gate.limit is None else f'{gate.limit:g}'}</td>"
        f'<td class="{"pass" if gate.passed else "fail"}">{"PASS" if gate.passed else "FAIL"}</td>'
        f"<td>{html.escape(gate.detail)}</td></tr>"
        for gate in verdict.gates
    )
    return (
        f'<section class="banner {word}"><span class="word">{word.upper()}</span><div class="wide"><table>'
        f"<tr><th>gate</th><th>value</th><th>limit</th><th></th><th></th></tr>{rows}</table></div></section>"
    )


def _table(rows: list[list[str]]) -> str:
    heading = "".join(f"<th>{html.escape(cell)}</th>" for cell in rows[0])
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows[1:])
    return f'<div class="wide"><table><tr>{heading}</tr>{body}</table></div>'


def _picture(data: bytes | None, alt: str) -> str:
    if data is None:
        return ""
    return f'<img alt="{alt}" src="data:image/png;base64,{base64.b64encode(data).decode()}">'


def _losses(workdir: Path) -> bytes | None:
    stages: dict[str, list[tuple[float, float]]] = {}
    for path in sorted(workdir.glob("*.metrics.jsonl")):
        lines = path.read_text(encoding="utf-8").splitlines()
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                # The last line of a run that was killed may be half written.
                if number == len(lines):
                    break
                raise CheckpointError(f"{path}: line {number} is not JSON ({error.msg}); expected one object a line") from error
            if "loss" in row:
                stages.setdefault(f"{row['stage']}: {row['name']}", []).append((row["tokens"], row["loss"]))
    return loss_curves(stages) if stages else None


def _decode_picture(reports: dict[str, Report]) -> bytes | None:
    # Conversion alone does not change speed: base and final are the two lines to see.
    shown = {name: reports[name] for name in ("base", "distilled") if name in reports}
    return against_context(shown or reports, "decode_tokens_per_s", "decode, tokens/s", log_y=False)


def _state_picture(reports: dict[str, Report]) -> bytes | None:
    shown = {name: reports[name] for name in ("base", "distilled") if name in reports}
    return against_context(shown or reports, "state_bytes", "cache of one sequence, bytes", log_y=True)


def _text_file(path: Path) -> str:
    return f"<pre>{html.escape(path.read_text(encoding='utf-8'))}</pre>" if path.is_file() else ""


def _versions(reports: dict[str, Report]) -> str:
    if not reports:
        return ""
    rows = [["", *reports]]
    for key in sorted({key for report in reports.values() for key in report.versions}):
        rows.append([key, *(report.versions.get(key, "-") for report in reports.values())])
    rows.append(["checkpoint", *(report.checkpoint for report in reports.values())])
    rows.append(["checkpoint_hash", *(report.checkpoint_hash[:16] for report in reports.values())])
    return _table(rows)
