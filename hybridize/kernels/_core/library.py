"""Launchers as ops of torch.library, so that torch.compile takes them whole without looking into Triton.

In eager mode the launcher is called itself: a boundary costs microseconds, as much as a decode kernel does.
"""

from collections.abc import Callable
from typing import Any

import torch

NAMESPACE = "hybridize"
_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")
_DEFINED: set[str] = set()


def registered(name: str, schema: str, launcher: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """A function that calls `launcher`, and is the op hybridize::<name> where a graph is being compiled.

    Args:
        name: of the op.
        schema: such as "(Tensor x, Tensor(a!) state) -> Tensor"; what is written in place carries an alias with `!`.
        launcher: positional arguments as in the schema.
        fake: the same arguments -> empty tensors of the results' shapes.
    """
    if name not in _DEFINED:
        _DEFINED.add(name)
        _LIBRARY.define(name + schema)
        _LIBRARY.impl(name, launcher, "CUDA")
        _LIBRARY.impl(name, launcher, "CPU")
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)
    overload = getattr(getattr(torch.ops, NAMESPACE), name).default

    def call(*arguments: Any) -> Any:
        return overload(*arguments) if torch.compiler.is_compiling() else launcher(*arguments)

    return call
