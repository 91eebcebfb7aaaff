"""Associative recall: pairs are shown, then each key is asked for again."""

from dataclasses import dataclass, field

import numpy as np

from hybridize.errors import ConfigError
from hybridize.eval.answers import Prompt, bos_of, score
from hybridize.eval.context import EvalContext, ProbeResult, merged
from hybridize.eval.prompts import TEMPLATES, WORDS, ask, check_template, draw_facts, encode, spelled


@dataclass(frozen=True, kw_only=True)
class Recall:
    """Share of keys whose whole value is the model's greedy choice, with `pairs` facts in sight (arXiv 2312.04927)."""

    pairs: list[int] = field(default_factory=lambda: [8])
    """Facts in a prompt; each number N gives `recall@N` and `recall_nll@N`."""
    samples: int = 64
    """Prompts for each number of pairs; the independent items of the standard error."""
    queries: int = 8
    """Keys asked for in a prompt, at most its pairs. A later one sees the answers of earlier ones, of other keys."""
    template: str | None = None
    """One fact, and one question with its answer; None is the first of "{key} = {value}\\n" and "{key} is {value}; " that the
    tokenizer can spell."""
    batch_tokens: int = 4096
    """Tokens in one forward pass."""

    def __post_init__(self) -> None:
        check_template(self.template)
        if not self.pairs or not all(1 <= count <= len(WORDS) for count in self.pairs):
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
        return merged([self._at(context, count) for count in self.pairs])

    def prompt(self, seed: int, count: int, index: int, template: str = TEMPLATES[0]) -> tuple[str, list[tuple[int, int]]]:
        """Text of one prompt, and where each asked value stands in it, in characters."""
        generator = np.random.default_rng([seed, count, index])
        facts = draw_facts(generator, count)
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
        context.need_context(f"recall with {count} pairs", max(len(prompt.ids) for prompt in prompts))
        return score(context, "recall", count, prompts, self.batch_tokens)
