"""`causal_conv1d` and `causal_conv1d_step`, described."""

import torch
import torch.nn.functional as F

from hybridize.kernels._core.spec import Bug, Case, Inputs, OpSpec, draw
from hybridize.kernels.conv import causal_conv1d, causal_conv1d_step
from hybridize.kernels.conv.reference import causal_conv1d_reference, causal_conv1d_step_reference


def make_inputs(sizes, dtype, device, seed):
    """x is cut out of a wider projection, as in the mixers; `docs` is the length of the documents, shifted from row to row."""
    g = torch.Generator().manual_seed(seed)
    batch, tokens, channels, taps = (sizes[name] for name in "BTCK")
    x_BTC = draw((batch, tokens, channels + 16), dtype, device, g)
    inputs: Inputs = {"x_BTC": x_BTC[..., 16:] if sizes.get("cut", 1) else x_BTC[..., 16:].contiguous()}
    inputs |= _parameters(sizes, device, g)
    inputs["state_BCK1"] = draw((batch, channels, taps - 1), dtype, device, g) if sizes.get("state", 1) else None
    inputs["activation"] = "silu" if sizes.get("silu", 1) else None
    places = torch.arange(tokens, device=device) + torch.arange(batch, device=device)[:, None]
    inputs["segments_BT"] = 3 * (places // sizes["docs"]) + 7 if sizes.get("docs") else None
    return inputs


def make_step_inputs(sizes, dtype, device, seed):
    """`rows` 1 goes on from rows of a longer state in another order, and skips every third one."""
    g = torch.Generator().manual_seed(seed)
    batch, channels, taps = (sizes[name] for name in "BCK")
    inputs: Inputs = {"x_BC": draw((batch, channels + 16), dtype, device, g)[:, 16:]}
    inputs |= _parameters(sizes, device, g)
    rows = bool(sizes.get("rows"))
    # As prefill leaves it, with the channels side by side in memory.
    state_BCK1 = draw((batch + rows, taps - 1, channels), dtype, device, g).mT
    inputs["state_BCK1"] = state_BCK1.contiguous() if sizes.get("flat") else state_BCK1
    inputs["activation"] = "silu" if sizes.get("silu", 1) else None
    order = torch.arange(batch, 0, -1, device=device)
    inputs["rows_B"] = torch.where(order % 3 == 2, -1, order) if rows else None
    return inputs


def _parameters(sizes, device, g):
    weight_CK = draw((sizes["C"], sizes["K"]), torch.float32, device, g)
    return {"weight_CK": weight_CK, "bias_C": draw((sizes["C"],), torch.float32, device, g) if sizes.get("bias", 1) else None}


def two_calls_are_one(run, close, make):
    """The state hands over between two calls, wherever the text is cut."""
    inputs = make(B=2, T=13, C=12, K=4)
    whole = run(inputs)
    for first in (1, 2, 8):
        a = run(inputs | {"x_BTC": inputs["x_BTC"][:, :first]})
        b = run(inputs | {"x_BTC": inputs["x_BTC"][:, first:], "state_BCK1": a["last_BCK1"]})
        close(torch.cat([a["y_BTC"], b["y_BTC"]], dim=1), whole["y_BTC"])
        close(b["last_BCK1"], whole["last_BCK1"])


def packed_documents_are_calls_of_their_own(run, close, make):
    """The state is that of the first document alone."""
    inputs = make(B=1, T=14, C=12, K=4)
    ids = torch.tensor([[0] * 2 + [1] * 7 + [4] * 5])
    packed = run(inputs | {"segments_BT": ids})
    state = inputs["state_BCK1"]
    for document in ids.unique():
        own = (ids == document)[0]
        alone = run(inputs | {"x_BTC": inputs["x_BTC"][:, own], "state_BCK1": state})
        close(packed["y_BTC"][:, own], alone["y_BTC"])
        state = None
    close(packed["last_BCK1"], alone["last_BCK1"])


def channels_and_rows_are_apart(run, close, make):
    """Channels and batch rows may change places."""
    inputs = make(B=2, T=9, C=20, K=3)
    turned = {name: value.flip(0) for name, value in inputs.items() if name in ("x_BTC", "state_BCK1")}
    turned = {name: value.roll(1, -1 if name == "x_BTC" else 1) for name, value in turned.items()}
    turned |= {name: inputs[name].roll(1, 0) for name in ("weight_CK", "bias_C")}
    close(run(inputs | turned)["y_BTC"], run(inputs)["y_BTC"].flip(0).roll(1, -1))


def no_tokens_leave_the_state(run, close, make):
    """A call over nothing gives the state back."""
    inputs = make(B=2, T=0, C=12, K=4)
    found = run(inputs)
    assert found["y_BTC"].shape == (2, 0, 12)
    assert torch.equal(found["last_BCK1"], inputs["state_BCK1"])


def steps_are_a_prefill(run, close, make):
    """Five tokens one by one, against the function over all of them."""
    inputs = make(B=2, C=12, K=4, rows=0)
    x_BTC = torch.stack([inputs["x_BC"], 2 * inputs["x_BC"], inputs["x_BC"] - 1, -inputs["x_BC"], inputs["x_BC"]], dim=1)
    options = {name: inputs[name] for name in ("weight_CK", "bias_C", "state_BCK1", "activation")}
    want, last = causal_conv1d(x_BTC, **options, impl="torch")
    state = inputs["state_BCK1"]
    for t, x_BC in enumerate(x_BTC.unbind(1)):
        found = run(inputs | {"x_BC": x_BC, "state_BCK1": state})
        state = found["state_BCK1"]
        close(found["y_BC"], want[:, t])
    close(state, last)


def rows_that_are_skipped_keep_their_state(run, close, make):
    """Bit for bit, as does a row that no one asked for."""
    inputs = make(B=5, C=12, K=4, rows=1)
    found = run(inputs)["state_BCK1"]
    used = inputs["rows_B"][inputs["rows_B"] >= 0]
    idle = torch.tensor([row for row in range(6) if row not in used])
    assert len(idle) == 3
    assert torch.equal(found[idle], inputs["state_BCK1"][idle])


def library_conv(x_BTC, weight_CK, bias_C, state_BCK1, activation, segments_BT):
    """The library's depthwise convolution; no documents."""
    padded_BCT = (
        torch.cat([state_BCK1, x_BTC.mT], dim=2) if state_BCK1 is not None else F.pad(x_BTC.mT, (weight_CK.shape[1] - 1, 0))
    )
    return F.silu(F.conv1d(padded_BCT, weight_CK[:, None].to(x_BTC), bias_C.to(x_BTC), groups=len(weight_CK))).mT


def cuda_conv(x_BTC, weight_CK, bias_C, state_BCK1, activation, segments_BT):
    """Dao-AILab's CUDA kernel; either documents or a state."""
    from causal_conv1d import causal_conv1d_fn  # pyright: ignore[reportMissingImports]

    ids = None if segments_BT is None else segments_BT.to(torch.int32)
    return causal_conv1d_fn(x_BTC.mT, weight_CK.to(x_BTC), bias_C.to(x_BTC), ids, state_BCK1, activation=activation).mT


def cuda_step(x_BC, weight_CK, bias_C, state_BCK1, activation, rows_B):
    """Dao-AILab's CUDA kernel."""
    from causal_conv1d import causal_conv1d_update  # pyright: ignore[reportMissingImports]

    return causal_conv1d_update(x_BC, state_BCK1, weight_CK.to(x_BC), bias_C.to(x_BC), activation, conv_state_indices=rows_B)


# x, B and C of a Mamba2 layer with the heads of Llama-3-8B: 8, 8 and 32 of 128.
LLAMA = {"C": 6144, "K": 4, "state": 0}
TILES = {"conv_forward": {"ROWS": 8, "COLUMNS": 16}, "conv_backward": {"ROWS": 8, "COLUMNS": 32}, "conv_step": {"COLUMNS": 16}}


def conv_bytes(sizes, direction, element):
    """x and y; backward x, dy and dx."""
    return (2 if direction == "forward" else 3) * sizes["B"] * sizes["T"] * sizes["C"] * element


CONV = OpSpec(
    op="conv",
    function=causal_conv1d,
    reference=causal_conv1d_reference,
    make_inputs=make_inputs,
    outputs=("y_BTC", "last_BCK1"),
    cases=(
        Case("state and documents", {"B": 1, "T": 10, "C": 20, "K": 4, "docs": 4}),
        Case("three taps, no bias, no state", {"B": 1, "T": 17, "C": 20, "K": 3, "bias": 0, "state": 0, "docs": 9}),
        Case("two taps, no activation", {"B": 2, "T": 9, "C": 36, "K": 2, "silu": 0, "cut": 0}),
        Case("four taps, plain", {"B": 1, "T": 16, "C": 16, "K": 4}),
        Case("one token", {"B": 2, "T": 1, "C": 12, "K": 4}),
        Case("fewer tokens than taps, documents", {"B": 2, "T": 2, "C": 12, "K": 4, "docs": 2}),
        Case("one before a block's end", {"B": 1, "T": 7, "C": 12, "K": 3, "docs": 1}),
    ),
    shapes=(
        Case("llama8b_b1_t4k", {"B": 1, "T": 4096, **LLAMA}),
        Case("llama8b_b8_t4k", {"B": 8, "T": 4096, **LLAMA}),
        Case("llama8b_b8_t4k_packed", {"B": 8, "T": 4096, **LLAMA, "state": 1, "docs": 700}),
        Case("channels_of_2480_b8_t4k", {"B": 8, "T": 4096, "C": 2480, "K": 3}),
        Case("two_taps_b8_t4k", {"B": 8, "T": 4096, "C": 4096, "K": 2, "bias": 0, "silu": 0}),
    ),
    cpu_shapes=(Case("b2_t1k_c1536", {"B": 2, "T": 1024, "C": 1536, "K": 4, "state": 0}),),
    grads=("x_BTC", "weight_CK", "bias_C", "state_BCK1"),
    tiles=TILES,
    invariants={
        "two calls are one": two_calls_are_one,
        "packed documents are calls of their own": packed_documents_are_calls_of_their_own,
        "channels and rows are apart": channels_and_rows_are_apart,
        "no tokens leave the state": no_tokens_leave_the_state,
    },
    bugs=(
        Bug("                value = tl.where((own == theirs)[:, None], value, 0.0)", "                pass",
            ("state and documents", "packed documents are calls of their own")),
        Bug("if block == 0:", "if block < 0:", ("four taps, plain", "two calls are one")),
        Bug("end = tl.where(end_own == end_theirs, end, 0.0)", "pass", ("state and documents",)),
        Bug("counted = tl.where(i < ROWS, d0, 0.0)", "counted = d0", ("four taps, plain",)),
        Bug("given = w3 * g0 + w2 * g1 + w1 * g2 + w0 * g3",
            "given = w0 * g0 + w1 * g1 + w2 * g2 + w3 * g3", ("four taps, plain",)),
        Bug("if (t >= T) & (t < T + K - 1):", "if (t > T) & (t < T + K - 1):", ("four taps, plain", "one token")),
        Bug("g2, g3 = tl.where(s2 == theirs, d2, 0.0), tl.where(s3 == theirs, d3, 0.0)", "pass", ("state and documents",)),
    ),
    flops=lambda s, direction: (2 if direction == "forward" else 6) * s["K"] * s["B"] * s["T"] * s["C"],
    bytes=conv_bytes,
    anchors={"conv1d": ("torch", library_conv), "causal_conv1d": ("causal_conv1d", cuda_conv)},
)  # fmt: skip

CONV_STEP = OpSpec(
    op="conv",
    function=causal_conv1d_step,
    reference=causal_conv1d_step_reference,
    make_inputs=make_step_inputs,
    outputs=("y_BC",),
    cases=(
        Case("rows in another order", {"B": 4, "C": 20, "K": 4, "rows": 1}),
        Case("two taps, no bias", {"B": 2, "C": 20, "K": 2, "bias": 0}),
        Case("three taps, no activation", {"B": 2, "C": 12, "K": 3, "silu": 0, "flat": 1}),
    ),
    shapes=(
        Case("llama8b_b1", {"B": 1, **LLAMA}),
        Case("llama8b_b8", {"B": 8, **LLAMA}),
        Case("llama8b_b64", {"B": 64, **LLAMA, "rows": 1}),
        Case("channels_of_2480_b8", {"B": 8, "C": 2480, "K": 3, "bias": 0}),
    ),
    cpu_shapes=(Case("b8_c1536", {"B": 8, "C": 1536, "K": 4}),),
    in_place=("state_BCK1",),
    tiles=TILES,
    invariants={
        "steps are a prefill": steps_are_a_prefill,
        "rows that are skipped keep their state": rows_that_are_skipped_keep_their_state,
    },
    bugs=(
        Bug("tl.store(state + (tap - 1) * state_k, old, mask=used)", "tl.store(state + tap * state_k, old, mask=used)",
            ("rows in another order", "steps are a prefill")),
        Bug("used = real & (row >= 0)", "used = real & (row > -9)\n    row = tl.maximum(row, 0)",
            ("rows in another order", "rows that are skipped keep their state")),
    ),
    flops=lambda s, direction: 2 * s["K"] * s["B"] * s["C"],
    bytes=lambda s, direction, e: 2 * s["K"] * s["B"] * s["C"] * e,
    anchors={"causal_conv1d": ("causal_conv1d", cuda_step)},
)  # fmt: skip
