"""Tiny hybrids with noise in every tensor, so that none that is dropped, swapped or scaled wrongly is missed."""

import torch

from hybridize.checkpoint import open_base
from hybridize.conversions import plan
from hybridize.modeling import FP32_PARAMETERS, build_model, hybrid_config
from tests.tiny import tiny_base


def random_hybrid(family, tmp, section, dtype=torch.float32, norms=(0.5, 1.5), qk_norms=None, **overrides):
    """Save a random hybrid and return its folder.

    Args:
        family: of the base.
        tmp: where.
        section: which layers, as a recipe has it.
        dtype: it is stored in.
        norms: range of the norms' weights.
        qk_norms: those of the q-norms and of the k-norms, where they have others.
        **overrides: fields of the base's config.
    """
    made = plan(open_base(tiny_base(family, tmp, **overrides)), section, "test", 0)
    config = hybrid_config(open_base(tmp / f"{family}-base").config, [layer.mixer for layer in made.layers])
    config.dtype = dtype
    with torch.random.fork_rng(devices=[]):
        model = build_model(config)
    generator = torch.Generator().manual_seed(3)
    ranges = dict(zip(("q_norm", "k_norm"), qk_norms or (norms, norms), strict=True))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name and parameter.dim() == 1:
                low, high = ranges.get(name.split(".")[-2], norms)
                parameter.copy_(low + (high - low) * torch.rand(parameter.shape, generator=generator))
            elif parameter.dim() == 1:
                parameter.copy_(0.5 * noise)
            elif "conv1d" in name:
                parameter.copy_(0.5 * noise)
            else:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
            if name.rpartition(".")[2] not in FP32_PARAMETERS:
                parameter.data = parameter.data.to(dtype)
    path = tmp / "hybrid"
    model.save_pretrained(path)
    return path
