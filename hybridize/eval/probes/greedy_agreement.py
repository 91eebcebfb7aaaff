"""Greedy generation: for how long the model writes what its base writes."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from hybridize.data import spread_blocks
from hybridize.errors import ConfigError
from hybridize.eval.answers import item_of
from hybridize.eval.context import EvalContext, Item, ProbeResult, item_hash, mean_metric
from hybridize.eval.scoring import batches, generate


@dataclass(frozen=True, kw_only=True)
class GreedyAgreement:
    """Share of greedily generated tokens before the first that differs from the base's, through real caches in `generate`."""

    new_tokens: list[int] = field(default_factory=lambda: [64])
    """Tokens to generate; each number N gives `greedy_agreement@N`."""
    prompt_tokens: int | None = None
    """Tokens of a prompt, BOS counted; None is 128, and at most a quarter of what the model is trained for."""
    samples: int = 32
    """Prompts, spread evenly over the held-out text."""
    batch_tokens: int = 4096
    """Tokens generated together, prompts counted."""

    def __post_init__(self) -> None:
        lengths = [*self.new_tokens, self.samples, 2 if self.prompt_tokens is None else self.prompt_tokens - 1]
        if not self.new_tokens or min(lengths) < 1:
            raise ConfigError("new_tokens and samples must be at least 1, prompt_tokens at least 2")

    def __call__(self, context: EvalContext) -> ProbeResult:
        """Measure. EOS is a token like any other, and the checkpoint's generation_config plays no part.

        Returns:
            `greedy_agreement@N` with its stderr over prompts; samples are each prompt's share.

        Raises:
            ConfigError: no text, no base, or prompt and new tokens longer than the model's context.
            DataError: the text is shorter than a prompt.
        """
        most = max(self.new_tokens)
        prompt = self.prompt_tokens or max(2, min(128, context.trained_tokens // 4))
        context.need_context("greedy_agreement", prompt + most)
        text = context.need_text("greedy_agreement")
        prompts = spread_blocks(text, prompt, context.bos_id, min(self.samples, context.limit or self.samples))
        base, model = context.base, context.model
        given, wanted = [], []
        for part in batches(prompts, max(1, self.batch_tokens * prompt // (prompt + most))):
            given += generate(model, part, most)
            wanted += given[-len(part) :] if base is model else generate(base, part, most)
            context.tell("greedy_agreement", len(given), len(prompts))
        agreed = [first_difference(*pair) for pair in zip(given, wanted, strict=True)]
        samples = {f"greedy_agreement@{count}": [min(same, count) / count for same in agreed] for count in self.new_tokens}
        items: dict[str, list[Item]] = {}
        if context.tokenizer is not None:
            triples = list(zip(prompts.tolist(), wanted, given, strict=True))
            for name, count in zip(samples, self.new_tokens, strict=True):
                items[name] = [
                    item_of(context.tokenizer, shown, [theirs[:count]], [ours[:count]]) for shown, theirs, ours in triples
                ]
        return ProbeResult(
            metrics={name: mean_metric(values, "share of tokens", True) for name, values in samples.items()},
            samples=samples,
            item_hashes=dict.fromkeys(samples, item_hash(prompts)),
            items=items,
        )


def first_difference(ours: Tensor, theirs: Tensor) -> int:
    """Tokens before the first that differs; all of them where none does."""
    differs = torch.nonzero(ours != theirs)
    return int(differs[0]) if len(differs) else len(ours)
