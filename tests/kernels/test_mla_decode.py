"""`mla_decode`: the PyTorch path against the float64 reference, rows without tokens, what is refused. More in test_ops.py."""

import pytest
import torch

from hybridize.errors import ConfigError
from hybridize.kernels.mla_decode import mla_decode
from hybridize.kernels.mla_decode.spec import MLA_DECODE as SPEC
from tests.kernels.suite import check_case
from tests.tolerances import assert_close, rms_ratio

SIZES = {"B": 2, "S": 9, "H": 3, "R": 6, "E": 4}


def inputs_of(dtype=torch.float64, **sizes):
    return SPEC.make_inputs(SIZES | sizes, dtype, "cpu", 0)


@pytest.mark.parametrize("case", SPEC.cases, ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_pytorch_path_is_the_reference(case, dtype):
    check_case(SPEC, case, dtype, "torch")


def test_in_fp64_it_is_exact_and_has_gradients():
    inputs = inputs_of(starts=1, lengths=1)
    out, lse = mla_decode(**inputs)
    expected, expected_lse = SPEC.reference(**inputs)
    assert_close(out, expected, "fp64")
    assert_close(lse, expected_lse, "fp64")
    # Wrong on purpose: another scale, a row's start left out, the queries of another head.
    for change in ({"scale": 1.0}, {"q_rope_BHE": inputs["q_rope_BHE"].flip(1)}):
        assert rms_ratio(mla_decode(**inputs | change)[0], expected) > 1e-3
    assert mla_decode(**inputs | {"starts_B": None})[0].isnan().any()
    leaves = [t.requires_grad_() for t in list(inputs_of().values())[:4]]
    assert torch.autograd.gradcheck(lambda *t: mla_decode(*t, scale=0.4), leaves)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_a_row_without_tokens_is_zero(impl):
    if impl == "triton":
        pytest.importorskip("triton", reason="Triton is not installed")
    inputs = inputs_of(torch.float32) | {"lengths_B": torch.tensor([0, 9]), "impl": impl}
    inputs["latent_BSR"][0] = torch.nan
    out, lse = mla_decode(**inputs)
    assert torch.equal(out[0], torch.zeros(3, 6))
    assert lse[0].eq(-torch.inf).all()
    assert out[1].isfinite().all()
    assert lse[1].isfinite().all()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"q_rope_BHE": torch.zeros(2, 4)}, "q_rope_BHE: got torch.float32 \\(2, 4\\), expected floats \\[B, H, E\\]"),
        ({"latent_BSR": torch.zeros(2, 6)}, "latent_BSR: got shape"),
        ({"q_latent_BHR": torch.zeros(2, 3, 5)}, "q_latent_BHR: got torch.float32 \\(2, 3, 5\\), expected torch.float32"),
        ({"rope_BSE": torch.zeros(2, 9, 4, dtype=torch.float16)}, "rope_BSE: got torch.float16"),
        ({"lengths_B": torch.zeros(2)}, "lengths_B: got torch.float32 \\(2,\\), expected integers"),
        ({"mask_BS": torch.zeros(2, 8, dtype=torch.bool)}, "mask_BS: got torch.bool \\(2, 8\\), expected bool \\(2, 9\\)"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)  # fmt: skip
def test_bad_inputs_are_named(change, words):
    with pytest.raises(ConfigError, match=words):
        mla_decode(**inputs_of(torch.float32) | change)


def test_what_the_kernels_cannot_run_is_said():
    pytest.importorskip("triton", reason="Triton is not installed")
    with pytest.raises(ConfigError, match="with triton: got a latent of 513, expected at most 512. Take impl"):
        mla_decode(**inputs_of(torch.float32, R=513), impl="triton")
    with pytest.raises(ConfigError, match="got float64, expected fp16"):
        mla_decode(**inputs_of(), impl="triton")
    inputs = inputs_of(torch.float32)
    inputs["latent_BSR"].requires_grad_()
    with pytest.raises(ConfigError, match="decoding has no backward"):
        mla_decode(**inputs, impl="triton")
