"""Mamba2 beside attention for llama.cpp: bamba, each state as wide again as the base's heads.

llama.cpp runs this class alone with rotary attention beside Mamba2, and takes 2 x hidden_size channels of x and z
(src/models/granite-hybrid.cpp). A base has hidden_size, so every head stands twice beside itself: x, z, their taps and the
norm's weight are repeated, and out_proj reads the first copy. The norm of a head is over both copies, whose mean square is
that of one, so that nothing changes; zeros in place of the copy would halve it, against an eps that counts. B, C, dt, A and
D are as they were. Costs: the state is twice as large, a mixer's weights are 1.6 times as many.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from hybridize.families import family_of, head_dim
from hybridize.native.gguf import no_head, no_rotary
from hybridize.native.granite import attention_biases, in_transformers, mamba2_fields, mamba2_tensors, no_groups, no_mamba2
from hybridize.native.target import Made, Specs, Target, carried, each_layer

RENAMED = {
    "mlp.": "feed_forward.", "post_attention_layernorm.": "pre_ff_layernorm.", "model.norm.": "model.final_layernorm.",
}  # fmt: skip
EXPAND = 2
"""Channels of x and z that llama.cpp's graph asserts, in hidden_size."""


def copies(config: Any) -> int:
    """How often each head's channels stand in the export."""
    return EXPAND if config.num_attention_heads * head_dim(config) == config.hidden_size else 1


def beside(rows: Tensor, heads: int, times: int) -> Tensor:
    """Rows of each head, [heads * d, ...], `times` times one after the other."""
    return rows.unflatten(0, (heads, 1, -1)).repeat_interleave(times, dim=1).flatten(0, 2)


def widened(config: Any) -> dict[str, Callable[[Tensor], Tensor]]:
    """Functions on the expanded layout that repeat each head's channels beside themselves."""
    width, heads, times = head_dim(config), config.num_attention_heads, copies(config)
    inner = heads * width

    def repeated(rows: Tensor) -> Tensor:
        return beside(rows, heads, times)

    def channels(rows: Tensor) -> Tensor:
        x, b, c = rows.split(inner)
        return torch.cat([repeated(x), b, c])

    def projection(rows: Tensor) -> Tensor:
        z, mixed, dt = rows.split([inner, 3 * inner, heads])
        return torch.cat([repeated(z), channels(mixed), dt])

    def first(columns: Tensor) -> Tensor:
        wide = columns.new_zeros(len(columns), heads, times, width)
        wide[:, :, 0] = columns.unflatten(1, (heads, width))
        return wide.flatten(1)

    return {
        "in_proj.weight": projection, "in_proj.bias": projection, "conv1d.weight": channels, "conv1d.bias": channels,
        "norm.weight": repeated, "out_proj.weight": first,
    }  # fmt: skip


class Bamba(Target):
    """Attention and Mamba2, rotary attention over whole heads, a dense MLP."""

    model_type, architecture = "bamba", "BambaForCausalLM"
    about = "attention and Mamba2 under its names, each head's channels twice, as llama.cpp needs them"
    mixers = frozenset({"mamba2"})
    served = {"transformers": architecture, "llama.cpp": "granitehybrid, as BambaForCausalLM"}
    unserved = {"vLLM": "no longer has bamba (since 0.24)", "SGLang": "has no bamba"}

    def obstacle(self, config: Any, mixers: Specs) -> str | None:
        return no_mamba2(config, mixers)

    def unready(self) -> str | None:
        return no_groups()

    def engine(self, engine: str, config: Any, mixers: Specs) -> tuple[bool, str]:
        if engine == "llama.cpp" and (reason := _no_gguf(config, mixers)):
            return False, reason
        if engine == "transformers":
            return True, in_transformers(self.architecture, mixers)
        return super().engine(engine, config, mixers)

    def config(self, config: Any, mixers: Specs) -> dict[str, Any]:
        fields = {**carried(config), **mamba2_fields(config, mixers)}
        times = copies(config)
        return {
            **fields, "model_type": self.model_type, "architectures": [self.architecture], "head_dim": head_dim(config),
            "attention_bias": family_of(config).has_qkv_bias(config), "mlp_bias": False,
            "mamba_d_head": times * fields["mamba_d_head"], "mamba_expand": times * fields["mamba_expand"],
            "attn_layer_indices": [index for index, spec in enumerate(mixers) if spec["name"] == "attention"],
            # Left out, the class rotates half of each head.
            "rope_parameters": {**fields["rope_parameters"], "partial_rotary_factor": 1.0},
        }  # fmt: skip

    def tensors(self, config: Any, mixers: Specs, names: Iterable[str]) -> list[Made]:
        known, made = set(names), []
        for name, index, part in each_layer(sorted(known)):
            if index is None or not part.startswith("self_attn.") or mixers[index]["name"] == "attention":
                made.append(Made(name=_renamed(name), sources=(name,)))
        widen = widened(config)
        for index, spec in enumerate(mixers):
            layer = f"model.layers.{index}."
            if spec["name"] == "attention":
                made += attention_biases(config, f"{layer}self_attn.", known)
                continue
            to = f"{layer}mamba."
            for tensor in mamba2_tensors(config, spec, f"{layer}self_attn.", to, known):
                last = widen.get(tensor.name.removeprefix(to))
                made.append(Made(name=tensor.name, sources=tensor.sources, make=_then(tensor.make, last)))
        return made


def _no_gguf(config: Any, mixers: Specs) -> str | None:
    """What llama.cpp or its converter has no place for."""
    if mamba2_fields(config, mixers)["mamba_proj_bias"]:
        return "its Mamba2 has no biases on in_proj; convert with proj_bias: false"
    if config.vocab_size % 8:
        return f"its converter counts tokens in eights beside Mamba2, the base has {config.vocab_size}"
    return no_head(config) or no_rotary(config, llama3=False)


def _renamed(name: str) -> str:
    for part, new in RENAMED.items():
        name = name.replace(part, new)
    return name


def _then(first: Callable[..., Tensor] | None, last: Callable[[Tensor], Tensor] | None) -> Callable[..., Tensor] | None:
    if first is None or last is None:
        return first or last
    return lambda *parts: last(first(*parts))
