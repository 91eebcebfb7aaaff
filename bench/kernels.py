"""Speed of every op beside what it could be compared with, in one run: op x shape x implementation -> ms, error, ratio.

    python bench/kernels.py --json kernels.json
    python bench/kernels.py --op ssd --op gdn --impl triton --impl torch

Each implementation is first compared with the float64 reference at the op's small cases, and its largest error there is
shown; one that is wrong is named, and no speed is shown for it. Runs are interleaved, so that a busy neighbour slows all of
them alike; ratios are of medians, over the anchor.

On a CPU the anchor is the reference, token by token under autograd, and shapes are the small ones. On a GPU shapes are those of
models, in bf16; TFLOP/s and GB/s follow from the op's least work, and the bound from what this card copied and multiplied in this
run. Libraries of the same ops (fla, mamba_ssm, causal_conv1d, Liger) are timed where they are installed.
"""

import argparse
import importlib.util
import json
import os
import statistics
import sys
import time
from pathlib import Path

# kernels.py lies beside this script and would pass for Hugging Face's package of that name, which transformers asks for.
sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch  # noqa: E402

from hybridize.kernels._core.table import SPECS, specs  # noqa: E402
from tests.kernels.suite import check_case  # noqa: E402

ROUNDS_ON_A_GPU = 3


def first(result):
    return result[0] if isinstance(result, tuple) else result


def tracked(spec, inputs):
    return {k: v.detach().requires_grad_() if k in spec.grads and isinstance(v, torch.Tensor) else v for k, v in inputs.items()}


def jobs(spec, functions, inputs):
    """{(implementation, pass): what to time}; the backward pass is timed with the forward one it needs."""
    found = {}
    for name, function in functions.items():

        def forward(function=function):
            with torch.no_grad():
                return function(**inputs)

        found[name, spec.passes()[0]] = forward
        if "backward" in spec.passes():
            leaves = tracked(spec, inputs)
            gradient = torch.randn_like(first(forward()))

            def both(function=function, leaves=leaves, gradient=gradient):
                first(function(**leaves)).backward(gradient)
                for leaf in leaves.values():
                    if isinstance(leaf, torch.Tensor):
                        leaf.grad = None

            found[name, "forward+backward"] = both
    return found


def on_a_cpu(work):
    start = time.perf_counter()
    work()
    return (time.perf_counter() - start) * 1e3


def on_a_gpu(work):
    from triton.testing import do_bench

    return do_bench(work, return_mode="median")


def timed(found, repeats, clock):
    runs = {job: [] for job in found}
    for repeat in range(repeats + 1):
        for job, work in found.items():
            spent = clock(work)
            if repeat:
                runs[job].append(spent)
    return runs


def checked(spec, name, device):
    """(the largest error of an implementation, None) or (None, what is wrong with it)."""
    worst = 0.0
    dtypes = (torch.bfloat16, torch.float32) if device == "cuda" else (torch.float32,)
    for case in spec.cases:
        for dtype in dtypes:
            row = "fp32 on a GPU" if device == "cuda" and dtype == torch.float32 else None
            try:
                worst = max(worst, check_case(spec, case, dtype, name, device, row))
            except AssertionError as error:
                return None, f"{case.name}, {dtype}: {str(error).splitlines()[0]}"
    return worst, None


def peaks():
    """(bytes/s of a copy, FLOP/s of a bf16 product) of this card, in this run."""
    memory = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    other = torch.empty_like(memory)
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    copy, product = on_a_gpu(lambda: other.copy_(memory)), on_a_gpu(lambda: a @ b)
    return 2 * memory.numel() / copy * 1e3, 2 * 8192**3 / product * 1e3


def peak_bytes(work):
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def functions_of(spec, inputs, device, wanted):
    """{name: function of the inputs} of what may be timed, [(name, why not)] and {name: error}."""
    functions, left, errors = {}, [], {}
    if device == "cpu":
        functions["reference"] = spec.reference
    for name in ("torch", *spec.impls):
        if wanted and name not in wanted:
            continue
        if device == "cpu" and name != "torch":
            continue
        errors[name], wrong = checked(spec, name, device)
        if wrong:
            left.append((name, f"WRONG: {wrong}"))
        else:
            functions[name] = lambda name=name, **inputs: spec.function(**inputs, impl=name)
    for name, (module, function) in spec.anchors.items():
        if importlib.util.find_spec(module) is None:
            left.append((name, f"{module} is not installed"))
        elif device == "cuda" or module == "torch":
            functions[name] = function
    for name, function in list(functions.items()):
        try:
            function(**inputs)
        except Exception as error:  # what a library refuses at this shape is a line of the table, not the end of the run
            left.append((name, f"{type(error).__name__}: {str(error).splitlines()[0][:90]}"))
            del functions[name]
    return functions, left, errors


def work_of(spec, sizes, direction, element):
    """(operations, least bytes) of a pass; forward and backward together for both."""
    parts = ("forward", "backward") if direction == "forward+backward" else (direction,)
    return sum(spec.flops(sizes, part) for part in parts), sum(spec.bytes(sizes, part, element) for part in parts)


def bench(spec, case, device, repeats, wanted, limits):
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    inputs = spec.make_inputs(case.sizes, dtype, device, 0)
    functions, left, errors = functions_of(spec, inputs, device, wanted)
    rows = [{"op": spec.name, "shape": case.name, "impl": name, "not timed": why} for name, why in left]
    if not functions:
        return rows
    found = jobs(spec, functions, inputs)
    runs = timed(found, ROUNDS_ON_A_GPU if limits else repeats, on_a_gpu if limits else on_a_cpu)
    anchor = next(iter(functions))
    for (name, direction), all_ms in runs.items():
        ms = statistics.median(all_ms)
        row = {
            "op": spec.name, "shape": case.name, "impl": name, "pass": direction,
            "ms": round(ms, 4), "min ms": round(min(all_ms), 4),
            "error": errors.get(name), "ratio": round(statistics.median(runs[anchor, direction]) / ms, 3), "anchor": anchor,
        }  # fmt: skip
        if limits:
            flops, moved = work_of(spec, case.sizes, direction, dtype.itemsize)
            bound = max(moved / limits[0], flops / limits[1]) * 1e3
            row |= {
                "TFLOP/s": round(flops / ms / 1e9, 1),
                "GB/s": round(moved / ms / 1e6),
                "% of bound": round(100 * bound / ms, 1),
            }
            row["peak MB"] = round(peak_bytes(found[name, direction]) / 1e6, 1)
        rows.append(row)
    return rows


def shown(row):
    head = f"{row['op']:20}{row['shape']:30}{row['impl']:23}"
    if "not timed" in row:
        return head + row["not timed"]
    text = head + f"{row['pass']:18}{row['ms']:10.3f} ms{row['ratio']:8.2f}x of {row['anchor']}"
    if row["error"] is not None:
        text += f"  error {row['error']:.1e}"
    if "GB/s" in row:
        text += (
            f"  {row['TFLOP/s']:7.1f} TFLOP/s {row['GB/s']:6} GB/s {row['% of bound']:5.1f} % of bound {row['peak MB']:9.1f} MB"
        )
    return text


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="where to write the rows")
    parser.add_argument("--op", action="append", choices=sorted(SPECS), help="only this function, again for more")
    parser.add_argument("--impl", action="append", help="only this implementation, again for more")
    parser.add_argument("--repeats", type=int, default=9, help="timed runs of each on a CPU, at least 7")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    if arguments.repeats < 7:
        parser.error("--repeats: at least 7, else the median says little")
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    limits = peaks() if device == "cuda" else None
    if limits:
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}: copies {limits[0] / 1e12:.2f} TB/s, "
              f"multiplies {limits[1] / 1e12:.0f} TFLOP/s in bf16")  # fmt: skip
    else:
        print(f"torch {torch.__version__}, {arguments.threads} threads, fp32")
    rows = []
    for spec in specs(arguments.op):
        for case in spec.shapes if limits else spec.cpu_shapes:
            found = bench(spec, case, device, arguments.repeats, arguments.impl, limits)
            print(*map(shown, found), sep="\n", flush=True)
            rows += found
            # After each, so that a run that is cut off leaves what it measured.
            if arguments.json:
                arguments.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return int(any("WRONG" in row.get("not timed", "") for row in rows))


if __name__ == "__main__":
    sys.exit(main())
