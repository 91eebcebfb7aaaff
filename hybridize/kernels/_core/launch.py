"""Launching Triton kernels: tiles from a checked-in table, scratch that tests can poison, compilation without a GPU.

There is no autotuning at run time: it would tune anew for every head count, race with state that is updated in place, and make
results differ from run to run. Tiles are rows of configs/sm_<capability>.json, by kernel; the first whose `when` holds counts:

    {"ssd_output": [{"when": {"P": 64, "N": 64}, "ROWS": 64, "num_warps": 4, "num_stages": 2}, {"ROWS": 64, ...}]}

`when` bounds sizes from above. A row holds constants of the kernel, `num_warps` and `num_stages`.
"""

import contextlib
import functools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TABLES = Path(__file__).parent / "configs"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# Devices on which Triton kernels run, in this process; tensors without memory get results without memory.
DEVICES = ("cuda", "meta", "cpu") if INTERPRETED else ("cuda", "meta")

_overrides: dict[str, dict[str, int]] = {}
_poisoned = False
_captured: Callable[..., None] | None = None
_architecture: int | None = None


@functools.cache
def table(architecture: int) -> dict[str, list[dict[str, Any]]]:
    """Rows by kernel for a compute capability such as 90; the newest table that is not newer is taken.

    Raises:
        FileNotFoundError: a GPU older than every table (below 8.0).
    """
    known = sorted(int(path.stem.removeprefix("sm_")) for path in TABLES.glob("sm_*.json"))
    fitting = [one for one in known if one <= architecture]
    if not fitting:
        raise FileNotFoundError(f"kernels: no table of tiles for compute capability {architecture}, known from {known[0]}")
    return json.loads((TABLES / f"sm_{fitting[-1]}.json").read_text(encoding="utf-8"))


def architecture_of(device: torch.device) -> int:
    """Compute capability of a device, 90 for Hopper; that is also what the interpreter takes its tiles for."""
    if _architecture is not None:
        return _architecture
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor


def tiles(kernel: str, device: torch.device, **sizes: int) -> dict[str, int]:
    """Constants, `num_warps` and `num_stages` for a kernel at these sizes."""
    for row in table(architecture_of(device))[kernel]:
        if all(sizes[name] <= most for name, most in row.get("when", {}).items()):
            chosen = {name: value for name, value in row.items() if name != "when"}
            return chosen | _overrides.get(kernel, {})
    raise KeyError(f"kernels: no row of the table holds for {kernel} at {sizes}")


@contextlib.contextmanager
def overridden(changes: dict[str, dict[str, int]]) -> Iterator[None]:
    """Other constants for kernels, by name: small chunks under the interpreter, candidates while tuning."""
    global _overrides
    before, _overrides = _overrides, _overrides | changes
    try:
        yield
    finally:
        _overrides = before


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory that a kernel is to write; full of NaN (or the largest integer) in `poisoned()`."""
    out = torch.empty(shape, dtype=dtype, device=device)
    if _poisoned:
        out.fill_(float("nan") if dtype.is_floating_point else torch.iinfo(dtype).max)
    return out


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """`empty` gives memory in which an element that was not written shows."""
    global _poisoned
    before, _poisoned = _poisoned, True
    try:
        yield
    finally:
        _poisoned = before


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Run `kernel` over `grid` (1 to 3 numbers), or hand it to whoever captures.

    Args:
        kernel: decorated by triton.jit.
        grid: programs; nothing runs where one of the numbers is 0.
        *arguments: tensors, numbers or None, in the order of the kernel's first parameters.
        **constants: the other parameters, `num_warps` and `num_stages`.
    """
    if 0 in grid:
        return
    if _captured is not None:
        _captured(kernel, arguments, constants)
        return
    if all(one.device.type != "meta" for one in arguments if isinstance(one, Tensor)):
        kernel[grid](*arguments, **constants)


@contextlib.contextmanager
def captured(take: Callable[..., None], architecture: int) -> Iterator[None]:
    """Hand every launch to `take(kernel, arguments, constants)` instead, with the tiles of an architecture."""
    global _captured, _architecture
    before = _captured, _architecture
    _captured, _architecture = take, architecture
    try:
        yield
    finally:
        _captured, _architecture = before


def cdiv(count: int, size: int) -> int:
    """Pieces of `size` that hold `count`."""
    return -(-count // size)


def power_of_2(count: int) -> int:
    """The smallest power of two that is not below `count`, at least 1."""
    return 1 << max(count - 1, 0).bit_length()
