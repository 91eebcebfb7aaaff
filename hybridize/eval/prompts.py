"""Prompts made offline: facts "key = value" to be found again, in the tokens a model would read them in."""

import re
from typing import Any

import numpy as np

from hybridize.errors import ConfigError

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


def check_template(template: str) -> None:
    """Raise ConfigError unless a template holds {key} and then {value}, once each."""
    if re.sub(r"[^{}]*({key}|{value})[^{}]*", r"\1", template) != "{key}{value}":
        raise ConfigError(f"template is {template!r}, expected one {{key}} and then one {{value}}")


def draw_facts(generator: np.random.Generator, count: int) -> dict[str, str]:
    """`count` different words, each with its own number of three or four digits."""
    keys = generator.choice(np.array(WORDS), size=count, replace=False)
    values = generator.choice(np.arange(100, 10_000), size=count, replace=False)
    return {str(key): str(value) for key, value in zip(keys, values, strict=True)}


def encode(tokenizer: Any, text: str, spans: list[tuple[int, int]]) -> tuple[list[int], list[tuple[int, int]]]:
    """Tokenise a text as a whole, and find the tokens of some of its parts.

    A part's first token begins before the spaces in front of it: most tokenizers put a space and the word after it into
    one token.

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
    found = []
    for start, stop in spans:
        borders = []
        for part in (text[:start].rstrip(" "), text[:stop]):
            prefix = ids_of(part)
            if ids[: len(prefix)] != prefix:
                raise ConfigError(
                    f"eval: the tokenizer has no border between {part[-12:]!r} and {text[len(part) :][:8]!r}; "
                    "choose another template"
                )
            borders.append(len(prefix))
        found.append((borders[0], borders[1]))
    return ids, found
