"""KL divergence estimated from a few tokens drawn from the teacher."""

from dataclasses import dataclass

import torch
from torch import Tensor

from hybridize.distill.losses.chunked import linear_divergence, select
from hybridize.distill.losses.kl import LogitLoss
from hybridize.distill.signals import Signals
from hybridize.errors import ConfigError
from hybridize.kernels.linear_kl.heads import softmax


@dataclass(frozen=True, kw_only=True)
class SampledKL(LogitLoss):
    """Random-sampling distillation: an unbiased estimate of KL(teacher || student), in value and gradient.

    Draws i_1 ... i_N from r = p^power / sum p^power, weighs each by p / r, and takes

        1/N sum_n p(i_n) / r(i_n) (log p(i_n) - log q(i_n))

    The weights are not normalised, which would bear a bias. Draws follow from the seed and the row's tokens up to each
    position alone: the same row is given the same draws however a step is divided, on every process and after a resume, as
    a cache of the teacher would give them. At a perfect student the value is zero and the gradient zero on average.
    Source: Anshumann et al., arXiv 2503.16870 (Sparse Logit Sampling).
    """

    samples: int = 50
    """N, draws for each token."""
    power: float = 1.0
    """Of the teacher's distribution to draw from; below 1 draws more of its tail."""
    seed: int = 0
    """Of the draws, which are a hash of it and the text."""

    needs = frozenset({"hidden", "head", "ids"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.samples < 1 or self.power < 0:
            raise ConfigError(f"samples is {self.samples} and power {self.power}, expected at least 1 and at least 0")

    def __call__(self, student: Signals, teacher: Signals, mask_BT: Tensor | None) -> Tensor:
        assert student.ids is not None
        draws = select(uniforms(student.ids, self.samples, self.seed), mask_BT)

        def rows(t: Tensor, s: Tensor, at: slice) -> tuple[Tensor, Tensor]:
            p, p_sum = softmax(t)
            q, q_sum = softmax(s)
            drawn_from = p if self.power == 1 else (t * self.power).softmax(-1)
            place = inverse(drawn_from, draws[at])
            weight = p.gather(-1, place) / drawn_from.gather(-1, place) / self.samples
            gap = t.gather(-1, place) - s.gather(-1, place) - (p_sum - q_sum)
            return (weight * gap).sum(-1), q.mul_(weight.sum(-1, True)).scatter_add_(-1, place, -weight)

        return linear_divergence(student, teacher, mask_BT, rows, self.temperature, self.chunk_tokens)


def inverse(shares: Tensor, draws: Tensor) -> Tensor:
    """Places [n, N] that uniform draws [n, N] fall on under the shares [n, V]."""
    reach = shares.cumsum(-1)
    # To the last sum, which rounding keeps from being one. A share of zero is never drawn.
    return torch.searchsorted(reach, draws.to(reach) * reach[:, -1:], right=True).clamp_(max=shares.shape[-1] - 1)


def uniforms(ids_BT: Tensor, samples: int, seed: int) -> Tensor:
    """Uniform numbers in [0, 1), [B, T, samples], fp64: a hash of the seed, the tokens up to each place and the draw's number."""
    places = torch.arange(ids_BT.shape[1], device=ids_BT.device)
    past = _mixed(ids_BT + _mixed(places + _mixed(places.new_tensor(seed)))).cumsum(1)
    bits = _mixed(past[..., None] + _mixed(torch.arange(1, samples + 1, device=ids_BT.device)))
    return _shifted(bits, 11).double() * 2.0**-53


def _shifted(x: Tensor, by: int) -> Tensor:
    """Right shift of 64 bits without their sign."""
    return (x >> by) & ((1 << (64 - by)) - 1)


def _mixed(x: Tensor) -> Tensor:
    """The finaliser of splitmix64 (Steele et al., OOPSLA 2014), on int64 that wraps around."""
    x = x + (0x9E3779B97F4A7C15 - (1 << 64))
    x = (x ^ _shifted(x, 30)) * (0xBF58476D1CE4E5B9 - (1 << 64))
    x = (x ^ _shifted(x, 27)) * (0x94D049BB133111EB - (1 << 64))
    return x ^ _shifted(x, 31)
