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


@pytest.fixture(autouse=True)
def _steady():
    """One thread, a known seed, and fp32 as the default, whatever an earlier test left."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    assert torch.get_default_dtype() == torch.float32
