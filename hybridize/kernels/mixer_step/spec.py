"""`mamba2_mixer_step` and `gdn_mixer_step`, described."""

from functools import partial

import torch

from hybridize.kernels._core.spec import Bug, Case, OpSpec, draw
from hybridize.kernels.conv import causal_conv1d
from hybridize.kernels.gated_norm import gated_rms_norm
from hybridize.kernels.gdn import gdn
from hybridize.kernels.mixer_step import gdn_mixer_step, mamba2_mixer_step
from hybridize.kernels.mixer_step.reference import gdn_mixer_step_reference, mamba2_mixer_step_reference
from hybridize.kernels.mixer_step.torch_impl import L2_EPS, gdn_composed, mamba2_composed
from hybridize.kernels.ssd import ssd


def make_inputs(kind, sizes, dtype, device, seed):
    """Of "mamba2" or "gdn": heads H = G R; what comes from projections is cut out of one wide tensor where `cut` is 1."""
    g = torch.Generator().manual_seed(seed)
    (batch, P, N, taps), groups, heads = (sizes[name] for name in "BPNK"), sizes["G"], sizes["G"] * sizes["R"]
    channels = groups * (P + N) + heads * N
    parts = [heads * P, channels, heads, heads]
    wide = draw((batch, sum(parts)), dtype, device, g)
    z, x, a, b = wide.split(parts, dim=-1) if sizes.get("cut", 1) else (t.contiguous() for t in wide.split(parts, dim=-1))
    weight = draw((channels, 1, taps), torch.float32, device, g)[:, 0]
    per_head = [draw((heads,), torch.float32, device, g) for _ in range(3)]
    conv = draw((batch, taps - 1, channels), dtype, device, g).mT
    conv = conv if sizes.get("cut", 1) else conv.contiguous()
    if sizes.get("hard"):
        # Decays of about e^-150 and e^-0.01, and gates that are shut or wide open.
        z, per_head[0] = z * 10, torch.where(torch.arange(heads) % 2 == 0, 5.0, -5.0).to(device)
    if kind == "mamba2":
        return {
            "z_BI": z, "xBC_BC": x, "dt_BH": a, "weight_CK": weight,
            "bias_C": draw((channels,), torch.float32, device, g) if sizes.get("bias", 1) else None,
            "A_log_H": per_head[0], "dt_bias_H": per_head[1], "D_H": per_head[2],
            "norm_I": draw((heads * P,), torch.float32, device, g), "eps": 1e-5, "conv_BCK1": conv,
            "state_BHPN": draw((batch, heads, P, N), _wide(dtype), device, g),
        }  # fmt: skip
    return {
        "z_BI": z, "qkv_BC": x, "a_BH": a, "b_BH": b, "weight_CK": weight, "A_log_H": per_head[0], "dt_bias_H": per_head[1],
        "beta_max": sizes.get("beta_max", 1), "norm_P": draw((P,), torch.float32, device, g), "eps": 1e-5, "conv_BCK1": conv,
        "state_BHNP": draw((batch, heads, N, P), _wide(dtype), device, g),
    }  # fmt: skip


def _wide(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def steps_are_a_prefill(kind, run, close, make):
    """Five tokens, one by one, against the three functions over all of them."""
    inputs, tokens = make(B=2, G=1, R=2, P=16, N=16, K=4), 5
    x = "xBC_BC" if kind == "mamba2" else "qkv_BC"
    scales = torch.linspace(-1, 2, tokens)[:, None, None].to(inputs[x])
    many = {
        name: (scales * value).transpose(0, 1) for name, value in inputs.items() if name in (x, "z_BI", "a_BH", "dt_BH", "b_BH")
    }
    state = next(name for name in inputs if name.startswith("state"))
    want, last_conv, last = (_mamba2_prefill if kind == "mamba2" else _gdn_prefill)(inputs, many)
    for t in range(tokens):
        found = run(inputs | {name: value[:, t] for name, value in many.items()})
        close(found["out_BI"], want[:, t])
        inputs = inputs | {name: found[name] for name in ("conv_BCK1", state)}
    close(inputs["conv_BCK1"], last_conv)
    close(inputs[state], last)


def _mamba2_prefill(one, many):
    xBC, conv = causal_conv1d(many["xBC_BC"], one["weight_CK"], one["bias_C"], one["conv_BCK1"], impl="torch")
    x, B, C = (t.unflatten(-1, (-1, 16)) for t in xBC.split([16, 16, 32], dim=-1))
    dt = torch.nn.functional.softplus(many["dt_BH"] + one["dt_bias_H"])
    y, state = ssd(x, dt, -torch.exp(one["A_log_H"].to(one["z_BI"])), B, C, one["D_H"], one["state_BHPN"], impl="torch")
    return gated_rms_norm(y.flatten(2), many["z_BI"], one["norm_I"], one["eps"], 16, impl="torch"), conv, state


def _gdn_prefill(one, many):
    qkv, conv = causal_conv1d(many["qkv_BC"], one["weight_CK"], None, one["conv_BCK1"], impl="torch")
    q, k, v = (t.unflatten(-1, (-1, 16)) for t in qkv.split([32, 16, 16], dim=-1))
    q, k = (t * torch.rsqrt(t.square().sum(-1, keepdim=True) + L2_EPS) for t in (q, k))
    g = -torch.exp(one["A_log_H"].to(one["z_BI"])) * torch.nn.functional.softplus(many["a_BH"] + one["dt_bias_H"])
    y, state = gdn(q / 4, k, v, g, torch.sigmoid(many["b_BH"]), one["state_BHNP"], impl="torch")
    z = many["z_BI"].unflatten(-1, (-1, 16))
    return gated_rms_norm(y, z, one["norm_P"], one["eps"], 16, gate_first=False, impl="torch").flatten(2), conv, state


def grouped_heads_are_repeated_ones(kind, run, close, make):
    """Heads of a group give what heads of their own with the same channels give."""
    inputs = make(B=2, G=2, R=2, P=16, N=16, K=3)
    x = "xBC_BC" if kind == "mamba2" else "qkv_BC"
    own = torch.arange(64).view(4, 16)
    shared = torch.arange(32).view(2, 16).repeat_interleave(2, dim=0)
    parts = [shared, 32 + shared, 64 + own] if kind == "mamba2" else [own, 64 + shared, 96 + shared]
    channels = torch.cat(parts).flatten()
    repeated = {name: inputs[name][channels] for name in ("weight_CK", "bias_C") if inputs.get(name) is not None}
    repeated |= {name: inputs[name][:, channels] for name in (x, "conv_BCK1")}
    found, want = run(inputs), run(inputs | repeated)
    state = next(name for name in inputs if name.startswith("state"))
    close(found["out_BI"], want["out_BI"])
    close(found[state], want[state])
    close(found["conv_BCK1"][:, channels], want["conv_BCK1"])


def invariants(kind):
    """What must hold for both, by name."""
    return {
        "steps are a prefill": partial(steps_are_a_prefill, kind),
        "grouped heads are repeated ones": partial(grouped_heads_are_repeated_ones, kind),
    }


CASES = (
    Case("grouped heads", {"B": 2, "G": 1, "R": 2, "P": 16, "N": 16, "K": 4}),
    Case("a head a group, odd widths", {"B": 1, "G": 2, "R": 1, "P": 12, "N": 20, "K": 3, "cut": 0, "bias": 0, "beta_max": 2}),
    Case("two taps, wide gates and decays", {"B": 1, "G": 2, "R": 3, "P": 16, "N": 32, "K": 2, "hard": 1}),
)
LLAMA = {"G": 8, "R": 4, "P": 128, "N": 128, "K": 4}
SHAPES = (
    Case("llama8b_b1", {"B": 1, **LLAMA}),
    Case("llama8b_b8", {"B": 8, **LLAMA}),
    Case("llama8b_b64", {"B": 64, **LLAMA}),
    Case("expanded_b8", {"B": 8, "G": 32, "R": 1, "P": 128, "N": 128, "K": 4}),
    Case("heads_of_64_b8", {"B": 8, "G": 8, "R": 4, "P": 64, "N": 64, "K": 4}),
    Case("heads_of_80_b8", {"B": 8, "G": 32, "R": 1, "P": 80, "N": 80, "K": 4}),
    Case("expanded_heads_of_64_b8", {"B": 8, "G": 32, "R": 1, "P": 64, "N": 64, "K": 3}),
)
CPU_SHAPES = (Case("b1_h8_p64", {"B": 1, "G": 8, "R": 1, "P": 64, "N": 64, "K": 4}),)


def flops(sizes, direction):
    """Of the states' update and its product with the output map."""
    return (5 if "beta_max" not in sizes else 8) * sizes["B"] * sizes["G"] * sizes["R"] * sizes["P"] * sizes["N"]


def least_bytes(sizes, direction, element):
    """The matrix states in fp32 and the convolution's inputs, read and written; z, the new inputs and the output."""
    heads = sizes["G"] * sizes["R"]
    channels = sizes["G"] * (sizes["P"] + sizes["N"]) + heads * sizes["N"]
    state = 2 * 4 * heads * sizes["P"] * sizes["N"]
    return sizes["B"] * (state + element * (channels * (2 * sizes["K"] - 1) + 2 * heads * sizes["P"]))


MAMBA2 = OpSpec(
    op="mixer_step",
    function=mamba2_mixer_step,
    reference=mamba2_mixer_step_reference,
    make_inputs=partial(make_inputs, "mamba2"),
    outputs=("out_BI",),
    cases=CASES,
    shapes=SHAPES,
    cpu_shapes=CPU_SHAPES,
    in_place=("conv_BCK1", "state_BHPN"),
    tiles={"mamba2_token": {"AHEAD": 1}},
    invariants=invariants("mamba2"),
    bugs=(
        Bug("at_C = G * (P + N) + head * N + n", "at_C = G * (P + N) + group * N + n",
            ("grouped heads", "steps are a prefill")),
        Bug("here = here * decay + (step * x)", "here = here + (step * x)", ("grouped heads", "steps are a prefill")),
        Bug("    shift(conv, at_B, in_n, conv_c, conv_k, B2, B3, B_new, K)\n", "    pass\n",
            ("grouped heads", "steps are a prefill")),
        Bug("+ tl.load(D + head).to(tl.float32) * x) * gate", "+ tl.load(D + group).to(tl.float32) * x) * gate",
            ("grouped heads",)),
    ),
    flops=flops,
    bytes=least_bytes,
    anchors={"three launches": ("triton", partial(mamba2_composed, impl="auto"))},
)  # fmt: skip

GDN = OpSpec(
    op="mixer_step",
    function=gdn_mixer_step,
    reference=gdn_mixer_step_reference,
    make_inputs=partial(make_inputs, "gdn"),
    outputs=("out_BI",),
    cases=CASES,
    shapes=SHAPES,
    cpu_shapes=CPU_SHAPES,
    in_place=("conv_BCK1", "state_BHNP"),
    tiles={"gdn_token": {"AHEAD": 0}},
    invariants=invariants("gdn"),
    bugs=(
        Bug("here = here * decay\n", "here = here * 1.0\n", ("grouped heads", "steps are a prefill")),
        Bug("wrong = v - tl.sum(k[:, None] * here, axis=0)", "wrong = v", ("grouped heads",)),
        Bug("at_q = head * N + n", "at_q = group * N + n", ("grouped heads", "grouped heads are repeated ones")),
        Bug("k *= tl.rsqrt(tl.sum(k * k, axis=0) + L2_EPS)\n", "k *= 1.0\n", ("grouped heads",)),
    ),
    flops=flops,
    bytes=least_bytes,
    anchors={"three launches": ("triton", partial(gdn_composed, impl="auto"))},
)  # fmt: skip
