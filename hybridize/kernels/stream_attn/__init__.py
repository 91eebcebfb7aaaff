"""Attention to the first tokens of a document and the last ones: sinks and a window, with grouped key/value heads.

    o_t = sum_s a_ts v_s,   a_t = softmax over visible s of scale <q_t, k_s>,
    s visible to t:  same document, s <= t, and (t - s < window or position of s in its document < sink)

Letters: B batch, H query heads, G key/value heads, T tokens, S slots, D head width.
"""

import torch
import torch.nn.functional as F

from hybridize.errors import ConfigError
from hybridize.kernels._core.dispatch import fast_path
from hybridize.kernels.stream_attn.torch_impl import block_attention

__all__ = ["stream_attn", "stream_attn_step"]


def stream_attn(
    q_BHTD, k_BGTD, v_BGTD, sink, window, segments_BT=None, scale=None, dropout=0.0, impl="auto"
):  # fmt: skip
    """Attend to the sinks and the window of each token.

    Args:
        q_BHTD: queries, rotated, [B, H, T, D], fp16 | bf16 | fp32 | fp64.
        k_BGTD: keys, rotated to their true position, [B, G, T, D], G divides H; head h reads h // (H / G).
        v_BGTD: values, [B, G, T, D].
        sink: first tokens of a document that all its tokens see, >= 0.
        window: last tokens that a token sees, itself counted, >= 1.
        segments_BT: integer document ids, [B, T], non-decreasing along T, or None for one document. Left padding is a document.
        scale: of the scores; None is D^-1/2.
        dropout: share of the weights that are dropped.
        impl: "auto", "torch", "triton" or "flex".

    Returns:
        o_BHTD: dtype of v.

    Raises:
        ConfigError: a shape, a dtype, a number out of range, or an `impl` that cannot run.

    Numerics: scores, softmax and sums in fp32 (fp64 for fp64 inputs); weights are rounded to the dtype of v before they meet it.
        Under autocast inputs are cast to its dtype first, as in PyTorch's own attention.
    Cost: O(T (window + sink) D) a head; memory beside the result is O(T), in PyTorch O(block (window + sink)) more.
    Source: Xiao et al., arXiv 2309.17453, section 3.2; rows in blocks with a running softmax after Dao, arXiv 2307.08691.
    """
    _check_attention("stream_attn", ("q_BHTD", q_BHTD), ("k_BGTD", k_BGTD), ("v_BGTD", v_BGTD))
    batch, _, tokens, width = q_BHTD.shape
    if k_BGTD.shape[2] != tokens:
        raise ConfigError(f"run stream_attn: k_BGTD: got {k_BGTD.shape[2]} tokens, expected the {tokens} of q_BHTD.")
    if sink < 0 or window < 1:
        raise ConfigError(f"run stream_attn: sink and window: got {sink} and {window}, expected >= 0 and >= 1.")
    if segments_BT is not None and (tuple(segments_BT.shape) != (batch, tokens) or segments_BT.dtype.is_floating_point):
        raise ConfigError(
            f"run stream_attn: segments_BT: got {segments_BT.dtype} {tuple(segments_BT.shape)}, "
            f"expected integers of shape {(batch, tokens)}."
        )
    q, k, v = _autocast(q_BHTD, k_BGTD, v_BGTD)
    scale = width**-0.5 if scale is None else float(scale)
    if fast := fast_path("stream_attn", "stream_attn", impl, q, k, v, sink, window, segments_BT, scale, dropout):
        return fast(q, k, v, sink, window, segments_BT, scale, dropout)

    def earlier(count):
        return torch.arange(min(count, sink), device=q.device)

    def attend(q, k, v, allowed, causal):
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=allowed, dropout_p=dropout, is_causal=causal, scale=scale, enable_gqa=True
        )

    return block_attention(q, k, v, window, lambda place: place < sink, earlier, segments_BT, attend)


@torch.no_grad()
def stream_attn_step(q_BHD, keys_BGSD, values_BGSD, counts_B=None, scale=None, impl="auto"):
    """Attend with one token to a ring of keys and values, in which its own already lie. Not differentiable.

    A ring holds in slot p the token at position p for p < sink + window, and that at p in slot sink + (p - sink) mod window
    from there on. What is held is what is visible, so that the order of slots says nothing.

    Args:
        q_BHD: queries, [B, H, D], fp16 | bf16 | fp32 | fp64.
        keys_BGSD: keys, [B, G, S, D], G divides H; head h reads h // (H / G). S >= 1.
        values_BGSD: values, [B, G, S, D].
        counts_B: how many slots of each row are filled, integers [B], 1 to S; None is all.
        scale: of the scores; None is D^-1/2.
        impl: "auto", "torch" or "triton".

    Returns:
        o_BHD: dtype of the values.

    Raises:
        ConfigError: a shape, a dtype, or an `impl` that cannot run.

    Numerics: as `stream_attn`.
    Cost: reads the ring once, O(S D) a head.
    Source: as `stream_attn`; slots split among programs after Flash-Decoding (Dao et al., 2023).
    """
    _check_attention("stream_attn_step", ("q_BHD", q_BHD[:, :, None]), ("keys_BGSD", keys_BGSD), ("values_BGSD", values_BGSD))
    if keys_BGSD.shape[2] == 0:
        raise ConfigError("run stream_attn_step: keys_BGSD: got 0 slots, expected the token's own at least.")
    if counts_B is not None and (tuple(counts_B.shape) != q_BHD.shape[:1] or counts_B.dtype.is_floating_point):
        raise ConfigError(
            f"run stream_attn_step: counts_B: got {counts_B.dtype} {tuple(counts_B.shape)}, "
            f"expected integers of shape {tuple(q_BHD.shape[:1])}."
        )
    q, keys, values = _autocast(q_BHD, keys_BGSD, values_BGSD)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if fast := fast_path("stream_attn", "stream_attn_step", impl, q, keys, values, counts_B, scale):
        return fast(q, keys, values, counts_B, scale)
    filled = None
    if counts_B is not None:
        filled = (torch.arange(keys.shape[2], device=q.device)[None] < counts_B[:, None])[:, None, None]
    return F.scaled_dot_product_attention(q[:, :, None], keys, values, attn_mask=filled, scale=scale, enable_gqa=True)[:, :, 0]


def _autocast(*tensors):
    """As PyTorch's attention does it: fp32 heads beside bf16 ones come of norms and rotations that autocast leaves alone."""
    kind = tensors[0].device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(one if one.dtype == torch.float64 else one.to(dtype) for one in tensors)


def _check_attention(op, *named):
    (_, q), (_, k), _ = named
    for name, one in named:
        if one.dim() != 4 or not one.dtype.is_floating_point:
            raise ConfigError(f"run {op}: {name}: got {one.dtype} {tuple(one.shape)}, expected floating heads of a batch.")
        if one.shape[0] != q.shape[0]:
            raise ConfigError(f"run {op}: {name}: got {one.shape[0]} rows, expected the {q.shape[0]} of {named[0][0]}.")
    if k.shape[1] < 1 or q.shape[1] % k.shape[1] or k.shape[3] != q.shape[3]:
        raise ConfigError(
            f"run {op}: {named[1][0]}: got shape {tuple(k.shape)}, expected heads that divide {q.shape[1]}, {q.shape[3]} wide."
        )
    if named[2][1].shape[:3] != k.shape[:3]:
        raise ConfigError(
            f"run {op}: {named[2][0]}: got shape {tuple(named[2][1].shape)}, expected {tuple(k.shape[:3])} in front."
        )
