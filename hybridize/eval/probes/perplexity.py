"""Perplexity of held-out text, block by block."""

import math
from dataclasses import dataclass

from hybridize.core import Metric
from hybridize.data import eval_blocks
from hybridize.errors import CheckpointError, ConfigError
from hybridize.eval.answers import item_of
from hybridize.eval.context import EvalContext, ProbeResult, item_hash, mean_metric, merged
from hybridize.eval.scoring import batches, token_nll


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """exp of the mean -log p over blocks that do not overlap, BOS in front of each (not scored itself)."""

    tokens: int = 262_144
    """Text tokens to use, from the start of the text."""
    context: int | None = None
    """Tokens of a block, BOS counted; None is the model's context, or its base's where it was stretched, at most 1024."""
    contexts: list[int] | None = None
    """Several block lengths: each gives `perplexity@T` instead of `perplexity`."""
    batch_tokens: int = 4096
    """Tokens in one forward pass."""

    def __post_init__(self) -> None:
        if self.context is not None and self.contexts is not None:
            raise ConfigError("got both 'context' and 'contexts', expected one of them")
        lengths = [self.tokens, *(self.contexts or [])] + ([] if self.context is None else [self.context])
        if min(lengths) < 2:
            raise ConfigError("tokens and contexts must be at least 2")

    def __call__(self, context: EvalContext) -> ProbeResult:
        """Measure.

        Returns:
            `perplexity` (stderr by the delta method over blocks), `bits_per_byte` (at the bytes per token
            of the whole text); samples are the mean -log p of each block, in nats; an item is the block's text.

        Raises:
            ConfigError: no text, or a block longer than the model's context.
            CheckpointError: the model's logits are not finite.
        """
        default = self.context or context.usual_tokens
        results = [self._at(context, length, f"@{length}") for length in self.contexts or []]
        if self.contexts is None:
            results = [self._at(context, default, "")]
        return merged(results)

    def _at(self, context: EvalContext, length: int, suffix: str) -> ProbeResult:
        context.need_context("perplexity", length)
        text = context.need_text("perplexity")
        blocks = eval_blocks(text, length, context.bos_id, self.tokens)[: context.limit]
        means: list[float] = []
        for part in batches(blocks, self.batch_tokens):
            means += token_nll(context.model, part).double().mean(dim=1).tolist()
            context.tell(f"perplexity{suffix}", len(means), len(blocks))
        nll = mean_metric(means, "nats", False)
        # Beyond e^700 a float has no room: such a model says nothing, and its report must not either.
        if not nll.value < 700:
            raise CheckpointError(
                f"{context.checkpoint}: the mean -log p of the text is {nll.value}, expected a finite number: "
                "the checkpoint is broken or its training diverged"
            )
        value = math.exp(nll.value)
        per_byte = len(text.ids) / text.text_bytes / math.log(2)
        spread = None if nll.stderr is None else nll.stderr * value
        shown = [item_of(context.tokenizer, block, [], []) for block in blocks.tolist()] if context.tokenizer is not None else []
        bits = Metric(
            value=nll.value * per_byte,
            stderr=None if nll.stderr is None else nll.stderr * per_byte,
            unit="bits per byte",
            samples=len(means),
        )
        return ProbeResult(
            metrics={
                f"perplexity{suffix}": Metric(value=value, stderr=spread, unit="per token", samples=len(means)),
                f"bits_per_byte{suffix}": bits,
            },
            samples={f"perplexity{suffix}": means},
            item_hashes={f"perplexity{suffix}": item_hash(blocks)},
            items={f"perplexity{suffix}": shown} if shown else {},
        )
