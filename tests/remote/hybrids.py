"""Tiny hybrids that are saved, and what they say."""

import torch
from transformers import AutoConfig

from hybridize.families import FAMILIES
from hybridize.mixers import MIXERS
from hybridize.modeling import build_model, hybrid_config
from tests.mixers.test_contract import BELOW, SMALL
from tests.tiny import SIZES

KEEP = {"name": "attention"}
CASES = [(family, name) for family in FAMILIES for name in MIXERS.names()]


def specs_of(name):
    """Three layers: what `name` reads, or `name` itself; kept attention; `name`."""
    spec = {"name": name, **SMALL.get(name, {})}
    return [BELOW.get(name, spec), KEEP, spec]


def config_of(family, specs):
    fields = {
        **SIZES,
        "num_hidden_layers": len(specs),
        "dtype": "float32",
        **({"sliding_window": None} if family == "mistral" else {}),
    }
    return hybrid_config(AutoConfig.for_model(family, **fields), specs)


def model_of(family, specs):
    torch.manual_seed(1)
    model = build_model(config_of(family, specs)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model
