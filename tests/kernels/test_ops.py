"""Every op under Triton's interpreter, from its OpSpec alone: values, gradients, properties, and faults that must be found.

A class of tests for each function, so that they spread over workers. The first case of each in fp32 is a unit test, the rest
belongs to the slow suite.
"""

import pytest
import torch

from hybridize.kernels._core.launch import INTERPRETED
from hybridize.kernels._core.table import SPECS, specs
from tests.kernels.suite import check_case, check_invariant, planted

pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = pytest.mark.skipif(not INTERPRETED, reason="the interpreter is for machines without a GPU; see test_gpu.py")

DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


def slow_but(first, values):
    return [pytest.param(one, marks=[] if one == first else pytest.mark.slow) for one in values]


class Op:
    """Made into a class for each function below."""

    spec = None

    def test_first_case(self):
        check_case(self.spec, self.spec.cases[0], torch.float32, "triton")

    @pytest.mark.slow
    def test_case(self, case, dtype):
        check_case(self.spec, case, DTYPES[dtype], "triton")

    @pytest.mark.slow
    def test_invariant(self, invariant):
        check_invariant(self.spec, invariant, torch.float32, "triton")

    @pytest.mark.slow
    def test_invariant_of_the_pytorch_path(self, invariant):
        check_invariant(self.spec, invariant, torch.float64, "torch")

    @pytest.mark.slow
    def test_a_planted_bug_is_found(self, bug, tmp_path):
        cases = {case.name: case for case in self.spec.cases}
        with planted(self.spec, bug, tmp_path):
            for name in bug.finds:
                check, what = (check_case, cases[name]) if name in cases else (check_invariant, name)
                with pytest.raises(AssertionError):
                    check(self.spec, what, torch.float32, "triton")


def pytest_generate_tests(metafunc):
    spec = getattr(metafunc.cls, "spec", None)
    if spec is None:
        return
    values = {
        "case": (spec.cases, lambda case: case.name),
        "dtype": (list(DTYPES), str),
        "invariant": (list(spec.invariants), str),
        "bug": (spec.bugs, lambda bug: bug.new.strip().splitlines()[0][:60]),
    }
    for name, (known, label) in values.items():
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, known, ids=label)


class OpWithoutTriton(Op):
    """Its PyTorch path alone."""

    test_first_case = test_case = test_invariant = test_a_planted_bug_is_found = None


for _spec in specs():
    _name = f"Test_{_spec.name}"
    globals()[_name] = type(_name, (Op if "triton" in _spec.impls else OpWithoutTriton,), {"spec": _spec})


def test_every_function_has_a_spec_and_every_spec_its_parts():
    for name, spec in zip(SPECS, specs(), strict=True):
        assert spec.name == name
        assert bool(spec.bugs) == bool(spec.impls), f"{name}: a fault to plant for each implementation that is not PyTorch"
        assert {one for bug in spec.bugs for one in bug.finds} <= {case.name for case in spec.cases} | set(spec.invariants)
