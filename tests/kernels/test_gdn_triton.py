"""`gdn` in Triton: what its OpSpec cannot say, since that has one length of chunks and compares with the float64 recurrence."""

import pytest
import torch

from hybridize.errors import ConfigError
from hybridize.kernels._core.launch import INTERPRETED, overridden, poisoned
from hybridize.kernels._core.table import specs
from hybridize.kernels.gdn import gdn, gdn_step
from hybridize.kernels.gdn.spec import KEYS, SMALL
from tests.kernels.suite import oracle
from tests.tolerances import assert_close

pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = pytest.mark.skipif(not INTERPRETED, reason="the interpreter is for machines without a GPU; see test_gpu.py")


def inputs_of(**sizes):
    return specs(["gdn"])[0].make_inputs(SMALL | sizes, torch.float32, "cpu", 0)


@pytest.mark.parametrize("sizes", [{"decay": 100}, pytest.param({"C": 32}, marks=pytest.mark.slow)], ids=["head", "channel"])
def test_chunks_of_64_as_on_a_gpu(sizes):
    """The second merge of the inverse, and the widest squares of channels."""
    spec, inputs = specs(["gdn"])[0], inputs_of(T=70, Q=1, X=1, H=1, N=16, keys=KEYS["clustered"], **sizes)
    with overridden({"gdn_solve": {"L": 64}}), poisoned(), torch.no_grad():
        y, last = gdn(**inputs, impl="triton")
    expected = oracle(spec, inputs)[1]
    assert_close(y, expected["y"], "fp32")
    assert_close(last, expected["last"], "fp32")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"v_BTXP": torch.zeros(1, 2, 2, 257)}, "at most 256"),
        ({"g": torch.zeros(1, 2, 2, dtype=torch.float64)}, "g: got torch.float64"),
    ],
    ids=["wide", "fp64"],
)
def test_what_the_kernels_do_not_take(change, words):
    inputs = inputs_of(T=2, blank=1) | change
    with pytest.raises(ConfigError, match=words) as caught:
        gdn(**inputs, impl="triton")
    assert "\n" not in str(caught.value)
    assert torch.isfinite(gdn(**inputs)[0]).all()


def test_a_state_in_pieces_is_refused():
    inputs = specs(["gdn_step"])[0].make_inputs(SMALL, torch.float32, "cpu", 0)
    inputs["state_BHNP"] = inputs["state_BHNP"].mT.contiguous().mT
    with pytest.raises(ConfigError, match="in one piece"):
        gdn_step(**inputs, impl="triton")


@pytest.mark.slow
@pytest.mark.parametrize("channels", [1, 16])
def test_ops_are_what_they_tell_a_compiler(channels):
    """Shapes, dtypes, and that nothing is written or shared but the state."""
    sizes = SMALL | {"T": 5, "N": 16, "C": channels}
    inputs = inputs_of(**sizes)
    ops, checks = torch.ops.hybridize, {"test_utils": ("test_schema", "test_faketensor")}
    gdn(**inputs, impl="triton")  # defines them
    dy, dlast = torch.randn(1, 5, 2, 16), torch.randn(1, 2, 16, 16)
    torch.library.opcheck(ops.gdn_forward.default, tuple(inputs.values()), **checks)
    torch.library.opcheck(ops.gdn_backward.default, (*inputs.values(), dy, dlast), **checks)
    token = specs(["gdn_step"])[0].make_inputs(sizes | {"B": 3, "rows": 1}, torch.float32, "cpu", 0)
    torch.library.opcheck(ops.gdn_step.default, tuple(token.values()), **checks)


def test_flash_linear_attention_says_that_it_is_not_there():
    with pytest.raises(ConfigError, match="fla is not installed|expected cuda"):
        gdn(**inputs_of(T=2), impl="fla")
