"""The report of a small real run in a browser: nothing is fetched, nothing is logged, nothing is too wide."""

import pytest

from hybridize.cli import app
from hybridize.eval import report
from hybridize.eval.report.page import POLICY
from tests.browser import Browser, Seen
from tests.eval.runs import fill
from tests.eval.toys import DOCUMENTS, toy_base

pytestmark = pytest.mark.slow

SMALL = [
    "--set", "distill=[{name: align, tokens: 1024, seq_tokens: 32, rows: 4}, {name: kl, tokens: 1024, seq_tokens: 32, rows: 4}]",
    "--set", "evaluate=[{name: perplexity, contexts: [16, 32]}, {name: kl_to_base, context: 32}, {name: recall, pairs: [1, 2], "
    "samples: 4, queries: 1}, {name: state_bytes}, {name: speed, contexts: [16, 64], repeats: 1}]",
    "--set", "gates=[{name: max_ratio, metric: perplexity, max: 1.5}]",
]  # fmt: skip
VIEWS = [(1280, False), (1280, True), (390, False), (390, True)]


@pytest.fixture(scope="module")
def browser():
    with Browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """By name: the page of a real run, of a made-up one with every section, and of both."""
    folder = tmp_path_factory.mktemp("report")
    text = folder / "text.jsonl"
    text.write_text("".join(f'{{"text": "{document.strip()}"}}\n' for document in DOCUMENTS))
    base = toy_base(folder)
    words = ["--quiet", "run", "mamba2", "--base", base, "--data", text, "--out", folder / "real" / "run", *SMALL]
    assert app([str(word) for word in words]) == 0
    made = fill(folder / "made" / "run")
    # Directories of one name are told apart by their whole path, which is longer than a phone is wide.
    both = report([folder / "real" / "run", made], folder / "both.html")
    return {"real": folder / "real" / "run" / "report.html", "made": report(made, folder / "made.html"), "both": both}


def wrong(seen: Seen, width: int) -> list[str]:
    """What must not be, one line each."""
    found = [f"logged {error}" for error in seen.errors]
    found += [f"asked for {url}" for url in seen.requests[1:]]
    # The window of a phone grows with a page that is too wide for it.
    if max(seen.layout["page"], seen.layout["window"]) > width:
        found.append(f"is {seen.layout['page']} wide in {seen.layout['window']} of {width}")
    pictures = seen.layout["pictures"]
    found += [f"empty picture: {picture}" for picture in pictures if min(picture["width"], picture["height"]) < 40]
    return found if pictures else [*found, "no picture"]


@pytest.mark.parametrize("name", ["real", "made", "both"])
def test_the_page_in_a_browser(browser, pages, name):
    grounds = set()
    for width, dark in VIEWS:
        seen = browser.look(pages[name], width, dark)
        assert wrong(seen, width) == [], (width, dark)
        assert len(seen.requests) == 1
        assert "Before and after" in seen.layout["text"] or "Side by side" in seen.layout["text"]
        # Read as text, even where it tried to be markup.
        assert name == "real" or "<script>" in seen.layout["text"]
        grounds.add((dark, seen.layout["colour"]))
    assert len(grounds) == 2
    assert len({colour for _, colour in grounds}) == 2


OUTSIDE = '<img src="http://127.0.0.1:9/x.png" width="50" height="50">'
NO_POLICY = (f'content="{POLICY}"', 'content=""')


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ([("</main>", f"{OUTSIDE}</main>"), NO_POLICY], "asked for http://127.0.0.1:9/x.png"),
        # With the policy the picture is not even asked for, and the browser says so.
        ([("</main>", f"{OUTSIDE}</main>")], "logged "),
        ([("</main>", "<script>console.error('no')</script></main>"), NO_POLICY], "logged "),
        ([("</main>", "<script>nothing()</script></main>"), NO_POLICY], "logged "),
        ([('class="box" role', 'class="free" role')], "wide in"),
        ([("figure svg { display: block;", "figure svg { display: none;")], "empty picture"),
    ],
)
def test_the_check_sees_a_wrong_page(browser, pages, tmp_path, changes, said):
    text = pages["made"].read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    page = tmp_path / "wrong.html"
    page.write_text(text)
    assert any(said in line for line in wrong(browser.look(page, 390), 390))


def test_every_box_is_reached_with_the_keyboard(browser, pages):
    """Tab goes through the skip link, all links, all boxes that scroll and all folds, in the order of the page."""
    reached = browser.tab_through(pages["made"], 390)
    assert reached[0] == "Skip to the report"
    assert {"Environment and hashes", "How well it does", "What it costs", "recipe.yaml", "In figures"} <= set(reached)
