"""What the Triton kernels share.

Under the interpreter (TRITON_INTERPRET=1, on a CPU) bf16 arithmetic is silently wrong and stores to bf16 truncate. So every
kernel widens what it loads, products of narrow operands go through `kdot`, and bf16 is tested on GPUs alone.
"""

import triton
import triton.language as tl

from hybridize.kernels._core.launch import INTERPRETED as _INTERPRETED

INTERPRETED = tl.constexpr(_INTERPRETED)


@triton.jit
def kdot(a, b, PRECISION: tl.constexpr):
    """a [M, K] @ b [K, N] summed in fp32; M, N, K at least 16. PRECISION ("ieee", "tf32", "tf32x3") is for fp32 operands."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION, out_dtype=tl.float32)


@triton.jit
def masked_exp(exponent, mask):
    """exp(exponent) where mask holds, else 0; the exponent is masked first, as 0 * inf is NaN."""
    return tl.where(mask, tl.exp(tl.where(mask, exponent, 0.0)), 0.0)


@triton.jit
def softplus(x):
    """log(1 + e^x), without overflow."""
    return tl.maximum(x, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(x)))


@triton.jit
def silu(x):
    """x * sigmoid(x)."""
    return x * tl.sigmoid(x)


@triton.jit
def silu_slope(x):
    """The derivative of silu at x."""
    s = tl.sigmoid(x)
    return s + x * s * (1.0 - s)
