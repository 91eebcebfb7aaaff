"""Loss by position: what more context is worth to the model."""

from dataclasses import dataclass

import torch

from hybridize.data import eval_blocks
from hybridize.errors import ConfigError
from hybridize.eval.context import EvalContext, ProbeResult, item_hash, mean_metric
from hybridize.eval.scoring import batches, token_nll

FIRST_BUCKET = 16
# What a paired comparison of the buckets needs.
FEWEST_BLOCKS = 32


@dataclass(frozen=True, kw_only=True)
class NllByPosition:
    """Mean -log p of held-out text in buckets of positions that double in size: `nll_at@P` is over positions P/2 + 1 to P."""

    tokens: int = 262_144
    """Text tokens to use, from the start of the text."""
    context: int | None = None
    """Tokens of a block, BOS counted; None is what the model is trained for, halved until the text has 32 blocks."""
    batch_tokens: int = 4096
    """Tokens in one forward pass."""

    def __post_init__(self) -> None:
        if min(self.tokens, FIRST_BUCKET if self.context is None else self.context) < FIRST_BUCKET:
            raise ConfigError(f"tokens is {self.tokens} and context {self.context}, expected at least {FIRST_BUCKET}")

    def __call__(self, context: EvalContext) -> ProbeResult:
        """Measure.

        Returns:
            `nll_at@P` in nats per token, with its stderr over blocks; samples are a block's mean over the bucket. P counts
            tokens of a row, the first of which (BOS) is at position 1 and never foretold. The last P is the block's length,
            the first at least 16 and below 32; its bucket begins at position 2.

        Raises:
            ConfigError: no text, or a block longer than the model's context.
            DataError: the text is shorter than a block.
        """
        text = context.need_text("nll_by_position")
        length = self.context or context.trained_tokens
        enough = FEWEST_BLOCKS * (length - (context.bos_id is not None))
        while self.context is None and length >= 2 * FIRST_BUCKET and min(self.tokens, len(text.ids)) < enough:
            length, enough = length // 2, FEWEST_BLOCKS * (length // 2 - (context.bos_id is not None))
        context.need_context("nll_by_position", length)
        blocks = eval_blocks(text, length, context.bos_id, self.tokens)[: context.limit]
        nll = []
        for part in batches(blocks, self.batch_tokens):
            nll.append(token_nll(context.model, part).double())
            context.tell("nll_by_position", sum(map(len, nll)), len(blocks))
        # Entry t of a row is about position t + 2.
        by_token = torch.cat(nll)
        samples = {
            f"nll_at@{last}": by_token[:, max(before - 1, 0) : last - 1].mean(dim=1).tolist() for before, last in buckets(length)
        }
        return ProbeResult(
            metrics={name: mean_metric(values, "nats per token", False) for name, values in samples.items()},
            samples=samples,
            item_hashes=dict.fromkeys(samples, item_hash(blocks)),
        )


def buckets(length: int) -> list[tuple[int, int]]:
    """(last position before the bucket, its last position) for rows of `length` tokens, by halves from the end."""
    lasts = [length]
    while lasts[0] // 2 >= FIRST_BUCKET:
        lasts.insert(0, lasts[0] // 2)
    return list(zip([0, *lasts[:-1]], lasts, strict=True))
