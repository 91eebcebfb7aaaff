"""Copying: a passage of held-out text, and the same passage again."""

from dataclasses import dataclass

import numpy as np

from hybridize.eval.answers import Prompt, at_lengths, check_lengths, copy_tokens, score, twice
from hybridize.eval.context import EvalContext, ProbeResult
from hybridize.eval.prompts import hay_of


@dataclass(frozen=True, kw_only=True)
class Copying:
    """Share of a passage's tokens, read a second time, that are the model's greedy choice.

    What fixed states lose first (Jelassi, Brandfonbrener, Kakade and Malach, arXiv 2402.01032).
    """

    lengths_tokens: list[int] | None = None
    """Tokens of both copies, BOS counted; None is a quarter, a half and the whole of what the model is trained for."""
    samples: int = 32
    """Passages for each length."""
    batch_tokens: int = 4096
    """Tokens in one forward pass."""

    def __post_init__(self) -> None:
        check_lengths(self.lengths_tokens, self.samples)

    def __call__(self, context: EvalContext) -> ProbeResult:
        """Measure, by one pass over both copies.

        Returns:
            `copying@L` and `copying_nll@L`, over the second copy less its first token, which nothing foretells; samples
            are passages.

        Raises:
            ConfigError: no text, or a length beyond the model's context.
            DataError: the text is shorter than a passage.
        """
        context.need_text("copying")
        return at_lengths(context, "copying", self.lengths_tokens, lambda length: self._at(context, length))

    def _at(self, context: EvalContext, length: int) -> ProbeResult:
        prompts = [self.prompt(context, length, index) for index in range(min(self.samples, context.limit or self.samples))]
        return score(context, "copying", length, prompts, self.batch_tokens, "each token")

    def prompt(self, context: EvalContext, length: int, index: int) -> Prompt:
        """Prompt `index`: BOS, a passage and the passage again."""
        generator = np.random.default_rng([context.seed, length, index])
        text, tokens = context.need_text("copying"), copy_tokens(context, length)
        return twice(context, hay_of(text, tokens, generator, f"copying@{length}"))
