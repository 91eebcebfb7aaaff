"""What tests, ahead-of-time compilation and bench read of `mla_decode`."""

import torch

from hybridize.kernels._core.spec import Bug, Case, OpSpec, draw
from hybridize.kernels.mla_decode import mla_decode
from hybridize.kernels.mla_decode.reference import mla_decode_reference

LLAMA = {"H": 32, "R": 512, "E": 64}


def make_inputs(sizes, dtype, device, seed):
    """Inputs whose cache is a slice of a wider buffer; what does not count is NaN.

    Sizes: B, S, H, R, E; flags: `starts`, `lengths`, `mask`, `values_only` (no scores from latents), `large` (scores of some
    tens), `cut` (0: the cache is two tensors of their own).
    """
    B, S, H, R, E = (sizes[name] for name in "BSHRE")
    g = torch.Generator().manual_seed(seed)
    q_latent, q_rope = draw((B, H, R), dtype, device, g), draw((B, H, E), dtype, device, g)
    fused = draw((B, S, R + E), dtype, device, g)
    starts = lengths = mask = None
    if sizes.get("starts"):
        starts = (torch.arange(B) * 3 % S).to(device)
    if sizes.get("lengths"):
        lengths = (S - torch.arange(B) * 5 % S).to(device)
    if sizes.get("mask"):
        mask = (torch.rand(B, S, generator=g) > 0.3).index_fill_(1, torch.tensor([S // 2]), True).to(device)
    if device != "meta":
        place = torch.arange(S, device=device)
        for unseen in (
            None if starts is None else place < starts[:, None], None if lengths is None else place >= lengths[:, None],
            None if mask is None else ~mask,
        ):  # fmt: skip
            if unseen is not None:
                fused = fused.masked_fill(unseen[..., None], float("nan"))
    latent, rope = fused[..., :R], fused[..., R:]
    if not sizes.get("cut", 1):
        latent, rope = latent.contiguous(), rope.contiguous()
    scale = (16.0 if sizes.get("large") else 1.0) * (R + E) ** -0.5
    return {
        "q_latent_BHR": None if sizes.get("values_only") else q_latent, "q_rope_BHE": q_rope, "latent_BSR": latent,
        "rope_BSE": rope, "starts_B": starts, "lengths_B": lengths, "mask_BS": mask, "scale": scale,
    }  # fmt: skip


def flops(sizes, which):
    """Scores of latent and rotary parts, and the mean of latents."""
    return 2 * sizes["B"] * sizes["S"] * sizes["H"] * (2 * sizes["R"] + sizes["E"])


def least_bytes(sizes, which, size):
    """The cache once; queries and outputs."""
    queries = sizes["B"] * sizes["H"] * (2 * sizes["R"] + sizes["E"])
    return size * (sizes["B"] * sizes["S"] * (sizes["R"] + sizes["E"]) + queries)


def padding_changes_nothing(run, close, make):
    """A row with 5 tokens of padding on its left, by its start and by a mask, is the row without them."""
    inputs = make(B=1, S=30, H=3, R=16, E=4)
    padded = dict(inputs)
    for name in ("latent_BSR", "rope_BSE"):
        padded[name] = torch.cat([torch.full_like(inputs[name][:, :5], float("nan")), inputs[name]], 1)
    expected = run(inputs)
    device = inputs["latent_BSR"].device
    masked = padded | {"mask_BS": (torch.arange(35) >= 5)[None].to(device)}
    for other in (padded | {"starts_B": torch.tensor([5], device=device)}, masked):
        for name, value in run(other).items():
            close(value, expected[name])


def parts_are_joined_by_their_sums(run, close, make):
    """Outputs over two halves of the cache, weighed by their log-sum-exps, are the output over all of it."""
    inputs = make(B=2, S=40, H=4, R=16, E=4)
    halves = []
    for at in (slice(0, 23), slice(23, 40)):
        halves.append(run(inputs | {name: inputs[name][:, at] for name in ("latent_BSR", "rope_BSE")}))
    share = torch.stack([half["lse"] for half in halves]).softmax(0)[..., None]
    whole = run(inputs)
    close(sum(part * half["out"] for part, half in zip(share, halves, strict=True)), whole["out"])
    close(torch.logaddexp(halves[0]["lse"], halves[1]["lse"]), whole["lse"])


def heads_are_alike(run, close, make):
    """Heads in another order give outputs in that order."""
    inputs = make(B=2, S=20, H=4, R=16, E=4)
    turned = inputs | {name: inputs[name].flip(1) for name in ("q_latent_BHR", "q_rope_BHE")}
    expected = run(inputs)
    for name, value in run(turned).items():
        close(value, expected[name].flip(1))


def by_bmm(q_latent_BHR, q_rope_BHE, latent_BSR, rope_BSE, scale, **bounds):
    """Products and a softmax in the inputs' dtype, over all tokens."""
    scores = q_latent_BHR @ latent_BSR.mT + q_rope_BHE @ rope_BSE.mT
    return (scores * scale).float().softmax(-1).to(latent_BSR.dtype) @ latent_BSR


def expanded(q_latent_BHR, q_rope_BHE, latent_BSR, rope_BSE, scale, **bounds):
    """What absorbing replaces, less the expansion itself: keys and values of every head, in memory."""
    q = torch.cat([q_latent_BHR, q_rope_BHE], -1)[:, :, None]
    k = torch.cat([latent_BSR, rope_BSE], -1)[:, None].expand(-1, q.shape[1], -1, -1)
    v = latent_BSR[:, None].expand(-1, q.shape[1], -1, -1)
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scale)[:, :, 0]


def by_sdpa(q_latent_BHR, q_rope_BHE, latent_BSR, rope_BSE, scale, **bounds):
    """PyTorch's attention with heads as rows of one head, over all tokens; the concatenations are part of it."""
    q = torch.cat([q_latent_BHR, q_rope_BHE], -1)[:, None]
    k = torch.cat([latent_BSR, rope_BSE], -1)[:, None]
    return torch.nn.functional.scaled_dot_product_attention(q, k, latent_BSR[:, None], scale=scale)[:, 0]


MLA_DECODE = OpSpec(
    op="mla_decode",
    function=mla_decode,
    reference=mla_decode_reference,
    make_inputs=make_inputs,
    outputs=("out", "lse"),
    cases=(
        Case("ragged", {"B": 2, "S": 37, "H": 4, "R": 24, "E": 8, "lengths": 1, "starts": 1}),
        Case("one", {"B": 2, "S": 1, "H": 3, "R": 16, "E": 4}),
        Case("border", {"B": 1, "S": 33, "H": 17, "R": 7, "E": 6, "mask": 1, "cut": 0}),
        Case("values_only", {"B": 1, "S": 32, "H": 4, "R": 16, "E": 144, "values_only": 1}),
        Case("large", {"B": 1, "S": 70, "H": 4, "R": 32, "E": 16, "large": 1, "cut": 0}),
    ),
    shapes=(
        Case("llama8b_b1_t4k", {"B": 1, "S": 4096, **LLAMA}),
        Case("llama8b_b8_t4k", {"B": 8, "S": 4096, **LLAMA, "mask": 1}),
        Case("llama8b_b64_t4k", {"B": 64, "S": 4096, **LLAMA, "lengths": 1, "starts": 1}),
        Case("rope128_b8_t32k", {"B": 8, "S": 32768, "H": 32, "R": 512, "E": 128}),
        Case("r448_b8_t4k", {"B": 8, "S": 4096, "H": 32, "R": 448, "E": 96}),
        Case("qwen3_0b6_b8_t4k", {"B": 8, "S": 4096, "H": 16, "R": 300, "E": 80}),
    ),
    cpu_shapes=(Case("h16_t1k", {"B": 1, "S": 1024, "H": 16, "R": 512, "E": 64}),),
    tiles={"mla_decode_split": {"KEYS": 16, "LEAST": 32}, "mla_decode_combine": {"PARTS": 2, "COLUMNS": 16}},
    invariants={
        "padding": padding_changes_nothing,
        "parts": parts_are_joined_by_their_sums,
        "heads": heads_are_alike,
    },
    bugs=(
        Bug("end = tl.minimum(begin + each, last)", "end = tl.minimum(begin + each, last + 1)", ("ragged",)),
        Bug("mixed = mixed * kept[:, None] +", "mixed = mixed +", ("large", "ragged")),
        Bug("begin = first + part * each", "begin = part * each", ("ragged", "padding")),
        Bug("tl.static_range(0, E, E_TILE)", "tl.static_range(0, E_TILE, E_TILE)", ("values_only",)),
        Bug("    mixed = mixed / tl.where(some, total, 1.0)\n", "    mixed = mixed / parts\n", ("large", "ragged")),
    ),
    flops=flops,
    bytes=least_bytes,
    anchors={"bmm": ("torch", by_bmm), "sdpa": ("torch", by_sdpa), "sdpa, a head each": ("torch", expanded)},
)
