"""Associative recall: pairs are shown, then each key is asked for again."""

from dataclasses import dataclass, field

import numpy as np

from hybridize.errors import ConfigError
from hybridize.eval.answers import Prompt, bos_of, score, with_room
from hybridize.eval.context import EvalContext, ProbeResult, merged
from hybridize.eval.prompts import TEMPLATES, WORDS, NoRoom, Values, ask, check_template, draw_facts, encode, spelled


@dataclass(frozen=True, kw_only=True)
class Recall:
    """Share of keys whose whole value is the model's greedy choice, with `pairs` facts in sight (arXiv 2312.04927)."""

    pairs: list[int] | None = field(default_factory=lambda: [8])
    """Facts in a prompt; each number N gives `recall@N` and `recall_nll@N`. None is those of 4, 16 and 64 that what the model is
    trained for has room for."""
    samples: int = 64
    """Prompts for each number of pairs; the independent items of the standard error."""
    queries: int = 8
    """Keys asked for in a prompt, at most its pairs. A later one sees the answers of earlier ones, of other keys."""
    values: Values = "numbers"
    """What keys are given: numbers of three or four digits, or words, for models that met no digits."""
    template: str | None = None
    """One fact, and one question with its answer; None is the first of "{key} = {value}\\n" and "{key} is {value}; " that the
    tokenizer can spell."""
    batch_tokens: int = 4096
    """Tokens in one forward pass."""

    def __post_init__(self) -> None:
        check_template(self.template)
        if self.pairs is not None and not (self.pairs and all(1 <= count <= len(WORDS) for count in self.pairs)):
            raise ConfigError(f"pairs is {self.pairs}, expected numbers from 1 to {len(WORDS)}")
        if self.samples < 1 or self.queries < 1:
            raise ConfigError(f"samples is {self.samples} and queries {self.queries}, expected at least 1")

    def __call__(self, context: EvalContext) -> ProbeResult:
        """Measure, by one teacher-forced pass over each prompt with its answers.

        Returns:
            `recall@N`: accuracy with its stderr over prompts; samples are each prompt's accuracy. `recall_nll@N`: mean
            -log p per token of the values.

        Raises:
            ConfigError: no tokenizer, one that cannot spell the template, or a prompt longer than the model's context.
        """
        if self.pairs is None:
            return with_room("recall", [4, 16, 64], lambda count: self._at(context, count))
        return merged([self._at(context, count) for count in self.pairs])

    def prompt(self, seed: int, count: int, index: int, template: str = TEMPLATES[0]) -> tuple[str, list[tuple[int, int]]]:
        """Text of one prompt, and where each asked value stands in it, in characters."""
        generator = np.random.default_rng([seed, count, index])
        facts = draw_facts(generator, count, self.values)
        text = "".join(template.format(key=key, value=value) for key, value in facts.items())
        asked, spans = ask(template, [(key, facts[key]) for key in generator.permutation(np.array(list(facts)))[: self.queries]])
        return text + asked, [(start + len(text), stop + len(text)) for start, stop in spans]

    def _at(self, context: EvalContext, count: int) -> ProbeResult:
        tokenizer = context.need_tokenizer("recall")
        bos, template = bos_of(context), spelled(self.template, tokenizer)
        prompts = []
        for index in range(min(self.samples, context.limit or self.samples)):
            ids, spans = encode(tokenizer, *self.prompt(context.seed, count, index, template))
            prompts.append(Prompt(bos + ids, [(first + len(bos), stop + len(bos)) for first, stop in spans]))
        longest = max(len(prompt.ids) for prompt in prompts)
        if self.pairs is None and longest > context.trained_tokens:
            raise NoRoom(f"eval: recall with {count} pairs takes {longest} tokens, expected at most {context.trained_tokens}")
        context.need_context(f"recall with {count} pairs", longest)
        return score(context, "recall", count, prompts, self.batch_tokens)
