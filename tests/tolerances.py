"""The only tolerances of the suite: {row: (forward, gradient)} as a ratio of root mean squares."""

import torch

TOLERANCES = {
    "fp64": (1e-12, 1e-10),
    "fp32": (5e-6, 2e-5),
    "bf16": (8e-3, 1.5e-2),
    "fp16": (2e-3, 5e-3),
    # Gradients of decays, steps and gates: sums over all pairs of tokens of a chunk, of both signs.
    "fp32 decay": (5e-6, 5e-5),
    "fp16 decay": (2e-3, 1e-2),
    "bf16 decay": (8e-3, 2e-2),
    # fp32 on the tensor cores of a GPU, in three passes of TF32.
    "fp32 on a GPU": (5e-6, 2e-5),
    "fp32 on a GPU decay": (5e-6, 5e-5),
    # All of it in fp32, rounded once at the end.
    "bf16 result": (3e-3, 3e-3),
}


def rms_ratio(actual, expected):
    """||actual - expected|| / ||expected|| in fp64; the plain norm where `expected` is zero."""
    actual, expected = actual.detach().double(), expected.detach().double()
    scale = torch.linalg.vector_norm(expected)
    difference = torch.linalg.vector_norm(actual - expected)
    return (difference / scale if scale > 0 else difference).item()


def assert_close(actual, expected, row, grad=False):
    """Fail unless shapes agree, all is finite and the RMS ratio is within the bound of `row`."""
    bound = TOLERANCES[row][1 if grad else 0]
    assert actual.shape == expected.shape, f"shape {actual.shape}, expected {expected.shape}"
    assert torch.isfinite(actual).all(), "not finite"
    ratio = rms_ratio(actual, expected)
    assert ratio <= bound, f"RMS ratio {ratio:.3g} above {bound:.3g} ({row})"
