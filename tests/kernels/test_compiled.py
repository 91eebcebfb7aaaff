"""Ops of torch.library under torch.compile: schemas say what is written, fakes have the right shapes, results are equal."""

import pytest
import torch

from hybridize.kernels._core.launch import INTERPRETED, overridden
from hybridize.kernels._core.table import specs

pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not INTERPRETED, reason="the interpreter is for machines without a GPU"),
]


def results(spec, function):
    """Results, what was written in place, and gradients of the sum of the results, of the op's second case."""
    inputs = spec.make_inputs(spec.cases[1].sizes, torch.float32, "cpu", 0)
    leaves = {k: v.detach().requires_grad_() if k in spec.grads and v is not None else v for k, v in inputs.items()}
    with overridden(dict(spec.tiles)):
        found = function(leaves)
        found = found if isinstance(found, tuple) else (found,)
        if spec.grads:
            torch.autograd.backward([one.sum() for one in found])
    return [*found, *(inputs[k] for k in spec.in_place), *(leaves[k].grad for k in spec.grads if leaves[k] is not None)]


# Dynamo makes an instance of each autograd.Function that it traces, and torch warns of that.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("name", ["ssd", "ssd_step"])
def test_a_compiled_call_is_the_eager_one(name):
    (spec,) = specs([name])
    eager = results(spec, lambda inputs: spec.function(**inputs, impl="triton"))
    compiled = torch.compile(lambda inputs: spec.function(**inputs, impl="triton"), backend="aot_eager", fullgraph=True)
    for found, expected in zip(results(spec, compiled), eager, strict=True):
        assert torch.equal(found, expected)


def test_schemas_and_fakes_of_ssd():
    from hybridize.kernels.ssd import triton_impl

    tests = ("test_schema", "test_faketensor")
    for name, operator in (("ssd", torch.ops.hybridize.ssd), ("ssd_step", torch.ops.hybridize.ssd_step)):
        (spec,) = specs([name])
        inputs = tuple(spec.make_inputs(spec.cases[1].sizes, torch.float32, "cpu", 0).values())
        with overridden(dict(spec.tiles)):
            torch.library.opcheck(operator.default, inputs, test_utils=tests)
            if name == "ssd":
                y, last, states = triton_impl.run_forward(*inputs)
                of_inputs = (y, last, *inputs[:6], inputs[7], states, True)
                torch.library.opcheck(torch.ops.hybridize.ssd_backward.default, of_inputs, test_utils=tests)
