"""-log p of each token from hidden states, without ever holding the logits of more than a few hundred tokens.

`linear_cross_entropy` takes a mean, whose slope is known at once. A loss that puts tokens together in another way, as DPO
does by sequence, has its slope only when all of them are there: here the logits are made again in the backward pass.

Letters: B batch, T tokens, N tokens that count, D width, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

HALF = (torch.bfloat16, torch.float16)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in fp32 (fp64 for fp64), on the tensor cores where both are of half precision there."""
    if a.is_cuda and b.dtype in HALF:
        return torch.mm(a.to(b.dtype), b, out_dtype=torch.float32)
    wide = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    return a.to(wide) @ b.to(wide)


class _TokenNll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, head_VD: Tensor, labels_N: Tensor, chunk: int) -> Tensor:
        parts = []
        for x, labels in zip(x_ND.split(chunk), labels_N.split(chunk), strict=True):
            logits = _product(x, head_VD.T)
            parts.append(torch.nn.functional.cross_entropy(logits, labels, reduction="none"))
        ctx.save_for_backward(x_ND, head_VD, labels_N)
        ctx.chunk = chunk
        return torch.cat(parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, head_VD, labels_N = ctx.saved_tensors
        grad_x = torch.empty_like(x_ND) if ctx.needs_input_grad[0] else None
        grad_head = torch.zeros(head_VD.shape, dtype=grad_N.dtype, device=head_VD.device) if ctx.needs_input_grad[1] else None
        for start in range(0, len(x_ND), ctx.chunk):
            at = slice(start, start + ctx.chunk)
            slope = _product(x_ND[at], head_VD.T).softmax(-1)
            place = labels_N[at, None]
            slope.scatter_add_(-1, place, slope.new_full(place.shape, -1.0)).mul_(grad_N[at, None])
            if grad_x is not None:
                grad_x[at] = _product(slope, head_VD)
            if grad_head is not None:
                grad_head += _product(slope.T, x_ND[at])
        return grad_x, None if grad_head is None else grad_head.to(head_VD.dtype), None, None


def linear_token_nll(hidden_ND: Tensor, head_VD: Tensor, labels_N: Tensor, chunk_tokens: int = 256) -> Tensor:
    """-log softmax(W h)[label] of each token.

    Args:
        hidden_ND: final hidden states, [N, D], bf16 | fp16 | fp32 | fp64.
        head_VD: output head, [V, D]; a frozen one costs no gradient.
        labels_N: the token each should predict, [N], int64.
        chunk_tokens: tokens whose logits exist at once.

    Returns:
        [N], fp32 (fp64 for fp64 input), in nats.

    Numerics: logits, softmax and the head's gradient in fp32.
    Cost: time 2 N V D FLOP, and 6 in the backward pass, 4 with a frozen head; 2 * chunk_tokens * V numbers of memory.
    """
    if not len(hidden_ND):
        return hidden_ND.sum(-1).to(torch.promote_types(hidden_ND.dtype, torch.float32))
    # Autocast would turn the fp32 products into bf16 ones.
    with torch.autocast(hidden_ND.device.type, enabled=False):
        return _TokenNll.apply(hidden_ND, head_VD, labels_N, chunk_tokens)
