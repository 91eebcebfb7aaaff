"""A pass key hidden in filler text that says the same again and again."""

import re
from dataclasses import dataclass, field

import numpy as np

from hybridize.errors import ConfigError
from hybridize.eval.answers import Prompt, at_lengths, bos_of, check_lengths, score
from hybridize.eval.context import EvalContext, ProbeResult
from hybridize.eval.prompts import NoRoom, encode

FILLER = " The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
FACT = " The pass key is {key}. Remember it. {key} is the pass key."
QUESTION = " What is the pass key? The pass key is {key}"


@dataclass(frozen=True, kw_only=True)
class Passkey:
    """Share of prompts whose pass key, five digits, is the model's greedy choice (Mohtashami and Jaggi, arXiv 2305.16300).

    Needs no text. The published instruction in front is left out, for models that follow none.
    """

    lengths_tokens: list[int] | None = None
    """Tokens of a whole prompt; None is a quarter, a half and the whole of what the model is trained for."""
    depths: list[float] = field(default_factory=lambda: [0.1, 0.3, 0.5, 0.7, 0.9])
    """Where the pass key stands, from 0 (the start) to 1 (just before the question)."""
    samples: int = 8
    """Prompts for each length and depth."""
    batch_tokens: int = 4096
    """Tokens in one forward pass."""

    def __post_init__(self) -> None:
        check_lengths(self.lengths_tokens, self.samples)
        if not self.depths or not all(0 <= depth <= 1 for depth in self.depths):
            raise ConfigError(f"depths is {self.depths}, expected some, 0 to 1")

    def __call__(self, context: EvalContext) -> ProbeResult:
        """Measure, by one teacher-forced pass over each prompt with its answer.

        Returns:
            `passkey@L` and `passkey_nll@L`; samples are prompts, those of a depth together.

        Raises:
            ConfigError: no tokenizer, one that cannot spell the prompt, or a length beyond the model's context.
        """
        context.need_tokenizer("passkey")
        return at_lengths(context, "passkey", self.lengths_tokens, lambda length: self._at(context, length))

    def _at(self, context: EvalContext, length: int) -> ProbeResult:
        prompts = [
            self.prompt(context, length, place, index)
            for place in range(len(self.depths))
            for index in range(min(self.samples, context.limit or self.samples))
        ]
        return score(context, "passkey", length, prompts, self.batch_tokens)

    def prompt(self, context: EvalContext, length: int, place: int, index: int) -> Prompt:
        """Prompt `index` at depth number `place`: `length` tokens that end with the pass key."""
        bos = bos_of(context)
        key = str(np.random.default_rng([context.seed, length, place, index]).integers(10_000, 100_000))
        text = QUESTION.format(key=key)
        question, ((first, stop),) = encode(context.tokenizer, text, [(len(text) - len(key), len(text))])
        fact, filler = (encode(context.tokenizer, part, [])[0] for part in (FACT.format(key=key), FILLER))
        room = length - len(bos) - len(fact) - len(question)
        if room < 0:
            raise NoRoom(f"eval: passkey@{length} leaves no room for the prompt, expected a longer one")
        rounds = room // len(filler) + 1
        borders = [turn * len(filler) + behind for turn in range(rounds) for behind in self._sentences(context, filler)]
        cut = min(borders, key=lambda border: abs(border - self.depths[place] * room))
        hay = (filler * rounds)[:room]
        ids = [*bos, *hay[:cut], *fact, *hay[cut:], *question]
        before = length - len(question)
        return Prompt(ids, [(before + first, before + stop)])

    def _sentences(self, context: EvalContext, filler: list[int]) -> list[int]:
        """Tokens of the filler in front of each sentence, where the tokenizer has a border there."""
        heads = [encode(context.tokenizer, FILLER[: match.start()], [])[0] for match in re.finditer(r" (?=[A-Z])", FILLER)]
        return [len(head) for head in heads if filler[: len(head)] == head]
