"""Models of a config alone, with random weights: speed and memory follow from shapes."""

from typing import Any

import torch
from transformers import AutoModelForCausalLM

from hybridize.modeling import FP32_PARAMETERS, hybrid_config


def random_model(config: Any, dtype: torch.dtype, mixers: list[dict[str, Any]] | None = None) -> Any:
    """A causal LM with freshly drawn weights, in eval mode, on the GPU where there is one.

    Args:
        config: of a base.
        dtype: of its weights; decays and their like stay in fp32, as in a loaded checkpoint.
        mixers: one {"name": ..., **options} a layer; None is the base itself.
    """
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config if mixers is None else hybrid_config(config, mixers), dtype=dtype)
    for name, parameter in model.named_parameters():
        if mixers is not None and name.split(".")[-1] in FP32_PARAMETERS:
            parameter.data = parameter.data.float()
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
