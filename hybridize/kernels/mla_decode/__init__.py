"""One new token of latent attention, in the latent space: every head reads the same latents and rotary keys.

    score_hs = scale (q_latent_h . c_s + q_rope_h . k_s),   out_h = sum_s softmax_s(score_h)_s c_s

The queries have been taken into the latent space by the keys' up-projection, and the output still is to be taken out of it by
the values'. So each cached token is read once for all heads, as a key and as a value.

Letters: B batch, H query heads, S cached tokens, R latent width, E rotary width.
"""

import torch

from hybridize.errors import ConfigError
from hybridize.kernels._core.dispatch import fast_path
from hybridize.kernels.mla_decode.torch_impl import mla_decode_torch

__all__ = ["mla_decode"]

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def mla_decode(
    q_latent_BHR,
    q_rope_BHE,
    latent_BSR,
    rope_BSE,
    starts_B=None,
    lengths_B=None,
    mask_BS=None,
    scale=1.0,
    impl="auto",
):
    """Attend from one token a row to what the cache holds; return latent outputs and log-sum-exps.

    score_hs = scale (q_latent_h . c_s + q_rope_h . k_s),   out_h = sum_s softmax_s(score_h)_s c_s

    A token counts where starts <= s < lengths and the mask is True. Tokens that do not count are not read: they may hold NaN.

    Args:
        q_latent_BHR: queries in the latent space, [B, H, R], fp16 | bf16 | fp32 | fp64; None where latents are values alone.
        q_rope_BHE: rotated queries, [B, H, E], dtype of the cache.
        latent_BSR: latents, keys and values at once, [B, S, R], any strides.
        rope_BSE: rotated keys, [B, S, E], any strides.
        starts_B: integers, [B], the first token of each row, as with padding on the left; None is 0.
        lengths_B: integers, [B], one past the last token of each row; None is S.
        mask_BS: bool, [B, S], True is seen; None sees all.
        scale: factor of the scores.
        impl: "auto", "torch" or "triton"; see `hybridize.kernels._core.dispatch`.

    Returns:
        out_BHR: means of latents, dtype of the queries; 0 for a row without tokens.
        lse_BH: log-sum-exps of the scores, natural, fp32 (fp64 for fp64); -inf for a row without tokens.

    Raises:
        ConfigError: a shape, a dtype, or an implementation that cannot run.

    Numerics: scores, softmax and sums in fp32 (fp64 for fp64); the fast path rounds softmax weights to the cache's dtype. Only
        the PyTorch path is differentiable.
    Cost: 2 B S H (2 R + E) FLOP; reads B S (R + E) numbers.
    Source: DeepSeek-V2, arXiv 2405.04434, section 2.1 and appendix C (absorbed projections); splits of the cache that are
        combined by their log-sum-exps as in Flash-Decoding (Dao et al., 2023).
    """
    _check(q_latent_BHR, q_rope_BHE, latent_BSR, rope_BSE, starts_B, lengths_B, mask_BS)
    arguments = (q_latent_BHR, q_rope_BHE, latent_BSR, rope_BSE, starts_B, lengths_B, mask_BS, scale)
    if fast := fast_path("mla_decode", "mla_decode", impl, *arguments):
        return fast(*arguments)
    return mla_decode_torch(*arguments)


def _check(q_latent_BHR, q_rope_BHE, latent_BSR, rope_BSE, starts_B, lengths_B, mask_BS):
    if q_rope_BHE.dim() != 3 or q_rope_BHE.dtype not in FLOATS:
        raise ConfigError(
            f"run mla_decode: q_rope_BHE: got {q_rope_BHE.dtype} {tuple(q_rope_BHE.shape)}, expected floats [B, H, E]."
        )
    if latent_BSR.dim() != 3:
        raise ConfigError(f"run mla_decode: latent_BSR: got shape {tuple(latent_BSR.shape)}, expected [B, S, R].")
    B, H, E = q_rope_BHE.shape
    S, R = latent_BSR.shape[1:]
    wanted = {
        "q_latent_BHR": (q_latent_BHR, (B, H, R)), "latent_BSR": (latent_BSR, (B, S, R)), "rope_BSE": (rope_BSE, (B, S, E)),
        "starts_B": (starts_B, (B,)), "lengths_B": (lengths_B, (B,)), "mask_BS": (mask_BS, (B, S)),
    }  # fmt: skip
    for name, (found, shape) in wanted.items():
        if found is None:
            continue
        kind, fits = "integers", not (found.dtype.is_floating_point or found.dtype == torch.bool)
        if name == "mask_BS":
            kind, fits = "bool", found.dtype == torch.bool
        elif name not in ("starts_B", "lengths_B"):
            kind, fits = str(q_rope_BHE.dtype), found.dtype == q_rope_BHE.dtype
        if tuple(found.shape) != shape or not fits:
            raise ConfigError(f"run mla_decode: {name}: got {found.dtype} {tuple(found.shape)}, expected {kind} {shape}.")
