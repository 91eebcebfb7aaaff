"""Latent decoding in Triton: the cache in parts, each read once by 32 heads, then combined by their log-sum-exps.

A program holds the queries of up to HEADS heads and runs over its part of one row's tokens. A tile of latents stands in shared
memory for both products. Rows share their own tokens out among the parts, so that short rows and long ones are all balanced.

Letters: B batch, H query heads, S cached tokens, R latent width, E rotary width, P parts.
"""

import torch
import triton
import triton.language as tl

from hybridize.kernels._core.launch import DEVICES, cdiv, empty, launch, power_of_2, tiles
from hybridize.kernels._core.library import registered
from hybridize.kernels._core.tl_utils import kdot

__all__ = ["DEVICES", "mla_decode", "refuses_mla_decode"]

# Two for each of an H200's processors. LEAST of the table are the fewest tokens that are worth a program of their own.
PROGRAMS = 264
LARGEST_RANK = 512
FLOATS = (torch.float16, torch.bfloat16, torch.float32)


@triton.jit
def mla_decode_split(
    q_latent, q_rope, latent, rope, starts, lengths, mask, out, lse,
    H, S, parts, scale, stride_qb, stride_qh, stride_qr, stride_tb, stride_th, stride_te,
    stride_cb, stride_cs, stride_cr, stride_kb, stride_ks, stride_ke, stride_mb, stride_ms,
    R: tl.constexpr, E: tl.constexpr, R_PAD: tl.constexpr, E_TILE: tl.constexpr, HEADS: tl.constexpr, KEYS: tl.constexpr,
    LEAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Outputs and log-sum-exps of one part, of HEADS heads of one row; out [B, H, P, R], lse [B, H, P]."""
    head = tl.program_id(0) * HEADS + tl.arange(0, HEADS)
    part = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    first, last = 0, S
    if starts is not None:
        first = tl.maximum(tl.load(starts + row).to(tl.int32), 0)
    if lengths is not None:
        last = tl.minimum(tl.load(lengths + row).to(tl.int32), S)
    each = tl.maximum(tl.cdiv(tl.cdiv(tl.maximum(last - first, 0), parts), KEYS) * KEYS, LEAST)
    begin = first + part * each
    end = tl.minimum(begin + each, last)

    r = tl.arange(0, R_PAD)
    head_in, r_in = head < H, r < R
    head_64 = head.to(tl.int64)
    if q_latent is not None:
        at_q = row * stride_qb + head_64[:, None] * stride_qh + r[None, :] * stride_qr
        q_c = tl.load(q_latent + at_q, mask=head_in[:, None] & r_in[None, :], other=0.0)
    top = tl.full([HEADS], float("-inf"), tl.float32)
    total = tl.zeros([HEADS], tl.float32)
    mixed = tl.zeros([HEADS, R_PAD], tl.float32)
    for start in range(begin, end, KEYS):
        key = start + tl.arange(0, KEYS)
        seen = key < end
        key_64 = key.to(tl.int64)
        if mask is not None:
            seen = seen & (tl.load(mask + row * stride_mb + key_64 * stride_ms, mask=seen, other=0) != 0)
        at_c = row * stride_cb + key_64[:, None] * stride_cs + r[None, :] * stride_cr
        c = tl.load(latent + at_c, mask=seen[:, None] & r_in[None, :], other=0.0)
        scores = tl.zeros([HEADS, KEYS], tl.float32)
        if q_latent is not None:
            scores += kdot(q_c, tl.trans(c), PRECISION)
        for e_start in tl.static_range(0, E, E_TILE):
            e = e_start + tl.arange(0, E_TILE)
            at_t = row * stride_tb + head_64[:, None] * stride_th + e[None, :] * stride_te
            q_k = tl.load(q_rope + at_t, mask=head_in[:, None] & (e < E)[None, :], other=0.0)
            at_k = row * stride_kb + key_64[:, None] * stride_ks + e[None, :] * stride_ke
            k = tl.load(rope + at_k, mask=seen[:, None] & (e < E)[None, :], other=0.0)
            scores += kdot(q_k, tl.trans(k), PRECISION)
        scores = tl.where(seen[None, :], scores * scale, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        # Nothing was seen yet: the difference of two infinities is no number.
        anchor = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp(scores - anchor[:, None])
        kept = tl.exp(top - anchor)
        total = total * kept + tl.sum(weights, 1)
        mixed = mixed * kept[:, None] + kdot(weights.to(c.dtype), c, PRECISION)
        top = new_top
    some = total > 0
    place = (row * H + head_64) * parts + part
    tl.store(lse + place, tl.where(some, top + tl.log(tl.where(some, total, 1.0)), float("-inf")), mask=head_in)
    mixed = mixed / tl.where(some, total, 1.0)[:, None]
    tl.store(
        out + place[:, None] * R + r[None, :], mixed.to(out.dtype.element_ty), mask=head_in[:, None] & r_in[None, :]
    )  # fmt: skip


@triton.jit
def mla_decode_combine(
    part_out, part_lse, out, lse, parts, R: tl.constexpr, PARTS_PAD: tl.constexpr, PARTS: tl.constexpr, COLUMNS: tl.constexpr
):
    """One head's parts [P, R] and [P] as one, COLUMNS of its outputs."""
    head = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    every = tl.arange(0, PARTS_PAD)
    sizes = tl.load(part_lse + head * parts + every, mask=every < parts, other=float("-inf"))
    top = tl.max(sizes, 0)
    anchor = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(tl.exp(sizes - anchor), 0)
    some = total > 0
    mixed = tl.zeros([COLUMNS], tl.float32)
    for start in range(0, parts, PARTS):
        part = start + tl.arange(0, PARTS)
        share = tl.exp(tl.load(part_lse + head * parts + part, mask=part < parts, other=float("-inf")) - anchor)
        at = (head * parts + part.to(tl.int64))[:, None] * R + column[None, :]
        read = tl.load(part_out + at, mask=(part < parts)[:, None] & (column < R)[None, :], other=0.0)
        mixed += tl.sum(share[:, None] * read, 0)
    mixed = mixed / tl.where(some, total, 1.0)
    tl.store(out + head * R + column, mixed.to(out.dtype.element_ty), mask=column < R)
    if tl.program_id(1) == 0:
        tl.store(lse + head, tl.where(some, anchor + tl.log(tl.where(some, total, 1.0)), float("-inf")))


def _launch(q_latent, q_rope, latent, rope, starts, lengths, mask, scale):
    B, H, E = q_rope.shape
    S, R = latent.shape[1:]
    device = q_rope.device
    chosen = tiles("mla_decode_split", device, R=R, BYTES=q_rope.element_size(), MASKED=int(mask is not None))
    chosen["HEADS"] = min(chosen["HEADS"], max(16, power_of_2(H)))
    blocks = cdiv(H, chosen["HEADS"])
    parts = max(1, min(cdiv(PROGRAMS, max(1, B * blocks)), cdiv(S, chosen["LEAST"])))
    out, lse = empty((B, H, R), q_rope.dtype, device), empty((B, H), torch.float32, device)
    part_out, part_lse = out, lse
    if parts > 1:
        part_out = empty((B, H, parts, R), torch.float32, device)
        part_lse = empty((B, H, parts), torch.float32, device)
    launch(
        mla_decode_split, (blocks, parts, B), q_latent, q_rope, latent, rope, starts, lengths,
        None if mask is None else mask.view(torch.int8), part_out, part_lse, H, S, parts, scale,
        *((0, 0, 0) if q_latent is None else q_latent.stride()), *q_rope.stride(), *latent.stride(), *rope.stride(),
        *((0, 0) if mask is None else mask.stride()),
        R=R, E=E, R_PAD=max(16, power_of_2(R)), E_TILE=min(128, max(16, power_of_2(E))),
        PRECISION="ieee", **chosen,
    )  # fmt: skip
    if parts > 1:
        combine = tiles("mla_decode_combine", device)
        launch(
            mla_decode_combine, (B * H, cdiv(R, combine["COLUMNS"])), part_out, part_lse, out, lse, parts,
            R=R, PARTS_PAD=power_of_2(parts), **combine,
        )  # fmt: skip
    return out, lse


def _fake(q_latent, q_rope, latent, rope, starts, lengths, mask, scale):
    return q_rope.new_empty((*q_rope.shape[:2], latent.shape[2])), q_rope.new_empty(q_rope.shape[:2], dtype=torch.float32)


mla_decode = registered(
    "mla_decode",
    "(Tensor? q_latent, Tensor q_rope, Tensor latent, Tensor rope, Tensor? starts, Tensor? lengths, Tensor? mask, float scale)"
    " -> (Tensor, Tensor)",
    _launch,
    _fake,
)


def refuses_mla_decode(q_latent, q_rope, latent, rope, starts, lengths, mask, scale):
    """Why the kernels cannot run these arguments, or None."""
    if q_rope.dtype not in FLOATS:
        return f"got {str(q_rope.dtype).removeprefix('torch.')}, expected fp16, bf16 or fp32"
    if latent.shape[2] > LARGEST_RANK:
        return f"got a latent of {latent.shape[2]}, expected at most {LARGEST_RANK}"
    tensors = (q_latent, q_rope, latent, rope)
    if any(one is not None and one.dtype != q_rope.dtype for one in tensors):
        return "got queries and a cache of several dtypes, expected one"
    if torch.is_grad_enabled() and any(one is not None and one.requires_grad for one in tensors):
        return "got tensors that require gradients, expected none: decoding has no backward in Triton"
    return None
