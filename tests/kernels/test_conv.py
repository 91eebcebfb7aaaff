"""`causal_conv1d` and its step against the float64 token loop."""

import pytest
import torch

from hybridize.errors import ConfigError
from hybridize.kernels.conv import causal_conv1d, causal_conv1d_step
from hybridize.kernels.conv.reference import causal_conv1d_reference, causal_conv1d_step_reference
from tests.tolerances import assert_close

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}
C = 12


def make_inputs(tokens, taps=4, dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    shapes = ((2, tokens, C), (C, taps), (C,), (2, C, taps - 1))
    return [torch.randn(*s, generator=g, dtype=torch.float64).to(dtype) for s in shapes]


def fails(actual, expected, row="fp64"):
    with pytest.raises(AssertionError, match="RMS ratio"):
        assert_close(actual, expected, row)


@pytest.mark.parametrize("row", list(DTYPES))
@pytest.mark.parametrize("taps", [1, 2, 4])
@pytest.mark.parametrize("tokens", [1, 2, 31, 100])
@pytest.mark.parametrize("activation", ["silu", None])
def test_forward_and_gradients_match_the_loop(row, taps, tokens, activation):
    inputs = make_inputs(tokens, taps, DTYPES[row])
    leaves = [t.clone().requires_grad_() for t in inputs]
    oracle = [t.double().requires_grad_() for t in inputs]
    y, state = causal_conv1d(*leaves, activation)
    y_ref, state_ref = causal_conv1d_reference(*oracle, activation)
    assert y.dtype == DTYPES[row]
    assert_close(y, y_ref, row)
    assert torch.equal(state.double(), state_ref)
    assert torch.equal(causal_conv1d(*inputs, activation)[0], y)
    dy, dstate = torch.randn_like(y), torch.randn_like(state)
    torch.autograd.backward((y, state), (dy, dstate))
    torch.autograd.backward((y_ref, state_ref), (dy.double(), dstate.double()))
    for leaf, expected in zip(leaves, oracle, strict=True):
        assert_close(leaf.grad, expected.grad, row, grad=True)


@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize("activation", ["silu", None])
def test_gradcheck(segmented, activation):
    inputs = [t[..., :3, :] if t.dim() == 3 and i else t for i, t in enumerate(make_inputs(6, 3))]
    inputs = [inputs[0][..., :3], inputs[1][:3], inputs[2][:3], inputs[3]]
    leaves = [t.contiguous().requires_grad_() for t in inputs]
    ids = torch.tensor([[0, 0, 1, 1, 1, 2], [0, 1, 2, 2, 2, 2]]) if segmented else None
    assert torch.autograd.gradcheck(lambda *t: causal_conv1d(*t, activation, ids), leaves)


def test_wrong_variants_are_caught():
    x, weight, bias, state = make_inputs(40)
    y_ref, _ = causal_conv1d_reference(x, weight, bias, state)
    fails(causal_conv1d(x, weight.flip(1), bias, state)[0], y_ref)
    fails(causal_conv1d(x, weight, bias)[0], y_ref)
    fails(causal_conv1d(x, weight, bias, state, None)[0], y_ref)
    fails(causal_conv1d(x, weight, None, state)[0], y_ref)


def test_it_is_causal():
    x, weight, bias, state = make_inputs(40)
    changed = x.clone()
    changed[:, 20:] += 1
    y, y_changed = (causal_conv1d(t, weight, bias, state)[0] for t in (x, changed))
    assert torch.equal(y[:, :20], y_changed[:, :20])
    assert not torch.equal(y[:, 20], y_changed[:, 20])


@pytest.mark.parametrize("first", [0, 1, 2, 17])
def test_two_prefills_equal_one(first):
    x, weight, bias, state = make_inputs(30)
    y_ref, state_ref = causal_conv1d(x, weight, bias, state)
    y_a, between = causal_conv1d(x[:, :first], weight, bias, state)
    y_b, last = causal_conv1d(x[:, first:], weight, bias, between)
    assert_close(torch.cat([y_a, y_b], dim=1), y_ref, "fp64")
    assert torch.equal(last, state_ref)


@pytest.mark.parametrize("taps", [1, 4])
@pytest.mark.parametrize("row", list(DTYPES))
def test_steps_equal_prefill(taps, row):
    x, weight, bias, state = make_inputs(9, taps, DTYPES[row])
    y_ref, state_ref = causal_conv1d(x, weight, bias, state)
    y = [causal_conv1d_step(x_BC, weight, bias, state) for x_BC in x.unbind(1)]
    assert_close(torch.stack(y, dim=1), y_ref, row)
    assert torch.equal(state, state_ref)


def test_a_step_over_picked_rows_leaves_the_others():
    x, weight, bias, _ = make_inputs(1)
    state = torch.randn(5, C, 3, dtype=torch.float64)
    rows, picked, expected = torch.tensor([4, -1]), state.clone(), state.clone()
    y = causal_conv1d_step(x[:, 0], weight, bias, picked, rows_B=rows)
    assert_close(y, causal_conv1d_step_reference(x[:, 0], weight, bias, expected, rows_B=rows), "fp64")
    assert torch.equal(picked, expected)
    assert torch.equal(picked[:4], state[:4])
    fails(causal_conv1d_step(x[:, 0], weight, bias, state, rows_B=torch.tensor([3, -1])), y)
    with pytest.raises(ConfigError, match="rows_B"):
        causal_conv1d_step(x[:, 0], weight, bias, state, rows_B=torch.tensor([3]))


@pytest.mark.parametrize("boundaries", [(1,), (2, 3, 20), (28,)], ids=str)
def test_segments_equal_separate_runs(boundaries):
    x, weight, bias, state = make_inputs(30)
    ids = torch.bucketize(torch.arange(30), torch.tensor(boundaries), right=True).expand(2, -1)
    y, last = causal_conv1d(x, weight, bias, state, segments_BT=ids)
    y_ref, last_ref = causal_conv1d_reference(x, weight, bias, state, segments_BT=ids)
    before, parts = state, []
    for start, stop in zip((0, *boundaries), (*boundaries, 30), strict=True):
        y_part, last_part = causal_conv1d(x[:, start:stop], weight, bias, before)
        parts.append(y_part)
        before = None
    assert_close(y, torch.cat(parts, dim=1), "fp64")
    assert_close(y, y_ref, "fp64")
    assert torch.equal(last, last_part)
    assert torch.equal(last, last_ref)
    fails(causal_conv1d(x, weight, bias, state)[0], y)


def test_many_blocks_give_the_result_of_one(monkeypatch):
    x, weight, bias, state = (t.requires_grad_() for t in make_inputs(50))
    y, _ = causal_conv1d(x, weight, bias, state)
    dy = torch.randn_like(y)
    grads = torch.autograd.grad(y, (x, weight, bias, state), dy)
    monkeypatch.setattr("hybridize.kernels.conv.torch_impl.BLOCK_NUMBERS", 7 * 2 * C)
    y_small, _ = causal_conv1d(x, weight, bias, state)
    assert_close(y_small, y, "fp64")
    small = torch.autograd.grad(y_small, (x, weight, bias, state), dy)
    for grad, expected in zip(small, grads, strict=True):
        assert_close(grad, expected, "fp64", grad=True)


@pytest.mark.parametrize(
    ("position", "value", "words"),
    [
        (0, torch.zeros(2, C), "x: got"),
        (1, torch.zeros(C + 1, 4), "weight_CK"),
        (2, torch.zeros(C, 1), "bias_C"),
        (3, torch.zeros(2, C, 4), "state_BCK1"),
        (4, "relu", "activation"),
        (5, torch.zeros(2, 8, dtype=torch.long), "segments_BT"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_inputs_are_named(position, value, words):
    arguments = [*make_inputs(9, dtype=torch.float32), "silu", None]
    arguments[position] = value
    with pytest.raises(ConfigError, match=words):
        causal_conv1d(*arguments)
