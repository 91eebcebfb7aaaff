"""The causal convolution as a sum of K shifted products, in blocks of tokens that stay in cache.

The library's depthwise `conv1d` was measured equal forward, but it leaves a transposed output whose
copy costs as much again, and its backward is slower.

Letters: B batch, T tokens, S tokens of a block, C channels, K taps, K1 = K - 1 inputs kept.
"""

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

BLOCK_NUMBERS = 1 << 18  # numbers in a temporary of a block: 1 MiB in fp32


def _blocks(batch, tokens, channels):
    length = max(1, BLOCK_NUMBERS // (batch * channels))
    return [(start, min(start + length, tokens)) for start in range(0, tokens, length)]


def _shifted(padded_BTC, ids_BT, taps, start, stop, dtype):
    """For every tap what it reads, [B, S, C], and where that is the same document, or None."""
    block = padded_BTC[:, start : stop + taps - 1].to(dtype)
    inputs = [block[:, tap : tap + stop - start] for tap in range(taps)]
    if ids_BT is None:
        return inputs, [None] * taps
    ids = ids_BT[:, start : stop + taps - 1]
    here = ids[:, taps - 1 :]
    return inputs, [(ids[:, t : t + stop - start] == here)[..., None].to(dtype) for t in range(taps)]


def _sum(inputs, same, weight_CK, bias_C):
    out = inputs[-1] * weight_CK[:, -1]
    for tap, (shifted, kept) in enumerate(zip(inputs[:-1], same[:-1], strict=True)):
        out.addcmul_(shifted if kept is None else shifted * kept, weight_CK[:, tap])
    return out if bias_C is None else out.add_(bias_C)


def _forward(padded_BTC, weight_CK, bias_C, ids_BT, silu):
    (batch, length, channels), taps = padded_BTC.shape, weight_CK.shape[1]
    tokens = length - taps + 1
    y_BTC = padded_BTC.new_empty(batch, tokens, channels)
    for start, stop in _blocks(batch, tokens, channels):
        inputs, same = _shifted(padded_BTC, ids_BT, taps, start, stop, weight_CK.dtype)
        out = _sum(inputs, same, weight_CK, bias_C)
        y_BTC[:, start:stop] = F.silu(out, inplace=True) if silu else out
    return y_BTC


class _CausalConv(torch.autograd.Function):
    """Saves the inputs only; the sum before the activation is computed again per block."""

    @staticmethod
    def forward(ctx, padded_BTC, weight_CK, bias_C, ids_BT, silu):
        ctx.save_for_backward(padded_BTC, weight_CK, bias_C, ids_BT)
        ctx.silu = silu
        return _forward(padded_BTC, weight_CK, bias_C, ids_BT, silu)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_BTC):
        padded, weight, bias, ids = ctx.saved_tensors
        dtype, taps = weight.dtype, weight.shape[1]
        dpadded = torch.zeros_like(padded, dtype=dtype)
        dweight_KC = torch.zeros_like(weight.mT)
        dbias = None if bias is None else torch.zeros_like(bias)
        dy_BTC = dy_BTC.contiguous()
        batch, tokens, channels = dy_BTC.shape
        for start, stop in _blocks(batch, tokens, channels):
            inputs, same = _shifted(padded, ids, taps, start, stop, dtype)
            dout = dy_BTC[:, start:stop].to(dtype)
            if ctx.silu:
                out = _sum(inputs, same, weight, bias)
                gate = torch.sigmoid(out)
                # silu' = s + o s (1 - s) with s the sigmoid of o
                dout = dout * torch.addcmul(gate, out.mul_(gate), 1 - gate)
            for tap in range(taps):
                through = dout if same[tap] is None else dout * same[tap]
                dpadded[:, start + tap : stop + tap].addcmul_(through, weight[:, tap])
                dweight_KC[tap] += (through * inputs[tap]).sum((0, 1))
            if bias is not None:
                dbias += dout.sum((0, 1))
        return dpadded.to(padded.dtype), dweight_KC.mT, dbias, None, None


def conv_shifts(padded_BTC, weight_CK, bias_C, ids_BT, silu):
    """Convolve [B, K1 + T, C]; `ids_BT` holds the document of every padded token, or is None.

    Weight and bias are in the dtype of the sums; the output has the dtype of the inputs.
    """
    tracked = [t for t in (padded_BTC, weight_CK, bias_C) if t is not None]
    if torch.is_grad_enabled() and any(t.requires_grad for t in tracked):
        return _CausalConv.apply(padded_BTC, weight_CK, bias_C, ids_BT, silu)
    return _forward(padded_BTC, weight_CK, bias_C, ids_BT, silu)
