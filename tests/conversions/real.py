"""stories260K and its text, for what a seed is worth on a real model before any training."""

import math
from functools import cache
from itertools import islice

import torch
from transformers import AutoTokenizer

from hybridize.data import eval_blocks, read_documents, tokenize


@cache
def stories_rows(shared_data, name, count):
    """Rows of 256 tokens, spread evenly over the first 250 stories of one of its texts, [count, 256]."""
    tokenizer = AutoTokenizer.from_pretrained(shared_data / "models" / "stories260K")
    documents = islice(read_documents(shared_data / "text" / "tinystories" / name), 250)
    blocks = eval_blocks(tokenize(tokenizer, documents), 256, 1)
    return blocks[torch.linspace(0, len(blocks) - 1, count).long()]


def perplexity(model, rows):
    """Of a causal LM on rows of tokens, [N, T]."""
    with torch.no_grad():
        logits = model.eval()(rows).logits[:, :-1]
    return math.exp(float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())))
