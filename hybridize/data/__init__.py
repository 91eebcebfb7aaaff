"""Text in, batches of tokens out: sources, tokens, the cache of tokens, mixtures, blocks."""

from hybridize.data.blocks import Batch, TrainBlocks, eval_blocks, spread_blocks
from hybridize.data.documents import document_hash, is_held_out, read_documents
from hybridize.data.mixture import Mixture, Sources, read_tokens, weighted_sources
from hybridize.data.same_tokenizer import check_same_tokenizer, load_tokenizer, tokenizer_hash
from hybridize.data.tokens import Tokens, tokenize

__all__ = [
    "Batch", "Mixture", "Sources", "Tokens", "TrainBlocks", "check_same_tokenizer", "document_hash", "eval_blocks",
    "is_held_out", "load_tokenizer", "read_documents", "read_tokens", "spread_blocks", "tokenize", "tokenizer_hash",
    "weighted_sources",
]  # fmt: skip
