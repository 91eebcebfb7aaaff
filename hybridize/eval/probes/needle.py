"""A needle in a haystack: one fact hidden in held-out text, asked for at the end."""

from dataclasses import dataclass, field

import numpy as np
import torch

from hybridize.core import Metric
from hybridize.errors import ConfigError, DataError
from hybridize.eval.context import EvalContext, ProbeResult, item_hash, mean_metric
from hybridize.eval.prompts import check_template, draw_facts, encode
from hybridize.eval.scoring import batches, hits


@dataclass(frozen=True, kw_only=True)
class Needle:
    """Share of prompts whose whole value is the model's greedy choice (one needle, one question)."""

    lengths_tokens: list[int] = field(default_factory=lambda: [1024])
    """Tokens of a whole prompt; each length L gives `needle@L`."""
    depths: list[float] = field(default_factory=lambda: [0.1, 0.3, 0.5, 0.7, 0.9])
    """Where the fact stands, from 0 (the start of the text) to 1 (just before the question)."""
    samples: int = 8
    """Prompts for each length and depth."""
    template: str = "{key} = {value}\n"
    """The fact, and the question with its answer; each begins on a new line."""
    batch_tokens: int = 4096
    """Tokens in one forward pass."""

    def __post_init__(self) -> None:
        check_template(self.template)
        if not self.lengths_tokens or not self.depths or not all(0 <= depth <= 1 for depth in self.depths):
            raise ConfigError(f"lengths_tokens is {self.lengths_tokens} and depths {self.depths}, expected some, 0 to 1")
        if self.samples < 1:
            raise ConfigError(f"samples is {self.samples}, expected at least 1")

    def __call__(self, context: EvalContext) -> ProbeResult:
        """Measure, by one teacher-forced pass over each prompt with its answer.

        Returns:
            `needle@L`: accuracy with its stderr; samples are 1 or 0 for each prompt, all prompts of a depth together.

        Raises:
            ConfigError: no text or tokenizer, or a length beyond the model's context.
            DataError: the text is shorter than a prompt.
        """
        metrics: dict[str, Metric] = {}
        samples: dict[str, list[float]] = {}
        hashes: dict[str, str] = {}
        for length in self.lengths_tokens:
            context.need_context("needle", length)
            name = f"needle@{length}"
            rows, answers = self._prompts(context, length)
            samples[name] = []
            for part in batches(rows, self.batch_tokens):
                for right in hits(context.model, part):
                    samples[name].append(float(right[-answers[len(samples[name])] :].all()))
                context.tell(name, len(samples[name]), len(rows))
            metrics[name] = mean_metric(samples[name], "share of prompts", True)
            hashes[name] = item_hash(rows)
        return ProbeResult(metrics=metrics, samples=samples, item_hashes=hashes)

    def _prompts(self, context: EvalContext, length: int) -> tuple[torch.Tensor, list[int]]:
        """Ids [prompts, length], each ending with its answer, and how many tokens each answer has."""
        tokenizer, text = context.need_tokenizer("needle"), context.need_text("needle")
        bos = [] if context.bos_id is None else [context.bos_id]
        rows, answers = [], []
        for place, depth in enumerate(self.depths):
            for index in range(min(self.samples, context.limit or self.samples)):
                generator = np.random.default_rng([context.seed, length, place, index])
                ((key, value),) = draw_facts(generator, 1).items()
                fact = "\n" + self.template.format(key=key, value=value)
                question = "\n" + self.template.split("{value}")[0].format(key=key) + value
                needle, _ = encode(tokenizer, fact, [])
                asked, ((first, stop),) = encode(tokenizer, question, [(len(question) - len(value), len(question))])
                hay = length - len(bos) - len(needle) - len(asked)
                if hay < 1:
                    raise ConfigError(f"probe 'needle': {length} tokens leave no room for text, expected a longer prompt")
                if len(text.ids) < hay:
                    raise DataError(f"data: {len(text.ids)} tokens, expected at least {hay} for needle@{length}; give more text")
                start = int(generator.integers(len(text.ids) - hay + 1))
                hay_ids = text.ids[start : start + hay].tolist()
                cut = round(depth * hay)
                rows.append(bos + hay_ids[:cut] + needle + hay_ids[cut:] + asked)
                answers.append(stop - first)
        return torch.tensor(rows), answers
