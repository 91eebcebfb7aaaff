"""Students that are wrong in one known way, and two that are not, as directories made from a real base."""

import importlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from hybridize.checkpoint import open_base
from hybridize.conversions import convert, plan

# hybridize.eval has a function of that name in front of the module.
EVALUATE = importlib.import_module("hybridize.eval.evaluate")
RESET_TOKENS = 64


def copied(base: Path, out: Path, change: Callable[[dict, dict], None]) -> Path:
    """The base with its tensors and config changed in place by `change(tensors, config)`."""
    shutil.copytree(base, out)
    tensors, config = load_file(out / "model.safetensors"), json.loads((out / "config.json").read_text())
    change(tensors, config)
    (out / "config.json").write_text(json.dumps(config))
    save_file({name: t.contiguous() for name, t in tensors.items()}, out / "model.safetensors", metadata={"format": "pt"})
    return out


def head_size(config: dict) -> int:
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def expand(tensors: dict, config: dict, rows: bool) -> None:
    """Full heads in place of grouped ones: each group's repeated, or with `rows` those of K row by row."""
    groups = config["num_attention_heads"] // config["num_key_value_heads"]
    for name, tensor in tensors.items():
        if name.endswith(("k_proj.weight", "v_proj.weight")):
            piece = 1 if rows and "k_proj" in name else head_size(config)
            tensors[name] = tensor.view(-1, piece, tensor.shape[1]).repeat_interleave(groups, 0).flatten(0, 1)
    config["num_key_value_heads"] = config["num_attention_heads"]


def drop_rope(tensors: dict, config: dict) -> None:
    config["rope_parameters"] = {"rope_type": "linear", "factor": 1e9, "rope_theta": 1e4}


def zero_layer(tensors: dict, config: dict) -> None:
    """What a middle layer adds to the stream is nothing."""
    for part in ("self_attn.o_proj", "mlp.down_proj"):
        tensors[f"model.layers.{config['num_hidden_layers'] // 2}.{part}.weight"].zero_()


def swap_heads(tensors: dict, config: dict) -> None:
    """The first and the last query of a middle layer, each read with the other's keys and written with the other's output."""
    size, query = head_size(config), tensors[f"model.layers.{config['num_hidden_layers'] // 2}.self_attn.q_proj.weight"]
    first, last = query[:size].clone(), query[-size:].clone()
    query[:size], query[-size:] = last, first


def to_bf16(tensors: dict, config: dict) -> None:
    for name in tensors:
        tensors[name] = tensors[name].bfloat16()
    config["dtype"] = "bfloat16"


def hybrid(base: Path, out: Path, section: dict[str, Any]) -> Path:
    convert(plan(open_base(base), section, "a test", 0), out, None, base_path=base)
    return out


def other_tokenizer(base: Path, out: Path) -> Path:
    """Two common pieces have each other's ids."""
    shutil.copytree(base, out)
    path = out / "tokenizer.json"
    found = json.loads(path.read_text())
    ids = found["model"]["vocab"]
    a, b = (next(piece for piece in pieces if piece in ids) for pieces in (("▁the", "e"), ("▁a", "a")))
    ids[a], ids[b] = ids[b], ids[a]
    path.write_text(json.dumps(found))
    return out


def forgetful(monkeypatch: Any, folder: Path) -> None:
    """A loader that gives the checkpoint in `folder` no memory beyond the last multiple of 64 tokens.

    Positions that begin again are another text to transformers' attention, and so they are to every mixer.
    """
    load = EVALUATE.load_for_test

    def again(module: Any, args: tuple, words: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        ids = words["input_ids"]
        return args, {**words, "position_ids": (torch.arange(ids.shape[1]) % RESET_TOKENS).expand(ids.shape)}

    def loaded(path: Path) -> Any:
        model = load(path)
        if Path(path) == folder:
            model.base_model.register_forward_pre_hook(again, with_kwargs=True)
        return model

    monkeypatch.setattr(EVALUATE, "load_for_test", loaded)


GOOD: dict[str, Callable[[Path, Path], Path]] = {
    "keeps everything": lambda base, out: hybrid(base, out, {"keep": "all", "mixer": {"name": "streaming"}}),
    "expanded heads": lambda base, out: copied(base, out, lambda tensors, config: expand(tensors, config, rows=False)),
    "bf16": lambda base, out: copied(base, out, to_bf16),
}
BROKEN: dict[str, Callable[[Path, Path], Path]] = {
    "rows of K repeated": lambda base, out: copied(base, out, lambda tensors, config: expand(tensors, config, rows=True)),
    "no RoPE": lambda base, out: copied(base, out, drop_rope),
    "window of 16": lambda base, out: hybrid(
        base, out, {"keep": {"layers": []}, "mixer": {"name": "streaming", "sink_tokens": 0, "window_tokens": 16}}
    ),
    "reset every 64": lambda base, out: copied(base, out, lambda tensors, config: None),
    "a layer of zeros": lambda base, out: copied(base, out, zero_layer),
    "heads swapped": lambda base, out: copied(base, out, swap_heads),
    "another tokenizer": other_tokenizer,
}
