"""`ssd` and `ssd_step` in Triton: what they take, their place in autograd, and their ops of torch.library."""

import torch
from torch.autograd.function import once_differentiable

from hybridize.kernels._core.launch import DEVICES
from hybridize.kernels._core.library import registered
from hybridize.kernels.ssd.triton_backward import backward, backward_fake
from hybridize.kernels.ssd.triton_forward import forward, forward_fake, step, step_fake

__all__ = ["DEVICES", "refuses_ssd", "refuses_ssd_step", "ssd", "ssd_step"]

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
MOST = 128  # of P and N: one tile holds them
MOST_ROWS = 65535  # of the batch: CUDA's limit on the last two numbers of a grid

run_forward = registered(
    "ssd",
    "(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? state, Tensor? segments) -> (Tensor, Tensor, Tensor)",
    forward,
    forward_fake,
)
run_backward = registered(
    "ssd_backward",
    "(Tensor dy, Tensor dlast, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? segments, Tensor states, "
    "bool wants_first) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    backward,
    backward_fake,
)
run_step = registered(
    "ssd_step",
    "(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor(a!) state, Tensor? rows) -> Tensor",
    step,
    step_fake,
)


class _SSD(torch.autograd.Function):
    """Saves the inputs and the states before the chunks."""

    @staticmethod
    def forward(ctx, x, dt, A, B, C, D, state, segments):
        y, last, states = run_forward(x, dt, A, B, C, D, state, segments)
        ctx.save_for_backward(x, dt, A, B, C, D, segments, states)
        return y, last

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dlast):
        *inputs, segments, states = ctx.saved_tensors
        wants_first = ctx.needs_input_grad[6]
        *grads, dD, dfirst = run_backward(dy, dlast, *inputs, segments, states, wants_first)
        return *grads, None if inputs[5] is None else dD, dfirst if wants_first else None, None


def ssd(x_BTXP, dt_BTH, A_H, B_BTGN, C_BTMN, D_H, state_BHPN, segments_BT, chunk):
    """Run `ssd` in Triton; arguments and results as there, unchecked. Chunks are as long as the table of tiles says."""
    inputs = (x_BTXP, dt_BTH, A_H, B_BTGN, C_BTMN, D_H, state_BHPN)
    if torch.is_grad_enabled() and any(t.requires_grad for t in inputs if t is not None):
        return _SSD.apply(*inputs, segments_BT)
    return run_forward(*inputs, segments_BT)[:2]


def refuses_ssd(x_BTXP, dt_BTH, A_H, B_BTGN, C_BTMN, D_H, state_BHPN, segments_BT, chunk):
    """Why the kernels do not take these, or None."""
    return _refuses(x_BTXP, (x_BTXP, dt_BTH, A_H, D_H, state_BHPN), B_BTGN)


def ssd_step(x_BXP, dt_BH, A_H, B_BGN, C_BMN, D_H, state_BHPN, rows_B):
    """Run `ssd_step` in Triton; arguments and results as there, unchecked."""
    return run_step(x_BXP, dt_BH, A_H, B_BGN, C_BMN, D_H, state_BHPN, rows_B)


def refuses_ssd_step(x_BXP, dt_BH, A_H, B_BGN, C_BMN, D_H, state_BHPN, rows_B):
    """Why the kernel does not take these, or None."""
    if state_BHPN.stride(-1) != 1:
        return f"got a state whose last dim has stride {state_BHPN.stride(-1)}, expected 1"
    return _refuses(x_BXP, (x_BXP, dt_BH, A_H, D_H), B_BGN)


def _refuses(x, floats, B):
    for tensor in floats:
        if tensor is not None and tensor.dtype not in FLOATS:
            return f"got {str(tensor.dtype).removeprefix('torch.')}, expected float16, bfloat16 or float32"
    if x.shape[0] > MOST_ROWS:
        return f"got a batch of {x.shape[0]}, expected at most {MOST_ROWS}"
    for name, size in (("P", x.shape[-1]), ("N", B.shape[-1])):
        if size > MOST:
            return f"got {name} = {size}, expected at most {MOST}"
    return None
