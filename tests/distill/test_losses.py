"""Each loss against a dense form in fp64, and the promises that hold for all of them."""

import pytest
import torch
import torch.nn.functional as F

from hybridize.distill.losses import LOSSES
from hybridize.distill.losses.chunked import linear_cross_entropy, linear_kl
from hybridize.distill.signals import Signals
from hybridize.errors import ConfigError
from tests.tolerances import assert_close

B, T, D, V = 2, 13, 8, 31


def problem(dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = {"s": (B, T, D), "ws": (V, D), "t": (B, T, D + 3), "wt": (V, D + 3)}
    return {name: torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype) for name, shape in shapes.items()}


def dense_kl(p, mask=None, temperature=1.0, reduction="token"):
    log_q = F.log_softmax(p["s"] @ p["ws"].T / temperature, dim=-1)
    log_p = F.log_softmax(p["t"] @ p["wt"].T / temperature, dim=-1)
    each = (log_p.exp() * (log_p - log_q)).sum(-1) * temperature**2
    if reduction == "batchmean":
        return each.sum() / B
    return each.mean() if mask is None else each[mask].sum() / mask.sum()


def gradients(loss, tensors):
    return torch.autograd.grad(loss, tensors)


@pytest.mark.parametrize("chunk", [1, 4, 26, 1000])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("dtype", "row"), [(torch.float64, "fp64"), (torch.float32, "fp32")])
def test_kl_is_the_dense_kl(chunk, temperature, masked, dtype, row):
    exact, own = problem(), problem(dtype)
    mask = (torch.arange(T) < 9).expand(B, T) if masked else None
    for p in (exact, own):
        p["s"].requires_grad_()
        p["ws"].requires_grad_()
    expected = dense_kl(exact, mask, temperature)
    actual = linear_kl(own["s"], own["ws"], own["t"], own["wt"], mask, temperature, chunk)
    assert_close(actual, expected, row)
    for a, e in zip(gradients(actual, [own["s"], own["ws"]]), gradients(expected, [exact["s"], exact["ws"]]), strict=True):
        assert_close(a, e, row, grad=True)


def test_a_kl_scaled_by_the_batch_fails_the_comparison():
    p = problem()
    with pytest.raises(AssertionError):
        assert_close(linear_kl(p["s"], p["ws"], p["t"], p["wt"]), dense_kl(p, reduction="batchmean"), "fp64")
    reverse = linear_kl(p["t"], p["wt"], p["s"], p["ws"])
    with pytest.raises(AssertionError):
        assert_close(reverse, dense_kl(p), "fp64")


def test_the_gradient_is_the_slope_of_the_loss():
    """Against central differences, which know nothing of how the loss is written."""
    p = problem()
    labels = torch.randint(V, (B, T), generator=torch.Generator().manual_seed(1))
    away = problem(seed=5)
    for loss in (
        lambda s, w: linear_kl(s, w, p["t"], p["wt"], None, 1.7, 5),
        lambda s, w: linear_cross_entropy(s, w, labels, None, 5),
    ):
        s, w = p["s"].clone().requires_grad_(), p["ws"].clone().requires_grad_()
        value = loss(s, w)
        (3 * value).backward()
        slope = float((s.grad * away["s"]).sum() + (w.grad * away["ws"]).sum()) / 3
        step = 1e-5
        with torch.no_grad():
            ahead, behind = (float(loss(s + h * away["s"], w + h * away["ws"])) for h in (step, -step))
        assert slope == pytest.approx((ahead - behind) / (2 * step), rel=1e-7)
        assert slope != pytest.approx((ahead - behind) / step, rel=1e-2)
        # The head's gradient was scaled in place: a second backward is refused, never wrong.
        again = loss(s, w)
        again.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            again.backward()


@pytest.mark.parametrize("chunk", [3, 1000])
def test_cross_entropy_is_torchs(chunk):
    p = problem()
    p["s"].requires_grad_()
    p["ws"].requires_grad_()
    labels = torch.randint(V, (B, T), generator=torch.Generator().manual_seed(1))
    expected = F.cross_entropy((p["s"] @ p["ws"].T).flatten(0, 1), labels.flatten())
    actual = linear_cross_entropy(p["s"], p["ws"], labels, None, chunk)
    assert_close(actual, expected, "fp64")
    for a, e in zip(gradients(actual, [p["s"], p["ws"]]), gradients(expected, [p["s"], p["ws"]]), strict=True):
        assert_close(a, e, "fp64", grad=True)
    with pytest.raises(AssertionError):
        assert_close(actual, linear_cross_entropy(p["s"], p["ws"], labels.roll(1, dims=1), None, chunk), "fp64")


def test_bf16_hidden_states_get_fp32_logits():
    """Near convergence, bf16 logits would drown the gradient; ours differs from fp64's by the rounding of its inputs only."""
    g = torch.Generator().manual_seed(0)
    t, w = torch.randn(1, 64, 32, generator=g), torch.randn(512, 32, generator=g)
    s = (t + 0.01 * torch.randn(1, 64, 32, generator=g)).bfloat16()
    t, w = t.bfloat16(), w.bfloat16()

    def slope(compute):
        x = s.clone().requires_grad_() if compute is None else s.to(compute).requires_grad_()
        if compute is None:
            loss = linear_kl(x, w, t, w)
        else:
            q = F.log_softmax((x @ w.to(compute).T).double(), -1)
            p = F.log_softmax((t.to(compute) @ w.to(compute).T).double(), -1)
            loss = (p.exp() * (p - q)).sum(-1).mean()
        return torch.autograd.grad(loss, x)[0].double()

    assert_close(slope(None), slope(torch.float64), "bf16", grad=True)
    with pytest.raises(AssertionError):
        assert_close(slope(torch.bfloat16), slope(torch.float64), "bf16", grad=True)


def test_a_frozen_head_gets_no_gradient_and_the_teacher_never_does():
    p = problem()
    for tensor in (p["s"], p["t"], p["wt"]):
        tensor.requires_grad_()
    linear_kl(p["s"], p["ws"], p["t"], p["wt"]).backward()
    assert p["s"].grad is not None
    assert p["ws"].grad is None
    assert p["t"].grad is None
    assert p["wt"].grad is None


def test_autocast_does_not_round_the_logits():
    p = problem(torch.float32)
    plain = linear_kl(p["s"], p["ws"], p["t"], p["wt"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(linear_kl(p["s"], p["ws"], p["t"], p["wt"]), plain)


# The contract, for every loss of the table.


def signals(seed, width=D):
    g = torch.Generator().manual_seed(seed)
    state = torch.randn(B, T, width, generator=g, dtype=torch.float64)
    ids = torch.randint(V, (B, T), generator=torch.Generator().manual_seed(9))
    head = torch.randn(V, width, generator=g, dtype=torch.float64)
    return Signals(mixed=state, hidden=state, head=head, ids=ids, mixed_scale=0.7, hidden_scale=0.7)


def part(s, rows=slice(None), stop=None):
    return Signals(
        mixed=s.mixed[rows, :stop], hidden=s.hidden[rows, :stop], head=s.head, ids=s.ids[rows, :stop],
        mixed_scale=s.mixed_scale, hidden_scale=s.hidden_scale,
    )  # fmt: skip


VARIANTS = [{"name": name} for name in LOSSES.names()] + [
    {"name": "mixer_output", "norm": "l2"}, {"name": "hidden_state", "norm": "l2"}, {"name": "kl", "temperature": 2.0},
]  # fmt: skip


@pytest.mark.parametrize("spec", VARIANTS, ids=str)
def test_padding_does_not_count(spec):
    loss, student, teacher = LOSSES.build(spec), signals(0), signals(1)
    mask = (torch.arange(T) < 9).expand(B, T)
    plain = loss(part(student, stop=9), part(teacher, stop=9), None)
    assert_close(loss(student, teacher, mask), plain, "fp64")
    with pytest.raises(AssertionError):
        assert_close(loss(student, teacher, None), plain, "fp64")


@pytest.mark.parametrize("spec", VARIANTS, ids=str)
def test_a_step_may_be_divided_anyhow(spec):
    loss, student, teacher = LOSSES.build(spec), signals(0), signals(1)
    whole = loss(student, teacher, None)
    halves = [loss(part(student, rows), part(teacher, rows), None) for rows in (slice(0, 1), slice(1, 2))]
    assert_close((halves[0] + halves[1]) / 2, whole, "fp64")
    with pytest.raises(AssertionError):
        assert_close(halves[0] + halves[1], whole, "fp64")


@pytest.mark.parametrize("spec", [s for s in VARIANTS if s["name"] != "cross_entropy"], ids=str)
def test_a_perfect_student_has_no_loss_and_no_gradient(spec):
    loss, student, teacher = LOSSES.build(spec), signals(0), signals(0)
    student.hidden.requires_grad_()
    value = loss(student, teacher, None)
    assert value.item() == 0
    (slope,) = torch.autograd.grad(value, [student.hidden])
    assert torch.equal(slope, torch.zeros_like(slope))
    off = signals(1)
    assert loss(off, teacher, None).item() > 0


@pytest.mark.parametrize("spec", VARIANTS, ids=str)
def test_the_loss_is_fp32_and_the_gradient_is_the_students(spec):
    loss, student, teacher = LOSSES.build(spec), signals(0), signals(1)
    kinds = {"mixed": torch.bfloat16, "hidden": torch.bfloat16, "head": torch.float32}
    low = [
        Signals(**{k: getattr(s, k).to(kind).requires_grad_() for k, kind in kinds.items()}, ids=s.ids)
        for s in (student, teacher)
    ]
    value = loss(*low, None)
    assert value.dtype == torch.float32
    value.backward()
    assert any(t.grad is not None for t in (low[0].mixed, low[0].hidden))
    assert all(t.grad is None for t in (low[1].mixed, low[1].hidden, low[1].head))


def test_impossible_options_are_named():
    for spec in ({"name": "kl", "temperature": 0}, {"name": "kl", "chunk_tokens": 0}):
        with pytest.raises(ConfigError, match=r"chunk_tokens"):
            LOSSES.build(spec)
