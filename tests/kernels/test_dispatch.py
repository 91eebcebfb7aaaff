"""Which implementation of an op runs, and what is said where it cannot."""

import logging
import subprocess
import sys

import pytest
import torch

from hybridize.errors import ConfigError
from hybridize.kernels._core import dispatch, launch
from hybridize.kernels.gated_norm import gated_rms_norm
from hybridize.kernels.gla import gla

ROWS = torch.arange(24, dtype=torch.float32).view(3, 8)


def norm(impl="auto", dtype=torch.float32):
    values = ROWS.to(dtype)
    return gated_rms_norm(values, values, torch.ones(8), 1e-5, 4, impl=impl)


@pytest.fixture
def calls(monkeypatch):
    """Names of the fast functions that run."""
    triton_impl = pytest.importorskip("hybridize.kernels.gated_norm.triton_impl")
    called = []

    def seen(*arguments, real=triton_impl.gated_rms_norm):
        called.append("triton")
        return real(*arguments)

    monkeypatch.setattr(triton_impl, "gated_rms_norm", seen)
    monkeypatch.delenv(dispatch.VARIABLE, raising=False)
    return called


def test_on_a_cpu_auto_is_pytorch_and_the_variable_changes_it(calls, monkeypatch):
    norm()
    assert calls == []
    norm("triton")
    assert calls == ["triton"]
    monkeypatch.setenv(dispatch.VARIABLE, "triton")
    norm()
    assert calls == ["triton"] * 2
    # What is asked for by name stays.
    norm("torch")
    assert calls == ["triton"] * 2
    monkeypatch.setenv(dispatch.VARIABLE, "torch")
    norm()
    assert calls == ["triton"] * 2


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: norm("triton", torch.float64), r"run gated_rms_norm with triton: got fp64, expected fp16, bf16 or fp32\. Take"),
        (lambda: norm("tritn"), "there is no implementation 'tritn' of gated_norm"),
        (lambda: gla(*[torch.zeros(1, 2, 1, 4)] * 4, impl="triton"), "there is no implementation 'triton' of gla"),
    ],
    ids=["a dtype it has not", "no such name", "no such file"],
)
def test_a_name_that_cannot_run_is_an_error_with_the_reason(call, words):
    with pytest.raises(ConfigError, match=words):
        call()


def test_a_missing_package_is_the_reason(monkeypatch):
    def missing(name):
        raise ModuleNotFoundError("No module named 'triton'", name="triton")

    monkeypatch.setattr(dispatch.importlib, "import_module", missing)
    monkeypatch.setattr(dispatch, "MODULES", {})
    with pytest.raises(ConfigError, match="triton is not installed"):
        norm("triton")


def test_a_machine_without_a_gpu_is_the_reason(calls, monkeypatch):
    monkeypatch.setattr(dispatch.MODULES["gated_norm", "triton"], "DEVICES", ("cuda", "meta"))
    with pytest.raises(ConfigError, match="got tensors on cpu, expected cuda or meta"):
        norm("triton")


def test_auto_on_a_gpu_falls_back_and_says_so_once(calls, monkeypatch, caplog):
    """A tensor that says it is on CUDA, since the choice is made before anything runs."""

    class There(torch.Tensor):
        device = torch.device("cuda")

    def chosen(dtype):
        tensor = torch.zeros(2, 8, dtype=dtype).as_subclass(There)
        return dispatch.fast_path("gated_norm", "gated_rms_norm", "auto", tensor, tensor, tensor, 1e-5, 4, True)

    monkeypatch.setattr(dispatch, "SAID", set())
    with caplog.at_level(logging.INFO, logger=dispatch.LOG.name):
        assert chosen(torch.float64) is None
        assert chosen(torch.float64) is None
        assert chosen(torch.float32) is not None
    assert caplog.messages == ["gated_rms_norm runs in PyTorch: got fp64, expected fp16, bf16 or fp32"]


def test_importing_the_package_imports_no_kernel():
    """Where Triton is installed, transformers imports it of itself."""
    program = (
        "import sys, hybridize, hybridize.mixers.mamba2, hybridize.mixers.mla, hybridize.mixers.streaming, hybridize.modeling; "
        "print([m for m in sys.modules if m.startswith('hybridize.kernels') and ('triton' in m or m.endswith('tl_utils'))])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_tiles_are_the_first_row_that_holds_and_old_cards_have_none():
    device = torch.device("cpu")
    narrow, wide = (launch.tiles("gated_norm_forward", device, SIZE=size)["ROWS"] for size in (128, 4096))
    assert (narrow, wide) == (16, 1)
    with launch.overridden({"gated_norm_forward": {"ROWS": 3}}):
        assert launch.tiles("gated_norm_forward", device, SIZE=128)["ROWS"] == 3
    with pytest.raises(FileNotFoundError, match="compute capability 75"):
        launch.table(75)
    assert launch.table(86) == launch.table(80)


def test_scratch_is_full_of_nan_when_it_is_asked_to():
    with launch.poisoned():
        assert launch.empty((3,), torch.float16, torch.device("cpu")).isnan().all()
        assert (launch.empty((3,), torch.int32, torch.device("cpu")) == 2**31 - 1).all()
