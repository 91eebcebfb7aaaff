"""A base of each family, a text, and the layer scores of one of them."""

import numpy as np
import pytest
import torch

from hybridize.checkpoint import open_base
from hybridize.conversions import score
from hybridize.data import Tokens
from hybridize.families import FAMILIES
from tests.tiny import tiny_base

SHAPE = {"num_attention_heads": 8, "num_key_value_heads": 4}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    return {family: open_base(tiny_base(family, folder, **SHAPE)) for family in FAMILIES}


@pytest.fixture(scope="module")
def text():
    ids = torch.randint(3, 64, (11 * 23,), generator=torch.Generator().manual_seed(1)).numpy().astype(np.int32)
    return Tokens(ids=ids, text_bytes=1, sha256="0" * 64, bos_id=1)


@pytest.fixture(scope="module")
def scores(bases, text):
    return score(bases["llama"], [{"name": "energy"}, {"name": "fisher", "tokens": 24}], text)
