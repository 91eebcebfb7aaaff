"""Speed of the kernels against the plain way to write them, on the CPU, in one run.

    python bench/kernels.py --json kernels.json

Each implementation is first compared with the float64 reference; if one is wrong, nothing is timed.
The runs are interleaved, so a busy neighbour slows all of them alike. The anchor of `ssd`, `gdn` and `gla` is the
token-by-token scan under autograd, of `conv` the library's depthwise `conv1d`, of `gated_norm` the
eager chain of operations. Ratios are of medians; the minimum is shown beside them.
"""

import argparse
import json
import os
import statistics
import sys
import time
from functools import partial
from pathlib import Path

# kernels.py lies beside this script and would pass for Hugging Face's package of that name, which transformers asks for.
sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

from hybridize.kernels.conv import causal_conv1d  # noqa: E402
from hybridize.kernels.conv.reference import causal_conv1d_reference  # noqa: E402
from hybridize.kernels.gated_norm import gated_rms_norm  # noqa: E402
from hybridize.kernels.gated_norm.reference import gated_rms_norm_reference  # noqa: E402
from hybridize.kernels.gdn import gdn  # noqa: E402
from hybridize.kernels.gdn.reference import gdn_reference  # noqa: E402
from hybridize.kernels.gla import gla  # noqa: E402
from hybridize.kernels.gla.reference import gla_reference  # noqa: E402
from hybridize.kernels.ssd import ssd  # noqa: E402
from hybridize.kernels.ssd.reference import ssd_reference  # noqa: E402
from tests.tolerances import TOLERANCES, rms_ratio  # noqa: E402

BATCH, TOKENS, HEADS, P, N = 2, 1024, 8, 64, 64
CHANNELS, TAPS = 1536, 4


def first(result):
    return result[0] if isinstance(result, tuple) else result


def library_conv(x_BTC, weight_CK, bias_C):
    padded_BCT = F.pad(x_BTC.mT, (weight_CK.shape[1] - 1, 0))
    return F.silu(F.conv1d(padded_BCT, weight_CK[:, None], bias_C, groups=len(bias_C))).mT


def eager_norm(y, z, weight, eps, group_size):
    gated = (y * F.silu(z)).unflatten(-1, (-1, group_size))
    return (gated * torch.rsqrt(gated.pow(2).mean(-1, keepdim=True) + eps)).flatten(-2) * weight


def ssd_inputs(x_heads, groups, maps):
    return [
        torch.randn(BATCH, TOKENS, x_heads, P),
        F.softplus(torch.randn(BATCH, TOKENS, HEADS) - 2),
        -torch.rand(HEADS) * 4 - 0.1,
        torch.randn(BATCH, TOKENS, groups, N) / N**0.5,
        torch.randn(BATCH, TOKENS, maps, N),
        torch.randn(HEADS),
    ]


def gdn_inputs(queries, others, *channels):
    return [
        torch.randn(BATCH, TOKENS, queries, N) / N**0.5,
        F.normalize(torch.randn(BATCH, TOKENS, others, N), dim=-1),
        torch.randn(BATCH, TOKENS, others, P),
        -F.softplus(torch.randn(BATCH, TOKENS, HEADS, *channels) - 2),
        torch.sigmoid(torch.randn(BATCH, TOKENS, HEADS)),
    ]


def gla_inputs(states, channels):
    return [
        torch.randn(BATCH, TOKENS, HEADS, N) / N**0.5,
        torch.randn(BATCH, TOKENS, states, N),
        torch.randn(BATCH, TOKENS, states, P),
        -F.softplus(torch.randn(BATCH, TOKENS, states, channels) - 2),
    ]


def operations():
    """{op: (inputs, float64 reference, {implementation: function})}; the first is the anchor."""
    scans = {"scan": ssd_reference, "chunked": ssd}
    deltas = {"scan": gdn_reference, "chunked": gdn}
    gated = {"scan": gla_reference, "chunked": gla}
    width = HEADS * P
    norm_inputs = [torch.randn(BATCH, TOKENS, width) for _ in range(2)] + [torch.randn(width)]
    options = {"eps": 1e-5, "group_size": P}
    return {
        "ssd": (ssd_inputs(HEADS, HEADS, HEADS), ssd_reference, scans),
        "ssd, 2 B and C": (ssd_inputs(HEADS, 2, 2), ssd_reference, scans),
        "ssd, 2 x and B": (ssd_inputs(2, 2, HEADS), ssd_reference, scans),
        "gdn": (gdn_inputs(HEADS, HEADS), gdn_reference, deltas),
        "gdn, 2 k and v": (gdn_inputs(HEADS, 2), gdn_reference, deltas),
        "gdn, channels": (gdn_inputs(HEADS, HEADS, N), gdn_reference, deltas),
        "gla": (gla_inputs(HEADS, 1), gla_reference, gated),
        "gla, 2 states": (gla_inputs(2, 1), gla_reference, gated),
        "gla, channels": (gla_inputs(HEADS, N), gla_reference, gated),
        "conv": (
            [
                torch.randn(BATCH, TOKENS, CHANNELS),
                torch.randn(CHANNELS, TAPS),
                torch.randn(CHANNELS),
            ],
            causal_conv1d_reference,
            {"conv1d": library_conv, "shifts": causal_conv1d},
        ),
        "gated_norm": (
            norm_inputs,
            partial(gated_rms_norm_reference, **options),
            {
                "eager": partial(eager_norm, **options),
                "gated_rms_norm": partial(gated_rms_norm, **options),
            },
        ),
    }


def gradients(function, inputs, dy):
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    y = first(function(*leaves))
    y.backward(dy.to(y.dtype))
    return y.detach(), [leaf.grad for leaf in leaves]


def errors(inputs, reference, implementations):
    """{implementation: (worst forward, worst gradient error)} against float64, as RMS ratios."""
    dy = torch.randn(first(reference(*inputs)).shape)
    y_ref, grads_ref = gradients(reference, [t.double() for t in inputs], dy)
    found = {}
    for name, function in implementations.items():
        y, grads = gradients(function, inputs, dy)
        with torch.no_grad():
            without_grad = first(function(*inputs))
        forward = max(rms_ratio(y, y_ref), rms_ratio(without_grad, y_ref))
        pairs = zip(grads, grads_ref, strict=True)
        found[name] = forward, max(rms_ratio(grad, expected) for grad, expected in pairs)
    return found


def run_forward(function, inputs):
    with torch.no_grad():
        function(*inputs)


def run_both(function, leaves, dy):
    first(function(*leaves)).backward(dy)


def times(inputs, implementations, repeats):
    """{(implementation, pass): milliseconds of every run}, interleaved, after one warm-up."""
    dy = torch.randn(first(next(iter(implementations.values()))(*inputs)).shape)
    leaves = [t.clone().requires_grad_() for t in inputs]
    jobs = {}
    for name, function in implementations.items():
        jobs[name, "forward"] = partial(run_forward, function, inputs)
        jobs[name, "forward+backward"] = partial(run_both, function, leaves, dy)
    found = {job: [] for job in jobs}
    for repeat in range(repeats + 1):
        for job, work in jobs.items():
            start = time.perf_counter()
            work()
            if repeat:
                found[job].append((time.perf_counter() - start) * 1e3)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="where to write {op: {implementation: ratio}}")
    parser.add_argument("--repeats", type=int, default=9, help="timed runs of each, at least 7")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    if arguments.repeats < 7:
        parser.error("--repeats: at least 7, else the median says little")
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    ops = operations()

    wrong = []
    found_errors = {op: errors(*parts) for op, parts in ops.items()}
    for op, found in found_errors.items():
        for name, pair in found.items():
            if not all(e <= bound for e, bound in zip(pair, TOLERANCES["fp32"], strict=True)):
                wrong.append(f"{op}/{name}: errors {pair[0]:.2g}, {pair[1]:.2g}")
    if wrong:
        print("wrong results, no speed is shown:", *wrong, sep="\n  ")
        return 1

    print(f"torch {torch.__version__}, {arguments.threads} threads, B{BATCH} T{TOKENS} fp32")
    print(f"{'op':16}{'implementation':16}{'pass':18}{'median ms':>10}{'min ms':>9}{'x':>7}  error")
    ratios = {}
    for op, (inputs, _, implementations) in ops.items():
        found = times(inputs, implementations, arguments.repeats)
        anchor = next(iter(implementations))
        for (name, part), runs in sorted(found.items(), key=lambda item: item[0][1]):
            median = statistics.median(runs)
            ratio = statistics.median(found[anchor, part]) / median
            error = found_errors[op][name][part != "forward"]
            print(f"{op:16}{name:16}{part:18}{median:10.1f}{min(runs):9.1f}{ratio:7.1f}  {error:.1g}")
            if name != anchor:
                ratios.setdefault(op, {})[f"{name} {part}"] = round(ratio, 2)
    if arguments.json:
        arguments.json.write_text(json.dumps(ratios, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
