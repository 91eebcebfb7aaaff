"""What vLLM's layers compute from their parameters on one GPU, token by token, in float64: written from vLLM's sources alone.

Sources: vLLM 0.33.0, layers/mamba/mamba_mixer2.py (forward, conv_ssm_forward), layers/mamba/gdn/qwen_gdn_linear_attn.py
(forward_cuda), models/llama.py (LlamaAttention), layers/mla.py (forward). `p` holds a GPU's parameters by vLLM's names; what
is returned is this GPU's summand of the layer's output.
"""

import torch
import torch.nn.functional as F


def linear(p, name, u):
    return F.linear(u, p[f"{name}.weight"], p.get(f"{name}.bias"))


def rms(x, weight, eps):
    return weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def convolved(p, u):
    """Depthwise, causal: the last tap meets the token itself; then SiLU."""
    weight = p["conv1d.weight"][:, 0]
    out = torch.zeros_like(u)
    for tap in range(weight.shape[1]):
        back = weight.shape[1] - 1 - tap
        out[back:] += u[: len(u) - back] * weight[:, tap]
    return F.silu(out + p.get("conv1d.bias", 0))


def mamba2(p, u, d, eps):
    inner = p["out_proj.weight"].shape[1]
    z, xBC, dt = linear(p, "in_proj", u).split([inner, 3 * inner, inner // d], dim=-1)
    x, B, C = (part.unflatten(-1, (-1, d)) for part in convolved(p, xBC).split(inner, dim=-1))
    if "q_norm.weight" in p:
        B, C = rms(B, p["k_norm.weight"], eps), rms(C, p["q_norm.weight"], eps)
    dt = F.softplus(dt + p["dt_bias"])
    state, ys = torch.zeros(inner // d, d, d, dtype=u.dtype), []
    for t in range(len(u)):
        state = state * torch.exp(dt[t] * p["A"])[:, None, None] + torch.einsum("h,hp,hn->hpn", dt[t], x[t], B[t])
        ys.append(torch.einsum("hpn,hn->hp", state, C[t]) + p["D"][:, None] * x[t])
    y = torch.stack(ys) * F.silu(z.unflatten(-1, (-1, d)))
    return linear(p, "out_proj", rms(y, p["norm.weight"].view(-1, d), eps).flatten(1))


def gdn(p, u, d, eps):
    inner = p["out_proj.weight"].shape[1]
    qkv, z = linear(p, "in_proj_qkvz", u).split([3 * inner, inner], dim=-1)
    b, a = linear(p, "in_proj_ba", u).chunk(2, dim=-1)
    q, k, v = (part.unflatten(-1, (-1, d)) for part in convolved(p, qkv).split(inner, dim=-1))
    q, k = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6) for x in (q, k))
    g, beta = -p["A_log"].exp() * F.softplus(a + p["dt_bias"]), b.sigmoid()
    state, ys = torch.zeros(inner // d, d, d, dtype=u.dtype), []
    for t in range(len(u)):
        state = state * g[t].exp()[:, None, None]
        new = beta[t][:, None] * (v[t] - torch.einsum("hk,hkv->hv", k[t], state))
        state = state + k[t][:, :, None] * new[:, None]
        ys.append(torch.einsum("hk,hkv->hv", q[t] * d**-0.5, state))
    y = rms(torch.stack(ys), p["norm.weight"], eps) * F.silu(z.unflatten(-1, (-1, d)))
    return linear(p, "out_proj", y.flatten(1))


def turned(x, angles):
    first, second = x.chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def softmax_over(scores, window):
    index = torch.arange(scores.shape[-1])
    distance = index[:, None] - index[None]
    return scores.masked_fill((distance < 0) | (distance >= window), -torch.inf).softmax(-1)


def attention(p, u, d, eps, inv_freq, window):
    inner = p["o_proj.weight"].shape[1]
    groups = (len(p["qkv_proj.weight"]) - inner) // 2
    q, k, v = (x.unflatten(-1, (-1, d)) for x in linear(p, "qkv_proj", u).split([inner, groups, groups], dim=-1))
    if "q_norm.weight" in p:
        q, k = rms(q, p["q_norm.weight"], eps), rms(k, p["k_norm.weight"], eps)
    angles = torch.arange(len(u))[:, None, None] * inv_freq
    q, k = turned(q, angles), turned(k, angles)
    k, v = (x.repeat_interleave(inner // groups, dim=1) for x in (k, v))
    weights = softmax_over(torch.einsum("thd,shd->hts", q, k) * d**-0.5, window)
    return linear(p, "o_proj", torch.einsum("hts,shd->thd", weights, v).flatten(1))


def latent(p, u, d, eps, inv_freq, rope, pairs):
    """MLA, every key and value made from the latents."""
    heads, read = p["o_proj.weight"].shape[1] // d, u
    q = linear(p, "q_proj", u).unflatten(-1, (heads, -1))
    if "k_proj.weight" in p:
        plain = rms(q, p["q_norm.weight"], eps)
        rotary = torch.einsum("thd,hrd->thr", plain, p["q_rope_proj.weight"].unflatten(0, (heads, -1)))
        keys = linear(p, "k_proj", u).unflatten(-1, (-1, d))
        read = torch.cat([u, rms(keys, p["k_norm.weight"], eps).flatten(1)], dim=-1)
    else:
        plain, rotary = q.split([d, rope], dim=-1)
    made = linear(p, "kv_a_proj_with_mqa", read)
    c, key = made[:, :-rope], made[:, -rope:]
    if "kv_a_layernorm.weight" in p:
        c = rms(c, p["kv_a_layernorm.weight"], 1e-6)
    c = F.pad(c, (0, p["kv_b_proj.weight"].shape[1] - c.shape[1]))
    angles = torch.arange(len(u))[:, None, None] * inv_freq[pairs]
    rotary, key = turned(rotary, angles), turned(key, angles[:, 0])
    k, v = linear(p, "kv_b_proj", c).unflatten(-1, (heads, -1)).split([d, d], dim=-1)
    scores = torch.einsum("thd,shd->hts", plain, k) + torch.einsum("thr,sr->hts", rotary, key)
    weights = softmax_over(scores * d**-0.5, len(u))
    return linear(p, "o_proj", torch.einsum("hts,shd->thd", weights, v).flatten(1))
