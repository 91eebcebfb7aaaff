"""`stream_attn` and its step, described."""

import torch
import torch.nn.functional as F

from hybridize.kernels._core.spec import Bug, Case, OpSpec, draw
from hybridize.kernels.stream_attn import stream_attn, stream_attn_step
from hybridize.kernels.stream_attn.reference import stream_attn_reference, stream_attn_step_reference


def make_inputs(sizes, dtype, device, seed):
    """Heads cut out of one fused projection, as in the mixers; `packed` rows have documents of 1 token and more."""
    g = torch.Generator().manual_seed(seed)
    batch, tokens, heads, groups = (sizes[name] for name in "BTHG")
    fused = draw((batch, tokens, heads + 2 * groups, sizes["D"]), dtype, device, g)
    if sizes.get("hard"):
        fused *= 4
    q, k, v = fused.transpose(1, 2).split((heads, groups, groups), dim=1)
    segments = None
    if sizes.get("packed"):
        borders = torch.tensor([tokens // 8, tokens // 8 + 1, tokens // 2 + 3, tokens - tokens // 4], device=device)
        index = torch.arange(tokens, device=device) + torch.arange(batch, device=device)[:, None]
        segments = torch.bucketize(index, borders, right=True)
    return {
        "q_BHTD": q, "k_BGTD": k, "v_BGTD": v, "sink": sizes["sink"], "window": sizes["window"], "segments_BT": segments,
        "scale": sizes["D"] ** -0.5,
    }  # fmt: skip


def make_step_inputs(sizes, dtype, device, seed):
    """A ring; in `counted` rows the slots past the count hold NaN in the values."""
    g = torch.Generator().manual_seed(seed)
    batch, slots, heads, groups, width = (sizes[name] for name in "BSHGD")
    q = draw((batch, heads + groups, width), dtype, device, g)[:, :heads]
    keys, values = (draw((batch, groups, slots, width), dtype, device, g) for _ in range(2))
    counts = None
    if sizes.get("counted"):
        counts = torch.arange(batch, device=device) * (slots - 1) // max(1, batch - 1) + 1
        empty = (torch.arange(slots, device=device) >= counts[:, None])[:, None, :, None]
        keys, values = (one.masked_fill(empty, torch.nan) for one in (keys, values)) if sizes["counted"] > 1 else (keys, values)
    return {"q_BHD": q, "keys_BGSD": keys, "values_BGSD": values, "counts_B": counts, "scale": width**-0.5}


TINY = {"B": 1, "H": 4, "G": 2, "D": 16, "sink": 3, "window": 21}


def documents_of_a_row_are_rows(run, close, make):
    """A packed row gives what its documents give alone."""
    inputs = make(**TINY | {"T": 61, "window": 9}, packed=1)
    whole, ids, start = run(inputs)["out"], inputs["segments_BT"][0].tolist(), 0
    while start < len(ids):
        stop = start + ids.count(ids[start])
        part = {name: inputs[name][:, :, start:stop] for name in ("q_BHTD", "k_BGTD", "v_BGTD")}
        close(whole[:, :, start:stop], run(inputs | part | {"segments_BT": None})["out"])
        start = stop


def a_wide_window_is_causal_attention(run, close, make):
    """As PyTorch has it."""
    inputs = make(**TINY | {"T": 37, "window": 37})
    q, k, v = (inputs[name] for name in ("q_BHTD", "k_BGTD", "v_BGTD"))
    close(run(inputs)["out"], F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True))
    close(run(inputs | {"window": 2**31 + 5, "sink": 2**31 + 5})["out"], run(inputs)["out"])


def repeated_keys_are_grouped_keys(run, close, make):
    """Every query head with a key head of its own."""
    inputs = make(**TINY | {"T": 40})
    repeated = {name: inputs[name].repeat_interleave(2, dim=1) for name in ("k_BGTD", "v_BGTD")}
    close(run(inputs | repeated)["out"], run(inputs)["out"])


def a_ring_is_the_last_row_of_the_whole(run, close, make):
    """Every length from an empty ring to one that went round."""
    whole = make_inputs(TINY | {"T": 15, "window": 5}, make(**STEP)["q_BHD"].dtype, "cpu", 0)
    q, k, v = (whole[name] for name in ("q_BHTD", "k_BGTD", "v_BGTD"))
    keys, values = (torch.full((1, 2, 8, 16), torch.nan, dtype=q.dtype) for _ in range(2))
    expected = stream_attn_reference(q.double(), k.double(), v.double(), 3, 5)
    for t in range(15):
        slot = t if t < 8 else 3 + (t - 3) % 5
        keys[:, :, slot], values[:, :, slot] = k[:, :, t], v[:, :, t]
        held = min(t + 1, 8)
        ring = {"q_BHD": q[:, :, t], "keys_BGSD": keys[:, :, :held], "values_BGSD": values[:, :, :held]}
        close(run(ring | {"counts_B": None, "scale": None})["out"], expected[:, :, t])


def slots_may_change_places(run, close, make):
    """And the count alone says which are read."""
    inputs = make(**STEP | {"S": 50})
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    turned = {name: inputs[name][:, :, order] for name in ("keys_BGSD", "values_BGSD")}
    close(run(inputs | turned)["out"], run(inputs)["out"])
    few = {name: inputs[name][:, :, :33] for name in ("keys_BGSD", "values_BGSD")}
    close(run(inputs | {"counts_B": torch.tensor([33])})["out"], run(inputs | few)["out"])


def pairs(sizes):
    """How many tokens all tokens of a row see."""
    tokens, window = sizes["T"], min(sizes["window"], sizes["T"])
    return tokens * window - window * (window - 1) / 2 + sizes["sink"] * (tokens - window)


def flex(**inputs):
    """PyTorch's flex_attention, compiled."""
    return stream_attn(**inputs, impl="flex")


def dense(**inputs):
    """PyTorch's attention with a mask of all pairs."""
    index = torch.arange(inputs["q_BHTD"].shape[2], device=inputs["q_BHTD"].device)
    ahead = index[:, None] - index
    seen = (ahead >= 0) & ((ahead < inputs["window"]) | (index < inputs["sink"]))
    return F.scaled_dot_product_attention(
        inputs["q_BHTD"], inputs["k_BGTD"], inputs["v_BGTD"], attn_mask=seen, scale=inputs["scale"], enable_gqa=True
    )


def causal(**inputs):
    """What the layer replaces: attention to all tokens."""
    return F.scaled_dot_product_attention(
        inputs["q_BHTD"], inputs["k_BGTD"], inputs["v_BGTD"], is_causal=True, scale=inputs["scale"], enable_gqa=True
    )


def ring(**inputs):
    """PyTorch's attention on a full ring."""
    return F.scaled_dot_product_attention(
        inputs["q_BHD"][:, :, None], inputs["keys_BGSD"], inputs["values_BGSD"], scale=inputs["scale"], enable_gqa=True
    )


LLAMA = {"H": 32, "G": 8, "D": 128, "sink": 4, "window": 1024}
STEP = {"B": 1, "S": 24, "H": 4, "G": 2, "D": 16}
LLAMA_STEP = {"S": 1028, "H": 32, "G": 8, "D": 128}

STREAM_ATTN = OpSpec(
    op="stream_attn",
    function=stream_attn,
    reference=stream_attn_reference,
    make_inputs=make_inputs,
    outputs=("out",),
    cases=(
        Case("one group", {**TINY, "T": 60, "H": 2, "G": 1, "window": 14}),
        Case("grouped", {**TINY, "T": 52}),
        Case("packed", {**TINY, "B": 2, "T": 96, "H": 2, "G": 1, "window": 9, "packed": 1}),
        Case("packed, wide window", {**TINY, "T": 71, "H": 2, "G": 1, "window": 50, "packed": 1}),
        Case("more sinks than a tile", {**TINY, "T": 77, "H": 2, "G": 2, "sink": 20, "window": 6}),
        Case("more sinks than a document", {**TINY, "T": 66, "H": 2, "G": 1, "sink": 18, "window": 2, "packed": 1}),
        Case("no sinks", {**TINY, "T": 48, "H": 2, "G": 2, "sink": 0, "window": 16}),
        Case("a window of one", {**TINY, "T": 17, "H": 2, "G": 1, "sink": 0, "window": 1}),
        Case("a window as wide as the text", {**TINY, "T": 33, "H": 2, "G": 2, "D": 80, "window": 40}),
        Case("heads of 64", {**TINY, "T": 40, "H": 3, "G": 1, "D": 64, "sink": 4}),
        Case("heads of 128", {**TINY, "T": 32, "H": 2, "G": 1, "D": 128, "sink": 4, "window": 12}),
        Case("wide scores", {**TINY, "T": 47, "H": 2, "G": 1, "hard": 1}),
        Case("one token", {**TINY, "T": 1}),
        Case("no tokens", {**TINY, "T": 0}),
    ),
    shapes=(
        Case("llama8b_b1_t4k", {"B": 1, "T": 4096, **LLAMA}),
        Case("llama8b_b8_t4k", {"B": 8, "T": 4096, **LLAMA}),
        Case("llama8b_b1_t32k", {"B": 1, "T": 32768, **LLAMA}),
        Case("llama8b_b8_t4k_packed", {"B": 8, "T": 4096, **LLAMA, "packed": 1}),
        Case("llama8b_b8_t4k_no_sinks", {"B": 8, "T": 4096, **LLAMA, "sink": 0}),
        Case("duo_b8_t4k", {"B": 8, "T": 4096, **LLAMA, "sink": 128, "window": 256}),
        Case("heads_of_64_b8_t4k", {"B": 8, "T": 4096, **LLAMA, "D": 64}),
        Case("heads_of_80_b8_t4k", {"B": 8, "T": 4096, **LLAMA, "D": 80}),
        Case("heads_of_96_b8_t4k", {"B": 8, "T": 4096, **LLAMA, "D": 96}),
        Case("heads_of_256_b8_t4k", {"B": 8, "T": 4096, **LLAMA, "H": 16, "D": 256}),
    ),
    cpu_shapes=(Case("b1_t4k_h8_g2_d64", {"B": 1, "T": 4096, "H": 8, "G": 2, "D": 64, "sink": 4, "window": 512}),),
    grads=("q_BHTD", "k_BGTD", "v_BGTD"),
    tiles={
        "stream_forward": {"M": 16, "N": 16}, "stream_dq": {"M": 16, "N": 16}, "stream_dkdv": {"M": 16, "N": 16},
        "stream_sinks": {"M": 16, "N": 16, "CHUNK": 48},
    },
    invariants={
        "documents of a row are rows": documents_of_a_row_are_rows,
        "a wide window is causal attention": a_wide_window_is_causal_attention,
        "repeated keys are grouped keys": repeated_keys_are_grouped_keys,
    },
    bugs=(
        Bug("near = tl.maximum(rows - window + 1, starts)", "near = tl.maximum(rows - window, starts)", ("one group",)),
        Bug("    group = tl.cast(head // per_group,", "    group = tl.cast(head % (heads // per_group),", ("grouped",)),
        Bug("sinks = tl.maximum(start, tl.minimum(start + sink, low))", "sinks = start + sink", ("one group",)),
        Bug("seen = seen & (cols >= starts[:, None])", "seen = seen", ("packed",)),
        Bug("start = tl.load(starts_ptr + first)\n        last", "start = 0\n        last", ("documents of a row are rows",)),
        Bug("(kdot(dout, tl.trans(v), PRECISION) - delta[:, None])", "kdot(dout, tl.trans(v), PRECISION)", ("one group",)),
        Bug("until = tl.minimum(cols + window, tokens)", "until = tl.minimum(cols + window - 1, tokens)", ("no sinks",)),
        Bug("seen = seen & (starts[None, :] <= cols[:, None])", "seen = seen", ("packed",)),
        Bug("here = tl.where(cols >= low, until, 0)", "here = until", ("one group",)),
        Bug("stop += holds_sinks * CHUNK", "stop += 0", ("one group",)),
        Bug("dk += tl.load(part_k_ptr + at, mask=there, other=0.0)", "dk += 0.0", ("one group", "packed")),
        Bug("rank = cols - start", "rank = cols", ("packed",)),
        Bug("tile * N + tl.arange(0, N)\n    k", "tl.arange(0, N)\n    k", ("more sinks than a tile",)),
    ),
    flops=lambda s, direction: (4 if direction == "forward" else 10) * s["B"] * s["H"] * s["D"] * pairs(s),
    bytes=lambda s, direction, e: (1 if direction == "forward" else 2) * s["B"] * s["T"] * 2 * (s["H"] + s["G"]) * s["D"] * e,
    anchors={
        "flex_attention": ("torch.nn.attention.flex_attention", flex), "dense mask": ("torch", dense),
        "full causal attention": ("torch", causal),
    },
)  # fmt: skip

STREAM_ATTN_STEP = OpSpec(
    op="stream_attn",
    function=stream_attn_step,
    reference=stream_attn_step_reference,
    make_inputs=make_step_inputs,
    outputs=("out",),
    cases=(
        Case("full ring in splits", STEP | {"S": 150}),
        Case("counted, splits that are empty", STEP | {"B": 3, "S": 200, "H": 2, "G": 1, "counted": 1}),
        Case("one slot", STEP | {"S": 1, "G": 4, "D": 80}),
        Case("more heads in a group than a tile", STEP | {"B": 2, "H": 20, "G": 1, "D": 20}),
    ),
    shapes=tuple(Case(f"llama8b_b{batch}", {"B": batch, **LLAMA_STEP}) for batch in (1, 8, 64))
    + (
        Case("llama8b_b8_counted", {"B": 8, **LLAMA_STEP, "counted": 1}),
        Case("heads_of_80_b8", {"B": 8, **LLAMA_STEP, "D": 80}),
        Case("heads_of_256_b8", {"B": 8, **LLAMA_STEP, "D": 256}),
    ),
    tiles={"stream_step": {"M": 16, "N": 16}},
    invariants={
        "a ring is the last row of the whole": a_ring_is_the_last_row_of_the_whole,
        "slots may change places": slots_may_change_places,
    },
    bugs=(
        Bug("tl.minimum(stop, tl.load(counts_ptr + batch).to(tl.int32))", "stop", ("counted, splits that are empty",)),
        Bug("head = group * per_group + within", "head = group + within * (heads // per_group)", ("full ring in splits",)),
        Bug("weights = tl.exp2(lse - tl.max(lse, axis=0))", "weights = tl.exp2(lse * 0.0)", ("full ring in splits",)),
        Bug("stop = tl.minimum(first + share, slots)", "stop = slots", ("full ring in splits",)),
    ),
    flops=lambda s, direction: 4 * s["B"] * s["H"] * s["D"] * s["S"],
    bytes=lambda s, direction, e: s["B"] * 2 * (s["G"] * s["S"] + s["H"]) * s["D"] * e,
    anchors={"PyTorch's attention": ("torch", ring)},
)
