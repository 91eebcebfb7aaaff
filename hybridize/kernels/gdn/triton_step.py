"""The kernel of `gdn_step`: the state is read and written once.

Letters: B batch, R rows of the state, H output heads, Q, G, X heads of q, k, v, N key dim, P value dim.
"""

import triton
import triton.language as tl


@triton.jit
def gdn_advance(
    q, k, v, g, beta, state, rows, y, heads, query_heads, key_heads, value_heads, N, P,
    stride_qb, stride_qh, stride_kb, stride_kh, stride_vb, stride_vh, stride_gb, stride_gh, stride_gn, stride_bb, stride_bh,
    stride_rows, stride_sr, stride_sh, stride_sn,
    KEYS: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """One token, for one head and some columns of its state."""
    columns, h, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    b = tl.cast(batch, tl.int64)
    row = b
    if rows is not None:
        row = tl.load(rows + b * stride_rows).to(tl.int64)
    n, p = tl.arange(0, KEYS), columns * COLUMNS + tl.arange(0, COLUMNS)
    there, within = n < N, p < P
    at = state + tl.maximum(row, 0) * stride_sr + h * stride_sh + n[:, None] * stride_sn + p[None, :]
    mask = there[:, None] & within[None, :] & (row >= 0)
    old = tl.load(at, mask=mask, other=0.0)
    query = tl.load(q + b * stride_qb + (h // (heads // query_heads)) * stride_qh + n, mask=there, other=0.0).to(tl.float32)
    key = tl.load(k + b * stride_kb + (h // (heads // key_heads)) * stride_kh + n, mask=there, other=0.0).to(tl.float32)
    value = tl.load(v + b * stride_vb + (h // (heads // value_heads)) * stride_vh + p, mask=within, other=0.0).to(tl.float32)
    strength = tl.load(beta + b * stride_bb + h * stride_bh).to(tl.float32)
    if CHANNELS:
        log_decay = tl.load(g + b * stride_gb + h * stride_gh + n * stride_gn, mask=there, other=0.0).to(tl.float32)
        old = old * tl.exp(log_decay)[:, None]
    else:
        old = old * tl.exp(tl.load(g + b * stride_gb + h * stride_gh).to(tl.float32))
    wrong = value - tl.sum(key[:, None] * old, axis=0)
    new = old + key[:, None] * (strength * wrong)[None, :]
    tl.store(at, new, mask=mask)
    out = tl.where(row >= 0, tl.sum(query[:, None] * new, axis=0), 0.0)
    tl.store(y + (b * heads + h) * P + p, out.to(y.dtype.element_ty), mask=within)
