"""Self-attention relations: who is alike among queries, among keys, among values."""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from hybridize.distill.signals import Signals, masked_mean
from hybridize.errors import ConfigError

PAIRS = {"query": (0, 0), "key": (1, 1), "value": (2, 2), "query_key": (0, 1)}


@dataclass(frozen=True, kw_only=True)
class Relations:
    """KL(teacher || student) of softmax(A B^T / sqrt(width)), mean per token and relation head, summed over the relations.

    Keys and values are repeated for the query heads that read them. A token relates to itself and what comes before it, as
    everything in a causal decoder. `query_key` alone, with the heads as they are, is the attention matrix (MiniLM, arXiv
    2002.10957). Only mixers with the base's projections can be aligned so.
    Source: Wang et al., arXiv 2012.15828 (MiniLMv2), equations 4 to 6.
    """

    weight: float = 1.0
    """What it is multiplied by in the sum of the stage."""
    relations: list[Literal["query", "key", "value", "query_key"]] = field(default_factory=lambda: ["query", "key", "value"])
    """Which of them are compared."""
    relation_heads: int | None = None
    """All heads' channels side by side, divided anew among so many; None keeps the query heads."""

    needs = frozenset({"heads"})

    def __post_init__(self) -> None:
        if not self.relations or len(set(self.relations)) != len(self.relations):
            raise ConfigError(f"relations is {self.relations}, expected at least one and each once")
        if self.relation_heads is not None and self.relation_heads < 1:
            raise ConfigError(f"relation_heads is {self.relation_heads}, expected at least 1 or null")

    def __call__(self, student: Signals, teacher: Signals, mask_BT: Tensor | None) -> Tensor:
        assert student.heads is not None
        assert teacher.heads is not None
        own, other = self._divided(student.heads), self._divided(tuple(t.detach() for t in teacher.heads))
        total = own[0].new_zeros(own[0].shape[0], own[0].shape[2])
        for name in self.relations:
            log_q, log_p = (_relation(side[PAIRS[name][0]], side[PAIRS[name][1]]) for side in (own, other))
            # Of what lies ahead both are -inf: not a number unless it is left out before the difference.
            gap = torch.where(log_p.isfinite(), log_p - log_q, 0.0)
            total = total + (log_p.exp() * gap).sum(-1).mean(1)
        return masked_mean(total, mask_BT)

    def _divided(self, heads: tuple[Tensor, ...]) -> list[Tensor]:
        """q, k, v as [B, R, T, width], fp32 or wider."""
        wide = torch.promote_types(heads[0].dtype, torch.float32)
        count = heads[0].shape[1]
        all_heads = [h.to(wide).repeat_interleave(count // h.shape[1], dim=1) for h in heads]
        parts = self.relation_heads or count
        width = count * heads[0].shape[-1]
        if width % parts:
            raise ConfigError(f"loss 'relations': relation_heads is {parts}, expected a divisor of the heads' {width} channels")
        return [h.transpose(1, 2).flatten(2).unflatten(-1, (parts, -1)).transpose(1, 2) for h in all_heads]


def _relation(a: Tensor, b: Tensor) -> Tensor:
    """log softmax over the tokens up to each, [B, R, T, T]."""
    scores = a @ b.mT * a.shape[-1] ** -0.5
    ahead = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
    return scores.masked_fill(ahead, -torch.inf).log_softmax(-1)
