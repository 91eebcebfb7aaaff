"""What a model says: scores of given tokens by one forward pass without a cache, never B x T x V logits; and greedy text.

Letters: B rows, T tokens, D width, V vocabulary.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GenerationConfig
from transformers.cache_utils import Cache

# Logits held at once, in bytes of fp32.
LOGIT_BYTES = 64 << 20


def batches(ids: Tensor, tokens: int) -> Iterator[Tensor]:
    """Rows of `ids` [N, T] in groups of at most `tokens` tokens, at least one row each."""
    yield from ids.split(max(1, tokens // ids.shape[1]))


def hidden_states(model: Any, ids: Tensor) -> Tensor:
    """What the output layer reads at each token of `ids` [B, T]: [B, T, D], in the model's dtype."""
    return model.base_model(input_ids=ids.to(model.device), use_cache=False).last_hidden_state


def logit_chunks(model: Any, hidden: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """fp32 logits of the rows of `hidden` [N, D], a piece at a time, with the rows of each piece."""
    head = model.get_output_embeddings()
    rows = max(1, LOGIT_BYTES // (4 * head.weight.shape[0]))
    for start in range(0, len(hidden), rows):
        part = slice(start, min(start + rows, len(hidden)))
        yield part, head(hidden[part]).float()


@torch.no_grad()
def token_nll(model: Any, ids: Tensor) -> Tensor:
    """-log p of each token but the first of each row.

    Args:
        model: a causal LM of transformers.
        ids: [B, T], int64.

    Returns:
        [B, T - 1], fp32, nats, on the CPU.
    """
    hidden = hidden_states(model, ids)[:, :-1].flatten(0, 1)
    target = ids[:, 1:].flatten().to(hidden.device)
    out = torch.empty(len(target), dtype=torch.float32)
    for part, logits in logit_chunks(model, hidden):
        out[part] = F.cross_entropy(logits, target[part], reduction="none").cpu()
    return out.view(len(ids), -1)


@torch.no_grad()
def scores_at(model: Any, ids: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """-log p of some tokens of the rows, and the token the model would choose in place of each.

    Args:
        model: a causal LM of transformers.
        ids: [B, T], int64.
        places: (row, place in the row, at least 1) of each token asked about, [N, 2], int64.

    Returns:
        (nats, fp32, [N]; greedy choices, int64, [N]), on the CPU.
    """
    hidden = hidden_states(model, ids)
    rows, tokens = places.T
    hidden = hidden[rows.to(hidden.device), tokens.to(hidden.device) - 1]
    target = ids[rows, tokens].to(hidden.device)
    nll, choice = torch.empty(len(places), dtype=torch.float32), torch.empty(len(places), dtype=torch.int64)
    for part, logits in logit_chunks(model, hidden):
        nll[part] = F.cross_entropy(logits, target[part], reduction="none").cpu()
        choice[part] = logits.argmax(-1).cpu()
    return nll, choice


@torch.no_grad()
def generate(model: Any, ids: Tensor, new_tokens: int, cache: Cache | None = None) -> Tensor:
    """The greedy tokens after each row, through the model's own cache.

    The checkpoint's generation_config plays no part: no penalty changes a choice, and EOS is a token like any other.

    Args:
        model: a causal LM of transformers.
        ids: [B, T], int64, without padding.
        new_tokens: how many.
        cache: holds the first tokens of `ids`, at least one of them left out, and grows; None begins with an empty one.

    Returns:
        [B, new_tokens], int64, on the CPU.
    """
    kept, model.generation_config = model.generation_config, GenerationConfig()
    ids = ids.to(model.device)
    asked = {"max_new_tokens": new_tokens, "do_sample": False, "use_cache": True, "pad_token_id": 0}
    try:
        out = model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, **asked)
    finally:
        model.generation_config = kept
    return out[:, ids.shape[1] :].cpu()


@torch.no_grad()
def cached_nll(model: Any, cache: Cache, ids: Tensor, first: int) -> Tensor:
    """-log p of the tokens of `ids` [T] from place `first` (at least 1) on, fed in one piece behind what a cache holds.

    Returns:
        [T - first], fp32, nats, on the CPU. The cache grows by T tokens.
    """
    out = model.base_model(input_ids=ids[None].to(model.device), past_key_values=cache, use_cache=True)
    hidden = out.last_hidden_state[0, first - 1 : -1]
    target = ids[first:].to(hidden.device)
    return torch.cat([
        F.cross_entropy(logits, target[part], reduction="none").cpu() for part, logits in logit_chunks(model, hidden)
    ])  # fmt: skip


@torch.no_grad()
def divergence(base: Any, model: Any, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """KL(base || model), and the next token that each of them would choose, at every token.

    Args:
        base: the reference, a causal LM of transformers.
        model: the model under test, of the same vocabulary.
        ids: [B, T], int64.

    Returns:
        (KL in nats, fp32; the base's choices, int64; the model's), [B, T] each, on the CPU.
    """
    wanted = hidden_states(base, ids).flatten(0, 1)
    got = hidden_states(model, ids).flatten(0, 1)
    kl = torch.empty(len(wanted), dtype=torch.float32)
    choices = torch.empty(2, len(wanted), dtype=torch.int64)
    for (part, p), (_, q) in zip(logit_chunks(base, wanted), logit_chunks(model, got), strict=True):
        q = q.to(p.device)
        choices[:, part] = torch.stack([p.argmax(-1), q.argmax(-1)]).cpu()
        p, q = p.log_softmax(-1), q.log_softmax(-1)
        kl[part] = (p.exp() * (p - q)).sum(-1).cpu()
    return kl.view(ids.shape), choices[0].view(ids.shape), choices[1].view(ids.shape)
