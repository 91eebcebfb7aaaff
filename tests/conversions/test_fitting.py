"""Closed forms of the seeds, against definitions in fp64."""

import torch

from hybridize.conversions import fitting
from hybridize.conversions.fitting import gram, refit_out_proj, spread
from tests.tolerances import assert_close, rms_ratio


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_gram_by_blocks_is_the_product(monkeypatch):
    rows = random(40, 29)
    want = torch.einsum("ni,nj->ij", rows.double(), rows.double())
    for block in (512, 8, 29, 1):
        monkeypatch.setattr(fitting, "BLOCK", block)
        assert_close(gram(rows), want, "fp32")
    # Wrong on purpose: blocks below the diagonal left out.
    monkeypatch.setattr(fitting, "BLOCK", 8)
    assert rms_ratio(gram(rows).triu(), want) > 0.1


def noisy(count=16, length=24, inner=24, hidden=20, noise=1.0):
    """(rows, prior, target) where the target lacks a change of rank 2, and the change."""
    rows, prior = random(count, length, inner, seed=1), random(hidden, inner, seed=2) * 0.2
    change = 0.3 * random(hidden, 2, seed=3) @ random(2, inner, seed=4)
    target = rows @ (prior + change).T + noise * random(count, length, hidden, seed=5)
    return rows, prior, target, change


def test_the_damping_is_the_best_on_sequences_held_out():
    rows, prior, target, _ = noisy(noise=4.0)
    dampings = (1e-3, 1e-1, 1.0, 10.0)
    found = refit_out_proj(lambda some: rows[some], prior, None, target, dampings)
    x, lack = rows.double(), target.double() - rows.double() @ prior.double().T
    held = torch.arange(16) % 4 == 3
    mean = float(x.flatten(0, 1).square().sum(0).mean())

    def solved(which, damping):
        a, b = x[which].flatten(0, 1), lack[which].flatten(0, 1)
        return torch.linalg.lstsq(
            torch.cat([a, (damping * mean) ** 0.5 * torch.eye(24)]), torch.cat([b, torch.zeros(24, 20)])
        ).solution

    errors = [float((x[held] @ solved(~held, damping) - lack[held]).square().sum()) for damping in dampings]
    best = dampings[errors.index(min(errors))]
    assert best not in (dampings[0], dampings[-1])
    assert_close(found, prior.double() + solved(torch.ones(16, dtype=torch.bool), best).T, "fp32")
    assert rms_ratio(found, prior.double() + solved(~held, best).T) > 1e-3


def test_noise_alone_leaves_the_projection_as_it_is():
    rows, prior, target, change = noisy()
    target = target - rows @ change.T
    assert torch.equal(refit_out_proj(lambda some: rows[some], prior, None, target, (1e-3, 1e-2)), prior)
    bias = random(20, seed=6)
    same = refit_out_proj(lambda some: rows[some], prior, bias, target + bias, (1e-3, 1e-2))
    assert torch.equal(same, prior)


def test_a_few_directions_hold_a_change_of_low_rank(monkeypatch):
    rows, prior, target, change = noisy(count=64, noise=0.01)
    monkeypatch.setattr(fitting, "DIRECTIONS", 8)
    found = refit_out_proj(lambda some: rows[some], prior, None, target, (1e-4,))
    assert torch.linalg.matrix_rank((found - prior).double(), rtol=1e-5) <= 8
    assert rms_ratio(found - prior, change) < 0.2
    # One direction cannot hold two.
    monkeypatch.setattr(fitting, "DIRECTIONS", 1)
    assert rms_ratio(refit_out_proj(lambda some: rows[some], prior, None, target, (1e-4,)) - prior, change) > 0.4


def test_few_tokens_are_fitted_better_than_by_a_fixed_damping():
    rows, prior, target, change = noisy(count=8, length=9, noise=3.0)
    found = refit_out_proj(lambda some: rows[some], prior, None, target, (1e-2, 1e-1, 1.0, 10.0))
    x, y = rows.flatten(0, 1).double(), target.flatten(0, 1).double()
    square = x.T @ x
    damping = fitting.RIDGE * square.diagonal().mean() * torch.eye(24).double()
    fixed = torch.linalg.solve(square + damping, x.T @ y + damping @ prior.double().T).T
    assert rms_ratio(found - prior, change) < 0.8 * rms_ratio(fixed - prior, change)


def test_spread_is_even_and_at_most_all():
    assert spread(48, 16)[[0, -1]].tolist() == [0, 47]
    assert spread(5, 9).tolist() == [0, 1, 2, 3, 4]
