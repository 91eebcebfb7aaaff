"""The built site in a browser: nothing comes from elsewhere, nothing is logged, no page is wider than a phone."""

from pathlib import Path

import pytest

from tests.browser import Browser

pytestmark = pytest.mark.slow

SITE = Path(__file__).parents[1] / "site"
# One of each kind: formulas, wide tables, long words, blocks of code, docstrings.
LOOKED_AT = ["index", "quickstart", "mixers/lolcats", "native", "recipes/zebra-llama", "troubleshooting", "api"]
WORDS = {
    "mixers/lolcats": "What it computes",
    "native": "every second layer",
    "api": "ConfigError",
    "troubleshooting": "What to do.",
}


@pytest.fixture(scope="module")
def browser():
    if not (SITE / "index.html").is_file():
        pytest.skip("the site is not built: make docs")
    with Browser() as opened:
        yield opened


@pytest.mark.parametrize("name", LOOKED_AT)
def test_a_page_in_a_browser(browser, name):
    for width, dark in ((1280, False), (390, False), (390, True)):
        seen = browser.look(SITE / f"{name}.html", width, dark)
        assert seen.errors == []
        assert [url for url in seen.requests if not url.startswith("file:")] == []
        assert max(seen.layout["page"], seen.layout["window"]) <= width, (width, dark)
        assert WORDS.get(name, "hybridize") in seen.layout["text"]


def test_a_formula_is_a_picture_of_its_own_size(browser):
    # Furo's icons are pictures of no size until they are used; a formula is one with the size that it was drawn in.
    seen = browser.look(SITE / "mixers" / "lolcats.html", 390)
    assert sum(picture["width"] > 200 and picture["height"] > 100 for picture in seen.layout["pictures"]) == 1
