"""The report of made-up directories: whole, in parts, several at once, and what must never be in it."""

import dataclasses
import json
import re
from html.parser import HTMLParser

import pytest

from hybridize.core import Verdict
from hybridize.errors import CheckpointError, ConfigError
from hybridize.eval import comparison_table, report
from hybridize.eval.pictures import COLOURS, MOST_POINTS, Axes, Line, chart, thinned
from hybridize.eval.report.changes import changes, differences, largest, sentence
from hybridize.eval.report.folder import read_runs
from hybridize.eval.report.style import STYLE
from hybridize.storage import write_json, write_text
from tests.eval.runs import EVIL, fill, measured

SECTIONS = [
    "Before and after", "Layers", "Scores of the layers", "Distillation", "Recall against length", "Perplexity against context",
    "Loss by position", "Memory and speed against context", "Where base and student differ most", "Recipe",
    "Environment and hashes",
]  # fmt: skip
VOID = {"wbr", "meta", "link", "img", "br", "path", "use", "rect"}


class Page(HTMLParser):
    """What a page holds, and what is wrong with it: `wrong` has one line each."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[tuple[str, dict]] = []
        self.wrong: list[str] = []
        self.ids: list[str] = []
        self.headings: list[tuple[int, str]] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.feed(text)
        self.close()
        self.wrong += [f"{tag} is not closed" for tag, _ in self.open]
        self.wrong += [f"id {name} is there twice" for name in {n for n in self.ids if self.ids.count(n) > 1}]
        self.wrong += [f"no {link}" for link in self.links if link.startswith("#") and link[1:] not in self.ids]
        levels = [1] + [level for level, _ in self.headings]
        self.wrong += [f"h{b} after h{a}" for a, b in zip(levels, levels[1:], strict=False) if b > a + 1]
        if self.tags.count("h1") != 1 or not {"header", "main", "nav", "footer"} <= set(self.tags):
            self.wrong.append("landmarks")

    def handle_starttag(self, tag, attrs):
        known = dict(attrs)
        self.tags.append(tag)
        self.ids += [known["id"]] if "id" in known else []
        around = [given for _, given in self.open]
        if tag in ("script", "iframe", "object", "embed", "form", "base") or any(name.startswith("on") for name in known):
            self.wrong.append(f"{tag} {attrs}")
        for name in ("src", "href", "xlink:href"):
            if name in known:
                self.links.append(known[name])
                if not re.match(r"#|data:", known[name]):
                    self.wrong.append(f"{tag} asks for {known[name]}")
        if tag in ("svg", "img") and not any(one.get("role") == "img" and one.get("aria-label") for one in around):
            self.wrong.append(f"a picture without words: {tag}")
        if tag == "table" and not any(one.get("tabindex") == "0" and one.get("aria-label") for one in around):
            self.wrong.append("a table outside its box")
        if re.fullmatch("h[1-6]", tag):
            self.headings.append((int(tag[1]), ""))
        if tag not in VOID:
            self.open.append((tag, known))

    def handle_endtag(self, tag):
        if tag in VOID:
            return
        if not self.open or self.open[-1][0] != tag:
            self.wrong.append(f"</{tag}> closes {self.open[-1:]}")
        else:
            self.open.pop()

    def handle_data(self, data):
        if self.open and re.fullmatch("h[1-6]", self.open[-1][0]):
            self.headings[-1] = (self.headings[-1][0], self.headings[-1][1] + data)

    def titles(self):
        return [text for level, text in self.headings if level == 2]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A full directory and the text of its page."""
    folder = fill(tmp_path_factory.mktemp("runs") / "first")
    return folder, report(folder, folder / "page.html").read_text()


def test_a_whole_report(whole):
    _, text = whole
    page = Page(text)
    assert page.wrong == []
    assert page.titles() == ["Fail: 1 of 2 gates failed", *SECTIONS]
    # Two stages, recall and its nll, perplexity, positions, cache and speed; of bench all but what was not measured.
    assert page.tags.count("svg") == 2 + 2 + 1 + 1 + 2 + 4
    for said in (
        "above the &lt;limit&gt;",
        "2.13",
        "5 ± 0.12",
        "2 of the base&#x27;s 4 layers became mamba2",
        "from 65,536 tokens on",
    ):
        assert said in text
    assert "/home/someone" not in text


@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        ("&lt;script&gt;", "<script>", "script"),
        ("</main>", '<img src="http://evil.example/x.png"></main>', "asks for"),
        ('class="box" role="region" tabindex="0"', 'class="box"', "a table outside its box"),
        ('role="img"', "", "without words"),
        ("<h2", "<h4", "h4 after h"),
        ("</section>", "", "closes"),
        ('id="layers"', 'id="recipe"', "there twice"),
    ],
)
def test_the_check_of_a_page_sees_a_wrong_one(whole, old, new, found):
    assert old in whole[1]
    assert any(found in wrong for wrong in Page(whole[1].replace(old, new)).wrong)


def test_text_from_files_stays_text(whole):
    folder, text = whole
    assert "&lt;script&gt;console.error" in text
    markdown = (folder / "page.md").read_text()
    # Markup stands inside fences alone, where it is text.
    outside = re.sub(r"(?ms)^(`{3,})$.*?^\1$", "", markdown)
    assert EVIL in markdown
    assert "<" not in outside
    assert "base &lt;script&gt;" in outside


def test_the_same_for_machines(whole):
    folder, _ = whole
    found = json.loads((folder / "page.all.json").read_text())
    (run,) = found["runs"]
    assert run["state"] == {"tokens": 32768, "share": 0.8}
    # bench went further than the report's probe.
    assert run["decode"] == {"tokens": 65536, "speedup": 65.536}
    assert run["metrics"]["distilled"]["perplexity"]["value"] == 6.25
    assert run["paired"]["recall@4"]["mean"] == -0.5
    assert run["items"]["recall@4"] == {"items": 4, "worse": 2, "better": 0}
    assert len(run["losses"]["0: align"]) <= MOST_POINTS
    assert len(run["layers"]) == 4
    assert "someone" not in json.dumps(found)
    # A run's own report.json is another thing.
    assert json.loads((folder / "report.json").read_text())["checkpoint"] == "here"


def test_what_got_worse(whole):
    (run,) = read_runs([whole[0]])
    paired = changes(run.base, run.final)
    assert set(paired) == {f"{name}@{n}" for name in ("recall", "recall_nll") for n in (4, 16, 64)}
    # Differences -1, 0, -1, 0: their deviation over the root of 4 is 0.2887.
    assert (paired["recall@4"].mean, round(paired["recall@4"].stderr, 4)) == (-0.5, 0.2887)
    assert not paired["recall@4"].worse
    # 0.25, 0.5, 0.75, 1 nats more, and fewer is better.
    nll = paired["recall_nll@4"]
    assert (nll.mean, round(nll.stderr, 4), nll.worse, nll.better) == (0.625, 0.1614, True, False)
    assert "3 of 6 metrics compared item by item got worse beyond two standard errors" in sentence(run)
    other = measured(1.25)
    other.item_hashes["recall@4"] = "other items"
    assert "recall@4" not in changes(run.base, other)


def test_the_items_that_differ_most(whole):
    (run,) = read_runs([whole[0]])
    found = differences(run)
    assert [item.size for item in found["recall@4"]] == [-1.0, 0.0, -1.0, 0.0]
    # Of nll from 1 to 5: a quarter more each, over a range of 4, and more is worse.
    assert [item.size for item in found["recall_nll@4"]] == [-0.25 / 4, -0.5 / 4, -0.75 / 4, -1 / 4]
    chosen = largest(found, 4)
    # One of the family, then its next; equal ones in the order of the table.
    assert [item.metric for item in chosen] == ["recall@4", "recall@4", "recall@16", "recall@16"]
    run.items["base"]["recall@4"][2]["prompt"] = "another question"
    assert "recall@4" not in differences(run)


def test_a_base_goes_by_its_last_name(whole):
    (run,) = read_runs([whole[0]])

    def name(path):
        return dataclasses.replace(run, plan=dataclasses.replace(run.plan, base=path)).base_name

    assert name("/home/someone/llama") == "llama"
    assert name("/home/someone/hub/models--org--some--base/snapshots/0a1b") == "org/some--base"


def test_parts_that_are_missing_are_left_out(tmp_path):
    fill(tmp_path)
    for name in ("report", "report-converted", "report-base"):
        (tmp_path / f"{name}.items.jsonl").unlink()
    for name in ("report.json", "report-converted.json", "distilled.metrics.jsonl", "verdict.json", "recipe.yaml", "scores.json",
                 "bench.json"):  # fmt: skip
        (tmp_path / name).unlink()
    page = Page(report(tmp_path, tmp_path / "report.html").read_text())
    assert report(tmp_path, tmp_path / "again.html").read_bytes() == (tmp_path / "report.html").read_bytes()
    assert page.wrong == []
    wanted = [SECTIONS[0], SECTIONS[1], *SECTIONS[4:8], SECTIONS[10]]
    assert page.titles() == ["No verdict yet", *wanted]
    (tmp_path / "plan.json").unlink()
    (tmp_path / "report-base.json").unlink()
    write_json(tmp_path / "verdict.json", Verdict(passed=True, gates=()).to_dict())
    page = Page(report(tmp_path, tmp_path / "report.html").read_text())
    assert (page.wrong, page.titles(), page.tags.count("svg")) == ([], ["Pass"], 0)


def test_runs_side_by_side(whole, tmp_path):
    second = fill(tmp_path / "second", "streaming", ("kl",), final=1.5)
    out = report([whole[0], second], tmp_path / "both.html")
    page = Page(out.read_text())
    assert page.wrong == []
    assert page.titles()[:4] == ["Fail: 1 of 2 gates failed"] * 2 + ["Side by side", "Layers"]
    found = json.loads(out.with_suffix(".all.json").read_text())
    assert [run["name"] for run in found["runs"]] == ["first", "second"]
    lines = out.with_suffix(".md").read_text().splitlines()
    heading = next(line for line in lines if line.startswith("| metric"))
    assert heading == "| metric | base | first | first / base | second | second / base | better |"
    assert "| perplexity | 5 ± 0.12 | 6.25 ± 0.12 | 1.25 | 7.5 ± 0.12 | 1.5 | lower |" in lines
    # The stages kl lie over each other, the first run alone has align.
    assert page.tags.count("svg") == 2 + 2 + 1 + 1 + 2 + 4


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("report.items.jsonl", '{"metric": "recall@4"}\n', "report.items.jsonl: line 1 has ['metric'], expected"),
        ("report.items.jsonl", "{", "line 1 is not JSON"),
        ("bench.json", '{"contexts": {}}', "bench.json: got no rows"),
        ("distilled.metrics.jsonl", '{"loss": 1.0, "stage": 1, "name": "kl"}\n', "line 1: tokens is None"),
        ("distilled.metrics.jsonl", "3\n", "line 1 is 3, expected one object a line"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, name, text, said):
    write_text(fill(tmp_path) / name, text)
    with pytest.raises(CheckpointError, match=re.escape(said)):
        report(tmp_path, tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_what_is_refused(tmp_path, whole):
    with pytest.raises(CheckpointError, match="holds no plan, report or verdict"):
        report(tmp_path, tmp_path / "report.html")
    with pytest.raises(ConfigError, match="ends in .html"):
        report(whole[0], tmp_path / "report.json")
    with pytest.raises(ConfigError, match="is there twice"):
        report([whole[0], whole[0] / "."], tmp_path / "report.html")
    with pytest.raises(ConfigError, match="got no directory"):
        report([], tmp_path / "report.html")
    assert not list(tmp_path.iterdir())


def luminance(colour):
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    """WCAG 2.2's contrast ratio."""
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_contrast_in_light_and_dark():
    assert round(contrast("#000000", "#ffffff"), 3) == 21
    for block in STYLE.split("@media (prefers-color-scheme: dark)")[:2]:
        known = dict(re.findall(r"--([a-z0-9]+): (#[0-9a-f]{6})", block.split("body {")[0]))
        for ground in ("paper", "raised"):
            for text in ("ink", "quiet", "link", "good", "bad"):
                assert contrast(known[text], known[ground]) >= 4.5, (text, ground)
            for place in range(COLOURS):
                assert contrast(known[f"c{place}"], known[ground]) >= 3, (place, ground)
        # The deepest shade of a heat map, under its text.
        accent = [int(part) for part in re.search(r"--accent: (\d+), (\d+), (\d+)", block).groups()]
        share = float(re.search(r"var\(--v\) \* ([.\d]+)", STYLE)[1])
        paper = [int(known["paper"][at : at + 2], 16) for at in (1, 3, 5)]
        mixed = "#" + "".join(f"{round(share * a + (1 - share) * p):02x}" for a, p in zip(accent, paper, strict=True))
        assert contrast(known["ink"], mixed) >= 4.5


def test_a_chart_has_the_pages_colours():
    lines = [
        Line(label="a", points=((1, 2.0), (4096, 3.0)), spread=((0.5, 0.1), (0.1, 0.5)), colour=9),
        Line(label="b", points=((1, 0.0),)),
    ]
    svg = chart(lines, Axes(x="<x> $1$", y="y", lengths=True, from_zero=True), "a")
    assert set(re.findall(r"var\(--\w+\)", svg)) == {"var(--c0)", "var(--c1)", "var(--rule)"}
    assert not re.search(r"#[0-9a-f]{6}[;\"]|<style|font-family|<metadata|<g id", svg)
    assert "&lt;x&gt; $1$" in svg
    assert ">4k<" in svg
    assert chart(lines, Axes(x="x", y="y"), "a") == chart(lines, Axes(x="x", y="y"), "a")
    # Names inside an <svg> hold for the whole page.
    names = [set(re.findall(r'id="([^"]+)"', chart(lines, Axes(x="x", y="y"), salt))) for salt in "ab"]
    assert names[0]
    assert not names[0] & names[1]


def test_long_curves_are_thinned():
    points = [(float(i), float(i % 2)) for i in range(1001)]
    found = thinned(points)
    assert len(found) == 167
    assert found[0] == (2.5, 0.5)
    assert found[-1] == (998.0, 0.4)
    assert thinned(points[:MOST_POINTS]) == points[:MOST_POINTS]


def test_the_table_puts_reports_side_by_side():
    rows = comparison_table({"base": measured(1), "converted": measured(2.5), "distilled": measured(1.25)})
    assert rows[0] == ["metric", "base", "converted", "distilled", "distilled / base"]
    assert rows[1] == ["perplexity", "5 ± 0.12", "12.5 ± 0.12", "6.25 ± 0.12", "1.25"]
    named = {row[0]: row[1:] for row in rows}
    assert named["kl_to_base"] == ["-", "0.01", "0.01", "-"]
    assert named["state_bytes@1024"] == ["1 MiB", "409.6 KiB", "819.2 KiB", "0.8"]
    # Speeds of two reports were measured at different times; speedups were not.
    assert named["decode_tokens_per_s@1024"] == ["100", "250", "125", "-"]
    names = [row[0] for row in rows[1:]]
    assert names[4:12] == ["kl_to_base", *(f"{name}@{n}" for name in ("recall", "recall_nll") for n in (4, 16, 64)), "nll_at@16"]
    assert names[-3:] == [f"decode_speedup@{n}" for n in (1024, 8192, 32768)]
    assert len({len(row) for row in rows}) == 1
    assert comparison_table({"base": measured(1)})[0] == ["metric", "base"]
