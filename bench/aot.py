"""Compile every Triton kernel for GPUs that are not here, and say what it takes: registers, spills, shared memory.

    python bench/aot.py --arch 90 [--op ssd] --json aot.json

Launchers run on tensors without memory at the shapes of the op's spec, with the tiles of the table; each launch is compiled by
Triton's own ptxas instead. Run it where TRITON_INTERPRET is not set.
"""

import argparse
import hashlib
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

# kernels.py lies beside this script and would pass for Hugging Face's package of that name, which transformers asks for.
sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch  # noqa: E402
import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from hybridize.kernels._core.launch import captured  # noqa: E402
from hybridize.kernels._core.spec import Case, OpSpec  # noqa: E402
from hybridize.kernels._core.table import SPECS, specs  # noqa: E402

TYPES = {
    torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64", torch.bool: "i1",
    torch.int8: "i8", torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip
OPTIONS = ("num_warps", "num_stages")
# Of one block, in bytes: the limit is the card's, by compute capability.
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}


def signature(kernel: Any, arguments: tuple[Any, ...], constants: dict[str, Any]) -> tuple[dict, dict, dict]:
    """(types, constants, alignments) of a launch, as Triton specialises it: 1 and None are constants, 16 divides or not."""
    names = kernel.arg_names
    given = dict(zip(names, arguments, strict=False)) | {k: v for k, v in constants.items() if k not in OPTIONS}
    missing = [p.name for p in kernel.params if p.name not in given]
    if missing:
        raise TypeError(f"{kernel.fn.__name__}: no value for {', '.join(missing)}")
    types, constant, aligned = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        value = given[parameter.name]
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            types[parameter.name], constant[(index,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            types[parameter.name], aligned[(index,)] = "*" + TYPES[value.dtype], [["tt.divisibility", 16]]
        elif isinstance(value, bool):
            types[parameter.name] = "u1"
        elif isinstance(value, int):
            types[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                aligned[(index,)] = [["tt.divisibility", 16]]
        else:
            types[parameter.name] = "fp32"
    return types, constant, aligned


def usage(compiled: Any) -> dict[str, int]:
    """Registers of a thread, bytes of a thread's stack (spills), bytes of shared memory of a block."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        text = subprocess.run([tool, "-res-usage", cubin.name], capture_output=True, text=True, check=True).stdout
    registers, stack = re.findall(r"REG:(\d+) STACK:(\d+)", text)[0]
    return {"registers": int(registers), "spills": int(stack), "shared": int(compiled.metadata.shared)}


def run_backward(spec: OpSpec, inputs: dict[str, Any]) -> None:
    """The function on tensors without memory, and its backward where it has one."""
    tracked = {k: v.requires_grad_() if k in spec.grads and isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    found = spec.function(**tracked, impl="triton")
    results = [one for one in (found if isinstance(found, tuple) else (found,)) if one.requires_grad]
    if results:
        torch.autograd.backward(results, [torch.empty_like(one) for one in results])


def compile_case(spec: OpSpec, case: Case, dtype: torch.dtype, architecture: int, done: dict[str, Any]) -> None:
    """Compile each launch of a case that is not in `done` yet, and put it there."""

    def take(kernel: Any, arguments: tuple[Any, ...], constants: dict[str, Any]) -> None:
        types, constant, aligned = signature(kernel, arguments, constants)
        named = {kernel.arg_names[index]: value for (index,), value in constant.items()}
        key = hashlib.sha256(repr((kernel.fn.__name__, types, named, aligned, constants)).encode()).hexdigest()[:12]
        if key in done:
            done[key]["cases"].append(f"{spec.name}/{case.name}")
            return
        options = {name: constants[name] for name in OPTIONS if name in constants}
        source = ASTSource(kernel, types, constant, aligned)
        compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
        shown = {name: value for name, value in named.items() if isinstance(value, (int, str, bool))}
        done[key] = {
            "kernel": kernel.fn.__name__, "cases": [f"{spec.name}/{case.name}"], "dtype": TYPES[dtype], "constants": shown,
            **options, **usage(compiled),
        }  # fmt: skip

    with captured(take, architecture):
        run_backward(spec, spec.make_inputs(case.sizes, dtype, "meta", 0))


def main() -> int:
    """Compile; print one line a kernel; 1 if one does not fit."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, default=90, choices=sorted(SHARED_MEMORY))
    parser.add_argument("--op", action="append", choices=sorted(SPECS))
    parser.add_argument("--dtype", action="append", choices=("bf16", "fp16", "fp32"))
    parser.add_argument("--few", action="store_true", help="the first and the last shape of each function")
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    dtypes = {name: dtype for dtype, name in TYPES.items()}
    done: dict[str, Any] = {}
    for spec in specs(arguments.op):
        if "triton" in spec.impls:
            for case in spec.shapes[:1] + spec.shapes[-1:] if arguments.few else spec.shapes:
                for name in arguments.dtype or ["bf16"]:
                    compile_case(spec, case, dtypes[name], arguments.arch, done)
    limit, bad = SHARED_MEMORY[arguments.arch], 0
    for row in done.values():
        fits = row["shared"] <= limit
        bad += not fits
        sys.stdout.write(
            f"{row['kernel']:28} {row['registers']:4} registers {row['spills']:5} B spilled {row['shared'] / 1024:6.1f} KB"
            f"{'' if fits else ' TOO MUCH'}  {row['dtype']} {row['constants']}\n"
        )
    arguments.json.write_text(json.dumps(list(done.values()), indent=1) + "\n")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
