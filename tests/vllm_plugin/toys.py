"""Small hybrids with random weights, no value at a start that could hide a mistake."""

import torch
from transformers import AutoConfig

from hybridize.modeling import build_model, hybrid_config
from tests.tiny import SIZES


def config_of(family, mixers, **sizes):
    """A hybrid config of `mixers`, each a name or a spec."""
    plain = {"sliding_window": None} if family == "mistral" else {}
    base = AutoConfig.for_model(family, **{**SIZES, **plain, "dtype": "float32", "num_hidden_layers": len(mixers), **sizes})
    return hybrid_config(base, [{"name": mixer} if isinstance(mixer, str) else mixer for mixer in mixers])


def model_of(family, mixers, **sizes):
    """A hybrid of `config_of`, in fp32."""
    generator = torch.Generator().manual_seed(7)
    model = build_model(config_of(family, mixers, **sizes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith(("A_log", "dt_bias")):
                parameter.add_(0.3 * noise)
            elif parameter.dim() == 1:
                parameter.copy_((1.0 if "norm" in name or name.endswith(".D") else 0.0) + 0.2 * noise)
            else:
                parameter.copy_(noise * (0.5 if "conv1d" in name else parameter.shape[-1] ** -0.5))
        for name, buffer in model.named_buffers():
            if name.endswith("rope_pairs"):
                # Not the order that a layer without a seed has.
                buffer.copy_(buffer.flip(0))
    return model
