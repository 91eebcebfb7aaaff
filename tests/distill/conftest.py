import pytest
import torch

from tests.distill.group import Server
from tests.distill.pair import tiny_pair, tiny_tokens


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return tiny_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="session")
def group(tmp_path_factory):
    """Runs functions of the tests in groups of processes."""
    server = Server(tmp_path_factory.mktemp("group") / "log")
    yield server
    server.close()


@pytest.fixture
def ids():
    return torch.from_numpy(tiny_tokens(64).ids.astype("int64")).view(4, 16)
