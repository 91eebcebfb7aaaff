"""Induction: random tokens, and the same tokens again."""

from dataclasses import dataclass

import numpy as np

from hybridize.eval.answers import Prompt, at_lengths, check_lengths, copy_tokens, score, twice
from hybridize.eval.context import EvalContext, ProbeResult


@dataclass(frozen=True, kw_only=True)
class Induction:
    """Share of a random sequence's tokens, read a second time, that are the model's greedy choice (arXiv 2209.11895).

    Neither text nor grammar helps: only what stood behind the same token before does.
    """

    lengths_tokens: list[int] | None = None
    """Tokens of both copies, BOS counted; None is a quarter, a half and the whole of what the model is trained for."""
    samples: int = 32
    """Sequences for each length."""
    batch_tokens: int = 4096
    """Tokens in one forward pass."""

    def __post_init__(self) -> None:
        check_lengths(self.lengths_tokens, self.samples)

    def __call__(self, context: EvalContext) -> ProbeResult:
        """Measure, by one pass over both copies; needs no text, and a tokenizer only to leave its special tokens out.

        Returns:
            `induction@L` and `induction_nll@L`, over the second copy less its first token; samples are sequences.

        Raises:
            ConfigError: a length beyond the model's context.
        """
        return at_lengths(context, "induction", self.lengths_tokens, lambda length: self._at(context, length))

    def _at(self, context: EvalContext, length: int) -> ProbeResult:
        prompts = [self.prompt(context, length, index) for index in range(min(self.samples, context.limit or self.samples))]
        return score(context, "induction", length, prompts, self.batch_tokens, "each token")

    def prompt(self, context: EvalContext, length: int, index: int) -> Prompt:
        """Prompt `index`: BOS, tokens drawn uniformly from the vocabulary less its special ones, and the same again."""
        known, special = context.model.config.vocab_size, {context.bos_id}
        if context.tokenizer is not None:
            known, special = min(known, len(context.tokenizer)), set(context.tokenizer.all_special_ids)
        ordinary = np.array([token for token in range(known) if token not in special])
        generator = np.random.default_rng([context.seed, length, index])
        return twice(context, generator.choice(ordinary, size=copy_tokens(context, length)).tolist())
