"""Where each tensor of a hybrid goes in vLLM: names, shards of fused projections, heads that are repeated. Pure tensor functions.

vLLM's layers have one key and value head for each query head in Mamba2 and Gated DeltaNet, so heads that stay grouped here
are repeated, each for its query heads, side by side. A fused projection is a list of shards; vLLM divides each of them among
the GPUs by heads.

Letters: H query heads, G key and value heads, d head width.
"""

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridize.errors import CheckpointError
from hybridize.families import head_dim
from hybridize.mixers.gdn import GDN
from hybridize.mixers.mamba2 import Mamba2
from hybridize.mixers.mla import MLA
from hybridize.vllm_plugin.verdict import latent_width

Shard = int | str | None


class Part(NamedTuple):
    """What one parameter of vLLM is given: its name, which shard of it (None: all), and the tensor of all GPUs together."""

    name: str
    shard: Shard
    tensor: Tensor


_NAME = re.compile(r"(model\.layers\.(\d+)\.)(self_attn|mlp)\.(.+)")

_ATTENTION = {"q_proj": "q", "k_proj": "k", "v_proj": "v"}
_MLP = {"gate_proj": 0, "up_proj": 1}


def repeat_heads(rows: Tensor, groups: int, heads: int) -> Tensor:
    """[G * d, ...] -> [H * d, ...]: each head H/G times, side by side."""
    return rows.unflatten(0, (groups, -1)).repeat_interleave(heads // groups, dim=0).flatten(0, 1)


def parts(config: Any, options: list[Any], name: str, tensor: Tensor) -> Iterator[Part]:
    """What a tensor of the checkpoint becomes.

    Args:
        config: the hybrid's.
        options: of each layer, as `modeling.mixer_options`.
        name: the tensor's name in the checkpoint.
        tensor: as stored.

    Yields:
        parts of vLLM's parameters, in its names.

    Raises:
        CheckpointError: a name that the layer's mixer has not.
    """
    found = _NAME.fullmatch(name)
    if found is None:
        yield Part(name, None, tensor)
        return
    prefix, layer, block, rest = found.groups()
    module, _, kind = rest.rpartition(".")
    if block == "mlp":
        if module in _MLP:
            yield Part(f"{prefix}mlp.gate_up_proj.{kind}", _MLP[module], tensor)
        else:
            yield Part(name, None, tensor)
        return
    option = options[int(layer)]
    if isinstance(option, MLA):
        made = _mla(config, option, rest, tensor, latent_width(config, options))
    else:
        made = {Mamba2: _mamba2, GDN: _gdn}.get(type(option), _attention)(config, option, rest, tensor)
    if made is None:
        raise CheckpointError(f"{name}: a {type(option).__name__} layer has no such tensor. Convert the checkpoint again")
    for part in made:
        yield part._replace(name=f"{prefix}self_attn.{part.name}")


def _attention(config: Any, option: Any, rest: str, tensor: Tensor) -> list[Part] | None:
    module, _, kind = rest.rpartition(".")
    if module in _ATTENTION:
        return [Part(f"qkv_proj.{kind}", _ATTENTION[module], tensor)]
    return [Part(rest, None, tensor)] if module in ("o_proj", "q_norm", "k_norm") else None


def _mamba2(config: Any, option: Mamba2, rest: str, tensor: Tensor) -> list[Part] | None:
    """in_proj is [z | x | B | C | dt] and conv1d [x | B | C], of which x and B may be grouped."""
    module, _, kind = rest.rpartition(".")
    heads, width = config.num_attention_heads, head_dim(config)
    groups = config.num_key_value_heads if option.heads == "grouped" else heads
    inner, grouped = heads * width, groups * width
    if module in ("in_proj", "conv1d"):
        mixed = [grouped, grouped, inner]
        sizes = [inner, *mixed, heads] if module == "in_proj" else mixed
        x = sizes.index(grouped, 1) if module == "in_proj" else 0
        shards = list(tensor.split(sizes))
        for place in (x, x + 1):
            shards[place] = repeat_heads(shards[place], groups, heads)
        return [Part(f"{module}.{kind}", index, shard) for index, shard in enumerate(shards)]
    # vLLM's A is -exp(A_log); its loader takes the logarithm.
    names = {"A_log": "A"}
    whole = rest in ("A_log", "dt_bias", "D") or module in ("norm", "q_norm", "k_norm", "out_proj")
    return [Part(names.get(rest, rest), None, tensor)] if whole else None


def _gdn(config: Any, option: GDN, rest: str, tensor: Tensor) -> list[Part] | None:
    """in_proj_qkv and conv1d are [q | k | v], of which k and v may be grouped; [qkv | z] and [b | a] are fused in vLLM."""
    module, _, kind = rest.rpartition(".")
    heads, width = config.num_attention_heads, head_dim(config)
    groups = config.num_key_value_heads if option.heads == "grouped" else heads
    if module in ("in_proj_qkv", "conv1d"):
        q, k, v = tensor.split([heads * width, groups * width, groups * width])
        k, v = repeat_heads(k, groups, heads), repeat_heads(v, groups, heads)
        if module == "conv1d":
            # One parameter with one loader, that divides q, k and v itself.
            return [Part(rest, None, torch.cat([q, k, v]))]
        return [Part(f"in_proj_qkvz.{kind}", index, shard) for index, shard in enumerate((q, k, v))]
    fused = {"in_proj_z": ("in_proj_qkvz", 3), "in_proj_b": ("in_proj_ba", 0), "in_proj_a": ("in_proj_ba", 1)}
    if module in fused:
        target, shard = fused[module]
        return [Part(f"{target}.{kind}", shard, tensor)]
    whole = rest in ("A_log", "dt_bias") or module in ("norm", "out_proj")
    return [Part(rest, None, tensor)] if whole else None


def _mla(config: Any, option: MLA, rest: str, tensor: Tensor, width: int) -> list[Part] | None:
    """kv_b_proj reads a latent that is made up to vLLM's width with zeros."""
    module = rest.rpartition(".")[0]
    if module == "kv_b_proj":
        rank, rope = option.sizes(config)
        return [Part(rest, None, F.pad(tensor, (0, width - rank - rope)))]
    modules = ("q_proj", "k_proj", "q_norm", "k_norm", "q_rope_proj", "kv_a_proj_with_mqa", "kv_a_layernorm", "o_proj")
    return [Part(rest, None, tensor)] if rest == "rope_pairs" or module in modules else None
