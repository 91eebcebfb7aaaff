"""`ssd` and `ssd_step`, described."""

import torch
import torch.nn.functional as F

from hybridize.kernels._core.launch import overridden
from hybridize.kernels._core.spec import Bug, Case, OpSpec, draw
from hybridize.kernels.ssd import ssd, ssd_step
from hybridize.kernels.ssd.reference import ssd_reference, ssd_step_reference

CHUNK = 128  # of the table, for the count of operations


def projected(sizes, lead, dtype, device, generator):
    """x, B and C cut out of one projection, as the mixers have them."""
    parts = [(sizes["X"], sizes["P"]), (sizes["G"], sizes["N"]), (sizes["M"], sizes["N"])]
    wide = draw((*lead, sum(heads * width for heads, width in parts)), dtype, device, generator)
    cut = wide.split([heads * width for heads, width in parts], dim=-1)
    return [one.unflatten(-1, part) for one, part in zip(cut, parts, strict=True)]


def drawn_state(sizes, rows, heads, dtype, device, generator):
    """fp32, or fp64 for fp64 values."""
    shape = (rows, heads, sizes["P"], sizes["N"])
    return draw(shape, torch.float64 if dtype == torch.float64 else torch.float32, device, generator)


def rates(sizes, lead, device, generator):
    """dt and A. hard 1: log decays of -400, -8e-4, 0 and -8 side by side."""
    heads = max(sizes[name] for name in "XGM")
    dt = F.softplus(draw((*lead, heads), torch.float32, device, generator) - 1)
    A = -torch.exp(draw((heads,), torch.float32, device, generator))
    if sizes.get("hard"):
        choices = torch.tensor([50.0, 1e-4, 0.0, 1.0])[torch.randint(0, 4, dt.shape, generator=generator)]
        dt, A = choices.to(device), torch.full_like(A, -8.0)
    return dt, A


def make_inputs(sizes, dtype, device, seed):
    """`documents` tokens to a document, another number in each row; `skip` and `state` say what is there."""
    g = torch.Generator().manual_seed(seed)
    lead = (sizes["B"], sizes["T"])
    x, B, C = projected(sizes, lead, dtype, device, g)
    if not sizes.get("cut", 1):
        x, B, C = x.contiguous(), B.contiguous(), C.contiguous()
    dt, A = rates(sizes, lead, device, g)
    heads, documents = len(A), sizes.get("documents", 0)
    segments = None
    if documents:
        lengths = documents + torch.arange(sizes["B"], device=device)
        segments = 3 + 2 * (torch.arange(sizes["T"], device=device) // lengths[:, None])
    return {
        "x_BTXP": x, "dt_BTH": dt, "A_H": A, "B_BTGN": B / sizes["N"] ** 0.5, "C_BTMN": C,
        "D_H": draw((heads,), torch.float32, device, g) if sizes.get("skip", 1) else None,
        "state_BHPN": drawn_state(sizes, sizes["B"], heads, dtype, device, g) if sizes.get("state") else None,
        "segments_BT": segments,
    }  # fmt: skip


def make_step_inputs(sizes, dtype, device, seed):
    """`states` rows of states, more than the batch has; then one row of the batch is left out."""
    g = torch.Generator().manual_seed(seed)
    batch, states = sizes["B"], sizes.get("states", 0)
    x, B, C = projected(sizes, (batch,), dtype, device, g)
    dt, A = rates(sizes, (batch,), device, g)
    rows = None
    if states:
        rows = (torch.arange(batch, device=device) * 2 + 1) % states
        rows[batch // 2] = -1
    return {
        "x_BXP": x, "dt_BH": dt, "A_H": A, "B_BGN": B / sizes["N"] ** 0.5, "C_BMN": C,
        "D_H": draw((len(A),), torch.float32, device, g) if sizes.get("skip", 1) else None,
        "state_BHPN": drawn_state(sizes, states or batch, len(A), dtype, device, g),
        "rows_B": rows,
    }  # fmt: skip


def cut(inputs, start, stop, state):
    """The inputs of some tokens, with the state before them."""
    per_token = ("x_BTXP", "dt_BTH", "B_BTGN", "C_BTMN")
    return inputs | {name: inputs[name][:, start:stop] for name in per_token} | {"state_BHPN": state, "segments_BT": None}


def two_runs_equal_one(run, close, make):
    """Tokens after a run go on with its state."""
    inputs = make(B=1, T=37, X=1, G=1, M=2, P=16, N=16, state=1)
    whole = run(inputs)
    before = run(cut(inputs, 0, 21, inputs["state_BHPN"]))
    after = run(cut(inputs, 21, 37, before["state"]))
    close(torch.cat([before["y"], after["y"]], dim=1), whole["y"])
    close(after["state"], whole["state"])


def packed_equals_apart(run, close, make):
    """Documents of one row are as they would be alone; the first goes on with the state."""
    inputs = make(B=1, T=37, X=1, G=1, M=2, P=16, N=16, state=1, documents=21)
    packed = run(inputs)
    first, second = run(cut(inputs, 0, 21, inputs["state_BHPN"])), run(cut(inputs, 21, 37, None))
    close(packed["y"], torch.cat([first["y"], second["y"]], dim=1))
    close(packed["state"], second["state"])


def chunks_do_not_matter(run, close, make):
    """Chunks of one tile and of two give the same."""
    inputs = make(B=1, T=37, X=1, G=1, M=1, P=16, N=16)
    long = run(inputs)
    with overridden({"ssd_decays": {"L": 16, "HEADS": 1}}):
        short = run(inputs)
    for name in ("y", "state"):
        close(short[name], long[name])


def shared_heads_equal_repeated(run, close, make):
    """A shared head is the same as copies of it."""
    inputs = make(B=1, T=19, X=2, G=1, M=4, P=16, N=16)
    copies = {name: inputs[name].repeat_interleave(4 // inputs[name].shape[2], dim=2) for name in ("x_BTXP", "B_BTGN")}
    shared, repeated = run(inputs), run(inputs | copies)
    for name in ("y", "state"):
        close(repeated[name], shared[name])


def steps_equal_a_run(run, close, make):
    """Token by token is the recurrence over tokens."""
    steps = [make(B=1, X=1, G=1, M=2, P=16, N=16, seed=seed) for seed in range(4)]
    steps = [one | {"A_H": steps[0]["A_H"], "D_H": steps[0]["D_H"]} for one in steps]
    tokens = [torch.stack([one[name] for one in steps], dim=1).double() for name in ("x_BXP", "dt_BH", "B_BGN", "C_BMN")]
    fixed = [steps[0][name].double() for name in ("A_H", "D_H", "state_BHPN")]
    y, last = ssd_reference(tokens[0], tokens[1], fixed[0], tokens[2], tokens[3], fixed[1], fixed[2])
    state, found = steps[0]["state_BHPN"], []
    for one in steps:
        results = run(one | {"state_BHPN": state})
        state = results["state_BHPN"]
        found.append(results["y"])
    close(torch.stack(found, dim=1), y)
    close(state, last)


def other_states_stay(run, close, make):
    """States that no row of the batch goes on with do not change in a bit, whatever is in them."""
    inputs = make(B=3, states=5, X=1, G=1, M=2, P=16, N=16)
    left = [row for row in range(5) if row not in inputs["rows_B"].tolist()]
    inputs["state_BHPN"][left] = torch.nan
    results = run(inputs)
    assert results["state_BHPN"][left].isnan().all()
    assert (results["y"][inputs["rows_B"] < 0] == 0).all()
    assert results["y"].isfinite().all()


def numbers(s):
    """Numbers in x, B and C of a token, in its outputs, and heads."""
    heads = max(s[name] for name in "XGM")
    return s["X"] * s["P"] + (s["G"] + s["M"]) * s["N"], heads * s["P"], heads


def flops(s, direction):
    """Products alone, the causal half of a chunk; backward takes 2.5 times as many."""
    if direction == "step":
        return 6 * s["B"] * numbers(s)[1] * s["N"]
    forward = s["B"] * s["T"] * numbers(s)[2] * (CHUNK * (s["N"] + s["P"]) + 4 * s["N"] * s["P"])
    return forward * (1 if direction == "forward" else 2.5)


def least_bytes(s, direction, e):
    """Inputs and results once; in a step the state twice."""
    read, written, heads = numbers(s)
    if direction == "step":
        return s["B"] * (2 * 4 * written * s["N"] + (read + written) * e + 4 * heads)
    if direction == "forward":
        return s["B"] * s["T"] * ((read + written) * e + 4 * heads)
    return s["B"] * s["T"] * ((2 * read + written) * e + 8 * heads)


def full_heads(x, B, C, heads):
    """What libraries ask for: as many heads of x, B and C as there are outputs. The copies are part of their time."""
    return (t.repeat_interleave(heads // t.shape[2], dim=2) for t in (x, B, C))


def mamba_ssm(x_BTXP, dt_BTH, A_H, B_BTGN, C_BTMN, D_H=None, state_BHPN=None, segments_BT=None):
    """mamba_chunk_scan_combined of state-spaces/mamba, mamba_ssm/ops/triton/ssd_combined.py."""
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined  # pyright: ignore[reportMissingImports]

    x, B, C = full_heads(x_BTXP, B_BTGN, C_BTMN, len(A_H))
    return mamba_chunk_scan_combined(
        x, dt_BTH, A_H, B, C, chunk_size=256, D=D_H, initial_states=state_BHPN,
        seq_idx=None if segments_BT is None else segments_BT.int(), return_final_states=True,
    )  # fmt: skip


def fla_simple_gla(x_BTXP, dt_BTH, A_H, B_BTGN, C_BTMN, D_H=None, state_BHPN=None, segments_BT=None):
    """chunk_simple_gla of fla-org/flash-linear-attention, fla/ops/simple_gla; it knows no documents by ids, nor a skip."""
    from fla.ops.simple_gla import chunk_simple_gla  # pyright: ignore[reportMissingImports]

    x, B, C = full_heads(x_BTXP, B_BTGN, C_BTMN, len(A_H))
    state = None if state_BHPN is None else state_BHPN.mT.contiguous()
    v = (x * dt_BTH[..., None]).to(x.dtype)
    y, last = chunk_simple_gla(C, B, v, g=dt_BTH * A_H, scale=1.0, initial_state=state, output_final_state=True)
    return (y if D_H is None else (y + D_H[:, None] * x).to(y.dtype)), last.mT


def mamba_ssm_step(x_BXP, dt_BH, A_H, B_BGN, C_BMN, D_H, state_BHPN, rows_B=None):
    """selective_state_update of state-spaces/mamba, mamba_ssm/ops/triton/selective_state_update.py."""
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update  # pyright: ignore[reportMissingImports]

    P, N, heads = x_BXP.shape[-1], B_BGN.shape[-1], len(A_H)
    x, B, C = (t.repeat_interleave(heads // t.shape[1], dim=1) for t in (x_BXP, B_BGN, C_BMN))
    return selective_state_update(
        state_BHPN, x, dt_BH[..., None].expand(-1, -1, P), A_H[:, None, None].expand(-1, P, N), B, C,
        D=None if D_H is None else D_H[:, None].expand(-1, P), state_batch_indices=rows_B,
    )  # fmt: skip


LLAMA = {"X": 8, "G": 8, "M": 32, "P": 128, "N": 128}
OTHER = {"X": 24, "G": 1, "M": 1, "P": 80, "N": 96}
SMALL = {"X": 1, "G": 1, "M": 2, "P": 16, "N": 16}

SSD = OpSpec(
    op="ssd",
    function=ssd,
    reference=ssd_reference,
    make_inputs=make_inputs,
    outputs=("y", "state"),
    cases=(
        Case("two chunks", {"B": 1, "T": 37, **SMALL, "state": 1}),
        Case("documents", {"B": 2, "T": 37, **SMALL, "state": 1, "documents": 9}),
        Case("three head counts", {"B": 1, "T": 19, "X": 2, "G": 1, "M": 4, "P": 24, "N": 20, "cut": 0}),
        Case("most heads are of x", {"B": 1, "T": 18, "X": 4, "G": 2, "M": 1, "P": 16, "N": 16, "skip": 0}),
        Case("most heads are of B", {"B": 1, "T": 18, "X": 1, "G": 4, "M": 2, "P": 16, "N": 16}),
        Case("strong beside weak decays", {"B": 1, "T": 70, "X": 1, "G": 1, "M": 1, "P": 16, "N": 16, "hard": 1, "state": 1}),
        Case("one token", {"B": 2, "T": 1, **SMALL, "state": 1}),
        Case("a chunk less one", {"B": 1, "T": 31, **SMALL}),
        Case("a chunk", {"B": 1, "T": 32, **SMALL}),
        Case("a chunk and one", {"B": 1, "T": 33, **SMALL, "documents": 32}),
    ),
    shapes=(
        Case("llama8b_b1_t4k", {"B": 1, "T": 4096, **LLAMA}),
        Case("llama8b_b8_t4k", {"B": 8, "T": 4096, **LLAMA}),
        Case("llama8b_packed_b1_t4k", {"B": 1, "T": 4096, **LLAMA, "documents": 700, "state": 1}),
        Case("heads_of_80_b8_t4k", {"B": 8, "T": 4096, **OTHER}),
    ),
    cpu_shapes=(
        Case("b2_t1k", {"B": 2, "T": 1024, "X": 8, "G": 8, "M": 8, "P": 64, "N": 64}),
        Case("b2_t1k_2_x_and_B", {"B": 2, "T": 1024, "X": 2, "G": 2, "M": 8, "P": 64, "N": 64}),
    ),
    grads=("x_BTXP", "dt_BTH", "A_H", "B_BTGN", "C_BTMN", "D_H", "state_BHPN"),
    decay_grads=("dt_BTH", "A_H"),
    tiles={
        "ssd_decays": {"L": 32, "HEADS": 2},
        "ssd_states": {"BLOCK_P": 16, "BLOCK_N": 16},
        "ssd_backward_states": {"BLOCK_P": 16, "BLOCK_N": 16},
        "ssd_outputs": {"ROWS": 16},
        "ssd_backward_values": {"ROWS": 16, "BLOCK_P": 16},
        "ssd_backward_writes": {"ROWS": 16, "BLOCK_N": 16},
        "ssd_backward_reads": {"ROWS": 16},
    },
    invariants={
        "two runs equal one": two_runs_equal_one,
        "packed equals apart": packed_equals_apart,
        "chunks do not matter": chunks_do_not_matter,
        "shared heads equal repeated": shared_heads_equal_repeated,
    },
    bugs=(
        # Log decays in one fp32 word; in ssd_states, outputs and gradients: a pairing, a decay, a border left out.
        Bug("low = (total - high.to(tl.float64)).to(tl.float32)", "low = high * 0.0", ("strong beside weak decays",)),
        Bug("running = running * chunk_decay(words, segments, tokens, start, start + L - 1) + kdot",
            "running = running * chunk_decay(words, None, tokens, start, start + L - 1) + kdot", ("packed equals apart",)),
        Bug("out = kdot(read, tl.trans(state), PRECISION) * into_decay(words, segments, tokens, start, start + i)[:, None]",
            "out = kdot(read, tl.trans(state), PRECISION)", ("two chunks",)),
        Bug("allowed = later >= earlier", "allowed = later > earlier", ("two chunks",)),
        Bug("C += batch * C_b + h // C_group * C_h + first * C_t",
            "C += batch * C_b + h % (heads // C_group) * C_h + first * C_t",
            ("most heads are of B",)),
        Bug("        running = running * passed\n", "        running = running\n", ("two chunks",)),
        Bug("total += dz * step[:, None]", "total = dz * step[:, None]", ("two chunks",)),
        Bug("p, n = tl.arange(0, BLOCK_P), part * BLOCK_N + tl.arange(0, BLOCK_N)",
            "p, n = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)",
            ("three head counts",)),
        Bug("weight = step * out_decay(own", "weight = out_decay(own", ("two chunks",)),
        Bug("tl.where(i[:, None] > j[None, :], upto, 0.0)", "tl.where(i[:, None] >= j[None, :], upto, 0.0)", ("two chunks",)),
        Bug("mask=token // ROWS <= row", "mask=token // ROWS == row", ("two chunks",)),
    ),
    flops=flops,
    bytes=least_bytes,
    anchors={"mamba_ssm": ("mamba_ssm", mamba_ssm), "fla": ("fla", fla_simple_gla)},
)  # fmt: skip

SSD_STEP = OpSpec(
    op="ssd",
    function=ssd_step,
    reference=ssd_step_reference,
    make_inputs=make_step_inputs,
    outputs=("y",),
    in_place=("state_BHPN",),
    cases=(
        Case("grouped", {"B": 2, **SMALL}),
        Case("rows of states", {"B": 3, "states": 5, "X": 1, "G": 2, "M": 4, "P": 20, "N": 24}),
        Case("most heads are of x", {"B": 1, "X": 4, "G": 2, "M": 1, "P": 16, "N": 16, "skip": 0, "hard": 1}),
    ),
    shapes=(
        Case("llama8b_b1", {"B": 1, **LLAMA}),
        Case("llama8b_b8", {"B": 8, **LLAMA}),
        Case("llama8b_b64", {"B": 64, **LLAMA}),
        Case("llama8b_b64_of_100", {"B": 64, **LLAMA, "states": 100}),
        Case("heads_of_80_b64", {"B": 64, **OTHER}),
    ),
    cpu_shapes=(Case("b8", {"B": 8, "X": 8, "G": 8, "M": 8, "P": 64, "N": 64}),),
    tiles={"ssd_one_token": {"ROWS": 16}},
    invariants={"steps equal a run": steps_equal_a_run, "other states stay": other_states_stay},
    bugs=(
        Bug("slot = tl.load(slots + batch).to(tl.int64)", "slot = batch", ("rows of states", "other states stay")),
        Bug("tl.load(place, mask=within, other=0.0) * decay", "tl.load(place, mask=within, other=0.0)", ("grouped",)),
    ),
    flops=flops,
    bytes=least_bytes,
    anchors={"mamba_ssm": ("mamba_ssm", mamba_ssm_step)},
)  # fmt: skip
