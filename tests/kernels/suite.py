"""What every op's tests are made of: inputs between guards, the float64 oracle, and comparison with it."""

import contextlib
import importlib.util
import sys
from pathlib import Path

import torch

from hybridize.kernels._core import dispatch, launch
from tests.tolerances import assert_close, rms_ratio

GUARD = 64
NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


def guarded(tensor):
    """The same values with NaN before and after them in memory, and a check that these are still there."""
    if not tensor.dtype.is_floating_point or not tensor.is_contiguous():
        return tensor, lambda: None
    memory = torch.full((tensor.numel() + 2 * GUARD,), torch.nan, dtype=tensor.dtype, device=tensor.device)
    inner = memory[GUARD : GUARD + tensor.numel()].view(tensor.shape)
    inner.copy_(tensor)

    def check():
        assert memory[:GUARD].isnan().all(), "written before the tensor"
        assert memory[GUARD + tensor.numel() :].isnan().all(), "written past the tensor"

    return inner, check


def named(spec, inputs, found):
    """Results by name, those written in place among them."""
    results = dict(zip(spec.outputs, found if isinstance(found, tuple) else (found,), strict=True))
    return results | {name: inputs[name] for name in spec.in_place}


def runner(spec, impl):
    """run(inputs) -> results by name; inputs are not changed."""

    def run(inputs):
        own = {k: v.clone() if k in spec.in_place and isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
        with torch.no_grad():
            return named(spec, own, spec.function(**own, impl=impl))

    return run


def oracle(spec, inputs):
    """What the inputs' values, as they are rounded, give in float64; leaves for the gradients among them."""
    wide = {}
    for name, value in inputs.items():
        if isinstance(value, torch.Tensor) and value.dtype.is_floating_point:
            value = value.detach().cpu().double().clone()
            value.requires_grad_(name in spec.grads)
        elif isinstance(value, torch.Tensor):
            value = value.cpu()
        wide[name] = value
    return wide, named(spec, wide, spec.reference(**wide))


def compare(actual, expected, row, grad=False):
    """Fail beyond the tolerance; the error otherwise."""
    if expected is None:
        assert actual is None
        return 0.0
    assert_close(actual.cpu(), expected, row, grad)
    return rms_ratio(actual.cpu(), expected)


def check_case(spec, case, dtype, impl, device="cpu", row=None):
    """Forward without gradients, forward with them and every gradient against the oracle; returns the largest error."""
    row = row or NAMES[dtype]
    inputs, checks = {}, []
    for name, value in spec.make_inputs(case.sizes, dtype, device, 0).items():
        if isinstance(value, torch.Tensor):
            value, check = guarded(value)
            checks.append(check)
        inputs[name] = value
    wide, expected = oracle(spec, inputs)
    with launch.overridden(dict(spec.tiles) if device == "cpu" else {}), launch.poisoned():
        found = runner(spec, impl)(inputs)
        errors = [compare(found[name], value, row) for name, value in expected.items()]
        if spec.grads:
            errors += check_gradients(spec, inputs, wide, expected, impl, row)
    for check in checks:
        check()
    return max(errors)


def check_gradients(spec, inputs, wide, expected, impl, row):
    leaves = {k: v.detach().requires_grad_() if k in spec.grads and v is not None else v for k, v in inputs.items()}
    found = named(spec, leaves, spec.function(**leaves, impl=impl))
    generator = torch.Generator().manual_seed(1)
    pairs, errors = [], []
    for name, value in expected.items():
        errors.append(compare(found[name], value, row))
        if value is not None and value.requires_grad:
            pairs.append((found[name], value, torch.randn(value.shape, generator=generator, dtype=torch.float64)))
    if not pairs:
        return errors
    torch.autograd.backward([a for a, _, _ in pairs], [g.to(a) for a, _, g in pairs])
    torch.autograd.backward([b for _, b, _ in pairs], [g.to(a).cpu().double() for a, _, g in pairs])
    for name in spec.grads:
        if leaves[name] is not None:
            grad, want = leaves[name].grad, wide[name].grad
            want = torch.zeros_like(wide[name]) if want is None else want
            errors.append(compare(grad, want, f"{row} decay" if name in spec.decay_grads else row, grad=True))
    return errors


def check_invariant(spec, name, dtype, impl, device="cpu"):
    row = NAMES.get(dtype, "fp64")

    def make(**sizes):
        seed = sizes.pop("seed", 0)
        inputs = spec.make_inputs(sizes, dtype, device, seed)
        if dtype != torch.float64:
            return inputs
        return {k: v.double() if isinstance(v, torch.Tensor) and v.dtype.is_floating_point else v for k, v in inputs.items()}

    def close(actual, expected):
        assert_close(actual, expected, row)

    with launch.overridden(dict(spec.tiles)), launch.poisoned():
        spec.invariants[name](runner(spec, impl), close, make)


@contextlib.contextmanager
def planted(spec, bug, folder):
    """The op's Triton implementation with a fault in its source, for the time of the block."""
    package = Path(sys.modules[type(spec).__module__].__file__).parents[1] / spec.op
    files = [path for path in sorted(package.glob("triton*.py")) if bug.old in path.read_text(encoding="utf-8")]
    assert len(files) == 1, f"{bug.old!r} stands in {len(files)} files"
    assert files[0].read_text(encoding="utf-8").count(bug.old) == 1, f"{bug.old!r} is not there exactly once"
    # Every file of the implementation is copied under names of its own, so that they import each other's copies.
    stems = {path.stem: f"planted_{spec.op}_{path.stem}" for path in package.glob("triton*.py")}
    for path in package.glob("triton*.py"):
        text = path.read_text(encoding="utf-8")
        text = text.replace(bug.old, bug.new) if path == files[0] else text
        for stem, alias in stems.items():
            text = text.replace(f"hybridize.kernels.{spec.op}.{stem} import", f"{alias} import")
        (folder / f"{stems[path.stem]}.py").write_text(text, encoding="utf-8")
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    before = dispatch.MODULES.pop((spec.op, "triton"), None)
    try:
        dispatch.MODULES[spec.op, "triton"] = importlib.import_module(stems["triton_impl"])
        yield
    finally:
        dispatch.MODULES.pop((spec.op, "triton"), None)
        if before is not None:
            dispatch.MODULES[spec.op, "triton"] = before
        sys.path.remove(str(folder))
        for alias in stems.values():
            sys.modules.pop(alias, None)
