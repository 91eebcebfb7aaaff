"""`gla`, described; it has its PyTorch path alone."""

import torch
import torch.nn.functional as F

from hybridize.kernels._core.spec import Case, OpSpec, draw
from hybridize.kernels.gla import gla
from hybridize.kernels.gla.reference import gla_reference


def make_inputs(sizes, dtype, device, seed):
    """Keys of length one, decays as softplus gives them."""
    g = torch.Generator().manual_seed(seed)
    start, states, width = (sizes["B"], sizes["T"]), sizes["S"], sizes["N"]
    return {
        "q_BTHN": draw((*start, sizes["H"], width), dtype, device, g) / width**0.5,
        "k_BTSN": draw((*start, states, width), dtype, device, g),
        "v_BTSP": draw((*start, states, sizes["P"]), dtype, device, g),
        "log_decay_BTSE": -F.softplus(draw((*start, states, sizes.get("E", 1)), torch.float32, device, g) - 2),
    }


def prefills_add_up(run, close, make):
    """Two prefills, the second from the first's state, are one."""
    inputs = make(B=1, T=40, H=2, S=1, N=8, P=6)
    parts = [{k: v[:, at] for k, v in inputs.items()} for at in (slice(0, 17), slice(17, 40))]
    first = run(parts[0])
    second = run(parts[1] | {"state_BSNP": first["state_BSNP"]})
    whole = run(inputs)
    close(torch.cat([first["y_BTHP"], second["y_BTHP"]], 1), whole["y_BTHP"])
    close(second["state_BSNP"], whole["state_BSNP"])


def flops(s, direction):
    """2 N P for the update and 2 N P a query head for the read; backward about twice."""
    once = 2 * s["B"] * s["T"] * s["N"] * s["P"] * (s["S"] + s["H"])
    return once if direction == "forward" else 2 * once


def moved(s, direction, element):
    """Inputs and outputs once; twice and a half of it backward."""
    numbers = s["H"] * (s["N"] + s["P"]) + s["S"] * (s["N"] + s["P"] + s.get("E", 1))
    return (1 if direction == "forward" else 2.5) * s["B"] * s["T"] * numbers * element


SMALL = {"B": 2, "T": 1024, "N": 64, "P": 64, "H": 8}
LLAMA = {"T": 4096, "N": 128, "P": 128, "H": 32}

GLA = OpSpec(
    op="gla",
    function=gla,
    reference=gla_reference,
    make_inputs=make_inputs,
    outputs=("y_BTHP", "state_BSNP"),
    cases=(
        Case("a decay a head", {"B": 2, "T": 37, "H": 4, "S": 2, "N": 8, "P": 6}),
        Case("a decay a channel", {"B": 2, "T": 37, "H": 4, "S": 4, "N": 8, "P": 6, "E": 8}),
    ),
    shapes=(Case("llama8b_b1_t4k", {"B": 1, "S": 8, **LLAMA}), Case("llama8b_b8_t4k", {"B": 8, "S": 8, **LLAMA})),
    cpu_shapes=(
        Case("one state", {**SMALL, "S": 1}),
        Case("two states", {**SMALL, "S": 2}),
        Case("channels", {**SMALL, "S": 8, "E": 64}),
    ),
    grads=("q_BTHN", "k_BTSN", "v_BTSP", "log_decay_BTSE"),
    decay_grads=("log_decay_BTSE",),
    invariants={"prefills add up": prefills_add_up},
    flops=flops,
    bytes=moved,
    impls=(),
)
