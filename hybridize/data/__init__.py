"""Text in, batches of tokens out: sources, tokens, the cache of tokens, mixtures, blocks."""

from hybridize.data.blocks import Batch, TrainBlocks, eval_blocks, spread_blocks
from hybridize.data.documents import document_hash, is_held_out, read_documents
from hybridize.data.mixture import Mixture, Sources, read_tokens, weighted_sources
from hybridize.data.tokens import Tokens, tokenize

__all__ = [
    "Batch", "Mixture", "Sources", "Tokens", "TrainBlocks", "document_hash", "eval_blocks", "is_held_out", "read_documents",
    "read_tokens", "spread_blocks", "tokenize", "weighted_sources",
]  # fmt: skip
