"""Gated DeltaNet beside Qwen3's attention: qwen3_5_text, its attention's gate at one half.

Three things differ from the hybrid, and each is undone exactly, in whatever dtype the hybrid is stored:

    a gate on attention's output        its rows are zeros, sigmoid(0) = 1/2, and o_proj is doubled
    norms multiply by 1 + weight        w - 1 is stored; where that would round, w is first scaled by a power of two, which
                                        the columns of what reads the norm give back
    keys and values of every head       grouped rows of a Gated DeltaNet are repeated
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from hybridize.families import family_of, head_dim
from hybridize.native.target import Made, Specs, Target, carried, each_layer

# What our mixer may have and the native class has not.
PLAIN = {"proj_bias": False, "qk_norm": False, "rope": False, "beta_max": 1}
POWERS = sorted(range(-12, 13), key=abs, reverse=True)
"""Of two, by which a rotary pair of the q-norm is raised and the same pair of the k-norm lowered; 0 wins where it will do."""


class Qwen35(Target):
    """Attention with q/k-norms and Gated DeltaNet, a dense MLP."""

    model_type, architecture = "qwen3_5_text", "Qwen3_5ForCausalLM"
    about = "attention with its gate at 1/2 and Gated DeltaNet under its names"
    mixers = frozenset({"gdn"})
    served = {
        "transformers": architecture,
        "vLLM": architecture,
        "SGLang": architecture,
        "llama.cpp": "as qwen35, converted with --no-nextn",
    }
    by_interval = ("SGLang", "llama.cpp")
    """Engines that go by full_attention_interval alone: every n-th layer is attention, counted from the first, the n-th."""

    def obstacle(self, config: Any, mixers: Specs) -> str | None:
        recurrent = [spec for spec in mixers if spec["name"] == "gdn"]
        if other := sorted({spec["name"] for spec in mixers} - {"attention", "gdn"}):
            return f"it has attention and Gated DeltaNet, not {other[0]}"
        if not recurrent:
            return "no layer is a Gated DeltaNet: the base's own class holds it"
        if not family_of(config).qk_norm:
            return "the native class has q/k-norms in its attention layers, which the base has not"
        if getattr(config, "attention_bias", False):
            return "the base has biases in its attention, the native Gated DeltaNet has none"
        if config.hidden_act != "silu":
            return f"hidden_act is {config.hidden_act}, which the native class would use after the convolution instead of SiLU"
        if len(recurrent) == len(mixers):
            return "the native class needs at least one attention layer to generate"
        if any(spec["conv_tokens"] != recurrent[0]["conv_tokens"] for spec in recurrent):
            return "the native class has one conv_tokens for all layers"
        for spec in recurrent:
            if odd := [f"{key}: {spec[key]}".lower() for key, value in PLAIN.items() if spec[key] != value]:
                return f"the native Gated DeltaNet has no place for {odd[0]}"
            if spec["norm_eps"] not in (None, config.rms_norm_eps):
                return f"norm_eps is {spec['norm_eps']}, the native class takes the base's {config.rms_norm_eps}"
        return None

    def engine(self, engine: str, config: Any, mixers: Specs) -> tuple[bool, str]:
        if engine in self.by_interval and interval(mixers) is None:
            return False, "takes attention in every n-th layer, counted from the n-th, and no other order"
        return super().engine(engine, config, mixers)

    def config(self, config: Any, mixers: Specs) -> dict[str, Any]:
        spec = next(spec for spec in mixers if spec["name"] == "gdn")
        width, heads = head_dim(config), config.num_attention_heads
        return {
            **carried(config), "model_type": self.model_type, "architectures": [self.architecture], "head_dim": width,
            # Whoever is not told turns a quarter of a head; SGLang and llama.cpp look for it beside rope_parameters.
            "rope_parameters": {**config.rope_parameters, "partial_rotary_factor": 1.0}, "partial_rotary_factor": 1.0,
            **({"full_attention_interval": interval(mixers)} if interval(mixers) else {}),
            "layer_types": ["linear_attention" if spec["name"] == "gdn" else "full_attention" for spec in mixers],
            "linear_num_key_heads": heads, "linear_num_value_heads": heads, "linear_key_head_dim": width,
            "linear_value_head_dim": width, "linear_conv_kernel_dim": spec["conv_tokens"],
        }  # fmt: skip

    def tensors(self, config: Any, mixers: Specs, names: Iterable[str]) -> list[Made]:
        return [_tensor(config, mixers, name, index, part) for name, index, part in each_layer(names)]


def interval(mixers: Specs) -> int | None:
    """n where layers n, 2n, 3n, ... and no others are attention, counted from 1."""
    kept = [index + 1 for index, spec in enumerate(mixers) if spec["name"] == "attention"]
    return kept[0] if kept == list(range(kept[0], len(mixers) + 1, kept[0])) else None


def _tensor(config: Any, mixers: Specs, name: str, index: int | None, part: str) -> Made:
    """Where one tensor of the hybrid goes; each goes to one place."""
    tied = config.tie_word_embeddings
    if index is None:
        if name == "lm_head.weight":
            return Made(name=name, sources=(name, "model.norm.weight"), make=_behind_norm)
        if name == "model.norm.weight":
            # A tied head is the embedding too, whose columns are not free to scale.
            return Made(name=name, sources=(name,), make=_less_one if tied else _norm)
        return Made(name=name, sources=(name,))
    layer = f"model.layers.{index}."
    attention = f"{layer}self_attn."
    outer, _, leaf = part.partition(".")
    if outer in ("input_layernorm", "post_attention_layernorm"):
        return Made(name=name, sources=(name,), make=_norm)
    if outer == "mlp":
        if leaf == "down_proj.weight":
            return Made(name=name, sources=(name,))
        return Made(name=name, sources=(name, f"{layer}post_attention_layernorm.weight"), make=_behind_norm)
    before = f"{layer}input_layernorm.weight"
    if mixers[index]["name"] == "gdn":
        repeat = _repeated(config, mixers[index])
        make: Callable[..., Tensor] | None = None
        sources = (name, before) if leaf.startswith("in_proj") else (name,)
        if leaf.startswith("in_proj"):
            make = _then(repeat, _behind_norm) if leaf == "in_proj_qkv.weight" else _behind_norm
        elif leaf == "conv1d.weight" and repeat is not None:
            make = repeat
        return Made(name=f"{layer}linear_attn.{leaf}", sources=sources, make=make)
    norms = {"q": f"{attention}q_norm.weight", "k": f"{attention}k_norm.weight"}
    width = head_dim(config)
    match leaf:
        case "q_proj.weight":
            return Made(name=name, sources=(name, before, norms["q"]), make=lambda *found: _ungated(_signed(*found), width))
        case "k_proj.weight":
            return Made(name=name, sources=(name, before, norms["k"]), make=_signed)
        case "v_proj.weight":
            return Made(name=name, sources=(name, before), make=_behind_norm)
        case "o_proj.weight":
            return Made(name=name, sources=(name,), make=_doubled)
        case "q_norm.weight":
            return Made(name=name, sources=(norms["q"], norms["k"]), make=lambda q, k: _balanced(q, k)[0])
        case "k_norm.weight":
            return Made(name=name, sources=(norms["k"], norms["q"]), make=lambda k, q: _balanced(q, k)[1])
    return Made(name=name, sources=(name,))


def _is_exact(weight: Tensor) -> Tensor:
    """Where weight - 1 is a number of the weight's dtype, bool."""
    return _less_one(weight).double() + 1 == weight.double()


def _less_one(weight: Tensor) -> Tensor:
    return (weight.double() - 1).to(weight.dtype)


def _scale(weight: Tensor) -> Tensor:
    """Powers of two, with a sign, by which a norm's weight is multiplied so that 1 can be taken off without rounding.

    A product in [1/2, 1) has the bits it needs in any dtype; most weights of most models need no factor.
    """
    _, exponent = torch.frexp(weight.double())
    factor = torch.ldexp(torch.where(weight < 0, -1.0, 1.0).double(), -exponent)
    return torch.where(_is_exact(weight), 1.0, factor)


def _norm(weight: Tensor) -> Tensor:
    return _less_one((weight.double() * _scale(weight)).to(weight.dtype))


def _behind_norm(rows: Tensor, norm: Tensor) -> Tensor:
    """A linear's weight [out, in] whose input comes from a norm stored by `_norm`; no bit of it is lost."""
    # fp16 has no numbers as large as the factor of a tiny weight.
    wide = torch.promote_types(rows.dtype, torch.float32)
    return (rows.to(wide) / _scale(norm).to(wide)).to(rows.dtype)


def _signed(rows: Tensor, before: Tensor, norm: Tensor) -> Tensor:
    """`_behind_norm` of q_proj or k_proj; a row behind which the q/k-norm has a negative weight changes its sign with it."""
    sign = torch.where(norm < 0, -1.0, 1.0).to(rows.dtype)
    return _behind_norm(rows, before) * sign.repeat(len(rows) // len(norm))[:, None]


def _ungated(rows: Tensor, width: int) -> Tensor:
    """Each head's queries, then as many rows of its gate, which are zeros."""
    heads = rows.unflatten(0, (-1, width))
    return torch.cat([heads, torch.zeros_like(heads)], dim=1).flatten(0, 1)


def _doubled(rows: Tensor) -> Tensor:
    """o_proj behind a gate of one half."""
    return rows * 2


def _balanced(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """The q- and the k-norm as they are stored: |w| less one.

    Scores do not change when a rotary pair of one is multiplied and that of the other divided by a power of two. Where no
    power makes all four exact, the pair is rounded.
    """
    pairs = [weight.abs().unflatten(0, (2, -1)) for weight in (q, k)]
    chosen = torch.zeros_like(pairs[0][0], dtype=torch.float64)
    for power in POWERS:
        exact = [_is_exact(pair * 2.0**sign) for pair, sign in zip(pairs, (power, -power), strict=True)]
        chosen = torch.where(torch.cat(exact).all(0), float(power), chosen)
    factor = torch.exp2(chosen).to(q.dtype)
    return _less_one(pairs[0] * factor).flatten(), _less_one(pairs[1] / factor).flatten()


def _repeated(config: Any, spec: dict[str, Any]) -> Callable[[Tensor], Tensor] | None:
    """Repeats grouped rows [q | k | v] for every query head: head h reads group h // (H / n_kv). None where there is no need."""
    width, heads, groups = head_dim(config), config.num_attention_heads, config.num_key_value_heads
    if spec["heads"] == "expanded" or heads == groups:
        return None

    def repeated(rows: Tensor) -> Tensor:
        q, k, v = rows.split([heads * width, groups * width, groups * width])
        k, v = (part.unflatten(0, (groups, width)).repeat_interleave(heads // groups, 0).flatten(0, 1) for part in (k, v))
        return torch.cat([q, k, v])

    return repeated


def _then(first: Callable[[Tensor], Tensor] | None, second: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return second if first is None else lambda rows, *more: second(first(rows), *more)
