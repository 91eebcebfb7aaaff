import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch  # noqa: E402

# Triton reads it when a kernel is defined. Without a GPU its kernels run on the CPU, one program after the other.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def data_root() -> Path:
    """The shared test data: $HYBRIDIZE_DATA, or beside the repository."""
    return Path(os.environ.get("HYBRIDIZE_DATA", Path(__file__).parents[2] / "shared" / "data"))


def pytest_runtest_setup(item):
    if item.get_closest_marker("data") and not data_root().is_dir():
        pytest.skip(f"the shared test data is not at {data_root()}; set HYBRIDIZE_DATA")
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no CUDA device here")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    return data_root()


# Taken before `_no_wait_for_the_disk` puts another in its place.
FSYNC = os.fsync


@pytest.fixture(scope="session", autouse=True)
def _no_wait_for_the_disk():
    """Files of tests outlive a killed process as the kernel has their bytes, and need not outlive the machine.

    A handle that is none is an error with fstat too. Tests of storage itself and the campaigns of kills have the real call.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", os.fstat)
        yield


@pytest.fixture
def real_fsync(monkeypatch):
    monkeypatch.setattr(os, "fsync", FSYNC)


@pytest.fixture(autouse=True)
def _steady():
    """One thread, a known seed, and fp32 as the default, whatever an earlier test left."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    assert torch.get_default_dtype() == torch.float32
