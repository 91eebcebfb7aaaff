"""Which implementation of an op runs: its PyTorch path, or a faster one that lies beside it in the op's folder.

`auto` takes Triton for tensors on CUDA that its kernels support, and PyTorch otherwise. The environment variable
HYBRIDIZE_KERNELS (torch, triton) stands for every `impl` that is not given. A name that cannot run raises with the reason;
`auto` says once in the log why it stayed with PyTorch.

An implementation is the module `<name>_impl.py` of the op's folder. It has, for each function f of the op that it offers, `f`
with the same positional arguments, and `refuses_f` with them as well: the reason why these cannot be run, or None. It is
imported when it is first asked for, so that importing the package imports no compiler.
"""

import importlib
import logging
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hybridize.errors import ConfigError

LOG = logging.getLogger(__name__)

VARIABLE = "HYBRIDIZE_KERNELS"
# Implementations that were asked for, by (op, name).
MODULES: dict[tuple[str, str], Any] = {}
SAID: set[str] = set()


def fast_path(op: str, function: str, impl: str, *arguments: Any) -> Callable[..., Any] | None:
    """What to call in place of the PyTorch path, with the same arguments; None is the PyTorch path itself.

    Args:
        op: folder of the op.
        function: which of its functions.
        impl: "auto", "torch", or the name of another implementation.
        *arguments: of the call, tensors, numbers and None; the first tensor says which device it is about.

    Raises:
        ConfigError: a name that there is not, or that cannot run here.
    """
    name = os.environ.get(VARIABLE, "auto") if impl == "auto" else impl
    if name == "torch":
        return None
    device = next(one.device for one in arguments if isinstance(one, Tensor))
    named = name != "auto"
    if not named and device.type != "cuda":
        return None
    name = name if named else "triton"
    reason = unavailable(op, name, device.type)
    if reason == "":
        module = MODULES[op, name]
        reason = getattr(module, f"refuses_{function}")(*arguments)
        if reason is None:
            return getattr(module, function)
    if named:
        raise ConfigError(f"run {function} with {name}: {reason}. Take impl 'auto' or 'torch', or unset {VARIABLE}")
    _say(f"{function} runs in PyTorch: {reason}")
    return None


@torch.compiler.assume_constant_result
def unavailable(op: str, name: str, device: str) -> str:
    """Why an implementation is not there for a type of device, or nothing: then it is among MODULES."""
    if (op, name) not in MODULES:
        full = f"hybridize.kernels.{op}.{name}_impl"
        try:
            MODULES[op, name] = importlib.import_module(full)
        except ImportError as error:
            return f"there is no implementation {name!r} of {op}" if error.name == full else f"{error.name} is not installed"
    known = MODULES[op, name].DEVICES
    return "" if device in known else f"got tensors on {device}, expected {' or '.join(known)}"


def _say(text: str) -> None:
    if text not in SAID and not torch.compiler.is_compiling():
        SAID.add(text)
        LOG.info(text)
