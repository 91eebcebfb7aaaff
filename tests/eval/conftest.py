import pytest
import torch
from transformers import AutoTokenizer
from transformers.utils import logging

from tests.eval.toys import toy_base

torch.set_num_threads(1)
logging.disable_progress_bar()


@pytest.fixture(scope="package")
def base(tmp_path_factory):
    """Folder of a tiny Llama with a tokenizer."""
    return toy_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="package")
def tokenizer(base):
    return AutoTokenizer.from_pretrained(base)
