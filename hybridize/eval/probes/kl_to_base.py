"""How far the next-token distribution moved from the base's."""

from dataclasses import dataclass

from hybridize.data import eval_blocks
from hybridize.errors import ConfigError
from hybridize.eval.answers import item_of
from hybridize.eval.context import EvalContext, Item, ProbeResult, item_hash, mean_metric
from hybridize.eval.scoring import batches, divergence


@dataclass(frozen=True, kw_only=True)
class KlToBase:
    """Mean KL(base || model) per token over held-out text, and how often both choose the same token."""

    tokens: int = 65_536
    """Text tokens to use, from the start of the text."""
    context: int | None = None
    """Tokens of a block, BOS counted; None is the model's context and at most the base's, at most 1024."""
    batch_tokens: int = 4096
    """Tokens in one forward pass."""

    def __call__(self, context: EvalContext) -> ProbeResult:
        """Measure.

        Returns:
            `kl_to_base` in nats per token and `top1_agreement`, each with its stderr over blocks; samples per block. An item
            is the place of its block where both differ most: what the base, and what the model would choose.

        Raises:
            ConfigError: no text, no base, or a base of another vocabulary.
        """
        length = self.context or min(context.usual_tokens, context.base.config.max_position_embeddings)
        context.need_context("kl_to_base", length)
        blocks = eval_blocks(context.need_text("kl_to_base"), length, context.bos_id, self.tokens)[: context.limit]
        base, model = context.base, context.model
        if base.config.vocab_size != model.config.vocab_size:
            raise ConfigError(
                f"eval: the base has vocab_size {base.config.vocab_size}, {context.checkpoint} has "
                f"{model.config.vocab_size}; expected the checkpoint's own base"
            )
        kls: list[float] = []
        agreements: list[float] = []
        items: list[Item] = []
        for part in batches(blocks, self.batch_tokens):
            kl, wanted, given = divergence(base, model, part)
            kls += kl.double().mean(dim=1).tolist()
            agreements += (wanted == given).double().mean(dim=1).tolist()
            if context.tokenizer is not None:
                worst = kl.argmax(dim=1).tolist()
                rows = zip(part.tolist(), worst, wanted, given, strict=True)
                items += [
                    item_of(context.tokenizer, row[: at + 1], [theirs[at : at + 1]], [ours[at : at + 1]])
                    for row, at, theirs, ours in rows
                ]
            context.tell("kl_to_base", len(kls), len(blocks))
        both = {"kl_to_base": kls, "top1_agreement": agreements}
        return ProbeResult(
            metrics={
                "kl_to_base": mean_metric(kls, "nats per token", False),
                "top1_agreement": mean_metric(agreements, "share of tokens", True),
            },
            samples=both,
            item_hashes=dict.fromkeys(both, item_hash(blocks)),
            items=dict.fromkeys(both, items) if items else {},
        )
