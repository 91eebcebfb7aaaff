"""Losses on logits, matrices and relations against what their papers say, written out densely in fp64."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from hybridize.distill.losses import LOSSES
from hybridize.distill.losses.sampled_kl import inverse, uniforms
from hybridize.distill.signals import Head, Signals
from tests.distill.test_losses import D, T, V, gradients, part, signals, with_gradients
from tests.tolerances import assert_close


def probabilities(student, teacher, temperature=1.0):
    """(q, p), [B, T, V]."""

    def logits(s):
        z = s.head.scale * s.hidden @ s.head.weight.T
        return z if s.head.cap is None else s.head.cap * torch.tanh(z / s.head.cap)

    return (F.softmax(logits(s) / temperature, -1) for s in (student, teacher))


def kl(p, q):
    return (p * (p.log() - q.log())).sum(-1)


def jsd(p, q, beta):
    m = beta * p + (1 - beta) * q
    return beta * kl(p, m) + (1 - beta) * kl(q, m)


def top_k(p, q, k):
    """Teacher and student over k + 1 classes, built class by class."""
    rows = []
    for p_row, q_row in zip(p.flatten(0, 1), q.flatten(0, 1), strict=True):
        top = sorted(range(len(p_row)), key=lambda i: -p_row[i].item())[:k]
        rest = [i for i in range(len(p_row)) if i not in top]
        rows.append([torch.cat([x[top], x[rest].sum()[None]]) for x in (p_row, q_row)])
    return kl(*(torch.stack(side) for side in zip(*rows, strict=True)))


CASES = [
    ({"name": "kl"}, kl),
    ({"name": "kl", "direction": "reverse"}, lambda p, q: kl(q, p)),
    ({"name": "kl", "reduction": "published_batchmean"}, lambda p, q: T * kl(p, q)),
    ({"name": "jsd"}, lambda p, q: jsd(p, q, 0.5)),
    ({"name": "jsd", "beta": 0.1}, lambda p, q: jsd(p, q, 0.1)),
    ({"name": "top_k_kl", "k": 3}, lambda p, q: top_k(p, q, 3)),
    ({"name": "top_k_kl", "k": 1000}, kl),
]


@pytest.mark.parametrize("temperature", [1.0, 1.7])
@pytest.mark.parametrize("head", [{"scale": 1.0, "cap": None}, {"scale": 0.6, "cap": 4.0}], ids=str)
@pytest.mark.parametrize(("spec", "dense"), CASES, ids=lambda c: str(c) if isinstance(c, dict) else "")
def test_the_value_and_both_gradients_are_the_dense_ones(spec, dense, head, temperature):
    student, teacher = (with_gradients(signals(seed)) for seed in (0, 1))
    student = dataclasses.replace(student, head=dataclasses.replace(student.head, **head))
    # The teacher's head is another one: width, scale and cap.
    teacher = dataclasses.replace(
        teacher, hidden=torch.cat([teacher.hidden, teacher.mixed], -1).detach(),
        head=Head(weight=torch.cat([teacher.head.weight] * 2, -1).detach(), scale=0.3, cap=None if head["cap"] else 2.0),
    )  # fmt: skip
    q, p = probabilities(student, teacher, temperature)
    expected = dense(p, q).mean() * temperature**2
    for chunk in (4, 1000):
        loss = LOSSES.build({**spec, "temperature": temperature, "chunk_tokens": chunk})
        value = loss(student, teacher, None)
        assert_close(value, expected, "fp64")
        leaves = [student.hidden, student.head.weight]
        own, exact = gradients(value, leaves), torch.autograd.grad(expected, leaves, retain_graph=True)
        for a, e in zip(own, exact, strict=True):
            assert_close(a, e, "fp64", grad=True)
            # The other way round, another beta, or a head without its cap is another loss.
            with pytest.raises(AssertionError):
                assert_close(a, torch.autograd.grad(kl(p, q).mean() + kl(q, p).mean(), leaves, retain_graph=True)[0], "fp64")
    bare = dataclasses.replace(student, head=dataclasses.replace(student.head, scale=0.9, cap=3.0))
    with pytest.raises(AssertionError):
        assert_close(loss(bare, teacher, None), expected, "fp64")


def test_the_losses_are_not_one_another():
    values = [LOSSES.build(spec)(signals(0), signals(1), None).item() for spec, _ in CASES[:-1]]
    assert len({round(value, 6) for value in values}) == len(values)


def test_a_long_tail_does_not_overflow():
    """fp32, logits a hundred apart: what one side holds for impossible costs as much as the other's surprise, no more."""
    student = Signals(hidden=torch.eye(4)[None] * 100, head=Head(weight=torch.eye(4)), ids=torch.zeros(1, 4, dtype=torch.long))
    teacher = dataclasses.replace(student, hidden=torch.eye(4)[[1, 0, 3, 2]][None] * 100)
    for name, expected in (("kl", 100), ("jsd", 0.6931472), ("top_k_kl", 100), ("sampled_kl", 100)):
        student = dataclasses.replace(student, hidden=student.hidden.detach().requires_grad_())
        value = LOSSES.build({"name": name, **({"k": 2} if name == "top_k_kl" else {})})(student, teacher, None)
        value.backward()
        assert value.item() == pytest.approx(expected, rel=1e-5)
        assert bool(student.hidden.grad.isfinite().all())
    # A residual mass of the teacher's that is nothing in fp32.
    spread = dataclasses.replace(student, hidden=torch.zeros(1, 4, 4))
    assert LOSSES.build({"name": "top_k_kl", "k": 1})(spread, teacher, None).item() == pytest.approx(1.3862943, rel=1e-5)


class TestSampled:
    """Random-sampling distillation: unbiased, and a function of seed and text."""

    def mean_over_seeds(self, power, seeds, samples=4, normalise=False):
        student, teacher = with_gradients(signals(0)), signals(1)
        found = []
        for seed in range(seeds):
            value = LOSSES.build({"name": "sampled_kl", "samples": samples, "power": power, "seed": seed})(student, teacher, None)
            found.append(torch.cat([value.detach()[None], torch.autograd.grad(value, student.hidden)[0].flatten()]))
        q, p = probabilities(student, teacher)
        exact = kl(p, q).mean()
        truth = torch.cat([exact.detach()[None], torch.autograd.grad(exact, student.hidden)[0].flatten()])
        found = torch.stack(found)
        return found.mean(0), found.std(0) / seeds**0.5, truth

    @pytest.mark.parametrize("power", [1.0, 0.6])
    def test_it_is_unbiased_in_value_and_gradient(self, power):
        mean, stderr, truth = self.mean_over_seeds(power, 600)
        off = (mean - truth) / stderr
        assert off[0].abs() < 4
        # Of so many gradients, 5 stderr off would be one in a million; the spread itself is that of a standard normal.
        assert off.abs().max() < 5
        assert 0.8 < off.std() < 1.2

    def test_a_biased_estimate_would_show(self, monkeypatch):
        """Draws from p^0.6 with the weights of draws from p."""
        import hybridize.distill.losses.sampled_kl as module

        def wrong(shares, draws):
            return inverse((shares.log() * 0.6).softmax(-1), draws)

        monkeypatch.setattr(module, "inverse", wrong)
        mean, stderr, truth = self.mean_over_seeds(1.0, 600)
        assert ((mean - truth) / stderr).abs().max() > 8

    def test_the_gradient_of_a_perfect_student_is_zero_on_average(self):
        student, teacher = with_gradients(signals(0)), signals(0)
        grads = []
        for seed in range(400):
            value = LOSSES.build({"name": "sampled_kl", "samples": 4, "seed": seed})(student, teacher, None)
            assert value.item() == 0
            grads.append(torch.autograd.grad(value, student.hidden)[0].flatten())
        grads = torch.stack(grads)
        assert (grads.mean(0) / grads.std(0) * 20).abs().max() < 5

    def test_draws_follow_from_seed_and_text_alone(self):
        ids = torch.randint(V, (3, T), generator=torch.Generator().manual_seed(2))
        torch.manual_seed(0)
        whole = uniforms(ids, 5, 1)
        torch.manual_seed(7)
        assert torch.equal(uniforms(ids[1:2], 5, 1), whole[1:2])
        assert torch.equal(uniforms(ids[:, :4], 5, 1), whole[:, :4])
        assert torch.equal(uniforms(ids, 3, 1), whole[..., :3])
        other = ids.clone()
        other[0, 6] += 1
        changed = uniforms(other, 5, 1) != whole
        assert not changed[0, :6].any()
        assert changed[0, 6:].all()
        assert not changed[1:].any()
        assert (uniforms(ids, 5, 2) != whole).all()

    def test_draws_are_uniform_and_independent(self):
        ids = torch.randint(V, (40, 50), generator=torch.Generator().manual_seed(2))
        u = uniforms(ids, 50, 0)
        counts = torch.histc(u, 64, 0, 1)
        chi2 = ((counts - u.numel() / 64) ** 2 / (u.numel() / 64)).sum()
        assert 63 - 5 * 126**0.5 < chi2 < 63 + 5 * 126**0.5
        x = u - 0.5
        for a, b in ((x[:, 1:], x[:, :-1]), (x[1:], x[:-1]), (x[..., 1:], x[..., :-1])):
            assert abs((12 * a * b).mean().item()) < 5 / a.numel() ** 0.5

    def test_shares_are_drawn_as_often_as_they_are_large(self):
        shares = torch.tensor([[0.5, 0.0, 0.3, 0.2]], dtype=torch.float64)
        draws = torch.linspace(0, 1, 10_001, dtype=torch.float64)[None, :-1]
        assert torch.bincount(inverse(shares, draws)[0], minlength=4).tolist() == pytest.approx([5000, 0, 3000, 2000], abs=1)


def test_matrix_orientation_is_the_published_one():
    student, teacher = signals(0), signals(1)
    published = torch.linalg.matrix_norm(student.matrix - teacher.matrix, ord="fro").mean()
    # The root's slope at nothing is paid for with 1e-6.
    assert LOSSES.build({"name": "mixing_matrix"})(student, teacher, None).item() == pytest.approx(published.item(), rel=1e-6)
    squared = (student.matrix - teacher.matrix).pow(2).sum(-1).mean()
    assert_close(LOSSES.build({"name": "mixing_matrix", "norm": "squared"})(student, teacher, None), squared, "fp64")
    with pytest.raises(AssertionError):
        assert_close(squared, published, "fp64")


def dense_relation(a, b, t):
    """Row t of one relation head, over the tokens up to it."""
    return F.softmax(torch.stack([(a[t] * b[s]).sum() for s in range(t + 1)]) / a.shape[-1] ** 0.5, 0)


@pytest.mark.parametrize("relation_heads", [None, 2, 8])
@pytest.mark.parametrize("relations", [["query", "key", "value"], ["query_key"]])
def test_relations_are_written_out_alike(relations, relation_heads):
    sides = [part(signals(seed), slice(0, 1), 5) for seed in (0, 1)]
    pairs = {"query": (0, 0), "key": (1, 1), "value": (2, 2), "query_key": (0, 1)}

    def relation_rows(side):
        """{(relation, head): rows}, from lists of channels."""
        heads = side.heads[0].shape[1]
        wide = [h[0].repeat_interleave(heads // h.shape[1], 0).transpose(0, 1).flatten(1) for h in side.heads]
        width = wide[0].shape[1] // (relation_heads or heads)
        cut = [[x[:, r * width : (r + 1) * width] for r in range(relation_heads or heads)] for x in wide]
        return [
            [dense_relation(cut[pairs[name][0]][r], cut[pairs[name][1]][r], t) for t in range(5)]
            for name in relations for r in range(relation_heads or heads)
        ]  # fmt: skip

    q, p = (relation_rows(side) for side in sides)
    each = [kl(p_row, q_row) for p_rows, q_rows in zip(p, q, strict=True) for p_row, q_row in zip(p_rows, q_rows, strict=True)]
    expected = torch.stack(each).sum() / 5 / (relation_heads or sides[0].heads[0].shape[1])
    loss = LOSSES.build({"name": "relations", "relations": relations, "relation_heads": relation_heads})
    assert_close(loss(*sides, None), expected, "fp64")
    with pytest.raises(AssertionError):
        assert_close(loss(*reversed(sides), None), expected, "fp64")


@pytest.mark.parametrize("name", ["mixer_output", "hidden_state", "features"])
def test_plain_distances_are_the_published_ones(name):
    """L2 of Zebra-Llama and MOHAWK, L2 * d^-1/2 of RADLADS, MSE: of the difference itself."""
    student, teacher = signals(0), signals(1)
    state = {"mixer_output": lambda s: s.mixed, "hidden_state": lambda s: s.hidden, "features": lambda s: s.layers[2]}[name]
    if name == "features":
        student, teacher = (dataclasses.replace(s, layers={2: s.layers[2]}) for s in (student, teacher))
    gap = state(student) - state(teacher)
    for norm, expected in (
        ("full_l2", torch.norm(gap, p=2, dim=-1).mean()), ("l2", torch.norm(gap, p=2, dim=-1).mean() / D**0.5),
        ("mse", F.mse_loss(state(student), state(teacher))),
    ):  # fmt: skip
        loss = LOSSES.build({"name": name, "norm": norm, "relative": False})
        # The root's slope at nothing is paid for with 1e-6.
        assert loss(student, teacher, None).item() == pytest.approx(expected.item(), rel=1e-5)
        assert LOSSES.build({"name": name, "norm": norm})(student, teacher, None).item() != pytest.approx(
            expected.item(), rel=1e-2
        )


def test_features_measure_each_token_against_the_teachers_state():
    student, teacher = signals(0), signals(1)
    losses = []
    for index in (0, 2):
        own, other = student.layers[index], teacher.layers[index]
        losses.append(((own - other).pow(2).sum(-1) / other.pow(2).sum(-1)).mean())
    assert_close(LOSSES.build({"name": "features"})(student, teacher, None), torch.stack(losses).mean(), "fp64")
