"""`gated_rms_norm`, described."""

import functools

import torch

from hybridize.kernels._core.spec import Bug, Case, OpSpec, draw
from hybridize.kernels.gated_norm import gated_rms_norm
from hybridize.kernels.gated_norm.reference import gated_rms_norm_reference


def make_inputs(sizes, dtype, device, seed):
    """y is a tensor of its own; z is cut out of a wider projection, as in the mixers."""
    g = torch.Generator().manual_seed(seed)
    shape, width = (sizes["B"], sizes["T"]), sizes["D"]
    y, projected = draw((*shape, width), dtype, device, g), draw((*shape, 2 * width), dtype, device, g)
    if sizes.get("hard"):
        y[:, ::2] = 0
        projected *= 20
    return {
        "y": y, "z": projected[..., width:] if sizes.get("cut", 1) else projected[..., width:].contiguous(),
        "weight": draw((width,), torch.float32, device, g), "eps": 1e-5, "group_size": sizes["group"],
        "gate_first": bool(sizes.get("gate_first", 1)),
    }  # fmt: skip


def heads_may_change_places(run, close, make):
    """A group's norm does not depend on the other groups."""
    inputs = make(B=1, T=5, D=64, group=16)
    swapped = dict(inputs)
    for name in ("y", "z"):
        swapped[name] = inputs[name].unflatten(-1, (4, 16)).flip(-2).flatten(-2)
    swapped["weight"] = inputs["weight"].view(4, 16).flip(0).flatten()
    close(run(swapped)["out"], run(inputs)["out"].unflatten(-1, (4, 16)).flip(-2).flatten(-2))


def mamba_ssm(y, z, weight, eps, group_size, gate_first):
    """state-spaces/mamba, mamba_ssm/ops/triton/layernorm_gated.py."""
    from mamba_ssm.ops.triton.layernorm_gated import rmsnorm_fn  # pyright: ignore[reportMissingImports]

    return rmsnorm_fn(y, weight, None, z, eps, group_size, not gate_first)


def compiled(**inputs):
    """The PyTorch path under torch.compile."""
    return _compiled()(**inputs)


@functools.cache
def _compiled():
    return torch.compile(functools.partial(gated_rms_norm, impl="torch"))


LLAMA = {"D": 4096, "group": 128}

GATED_NORM = OpSpec(
    op="gated_norm",
    function=gated_rms_norm,
    reference=gated_rms_norm_reference,
    make_inputs=make_inputs,
    outputs=("out",),
    cases=(
        Case("gate first", {"B": 2, "T": 5, "D": 48, "group": 16}),
        Case("norm first, width of no power of two", {"B": 1, "T": 7, "D": 40, "group": 20, "gate_first": 0}),
        Case("one group", {"B": 1, "T": 9, "D": 100, "group": 100, "cut": 0}),
        Case("zeros and wide gates", {"B": 2, "T": 4, "D": 32, "group": 16, "hard": 1}),
        Case("no tokens", {"B": 2, "T": 0, "D": 32, "group": 16}),
    ),
    shapes=(
        Case("llama8b_b1_t4k", {"B": 1, "T": 4096, **LLAMA}),
        Case("llama8b_b8_t4k", {"B": 8, "T": 4096, **LLAMA}),
        Case("llama8b_b8_t4k_norm_first", {"B": 8, "T": 4096, **LLAMA, "gate_first": 0}),
        Case("one_group_b8_t4k", {"B": 8, "T": 4096, "D": 4096, "group": 4096}),
        Case("heads_of_80_b8_t4k", {"B": 8, "T": 4096, "D": 2560, "group": 80}),
    ),
    cpu_shapes=(Case("b2_t1k_d512", {"B": 2, "T": 1024, "D": 512, "group": 64}),),
    grads=("y", "z", "weight"),
    tiles={"gated_norm_forward": {"ROWS": 4}, "gated_norm_backward": {"ROWS": 2}},
    invariants={"heads may change places": heads_may_change_places},
    bugs=(
        Bug("columns = tl.program_id(1) * SIZE + inside\n    mask", "columns = inside\n    mask", ("gate first",)),
        Bug("dnormed = scale * (through - normed", "dnormed = scale * (through + normed", ("gate first",)),
        Bug("tl.sum(normed * normed, axis=1) / SIZE + eps", "tl.sum(normed * normed, axis=1) / BLOCK + eps",
            ("norm first, width of no power of two",)),
    ),
    flops=lambda s, direction: (8 if direction == "forward" else 20) * s["B"] * s["T"] * s["D"],
    anchors={"mamba_ssm": ("mamba_ssm", mamba_ssm), "torch.compile": ("triton", compiled)},
    bytes=lambda s, direction, e: (3 if direction == "forward" else 5) * s["B"] * s["T"] * s["D"] * e,
)  # fmt: skip
