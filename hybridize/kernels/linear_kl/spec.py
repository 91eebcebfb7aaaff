"""`linear_kl`, described."""

import torch

from hybridize.kernels._core.spec import Bug, Case, OpSpec, draw
from hybridize.kernels.linear_kl import KINDS, linear_kl
from hybridize.kernels.linear_kl.reference import linear_kl_reference


def make_inputs(sizes, dtype, device, seed):
    """Logits of some units.

    Sizes: N, D, E, V, chunk; `kind` (an index into KINDS), `beta` and `tau` in tenths, `labels` (10 w, of which some are left
    out), `cap` (of the student; the teacher's is twice that), `scaled` (scales that are not one), `large` (logits to +-60).
    """
    N, D, E, V = (sizes[name] for name in "NDEV")
    g = torch.Generator().manual_seed(seed)
    size = 15 if sizes.get("large") else 1.5
    states, others = draw((N, D), dtype, device, g), draw((N, E), dtype, device, g)
    head = draw((V, D), dtype, device, g) * (size * D**-0.5)
    other_head = draw((V, E), dtype, device, g) * (size * E**-0.5)
    labels = None
    if sizes.get("labels"):
        labels = torch.empty(N, dtype=torch.int64, device=device)
        if device != "meta":
            labels.copy_(torch.randint(V, (N,), generator=g))
            labels[1::3] = -100
    cap = sizes.get("cap")
    scales = (0.6, 1.3) if sizes.get("scaled") else (1.0, 1.0)
    return {
        "student_ND": states, "student_head_VD": head, "teacher_NE": others, "teacher_head_VE": other_head, "labels_N": labels,
        "kind": KINDS[sizes.get("kind", 0)], "beta": sizes.get("beta", 5) / 10, "label_weight": sizes.get("labels", 0) / 10,
        "temperature": sizes.get("tau", 10) / 10, "student_scale": scales[0], "student_cap": float(cap) if cap else None,
        "teacher_scale": scales[1], "teacher_cap": 2.0 * cap if cap else None, "chunk": sizes["chunk"],
    }  # fmt: skip


def flops(sizes, which):
    """Products alone: logits of both sides; then the gradients of states and head."""
    products = sizes["D"] + sizes["E"] if which == "forward" else 2 * sizes["D"]
    return 2 * sizes["N"] * sizes["V"] * products


def least_bytes(sizes, which, size):
    """Heads and states once; backward also their gradients, the head's in fp32."""
    N, D, E, V = (sizes[name] for name in "NDEV")
    return size * (N + V) * (D + E) if which == "forward" else size * (N * D + V * D) + N * D * size + 4 * V * D


def chunks_change_nothing(run, close, make):
    """Tokens together or a few at a time; tokens in another order."""
    inputs = make(N=6, D=8, E=12, V=20, chunk=2, kind=2)
    expected = run(inputs)["loss"]
    close(run(inputs | {"chunk": 5})["loss"], expected)
    close(run(inputs | {name: inputs[name].flip(0) for name in ("student_ND", "teacher_NE")})["loss"], expected)


def identical_sides_cost_nothing(run, close, make):
    """Zero, exactly, for each kind."""
    for kind in KINDS:
        inputs = make(N=3, D=16, E=16, V=20, chunk=3, tau=17) | {"kind": kind}
        same = {"teacher_NE": inputs["student_ND"], "teacher_head_VE": inputs["student_head_VD"]}
        found = run(inputs | same)["loss"]
        assert found.item() == 0.0, f"{kind}: {found.item()}"


def directions_are_each_others(run, close, make):
    """The reverse is the forward with sides exchanged; so is the mixture, with beta from the other end."""
    inputs = make(N=3, D=16, E=16, V=20, chunk=3)
    turned = inputs | {
        "student_ND": inputs["teacher_NE"], "student_head_VD": inputs["teacher_head_VE"],
        "teacher_NE": inputs["student_ND"], "teacher_head_VE": inputs["student_head_VD"],
    }  # fmt: skip
    close(run(turned | {"kind": "reverse"})["loss"], run(inputs)["loss"])
    close(run(turned | {"kind": "jsd", "beta": 0.8})["loss"], run(inputs | {"kind": "jsd", "beta": 0.2})["loss"])


def naive(student_ND, student_head_VD, teacher_NE, teacher_head_VE, **options):
    """All logits at once, in fp32; forward KL at a temperature of 1, as for all anchors."""
    logits = student_ND @ student_head_VD.T, teacher_NE @ teacher_head_VE.T
    log_q, log_p = (z.float().log_softmax(-1) for z in logits)
    return torch.nn.functional.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def liger_chunked(student_ND, student_head_VD, teacher_NE, teacher_head_VE, **options):
    """Liger's chunked loss at beta = 0, compiled."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss  # pyright: ignore[reportMissingImports]

    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0)
    unused = torch.zeros(len(student_ND), dtype=torch.long, device=student_ND.device)
    return loss(student_ND, student_head_VD, teacher_NE, teacher_head_VE, unused, None, None)


def liger_fused(student_ND, student_head_VD, teacher_NE, teacher_head_VE, **options):
    """Liger's fused linear JSD at beta = 0."""
    from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD  # pyright: ignore[reportMissingImports]

    return LigerFusedLinearJSD(jsd_beta=0.0)(student_ND, student_head_VD, teacher_NE, teacher_head_VE, None)


def fla_fused(student_ND, student_head_VD, teacher_NE, teacher_head_VE, **options):
    """flash-linear-attention's fused KL, batchmean."""
    from fla.modules import FusedKLDivLoss  # pyright: ignore[reportMissingImports]

    return FusedKLDivLoss()(student_ND, teacher_NE, student_head_VD, teacher_head_VE)


LLAMA = {"D": 4096, "E": 4096, "V": 128256, "chunk": 256}
TINY = {"D": 16, "E": 24, "V": 36, "chunk": 2}

LINEAR_KL = OpSpec(
    op="linear_kl",
    function=linear_kl,
    reference=linear_kl_reference,
    make_inputs=make_inputs,
    outputs=("loss",),
    cases=(
        Case("forward", {"N": 3, **TINY}),
        Case("reverse", {"N": 3, **TINY, "kind": 1, "tau": 17}),
        Case("jsd", {"N": 3, **TINY, "kind": 2, "beta": 3}),
        Case("labels and caps", {"N": 4, **TINY, "labels": 3, "tau": 20, "cap": 2, "scaled": 1}),
        Case("jsd, labels and caps", {"N": 4, **TINY, "kind": 2, "labels": 7, "cap": 3, "scaled": 1}),
        Case("reverse, cap", {"N": 2, **TINY, "V": 16, "kind": 1, "cap": 2}),
        Case("large", {"N": 2, **TINY, "large": 1}),
        Case("no tokens", {"N": 0, **TINY}),
    ),
    shapes=(
        Case("llama8b_4k", {"N": 4096, **LLAMA}),
        Case("llama8b_16k", {"N": 16384, **LLAMA}),
        Case("llama8b_4k_reverse", {"N": 4096, **LLAMA, "kind": 1, "tau": 20}),
        Case("llama8b_4k_jsd_labels", {"N": 4096, **LLAMA, "kind": 2, "labels": 3}),
        Case("gemma2_9b_4k", {"N": 4096, "D": 3584, "E": 3584, "V": 256000, "chunk": 256, "cap": 30, "labels": 3}),
        Case("qwen3_0b6_of_8b_4k", {"N": 4096, "D": 1024, "E": 4096, "V": 151936, "chunk": 256}),
    ),
    cpu_shapes=(Case("n1k_v32k", {"N": 1024, "D": 512, "E": 512, "V": 32000, "chunk": 256}),),
    grads=("student_ND", "student_head_VD"),
    tiles={"linear_kl_rows": {"BLOCK": 16}},
    invariants={
        "chunks": chunks_change_nothing, "identical sides": identical_sides_cost_nothing,
        "directions": directions_are_each_others,
    },
    bugs=(
        Bug("slope = slope * temperature\n", "slope = slope / temperature\n", ("reverse", "labels and caps")),
        Bug("slope = q * (-gap - total)", "slope = q * -gap", ("reverse",)),
        Bug("t_sum = t_sum * tl.exp(t_top - top) +", "t_sum = t_sum +", ("forward",)),
        Bug("slope * (1.0 - z * z *", "slope * (1.0 - z *", ("labels and caps", "reverse, cap")),
        Bug("tl.where(gap > 0, 1.0 - beta, beta)", "tl.where(gap > 0, beta, 1.0 - beta)", ("jsd",)),
        Bug("tl.where(label >= 0, hard * label_weight, 0.0)", "hard * label_weight", ("labels and caps",)),
    ),
    flops=flops,
    bytes=least_bytes,
    anchors={
        "naive": ("torch", naive), "liger chunked": ("liger_kernel", liger_chunked), "liger fused": ("liger_kernel", liger_fused),
        "fla": ("fla", fla_fused),
    },
)  # fmt: skip
