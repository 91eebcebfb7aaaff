"""Each loss against a dense form in fp64, and the promises that hold for all of them."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from hybridize.distill.losses import LOSSES
from hybridize.distill.losses.chunked import linear_cross_entropy
from hybridize.distill.losses.kl import KL
from hybridize.distill.signals import Head, Signals
from hybridize.errors import ConfigError
from tests.tolerances import assert_close

B, T, D, V, H = 2, 13, 8, 31, 4


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


def linear_kl(s, ws, t, wt, mask=None, temperature=1.0, chunk=256, **options):
    sides = [Signals(hidden=x, head=Head(weight=w)) for x, w in ((s, ws), (t, wt))]
    return KL(temperature=temperature, chunk_tokens=chunk, **options)(*sides, mask)


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
        lambda s, w: linear_cross_entropy(s, Head(weight=w), labels, None, 5),
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
    actual = linear_cross_entropy(p["s"], Head(weight=p["ws"]), labels, None, chunk)
    assert_close(actual, expected, "fp64")
    for a, e in zip(gradients(actual, [p["s"], p["ws"]]), gradients(expected, [p["s"], p["ws"]]), strict=True):
        assert_close(a, e, "fp64", grad=True)
    with pytest.raises(AssertionError):
        assert_close(actual, linear_cross_entropy(p["s"], Head(weight=p["ws"]), labels.roll(1, dims=1), None, chunk), "fp64")


@pytest.mark.parametrize("spec", [{"name": "kl"}, {"name": "kl", "direction": "reverse"}, {"name": "jsd"}], ids=str)
def test_bf16_states_and_heads_get_fp32_logits(spec):
    """Near convergence bf16 logits would drown the gradient; ours differs from fp64's by the rounding of the result alone."""
    g = torch.Generator().manual_seed(0)
    t, w = torch.randn(1, 64, 32, generator=g), torch.randn(5000, 32, generator=g)
    s = (t + 0.01 * torch.randn(1, 64, 32, generator=g)).bfloat16()
    t, w, ws = t.bfloat16(), w.bfloat16(), (w + 0.01 * torch.randn(5000, 32, generator=g)).bfloat16()

    def exact(z_s, z_t):
        q, p = F.log_softmax(z_s.double(), -1), F.log_softmax(z_t.double(), -1)
        if spec["name"] == "jsd":
            m = ((q.exp() + p.exp()) / 2).log()
            return ((p.exp() * (p - m) + q.exp() * (q - m)) / 2).sum(-1).mean()
        return (p.exp() * (p - q)).sum(-1).mean() if spec.get("direction") is None else (q.exp() * (q - p)).sum(-1).mean()

    def slopes(compute):
        x, head = s.clone(), ws.clone()
        x, head = (leaf.to(compute or leaf.dtype).requires_grad_() for leaf in (x, head))
        if compute is None:
            loss = LOSSES.build(spec)(Signals(hidden=x, head=Head(weight=head)), Signals(hidden=t, head=Head(weight=w)), None)
        else:
            loss = exact(x @ head.T, t.to(compute) @ w.to(compute).T)
        return torch.autograd.grad(loss, [x, head])

    for own, expected, rounded in zip(slopes(None), slopes(torch.float64), slopes(torch.bfloat16), strict=True):
        assert_close(own, expected, "bf16 result", grad=True)
        with pytest.raises(AssertionError):
            assert_close(rounded, expected, "bf16 result", grad=True)


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


# The contract, for every loss of the table: it is in one file, so that a new loss is covered by its line there.


def signals(seed, width=D):
    """One model's side of everything a loss may ask for, [B, T, ...], fp64."""
    g = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    matrix = random(B, H, T, T).tril()
    heads = (random(B, H, T, 4), random(B, H // 2, T, 4), random(B, H // 2, T, 4))
    ids = torch.randint(V, (B, T), generator=torch.Generator().manual_seed(9))
    return Signals(
        mixed=random(B, T, width), hidden=random(B, T, width), context=random(B, T, 5), matrix=matrix, heads=heads,
        layers={0: random(B, T, width), 2: random(B, T, width)}, head=Head(weight=random(V, width), scale=0.6, cap=4.0), ids=ids,
        mixed_scale=0.7, hidden_scale=0.7, context_scale=0.7, gates=[random(4), random(2)],
    )  # fmt: skip


def part(s, rows=slice(None), stop=None):
    return dataclasses.replace(
        s, mixed=s.mixed[rows, :stop], hidden=s.hidden[rows, :stop], context=s.context[rows, :stop], ids=s.ids[rows, :stop],
        matrix=s.matrix[rows, :, :stop, :stop], heads=tuple(h[rows, :, :stop] for h in s.heads),
        layers={index: state[rows, :stop] for index, state in s.layers.items()},
    )  # fmt: skip


def leaves(s):
    """The tensors of one side that a gradient could reach."""
    return [s.mixed, s.hidden, s.context, s.matrix, *s.heads, *s.layers.values(), *s.gates, s.head.weight]


def with_gradients(s, low=False):
    """The same side on leaves that ask for a gradient; `low`: states in bf16, as a stage with that dtype has them."""

    def leaf(tensor):
        return tensor.to(torch.bfloat16 if low else tensor.dtype).detach().requires_grad_()

    head = dataclasses.replace(s.head, weight=s.head.weight.to(torch.float32 if low else torch.float64).detach().requires_grad_())
    # Learnt gates are fp32 in any stage.
    gates = [gate.to(torch.float32 if low else torch.float64).detach().requires_grad_() for gate in s.gates]
    return dataclasses.replace(
        s, gates=gates, mixed=leaf(s.mixed), hidden=leaf(s.hidden), context=leaf(s.context), matrix=leaf(s.matrix),
        heads=tuple(map(leaf, s.heads)), layers={index: leaf(state) for index, state in s.layers.items()}, head=head,
    )  # fmt: skip


NORMS = [{"norm": "l2"}, {"norm": "full_l2"}, {"relative": False}]
VARIANTS = [{"name": name} for name in LOSSES.names()] + [
    *({"name": name, **norm} for name in ("mixer_output", "hidden_state", "features") for norm in NORMS),
    {"name": "mixer_output", "at": "context"},
    {"name": "mixing_matrix", "norm": "squared"},
    {"name": "relations", "relations": ["query_key"]}, {"name": "relations", "relation_heads": 2},
    {"name": "kl", "temperature": 2.0}, {"name": "kl", "direction": "reverse"},
    {"name": "kl", "reduction": "published_batchmean"},
    {"name": "jsd", "beta": 0.1, "temperature": 0.5}, {"name": "jsd", "beta": 0.9},
    {"name": "top_k_kl", "k": 3}, {"name": "sampled_kl", "samples": 3, "power": 0.7},
]  # fmt: skip
# The text's own loss and that of gates have no teacher, draws leave a gradient that is zero only on average, and gates are
# the same for every token.
NO_TEACHER, NOISY, NO_TOKENS = {"cross_entropy", "gate_sparsity"}, {"sampled_kl"}, {"gate_sparsity"}


@pytest.mark.parametrize("spec", [s for s in VARIANTS if s["name"] not in NO_TOKENS], ids=str)
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


@pytest.mark.parametrize("spec", [s for s in VARIANTS if s["name"] not in NO_TEACHER], ids=str)
def test_a_perfect_student_has_no_loss_and_no_gradient(spec):
    loss, student, teacher = LOSSES.build(spec), with_gradients(signals(0)), signals(0)
    value = loss(student, teacher, None)
    assert value.item() == 0
    value.backward()
    if spec["name"] not in NOISY:
        for tensor in leaves(student):
            assert tensor.grad is None or tensor.grad.abs().max() < 1e-15
    assert loss(signals(1), teacher, None).abs().item() > 0


@pytest.mark.parametrize("spec", VARIANTS, ids=str)
def test_the_loss_is_fp32_and_the_gradient_is_the_students(spec):
    loss, student, teacher = LOSSES.build(spec), with_gradients(signals(0), low=True), with_gradients(signals(1), low=True)
    value = loss(student, teacher, None)
    assert value.dtype == torch.float32
    value.backward()
    assert any(t.grad is not None for t in leaves(student))
    assert all(t.grad is None for t in leaves(teacher))


@pytest.mark.parametrize("spec", VARIANTS, ids=str)
def test_the_gradient_is_the_slope(spec):
    """Against central differences along one direction, which know nothing of how a loss is written."""
    loss, student, teacher = LOSSES.build(spec), with_gradients(signals(0)), signals(1)
    loss(student, teacher, None).backward()
    moved = [(t, torch.randn_like(t)) for t in leaves(student) if t.grad is not None]
    slope = sum(float((t.grad * away).sum()) for t, away in moved)
    found = []
    for step in (1e-5, -2e-5, 1e-5):
        with torch.no_grad():
            for tensor, away in moved:
                tensor += step * away
        found.append(loss(student, teacher, None).item())
    assert slope == pytest.approx((found[0] - found[1]) / 2e-5, rel=1e-6)
    assert slope != pytest.approx((found[0] - found[1]) / 1e-5, rel=1e-2)


def test_impossible_options_are_named():
    for spec, words in (
        ({"name": "kl", "temperature": 0}, "chunk_tokens"),
        ({"name": "kl", "chunk_tokens": 0}, "chunk_tokens"),
        ({"name": "jsd", "beta": 0}, "beta is 0, expected between 0 and 1; for the ends use kl"),
        ({"name": "top_k_kl", "k": 0}, "k is 0"),
        ({"name": "sampled_kl", "samples": 0}, "samples is 0"),
        ({"name": "relations", "relations": []}, "expected at least one"),
        ({"name": "relations", "relations": ["query", "query"]}, "each once"),
        ({"name": "relations", "relations": ["queries"]}, "'query'"),
        ({"name": "relations", "relation_heads": 0}, "relation_heads is 0"),
    ):
        with pytest.raises(ConfigError, match=words):
            LOSSES.build(spec)
    with pytest.raises(ConfigError, match="relation_heads is 3, expected a divisor of the heads' 16 channels"):
        LOSSES.build({"name": "relations", "relation_heads": 3})(signals(0), signals(1), None)
    with pytest.raises(ConfigError, match=r"layers is \[5\], expected some of 0 to 2"):
        LOSSES.build({"name": "features", "layers": [5]}).chosen(3, [0])
    assert LOSSES.build({"name": "features"}).chosen(3, [0]) == [0]
    assert LOSSES.build({"name": "features", "layers": "all"}).chosen(3, [0]) == [0, 1, 2]
