"""Every op on a GPU, from its OpSpec: what the interpreter cannot see (bf16, TF32, races, masked lanes, launch limits).

pytest -m gpu tests/kernels/test_gpu.py
"""

import pytest
import torch

from hybridize.kernels._core.table import specs
from tests.kernels.suite import check_case, runner

pytestmark = pytest.mark.gpu

ROWS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32 on a GPU": torch.float32}
SPECS_OF = {spec.name: spec for spec in specs() if "triton" in spec.impls}
CASES = [pytest.param(name, case, id=f"{name}-{case.name}") for name, spec in SPECS_OF.items() for case in spec.cases]
SHAPES = [pytest.param(name, case, id=f"{name}-{case.name}") for name, spec in SPECS_OF.items() for case in spec.shapes[:1]]


@pytest.fixture(autouse=True)
def _exact_oracle():
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize(("name", "case"), CASES)
def test_case(name, case, row):
    check_case(SPECS_OF[name], case, ROWS[row], "triton", "cuda", row)


@pytest.mark.parametrize(("name", "case"), SHAPES)
def test_the_shape_of_a_model_agrees_with_the_pytorch_path(name, case):
    spec = SPECS_OF[name]
    inputs = spec.make_inputs(case.sizes, torch.bfloat16, "cuda", 0)
    found, expected = runner(spec, "triton")(inputs), runner(spec, "torch")(inputs)
    for key, value in expected.items():
        difference = (found[key].double() - value.double()).norm() / value.double().norm()
        assert difference < 8e-3, f"{key}: {difference:.2g}"


@pytest.mark.parametrize(("name", "case"), SHAPES)
def test_two_runs_are_equal_to_the_last_bit(name, case):
    spec = SPECS_OF[name]
    inputs = spec.make_inputs(case.sizes, torch.bfloat16, "cuda", 0)
    first = runner(spec, "triton")(inputs)
    for _ in range(5):
        for key, value in runner(spec, "triton")(inputs).items():
            assert torch.equal(value, first[key]), key
