"""Needles in a haystack: facts hidden in held-out text, asked for at the end."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from hybridize.errors import ConfigError
from hybridize.eval.answers import Judged, Prompt, at_lengths, bos_of, check_lengths, score
from hybridize.eval.context import EvalContext, ProbeResult, merged
from hybridize.eval.prompts import (
    Values,
    ask,
    check_template,
    draw_facts,
    draw_words,
    encode,
    hay_of,
    hide,
    lead,
    question_of,
    spelled,
)

Facts = list[tuple[str, str]]
Kind = Literal["single", "multikey", "multivalue", "multiquery", "tracking", "threading"]


@dataclass(frozen=True)
class Hidden:
    """What one prompt hides and asks for, in words."""

    needles: Facts
    """In the order in which they stand in the text."""
    question: str
    answers: list[tuple[int, int]]
    """Where each answer stands in the question, in characters."""
    deep: int | None = None
    """The needle whose depth is given; the others stand anywhere."""
    example: str = ""
    """In front of the text: how such a question is answered."""


def single(generator: np.random.Generator, needles: int, template: str, values: Values) -> Hidden:
    """One needle, asked for."""
    facts = list(draw_facts(generator, 1, values).items())
    return Hidden(facts, *ask(template, facts), deep=0)


def multikey(generator: np.random.Generator, needles: int, template: str, values: Values) -> Hidden:
    """One of several keys is asked for."""
    facts = list(draw_facts(generator, needles, values).items())
    deep = int(generator.integers(needles))
    return Hidden(facts, *ask(template, [facts[deep]]), deep=deep)


def multivalue(generator: np.random.Generator, needles: int, template: str, values: Values) -> Hidden:
    """One key has several values; all are asked for, in the order in which they stand."""
    drawn = draw_facts(generator, needles, values)
    facts = [(next(iter(drawn)), value) for value in drawn.values()]
    return Hidden(facts, *ask(template, facts))


def multiquery(generator: np.random.Generator, needles: int, template: str, values: Values) -> Hidden:
    """All of several keys are asked for, in another order."""
    facts = list(draw_facts(generator, needles, values).items())
    return Hidden(facts, *ask(template, [facts[place] for place in generator.permutation(needles)]))


def threading(generator: np.random.Generator, needles: int, template: str, values: Values) -> Hidden:
    """The value of a needle is the key of the next; the thread is followed link by link, past another thread."""
    words = draw_words(generator, 2 * (needles + 1))
    thread, other = _links(words[: needles + 1]), _links(words[needles + 1 :])
    facts = thread + other
    return Hidden([facts[place] for place in generator.permutation(len(facts))], *ask(template, thread))


def tracking(generator: np.random.Generator, needles: int, template: str, values: Values) -> Hidden:
    """The first name has a number, each further one has the name before it; all names of a number are asked for."""
    names = draw_words(generator, 2 * needles)
    numbers = [str(number) for number in generator.choice(np.arange(1000, 10_000), size=2, replace=False)]
    shown, asked = names[:needles], names[needles:]
    chain = "".join(template.format(key=key, value=value) for key, value in _assigned(shown, numbers[0]))
    example = chain + template.format(key=numbers[0], value=" ".join(shown))
    question, answers = question_of(template, numbers[1]), []
    for name in asked:
        answers.append((len(question), len(question) + len(name)))
        question += name + " "
    return Hidden(_assigned(asked, numbers[1]), question[:-1], answers, example=example)


def _links(words: list[str]) -> Facts:
    return list(zip(words[:-1], words[1:], strict=True))


def _assigned(names: list[str], number: str) -> Facts:
    return [(name, value) for value, name in _links([number, *names])]


# By kind: what it hides, its metric, and how a prompt is judged.
KINDS: dict[str, tuple[Callable[[np.random.Generator, int, str, Values], Hidden], str, Judged]] = {
    "single": (single, "needle", "each value"),
    "multikey": (multikey, "needle_multikey", "each value"),
    "multivalue": (multivalue, "needle_multivalue", "each value"),
    "multiquery": (multiquery, "needle_multiquery", "each value"),
    "tracking": (tracking, "tracking", "each value"),
    "threading": (threading, "threading", "all values"),
}


@dataclass(frozen=True, kw_only=True)
class Needle:
    """Values found again in a long text, in RULER's shapes (arXiv 2404.06654) and as threads (arXiv 2411.05000).

    Questions have the form of the facts and need no instruction. Where several values are asked for, the model reads each right
    one before the next; a thread counts where every link is right, which is when greedy generation would follow it to its end.
    Chains of variables (`tracking`) come with an answered example in front of the text, as in RULER.
    """

    kinds: list[Kind] = field(default_factory=lambda: ["single"])
    """single gives `needle@L`; multikey, multivalue, multiquery `needle_KIND@L`; tracking and threading their own names."""
    lengths_tokens: list[int] | None = None
    """Tokens of a whole prompt; None is a quarter, a half and the whole of what the model is trained for."""
    depths: list[float] = field(default_factory=lambda: [0.1, 0.3, 0.5, 0.7, 0.9])
    """Where the needle asked for stands, from 0 (the start of the text) to 1 (just before the question), in single and
    multikey; all others stand at random."""
    needles: int = 4
    """Facts, values, links or names, in all kinds but single."""
    values: Values = "numbers"
    """What keys are given: numbers of three or four digits, or words, for models that met no digits. Threads are of words."""
    samples: int = 8
    """Prompts for each length and depth."""
    template: str | None = None
    """A fact, and a question with its answer; None is the first of "{key} = {value}\\n" and "{key} is {value}; " that the
    tokenizer can spell."""
    batch_tokens: int = 4096
    """Tokens in one forward pass."""

    def __post_init__(self) -> None:
        check_template(self.template)
        check_lengths(self.lengths_tokens, self.samples)
        if not self.depths or not all(0 <= depth <= 1 for depth in self.depths):
            raise ConfigError(f"depths is {self.depths}, expected some, 0 to 1")
        if not self.kinds or self.needles < 2:
            raise ConfigError(f"kinds is {self.kinds} and needles {self.needles}, expected some, and at least 2")

    def __call__(self, context: EvalContext) -> ProbeResult:
        """Measure, by one teacher-forced pass over each prompt with its answers.

        Returns:
            For each kind and length: the share of values that are the model's greedy choice (of `threading`: of whole
            threads), and NAME_nll, the mean -log p per token of the values; samples are prompts, those of a depth together.

        Raises:
            ConfigError: no text or tokenizer, or a length beyond the model's context or with no room for text.
            DataError: the text is shorter than a prompt.
        """
        context.need_tokenizer("needle")
        context.need_text("needle")
        return merged([
            at_lengths(context, "needle", self.lengths_tokens, lambda length, kind=kind: self._at(context, kind, length))
            for kind in self.kinds
        ])  # fmt: skip

    def _at(self, context: EvalContext, kind: str, length: int) -> ProbeResult:
        name, judged = KINDS[kind][1:]
        prompts = [
            self.prompt(context, kind, length, place, index)
            for place in range(len(self.depths))
            for index in range(min(self.samples, context.limit or self.samples))
        ]
        return score(context, name, length, prompts, self.batch_tokens, judged)

    def prompt(self, context: EvalContext, kind: str, length: int, place: int, index: int) -> Prompt:
        """Prompt `index` of a kind at depth number `place`: `length` tokens that end with its last answer."""
        tokenizer: Any = context.tokenizer
        template, bos = spelled(self.template, tokenizer), bos_of(context)
        draw, name, _ = KINDS[kind]
        generator = np.random.default_rng([context.seed, length, place, index])
        hidden = draw(generator, self.needles, template, self.values)
        gap = lead(template)
        needles = [encode(tokenizer, gap + template.format(key=key, value=value), [])[0] for key, value in hidden.needles]
        example = encode(tokenizer, hidden.example, [])[0] if hidden.example else []
        spans = [(start + len(gap), stop + len(gap)) for start, stop in hidden.answers]
        question, found = encode(tokenizer, gap + hidden.question, spans)
        room = length - sum(map(len, [bos, example, *needles, question]))
        hay = hay_of(context.need_text("needle"), room, generator, f"{name}@{length}")
        places = np.sort(generator.random(len(needles))).tolist()
        if hidden.deep is not None:
            places[hidden.deep] = self.depths[place]
        ids = bos + example + hide(hay, needles, places) + question
        before = length - len(question)
        return Prompt(ids, [(before + first, before + stop) for first, stop in found])
