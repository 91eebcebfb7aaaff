"""Mamba2 beside attention: granitemoehybrid, without experts, its multipliers at one."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import Tensor

from hybridize.families import family_of, head_dim
from hybridize.native.target import Made, Specs, Target, carried, each_layer

# transformers masks padding in front of in_proj alone; what its bias says of padding goes through the convolution.
PADDING = "padding on the left reaches the first tokens where in_proj's bias on x, B or C is not 0"

# The first release of transformers whose Bamba and GraniteMoeHybrid norm each group, as servers and kernels always did; 5.16 to
# 5.22 norm all heads as one.
GROUPED = "5.23"


def no_groups() -> str | None:
    """Why the transformers installed here reads these classes otherwise, or None."""
    found = transformers.__version__
    if Version(found) >= Version(GROUPED):
        return None
    return f"transformers {found} norms all heads of this class as one, servers and {GROUPED} on norm each. Export with {GROUPED}"


def in_transformers(architecture: str, mixers: Specs) -> str:
    """How transformers runs one of these classes."""
    padding = f"; {PADDING}" if any(spec.get("proj_bias") for spec in mixers) else ""
    return f"{architecture}, from {GROUPED} on (earlier ones norm all heads as one){padding}"


def no_mamba2(config: Any, mixers: Specs) -> str | None:
    """What keeps layers of attention and Mamba2 from the classes of transformers that have both."""
    recurrent = [spec for spec in mixers if spec["name"] == "mamba2"]
    inner = config.num_attention_heads * head_dim(config)
    if other := sorted({spec["name"] for spec in mixers} - {"attention", "mamba2"}):
        return f"it has attention and Mamba2, not {other[0]}"
    if not recurrent:
        return "no layer is Mamba2: the base's own class holds it"
    if family_of(config).qk_norm:
        return "the base has q/k-norms, which no native Mamba2 hybrid has"
    if len(recurrent) == len(mixers):
        return "the native Mamba2 class needs at least one attention layer to generate"
    if inner % config.hidden_size:
        return f"heads x head_dim = {inner} is no multiple of hidden_size = {config.hidden_size}, as it needs to be"
    if any({**spec, "heads": ""} != {**recurrent[0], "heads": ""} for spec in recurrent):
        return "the native class has one set of Mamba2 options for all layers"
    if recurrent[0]["norm_eps"] not in (None, config.rms_norm_eps):
        return f"norm_eps is {recurrent[0]['norm_eps']}, the native class takes the base's {config.rms_norm_eps}"
    if config.hidden_act != "silu":
        return f"hidden_act is {config.hidden_act}, which the native class would use after the convolution instead of SiLU"
    if getattr(config, "mlp_bias", False):
        return "the base has biases in its MLP, the native class has none"
    return None


def mamba2_fields(config: Any, mixers: Specs) -> dict[str, Any]:
    """What both native classes call Mamba2's sizes. Every query head has x, B and C of its own: groups are repeated."""
    spec = next(spec for spec in mixers if spec["name"] == "mamba2")
    width, heads = head_dim(config), config.num_attention_heads
    return {
        "mamba_n_heads": heads, "mamba_d_head": width, "mamba_d_state": width, "mamba_n_groups": heads,
        "mamba_expand": heads * width // config.hidden_size, "mamba_d_conv": spec["conv_tokens"], "mamba_conv_bias": True,
        "mamba_proj_bias": spec["proj_bias"] or family_of(config).has_out_bias(config), "mamba_chunk_size": 256,
    }  # fmt: skip


def expanded(config: Any, spec: dict[str, Any]) -> dict[str, Callable[[Tensor], Tensor]]:
    """Functions that repeat grouped rows of in_proj and conv1d for every query head; empty where heads are expanded.

    [z | x | B | C | dt] with x and B of n_kv heads become the same of H heads: head h reads group h // (H / n_kv), as the
    base pairs them.
    """
    width, heads, groups = head_dim(config), config.num_attention_heads, config.num_key_value_heads
    if spec["heads"] == "expanded" or heads == groups:
        return {}
    inner, grouped = heads * width, groups * width

    def repeated(part: Tensor) -> Tensor:
        return part.unflatten(0, (groups, width)).repeat_interleave(heads // groups, dim=0).flatten(0, 1)

    def channels(rows: Tensor) -> Tensor:
        x, b, c = rows.split([grouped, grouped, inner])
        return torch.cat([repeated(x), repeated(b), c])

    def projection(rows: Tensor) -> Tensor:
        z, mixed, dt = rows.split([inner, 2 * grouped + inner, heads])
        return torch.cat([z, channels(mixed), dt])

    return {
        "in_proj.weight": projection, "in_proj.bias": projection, "conv1d.weight": channels, "conv1d.bias": channels,
    }  # fmt: skip


def mamba2_tensors(config: Any, spec: dict[str, Any], prefix: str, to: str, names: set[str]) -> list[Made]:
    """The tensors of one Mamba2 mixer under `to`; biases that the native class has and the mixer lacks are zeros."""
    found, repeat = [], expanded(config, spec)
    for name in sorted(names):
        if name.startswith(prefix):
            part = name.removeprefix(prefix)
            found.append(Made(name=to + part, sources=(name,), make=repeat.get(part)))
    if mamba2_fields(config, [spec])["mamba_proj_bias"]:
        for part in ("in_proj", "out_proj"):
            if f"{prefix}{part}.bias" not in names:
                weight = f"{prefix}{part}.weight"
                grow = repeat.get("in_proj.weight") if part == "in_proj" else None
                found.append(Made(name=f"{to}{part}.bias", sources=(weight,), make=_zeros(grow)))
    return found


def _zeros(grow: Callable[[Tensor], Tensor] | None) -> Callable[[Tensor], Tensor]:
    return lambda weight: torch.zeros_like((weight if grow is None else grow(weight))[:, 0])


def attention_biases(config: Any, prefix: str, names: set[str]) -> list[Made]:
    """o_proj's bias as zeros where the base has biases on q, k and v alone; the native classes have all four or none."""
    family = family_of(config)
    if not family.has_qkv_bias(config) or family.has_out_bias(config):
        return []
    return [Made(name=f"{prefix}o_proj.bias", sources=(f"{prefix}o_proj.weight",), make=_zeros(None))]


class GraniteMoeHybrid(Target):
    """Attention and Mamba2, rotary attention, a dense MLP with gate and up in one matrix."""

    model_type, architecture = "granitemoehybrid", "GraniteMoeHybridForCausalLM"
    about = "attention and Mamba2 under its names"
    mixers = frozenset({"mamba2"})
    served = {"transformers": architecture, "vLLM": architecture, "SGLang": architecture}
    unserved = {"llama.cpp": "its converter gives this class no rotary embedding"}

    def obstacle(self, config: Any, mixers: Specs) -> str | None:
        return no_mamba2(config, mixers)

    def unready(self) -> str | None:
        return no_groups()

    def engine(self, engine: str, config: Any, mixers: Specs) -> tuple[bool, str]:
        if engine in ("vLLM", "SGLang") and head_dim(config) * config.num_attention_heads != config.hidden_size:
            return False, f"takes head_dim = hidden_size / heads, the base has {head_dim(config)}"
        if engine == "transformers":
            return True, in_transformers(self.architecture, mixers)
        return super().engine(engine, config, mixers)

    def config(self, config: Any, mixers: Specs) -> dict[str, Any]:
        return {
            **carried(config), **mamba2_fields(config, mixers), "model_type": self.model_type,
            "architectures": [self.architecture], "head_dim": head_dim(config),
            "attention_bias": family_of(config).has_qkv_bias(config),
            # The old names: servers look for those, and transformers reads both.
            "layer_types": ["mamba" if spec["name"] == "mamba2" else "attention" for spec in mixers],
            "position_embedding_type": "rope", "attention_multiplier": head_dim(config) ** -0.5,
            "embedding_multiplier": 1.0, "logits_scaling": 1.0, "residual_multiplier": 1.0,
            "num_local_experts": 0, "num_experts_per_tok": 0, "shared_intermediate_size": config.intermediate_size,
        }  # fmt: skip

    def tensors(self, config: Any, mixers: Specs, names: Iterable[str]) -> list[Made]:
        known, made = set(names), []
        for name, index, part in each_layer(sorted(known)):
            if index is None or part.split(".")[0] in ("input_layernorm", "post_attention_layernorm"):
                made.append(Made(name=name, sources=(name,)))
            elif part.startswith("self_attn.") and mixers[index]["name"] == "attention":
                made.append(Made(name=name, sources=(name,)))
        for index, spec in enumerate(mixers):
            layer = f"model.layers.{index}."
            if spec["name"] == "mamba2":
                made += mamba2_tensors(config, spec, f"{layer}self_attn.", f"{layer}mamba.", known)
            else:
                made += attention_biases(config, f"{layer}self_attn.", known)
            both = (f"{layer}mlp.gate_proj.weight", f"{layer}mlp.up_proj.weight")
            made.append(Made(name=f"{layer}shared_mlp.input_linear.weight", sources=both, make=_stacked))
            down = f"{layer}mlp.down_proj.weight"
            made.append(Made(name=f"{layer}shared_mlp.output_linear.weight", sources=(down,)))
        return made


def _stacked(*parts: Tensor) -> Tensor:
    return torch.cat(parts)
