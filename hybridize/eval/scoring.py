"""Scores of given tokens under a model, by one forward pass without a cache, without ever holding B x T x V logits.

Letters: B rows, T tokens, D width, V vocabulary.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

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
def hits(model: Any, ids: Tensor) -> Tensor:
    """Whether each token but the first of each row is the model's own greedy choice, [B, T - 1], bool, on the CPU."""
    hidden = hidden_states(model, ids)[:, :-1].flatten(0, 1)
    target = ids[:, 1:].flatten().to(hidden.device)
    out = torch.empty(len(target), dtype=torch.bool)
    for part, logits in logit_chunks(model, hidden):
        out[part] = (logits.argmax(-1) == target[part]).cpu()
    return out.view(len(ids), -1)


@torch.no_grad()
def divergence(base: Any, model: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    """KL(base || model) and whether both choose the same next token, at every token.

    Args:
        base: the reference, a causal LM of transformers.
        model: the model under test, of the same vocabulary.
        ids: [B, T], int64.

    Returns:
        (KL in nats, fp32, [B, T]; agreement, bool, [B, T]), on the CPU.
    """
    wanted = hidden_states(base, ids).flatten(0, 1)
    got = hidden_states(model, ids).flatten(0, 1)
    kl = torch.empty(len(wanted), dtype=torch.float32)
    same = torch.empty(len(wanted), dtype=torch.bool)
    for (part, p), (_, q) in zip(logit_chunks(base, wanted), logit_chunks(model, got), strict=True):
        q = q.to(p.device)
        same[part] = (p.argmax(-1) == q.argmax(-1)).cpu()
        p, q = p.log_softmax(-1), q.log_softmax(-1)
        kl[part] = (p.exp() * (p - q)).sum(-1).cpu()
    return kl.view(ids.shape), same.view(ids.shape)
