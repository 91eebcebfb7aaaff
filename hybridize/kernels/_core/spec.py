"""An op described once, for its tests, its ahead-of-time compilation, its bench and its page."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

Inputs = dict[str, Any]
# run(inputs) -> named results; close(actual, expected): fails beyond the tolerance.
Run = Callable[[Inputs], dict[str, Any]]
Close = Callable[[Any, Any], None]


@dataclass(frozen=True)
class Case:
    """Sizes to run an op at.

    Attributes:
        name: "ragged", "llama8b_b8_t4k".
        sizes: letter or word -> number, as `make_inputs` reads them; flags are 0 or 1.
    """

    name: str
    sizes: Mapping[str, int]


@dataclass(frozen=True)
class Bug:
    """A fault to plant in an implementation's source, which the suite must find.

    Attributes:
        old: text that stands in the file exactly once.
        new: what to put there.
        finds: names of cases and invariants, each of which must fail with it.
    """

    old: str
    new: str
    finds: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class OpSpec:
    """One function of an op.

    Attributes:
        op: the op's folder.
        function: the public function; takes inputs as keywords, and `impl`.
        reference: the same function step by step in any dtype, without `impl`. Its float64 result is the oracle.
        make_inputs: (sizes, dtype, device, seed) -> keyword arguments in order: tensors (the values in `dtype`, what is always
            fp32 in fp32), None, and plain options. On the "meta" device nothing is drawn.
        outputs: names of the results, in order.
        cases: small sizes, for the interpreter: at most some 8 programs of 4 iterations each.
        shapes: sizes as models have them: compiled ahead of time, run and timed on a GPU.
        cpu_shapes: sizes timed on a CPU.
        grads: names of inputs that gradients are taken of; empty where the function is not differentiable.
        decay_grads: of those, the ones of decays, steps and gates, which carry sums over a whole chunk.
        in_place: inputs that the function overwrites; compared after the call as results of these names.
        tiles: constants by kernel under the interpreter, such as short chunks.
        invariants: what must hold between calls, name -> check(run, close, make). `make(**sizes)` gives inputs.
        bugs: faults that must be found.
        flops: (sizes, pass) -> operations; pass is "forward", "backward" or "step".
        bytes: (sizes, pass, bytes of an element) -> least traffic with memory.
        anchors: name -> (module that has to be there, function that takes the inputs), to compare speed with.
        impls: implementations to test and time beside "torch".
    """

    op: str
    function: Callable[..., Any]
    reference: Callable[..., Any]
    make_inputs: Callable[[Mapping[str, int], torch.dtype, str, int], Inputs]
    outputs: tuple[str, ...]
    cases: tuple[Case, ...]
    shapes: tuple[Case, ...]
    cpu_shapes: tuple[Case, ...] = ()
    grads: tuple[str, ...] = ()
    decay_grads: tuple[str, ...] = ()
    in_place: tuple[str, ...] = ()
    tiles: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    invariants: Mapping[str, Callable[[Run, Close, Callable[..., Inputs]], None]] = field(default_factory=dict)
    bugs: tuple[Bug, ...] = ()
    flops: Callable[[Mapping[str, int], str], float]
    bytes: Callable[[Mapping[str, int], str, int], float]
    anchors: Mapping[str, tuple[str, Callable[..., Any]]] = field(default_factory=dict)
    impls: tuple[str, ...] = ("triton",)

    @property
    def name(self) -> str:
        return self.function.__name__

    def passes(self) -> tuple[str, ...]:
        """What is timed: one call, or both directions."""
        if self.in_place:
            return ("step",)
        return ("forward", "backward") if self.grads else ("forward",)


def draw(shape: tuple[int, ...], dtype: torch.dtype, device: str, generator: torch.Generator) -> torch.Tensor:
    """Normal numbers, drawn in fp32 on the CPU and then rounded; nothing is drawn on the "meta" device."""
    if device == "meta":
        return torch.empty(shape, dtype=dtype, device=device)
    return torch.randn(shape, generator=generator).to(device=device, dtype=dtype)
