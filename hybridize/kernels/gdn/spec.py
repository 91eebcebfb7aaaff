"""`gdn` and `gdn_step`, described."""

import functools

import torch
import torch.nn.functional as F

from hybridize.kernels._core.spec import Bug, Case, OpSpec, draw
from hybridize.kernels.gdn import gdn, gdn_step
from hybridize.kernels.gdn.reference import gdn_reference, gdn_step_reference

KEYS = {"random": 0, "equal": 1, "alternating": 2, "clustered": 3}


def make_inputs(sizes, dtype, device, seed):
    """q, k and v are cut out of one projection, as in the mixers; keys are of length 1.

    Sizes beside the letters: C decays of a head (1 or N), `keys` as in KEYS, `beta` for all tokens, `decay` a divisor of the log
    decays, `hard` for decays of e^-3000 beside e^-0.0001 and 0, `document` tokens of a document, `blank` for no first state.
    """
    s, g = sizes, torch.Generator().manual_seed(seed)
    (B, T, H), widths = (s["B"], s["T"], s["H"]), [s["Q"] * s["N"], s["G"] * s["N"], s["X"] * s["P"]]
    fused = draw((B, T, sum(widths)), dtype, device, g)
    q, k, v = (
        part.unflatten(-1, (heads, -1)) for part, heads in zip(fused.split(widths, -1), (s["Q"], s["G"], s["X"]), strict=True)
    )
    shape = (B, T, H, s["N"]) if s.get("C", 1) > 1 else (B, T, H)
    log_decay, beta = draw(shape, torch.float32, device, g), draw((B, T, H), torch.float32, device, g)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    state = None if s.get("blank") else draw((B, H, s["N"], s["P"]), wide, device, g)
    segments = (torch.arange(T, device=device) // s["document"]).expand(B, -1) if s.get("document") else None
    if device != "meta":
        if s.get("keys") == KEYS["clustered"]:
            k.copy_(0.05 * k + k[:, :1])
        elif s.get("keys"):
            k.copy_(k[:, :1].clone().expand_as(k))
        if s.get("keys") == KEYS["alternating"]:
            k[:, 1::2] *= -1
        k.copy_(F.normalize(k.float(), dim=-1))
        log_decay, beta = -F.softplus(log_decay - 2) / s.get("decay", 1), 2 * torch.sigmoid(beta)
        if "beta" in s:
            beta.fill_(s["beta"])
        if s.get("hard"):
            log_decay = -torch.tensor([3000.0, 1e-4, 0.0, 1.0])[torch.randint(0, 4, shape, generator=g)].to(device)
    return {
        "q_BTQN": q, "k_BTGN": k, "v_BTXP": v, "g": log_decay, "beta_BTH": beta, "state_BHNP": state, "segments_BT": segments,
    }  # fmt: skip


def make_step_inputs(sizes, dtype, device, seed):
    """`rows`: the state has two rows more than the batch has entries, these take them last to first, and one takes none."""
    token = make_inputs(sizes | {"T": 1}, dtype, device, seed)
    names = ("q_BQN", "k_BGN", "v_BXP", "g", "beta_BH")
    inputs = {name: value[:, 0] for name, value in zip(names, list(token.values())[:5], strict=True)}
    state, rows = token["state_BHNP"], None
    if sizes.get("rows"):
        state = torch.cat([state, state[:2]])
        rows = torch.arange(len(state) - 1, 1, -1, device=device)
        rows[1] = -1
    return inputs | {"state_BHNP": state, "rows_B": rows}


SMALL = {"B": 1, "T": 40, "Q": 2, "G": 1, "X": 2, "H": 2, "N": 32, "P": 16}
TOKENS = ("q_BTQN", "k_BTGN", "v_BTXP", "g", "beta_BTH", "segments_BT")


def of_tokens(inputs, start, stop, state):
    """The call for some of the tokens, from a state."""
    cut = {name: None if inputs[name] is None else inputs[name][:, start:stop] for name in TOKENS}
    return inputs | cut | {"state_BHNP": state}


def two_prefills_equal_one(run, close, make, **sizes):
    """The state after some tokens is all that the next ones need."""
    inputs = make(**SMALL, **sizes)
    whole = run(inputs)
    first = run(of_tokens(inputs, 0, 17, inputs["state_BHNP"]))
    second = run(of_tokens(inputs, 17, 40, first["last"]))
    close(torch.cat([first["y"], second["y"]], dim=1), whole["y"])
    close(second["last"], whole["last"])


def documents_equal_runs_of_their_own(run, close, make, **sizes):
    """Borders inside a chunk and at its end; the first state belongs to the first document."""
    inputs = make(**SMALL, **sizes)
    ids = torch.tensor([5] * 9 + [6] * 23 + [9] * 8)[None]
    packed = run(inputs | {"segments_BT": ids})
    parts = [run(of_tokens(inputs, a, b, s)) for a, b, s in ((0, 9, inputs["state_BHNP"]), (9, 32, None), (32, 40, None))]
    close(packed["y"], torch.cat([part["y"] for part in parts], dim=1))
    close(packed["last"], parts[2]["last"])


def repeated_heads_equal_shared_ones(run, close, make):
    """Shared heads lie side by side."""
    inputs = make(**SMALL | {"Q": 1, "G": 2, "X": 1, "H": 4})
    wide = {name: inputs[name].repeat_interleave(4 // inputs[name].shape[2], dim=2) for name in ("q_BTQN", "k_BTGN", "v_BTXP")}
    close(run(inputs)["y"], run(inputs | wide)["y"])


def steps_equal_prefill(run, close, make):
    """Token by token, as in decoding."""
    inputs = make(**SMALL | {"T": 9})
    whole, state, y = run(inputs), inputs["state_BHNP"].clone(), []
    impl = "triton" if whole["y"].dtype == torch.float32 else "torch"
    for t in range(9):
        q, k, v, g, beta = (inputs[name][:, t] for name in TOKENS[:5])
        y.append(gdn_step(q, k, v, g, beta, state, impl=impl))
    close(torch.stack(y, dim=1), whole["y"])
    close(state, whole["last"])


def padding_leaves_no_trace(run, close, make):
    """A token with beta 0 and g 0 keeps the state."""
    inputs = make(**SMALL)
    padded = inputs | {name: inputs[name].clone() for name in ("g", "beta_BTH")}
    padded["g"][:, 21:], padded["beta_BTH"][:, 21:] = 0, 0
    short, long = run(of_tokens(inputs, 0, 21, inputs["state_BHNP"])), run(padded)
    close(long["y"][:, :21], short["y"])
    close(long["last"], short["last"])


def no_tokens_keep_the_state(run, close, make):
    """T = 0 gives the first state back."""
    inputs = make(**SMALL | {"T": 0})
    found = run(inputs)
    assert found["y"].shape == (1, 0, 2, 16)
    close(found["last"], inputs["state_BHNP"])


def channels_of_one_decay_equal_one_a_head(run, close, make):
    """Two ways to the same result."""
    inputs = make(**SMALL)
    close(run(inputs | {"g": inputs["g"][..., None].expand(-1, -1, -1, 32)})["y"], run(inputs)["y"])


def states_left_out_are_untouched(run, close, make):
    """Bit for bit; and it does not matter in which order the batch has its entries."""
    inputs = make(**SMALL | {"B": 3, "rows": 1})
    found = run(inputs)
    assert torch.equal(found["state_BHNP"][[0, 1, 3]], inputs["state_BHNP"][[0, 1, 3]])
    assert found["y"][1].abs().max() == 0
    changed = inputs | {name: inputs[name].flip(0) for name in ("q_BQN", "k_BGN", "v_BXP", "g", "beta_BH", "rows_B")}
    close(run(changed)["y"].flip(0), found["y"])


def flops(s, direction):
    """Products of chunks of 64, the causal half of squares; backward computes the forward's states again."""
    tokens, L, N, P = s["B"] * s["T"] * s["H"], 64, s["N"], s["P"]
    forward = tokens * (6 * N * P + 3 * L * (N + P) + 2 * L * L / 3)
    return forward if direction == "forward" else 3 * forward


def least_bytes(s, direction, e):
    """Inputs read and results written once; twice for gradients, which read the inputs and dy and write as much."""
    decays = s["N"] if s.get("C", 1) > 1 else 1
    per_token = ((s["Q"] + s["G"]) * s["N"] + s["X"] * s["P"]) * e + s["H"] * (decays + 1) * 4
    forward = s["B"] * (s["T"] * (per_token + s["H"] * s["P"] * e) + 2 * s["H"] * s["N"] * s["P"] * 4)
    return forward if direction == "forward" else forward + s["B"] * s["T"] * per_token


def step_bytes(s, direction, e):
    """The state read and written, the token's vectors, its output."""
    return 8 * s["B"] * s["H"] * s["N"] * s["P"] + s["B"] * ((s["Q"] + s["G"]) * s["N"] + (s["X"] + s["H"]) * s["P"]) * e


def flash_linear_attention(**inputs):
    """With the repetition of heads that it needs."""
    return gdn(**inputs, impl="fla")


LLAMA = {"Q": 32, "G": 8, "X": 8, "H": 32, "N": 128, "P": 128}

GDN = OpSpec(
    op="gdn",
    function=gdn,
    reference=gdn_reference,
    make_inputs=make_inputs,
    outputs=("y", "last"),
    cases=(
        Case("shared keys", SMALL | {"T": 35}),
        Case("three head counts", SMALL | {"B": 2, "T": 35, "Q": 2, "G": 1, "X": 4, "H": 4, "N": 16}),
        Case("dims of no power of two", SMALL | {"T": 35, "N": 40, "P": 20, "blank": 1}),
        Case("documents", SMALL | {"B": 2, "T": 40, "document": 13}),
        Case("equal keys, beta 2", SMALL | {"T": 21, "keys": KEYS["equal"], "beta": 2, "decay": 100}),
        Case("alternating keys, beta 1", SMALL | {"T": 45, "keys": KEYS["alternating"], "beta": 1, "decay": 100}),
        Case("clustered keys", SMALL | {"T": 45, "keys": KEYS["clustered"], "decay": 100}),
        Case("beta 0", SMALL | {"beta": 0}),
        Case("decays strong and weak", SMALL | {"T": 45, "hard": 1}),
        Case("channels", SMALL | {"T": 35, "C": 32}),
        Case("channels, three head counts", SMALL | {"B": 2, "T": 35, "Q": 1, "G": 2, "X": 4, "H": 4, "N": 16, "C": 16}),
        Case("channels, dims of no power of two", SMALL | {"T": 35, "N": 40, "P": 20, "C": 40, "blank": 1}),
        Case("channels, documents", SMALL | {"B": 2, "T": 40, "document": 13, "C": 32}),
        Case(
            "channels, alternating keys, beta 1",
            SMALL | {"T": 45, "keys": KEYS["alternating"], "beta": 1, "decay": 100, "C": 32},
        ),
        Case("channels, decays strong and weak", SMALL | {"T": 45, "hard": 1, "C": 32}),
        *(Case(f"{tokens} tokens", SMALL | {"T": tokens}) for tokens in (1, 31, 32, 33)),
    ),
    shapes=(
        Case("llama8b_b1_t4k", {"B": 1, "T": 4096, **LLAMA}),
        Case("llama8b_b8_t4k", {"B": 8, "T": 4096, **LLAMA}),
        Case("llama8b_b8_t4k_documents", {"B": 8, "T": 4096, "document": 1024, **LLAMA}),
        Case("dims_80_96_b8_t4k", {"B": 8, "T": 4096, **LLAMA, "N": 80, "P": 96}),
        Case("channels_b8_t4k", {"B": 8, "T": 4096, **LLAMA, "C": 128}),
        Case("dims_64_b8_t4k", {"B": 8, "T": 4096, **LLAMA, "N": 64, "P": 64}),
    ),
    cpu_shapes=(Case("b2_t1k_h8", {"B": 2, "T": 1024, "Q": 8, "G": 2, "X": 2, "H": 8, "N": 64, "P": 64}),),
    grads=("q_BTQN", "k_BTGN", "v_BTXP", "g", "beta_BTH", "state_BHNP"),
    decay_grads=("g", "beta_BTH"),
    tiles={
        "gdn_solve": {"L": 32, "SLICE": 16},
        "gdn_gates": {"HEADS": 2},
        "gdn_states": {"COLUMNS": 32},
        "gdn_outputs": {"SLICE": 16, "COLUMNS": 32},
        "gdn_output_grads": {"SLICE": 16, "COLUMNS": 32},
        "gdn_state_grads": {"COLUMNS": 32},
        "gdn_input_grads": {"SLICE": 32, "COLUMNS": 16},
        "gdn_channels": {"SLICE": 16},
        "gdn_channel_grads": {"SLICE": 16, "COLUMNS": 16},
    },
    invariants={
        "two prefills equal one": two_prefills_equal_one,
        "documents equal runs of their own": documents_equal_runs_of_their_own,
        "repeated heads equal shared ones": repeated_heads_equal_shared_ones,
        "steps equal prefill": steps_equal_prefill,
        "padding leaves no trace": padding_leaves_no_trace,
        "no tokens keep the state": no_tokens_keep_the_state,
        "channels of one decay equal one a head": channels_of_one_decay_equal_one_a_head,
        "documents of channels": functools.partial(documents_equal_runs_of_their_own, C=32),
        "prefills of channels": functools.partial(two_prefills_equal_one, C=32),
    },
    bugs=(
        Bug("log_decay = tl.load(at, mask=there, other=0.0).to(tl.float64)", "log_decay = tl.load(at, mask=there, other=0.0)",
            ("decays strong and weak",)),
        Bug("inverse = inverse - kdot(kdot(inverse, beside, PRECISION), inverse, PRECISION)", "inverse -= beside",
            ("shared keys",)),
        Bug("strictly = mask & (i[:, None] > i[None, :])", "strictly = mask", ("shared keys",)),
        Bug("state = state * total + kdot(", "state = state + kdot(", ("two prefills equal one",)),
        Bug("wrong = (value.to(tl.float32) - known)", "wrong = (value.to(tl.float32) + known)", ("shared keys",)),
        Bug("(own[:, None] == own[None, :])", "(own[:, None] >= own[None, :])", ("documents equal runs of their own",)),
        Bug("into = tl.where((own == before)[:, None], into, 0.0)\n        out = tl.where((own == last)[:, None], out, 0.0)\n"
            "    to =", "into = into\n    to =", ("documents equal runs of their own",)),
        Bug("query_head = tl.cast(h // (heads // query_heads), tl.int64)", "query_head = tl.cast(h % query_heads, tl.int64)",
            ("three head counts",)),
        Bug("found = kdot(tl.trans(pairs.to(grad.dtype)), grad", "found = kdot(pairs.to(grad.dtype), grad", ("shared keys",)),
        Bug("dstate -= kdot(tl.trans(key), dvalue", "dstate += kdot(tl.trans(key), dvalue", ("documents",)),
        Bug("tl.cumsum(used, axis=1) - used + entering", "tl.cumsum(used, axis=1) + entering", ("shared keys",)),
        Bug("dkey += kdot((asks + tl.trans(asks))", "dkey += kdot((asks + asks)", ("shared keys",)),
        Bug("late = ((i >> level) % 2 == 1)", "late = ((i >> level) % 2 == 0)", ("channels",)),
        Bug("(tl.where(last, 0.0, following), (L", "(tl.where(last, following, following), (L", ("channels",)),
        Bug("dlog += tl.where(late, to_late, to_early)", "dlog += tl.where(late, to_early, to_late)", ("channels",)),
        Bug("leaving += tl.sum(reads * tl.load(qk", "leaving -= tl.sum(reads * tl.load(qk", ("channels",)),
    ),
    flops=flops,
    bytes=least_bytes,
    anchors={"fla": ("fla", flash_linear_attention)},
)  # fmt: skip

GDN_STEP = OpSpec(
    op="gdn",
    function=gdn_step,
    reference=gdn_step_reference,
    make_inputs=make_step_inputs,
    outputs=("y",),
    cases=(
        Case("shared keys", SMALL),
        Case("three head counts", SMALL | {"B": 2, "Q": 1, "G": 2, "X": 4, "H": 4}),
        Case("a decay a channel", SMALL | {"B": 2, "C": 32}),
        Case("dims of no power of two", SMALL | {"N": 40, "P": 20}),
        Case("rows", SMALL | {"B": 3, "rows": 1}),
    ),
    shapes=tuple(Case(f"llama8b_b{batch}", {"B": batch, **LLAMA}) for batch in (1, 8, 64))
    + (
        Case("dims_80_96_b8", {"B": 8, **LLAMA, "N": 80, "P": 96}),
        Case("channels_b8", {"B": 8, **LLAMA, "C": 128}),
        Case("rows_b8", {"B": 8, **LLAMA, "rows": 1}),
    ),
    cpu_shapes=(Case("b2_h8", {"B": 2, "Q": 8, "G": 2, "X": 2, "H": 8, "N": 64, "P": 64}),),
    in_place=("state_BHNP",),
    tiles={"gdn_advance": {"COLUMNS": 16}},
    invariants={"states left out are untouched": states_left_out_are_untouched},
    bugs=(
        Bug("h // (heads // key_heads)) * stride_kh + n, mask", "h % key_heads) * stride_kh + n, mask", ("three head counts",)),
        Bug("(row >= 0)\n", "(row >= -1)\n", ("states left out are untouched",)),
        Bug("tl.maximum(row, 0) * stride_sr", "b * stride_sr", ("rows",)),
    ),
    flops=lambda s, direction: 8 * s["B"] * s["H"] * s["N"] * s["P"],
    bytes=step_bytes,
)  # fmt: skip
