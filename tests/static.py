"""Hybrids of each mixer for tests of fixed sizes, and what a step does, operation by operation."""

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from hybridize.mixers import MIXERS
from tests.mixers.test_contract import BELOW, SMALL
from tests.remote.hybrids import model_of

# Not a number anywhere, nor a size that depends on one: what a device would have to wait for, or a graph cannot hold.
STOPS = {
    "_local_scalar_dense", "nonzero", "is_nonzero", "item", "equal", "masked_select", "unique_dim", "_unique2", "lift_fresh",
    "repeat_interleave.Tensor",
}  # fmt: skip
# All mixers, a few to a model, so that a test of all is four models.
GROUPS = [tuple(MIXERS.names()[start::4]) for start in range(4)]
# Layers of a hybrid with one of each kind of entry: kept, window, latents, recurrent.
MIXED = [{"name": "attention"}, {"name": "streaming", **SMALL["streaming"]}, {"name": "mla"}, {"name": "mamba2"}]


class WideNorm(nn.Module):
    """RMSNorm in the dtype of its input; the library's own rounds to fp32, which would hide or enlarge a difference."""

    def __init__(self, norm):
        super().__init__()
        self.weight, self.eps = norm.weight, norm.variance_epsilon

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)


def specs_of(names):
    """A layer for each mixer, below it one for what it reads."""
    specs = []
    for name in names:
        spec = {"name": name, **SMALL.get(name, {})}
        if name in BELOW:
            specs.append(BELOW[name])
            spec["reads"] = len(specs) - 1
        specs.append(spec)
    return specs


def hybrid(*names):
    """A random hybrid of the Llama family, fp32."""
    return model_of("llama", specs_of(names))


def wide(model):
    """The model in fp64, norms too."""
    model.double()
    for module in list(model.modules()):
        for child, norm in list(module.named_children()):
            if type(norm).__name__ in ("LlamaRMSNorm", "MistralRMSNorm"):
                setattr(module, child, WideNorm(norm))
    return model


@torch.no_grad()
def read(model, cache, ids, sizes, mask=None):
    """Logits from a cache that is filled piece by piece."""
    out, start = [], 0
    for size in sizes:
        stop = start + size
        given = {}
        if mask is not None:
            seen = mask[:, :stop]
            given = {"attention_mask": seen, "position_ids": (seen.cumsum(1) - 1).clamp(min=0)[:, start:]}
        out.append(model(ids[:, start:stop], past_key_values=cache, use_cache=True, **given).logits)
        start = stop
    return torch.cat(out, dim=1)


class Recorder(TorchDispatchMode):
    """Every operation with shapes, dtypes, devices and numbers of its arguments, as a CUDA graph would hold it."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.operations.append((str(func).removeprefix("aten."), said((args, kwargs)), said(out)))
        return out

    def stops(self):
        """Those that a graph cannot hold: numbers read by the host, and tensors that change their device."""
        found = []
        for name, given, made in self.operations:
            if {name, name.split(".")[0]} & STOPS or ("copy" in name and len(devices(given) | devices(made)) > 1):
                found.append(name)
        return found


def said(value):
    if isinstance(value, torch.Tensor):
        return ("tensor", tuple(value.shape), tuple(value.stride()), str(value.dtype), str(value.device))
    if isinstance(value, (list, tuple)):
        return tuple(map(said, value))
    if isinstance(value, dict):
        return tuple((key, said(one)) for key, one in sorted(value.items()))
    return repr(value)


def devices(value):
    if isinstance(value, tuple):
        return {value[4]} if value[:1] == ("tensor",) else set().union(*map(devices, value)) if value else set()
    return set()


def recorded(step):
    """What `step` does, and what of it a graph could not hold."""
    recorder = Recorder()
    with recorder:
        step()
    return recorder.operations, recorder.stops()
