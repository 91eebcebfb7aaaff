"""Prompts made offline: facts "key = value" to be found again, in the tokens a model would read them in."""

import re
from typing import Any, Literal

import numpy as np

from hybridize.data import Tokens
from hybridize.errors import ConfigError, DataError

# Common English nouns that are also names of nothing else in a line: short, and one or two tokens in most tokenizers.
WORDS = tuple(
    """
    apple arm army baby back bag ball band bank bar base bath bear bed bee bell bird blood board boat body bone book
    boot bowl box boy bread bridge brother bus cake camp car card cat chain chair child church city class clock
    cloud club coat coffee corn country cow cup day desk dog doll door dream dress drum duck ear earth egg engine
    eye face farm father feet field finger fire fish flag floor flower food foot forest fox friend frog fruit game
    garden gate gift girl glass gold grass hair hall hand hat head heart hill hole home horse hotel house ice island
    jar job key king kitchen knife lady lake lamp land leaf leg letter library light lion lock lunch man map market
    meal meat milk mind mirror money moon morning mother mountain mouse mouth museum music nail name neck nest night
    nose ocean office oil orange page paint pan paper park party path pen phone picture pig pipe plane plant plate
    pocket poem pond pool queen rain ring river road rock roof room root rope rose sail salt sand school sea seed
    sheep ship shirt shoe shop sister skin sky snow soap sock song soup spoon spring stage star stone store story
    street sugar sun table tail tea tent tiger town toy train tree truck
    """.split()
)
# What keys are given: numbers of three or four digits, or words, for models that met no digits.
Values = Literal["numbers", "words"]
# A fact, where none is asked for: the first of these that the tokenizer can spell.
TEMPLATES = ("{key} = {value}\n", "{key} is {value}; ")


class NoRoom(ConfigError):
    """A prompt does not fit the length asked for."""


def check_template(template: str | None) -> None:
    """Raise ConfigError unless a template is left out, or holds {key} and then {value}, once each, and goes on behind them."""
    if template is None:
        return
    if re.sub(r"[^{}]*({key}|{value})[^{}]*", r"\1", template) != "{key}{value}":
        raise ConfigError(f"template is {template!r}, expected one {{key}} and then one {{value}}")
    if template.endswith("{value}"):
        raise ConfigError(f"template is {template!r}, expected something behind {{value}} that ends it, such as a newline")


def spelled(template: str | None, tokenizer: Any) -> str:
    """A template as asked for; for None the first of TEMPLATES that a tokenizer can spell.

    Raises:
        ConfigError: it can spell none of them.
    """
    if template is not None:
        return template
    for known in TEMPLATES:
        try:
            encode(tokenizer, *ask(known, [("apple", "1203"), ("bear", "apple"), ("cup", "army")]))
        except ConfigError:
            continue
        return known
    raise ConfigError(f"eval: the tokenizer spells none of {', '.join(map(repr, TEMPLATES))}; choose a template it knows")


def question_of(template: str, key: str) -> str:
    """A fact up to its value."""
    return template.split("{value}")[0].format(key=key)


def ask(template: str, facts: list[tuple[str, str]]) -> tuple[str, list[tuple[int, int]]]:
    """Questions with their answers, one behind another, the last one's ending left out; and where each answer stands."""
    text, spans = "", []
    for key, value in facts:
        start = len(text) + len(question_of(template, key))
        spans.append((start, start + len(value)))
        text += template.format(key=key, value=value)
    return text[: spans[-1][1]], spans


def draw_facts(generator: np.random.Generator, count: int, values: Values = "numbers") -> dict[str, str]:
    """`count` different words, each with its own number of three or four digits, or with a word of its own."""
    if values == "words":
        names = draw_words(generator, 2 * count)
        return dict(zip(names[:count], names[count:], strict=True))
    keys = generator.choice(np.array(WORDS), size=count, replace=False)
    numbers = generator.choice(np.arange(100, 10_000), size=count, replace=False)
    return {str(key): str(number) for key, number in zip(keys, numbers, strict=True)}


def draw_words(generator: np.random.Generator, count: int) -> list[str]:
    """`count` different names: single words, or pairs of words where there are not enough."""
    if count <= len(WORDS):
        return [str(word) for word in generator.choice(np.array(WORDS), size=count, replace=False)]
    if count > len(WORDS) ** 2:
        raise ConfigError(f"eval: {count} names, expected at most {len(WORDS) ** 2}; ask for a shorter prompt")
    pairs = generator.choice(len(WORDS) ** 2, size=count, replace=False)
    return [f"{WORDS[pair // len(WORDS)]} {WORDS[pair % len(WORDS)]}" for pair in pairs.tolist()]


def lead(template: str) -> str:
    """What stands between a text and a fact behind it."""
    return "\n" if template.endswith("\n") else " "


def hay_of(text: Tokens, tokens: int, generator: np.random.Generator, name: str) -> list[int]:
    """Ids of a stretch of `tokens` tokens from a random place of the text.

    Raises:
        NoRoom: there is no room for text at all.
        DataError: the text is shorter.
    """
    if tokens < 1:
        raise NoRoom(f"eval: {name} leaves no room for text, expected a longer prompt")
    if len(text.ids) < tokens:
        raise DataError(f"data: {len(text.ids)} tokens, expected at least {tokens} for {name}; give more text")
    start = int(generator.integers(len(text.ids) - tokens + 1))
    return text.ids[start : start + tokens].tolist()


def hide(hay: list[int], needles: list[list[int]], places: list[float]) -> list[int]:
    """A text with needles in it, each at its place from 0 (in front) to 1 (behind); those at one place keep their order."""
    out: list[int] = []
    done = 0
    for place, needle in sorted(zip(places, needles, strict=True), key=lambda pair: pair[0]):
        cut = round(place * len(hay))
        out += hay[done:cut] + needle
        done = cut
    return out + hay[done:]


def encode(tokenizer: Any, text: str, spans: list[tuple[int, int]]) -> tuple[list[int], list[tuple[int, int]]]:
    """Tokenise a text as a whole, and find the tokens of some of its parts.

    A part's first token begins before the spaces in front of it: most tokenizers put a space and the word after it into
    one token. Where a tokenizer puts it into the word before, it begins behind them, and its last token ends behind the spaces
    that follow.

    Args:
        tokenizer: of transformers.
        text: the prompt.
        spans: (start, stop) of each part, in characters.

    Returns:
        (ids of the whole text without special tokens, (first, last + 1) token of each part).

    Raises:
        ConfigError: the tokenizer does not give the text back, or has no token border at a part's border.
    """

    def ids_of(part: str) -> list[int]:
        return tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"]

    ids = ids_of(text)
    back = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    if back.lstrip(" ") != text.lstrip(" "):
        raise ConfigError(
            f"eval: the tokenizer reads {text[:24]!r} back as {back[:24]!r}; choose a template of characters it knows"
        )

    def border(*ends: int) -> int:
        for end in ends:
            prefix = ids_of(text[:end])
            if ids[: len(prefix)] == prefix:
                return len(prefix)
        at = ends[0]
        raise ConfigError(
            f"eval: the tokenizer has no border between {text[:at][-12:]!r} and {text[at:][:8]!r}; choose another template"
        )

    found = []
    for start, stop in spans:
        behind = stop + len(text[stop:]) - len(text[stop:].lstrip(" "))
        found.append((border(len(text[:start].rstrip(" ")), start), border(stop, behind)))
    return ids, found
