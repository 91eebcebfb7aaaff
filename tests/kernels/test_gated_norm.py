"""`gated_rms_norm` against the float64 loop over groups."""

import pytest
import torch

from hybridize.errors import ConfigError
from hybridize.kernels.gated_norm import gated_rms_norm
from hybridize.kernels.gated_norm.reference import gated_rms_norm_reference
from tests.tolerances import assert_close

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}
EPS = 1e-5


def make_inputs(dtype=torch.float64, scale=1.0):
    g = torch.Generator().manual_seed(0)
    shapes = ((2, 7, 24), (2, 7, 24), (24,))
    y, z, weight = (torch.randn(*s, generator=g, dtype=torch.float64) for s in shapes)
    return [(y * scale).to(dtype), z.to(dtype), weight.to(dtype)]


def fails(actual, expected):
    with pytest.raises(AssertionError, match="RMS ratio"):
        assert_close(actual, expected, "fp64")


@pytest.mark.parametrize("row", list(DTYPES))
@pytest.mark.parametrize("group_size", [1, 8, 24])
@pytest.mark.parametrize("gate_first", [True, False])
@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e4])
def test_forward_and_gradients_match_the_loop(row, group_size, gate_first, scale):
    inputs = make_inputs(DTYPES[row], scale)
    leaves = [t.clone().requires_grad_() for t in inputs]
    oracle = [t.double().requires_grad_() for t in inputs]
    out = gated_rms_norm(*leaves, EPS, group_size, gate_first)
    expected = gated_rms_norm_reference(*oracle, EPS, group_size, gate_first)
    assert out.dtype == DTYPES[row]
    assert_close(out, expected, row)
    if group_size == 1:
        return  # the norm of one number: its gradient is what rounding leaves of a zero
    dout = torch.randn_like(out)
    out.backward(dout)
    expected.backward(dout.double())
    for leaf, reference in zip(leaves, oracle, strict=True):
        assert_close(leaf.grad, reference.grad, row, grad=True)


@pytest.mark.parametrize("gate_first", [True, False])
def test_gradcheck(gate_first):
    leaves = [t[..., :8].clone().requires_grad_() for t in make_inputs()]
    assert torch.autograd.gradcheck(lambda *t: gated_rms_norm(*t, EPS, 4, gate_first), leaves)


def test_wrong_variants_are_caught():
    y, z, weight = make_inputs()
    expected = gated_rms_norm_reference(y, z, weight, EPS, 8)
    fails(gated_rms_norm(y, z, weight, EPS, 8, gate_first=False), expected)
    fails(gated_rms_norm(y, z, weight, EPS, 24), expected)
    fails(gated_rms_norm(y, torch.sigmoid(z), weight, EPS, 8), expected)
    fails(gated_rms_norm(y, z, weight, 1e-2, 8), expected)


def test_a_group_does_not_see_the_others():
    y, z, weight = make_inputs()
    changed = y.clone()
    changed[..., 8:] *= 5
    out, out_changed = (gated_rms_norm(t, z, weight, EPS, 8) for t in (y, changed))
    assert torch.equal(out[..., :8], out_changed[..., :8])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"z": torch.zeros(2, 7, 12)}, "z: got"),
        ({"weight": torch.zeros(12)}, "weight"),
        ({"group_size": 5}, "group_size"),
        ({"group_size": 0}, "group_size"),
    ],
    ids=["z", "weight", "divisor", "zero"],
)
def test_bad_inputs_are_named(change, words):
    y, z, weight = make_inputs()
    arguments = {"y": y, "z": z, "weight": weight, "eps": EPS, "group_size": 8}
    with pytest.raises(ConfigError, match=words):
        gated_rms_norm(**(arguments | change))
