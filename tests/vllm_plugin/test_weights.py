"""Tensors of a hybrid, taken to vLLM's names and divided among GPUs, compute in vLLM's formulas what the mixer computes."""

import pytest
import torch

from hybridize.errors import CheckpointError
from hybridize.modeling import mixer_options
from hybridize.vllm_plugin import weights
from hybridize.vllm_plugin.weights import parts, repeat_heads
from tests.tolerances import assert_close, rms_ratio
from tests.vllm_plugin import reference
from tests.vllm_plugin.toys import model_of

# What every GPU holds whole; what is divided along the input; what only the first GPU adds. The rest is divided by rows.
WHOLE = ("kv_a_proj_with_mqa", "k_proj", "q_norm", "k_norm", "kv_a_layernorm")
OUTPUTS = ("out_proj", "o_proj")

CASES = [
    ("llama", {"name": "attention"}),
    ("qwen2", {"name": "streaming", "sink_tokens": 0, "window_tokens": 4}),
    ("qwen3", {"name": "attention"}),
    ("llama", {"name": "mamba2"}),
    ("qwen3", {"name": "mamba2", "conv_tokens": 3}),
    ("qwen2", {"name": "mamba2", "heads": "expanded", "proj_bias": False, "norm_eps": 1e-3}),
    ("mistral", {"name": "gdn"}),
    ("qwen3", {"name": "gdn", "heads": "grouped", "qk_norm": False, "conv_tokens": 2, "norm_eps": 1e-3}),
    ("llama", {"name": "gdn", "heads": "grouped", "proj_bias": False}),
    ("llama", {"name": "mla", "rope_dim": 4}),
    ("qwen2", {"name": "mla", "latent_norm": "rms", "frequencies": "uniform"}),
    ("qwen3", {"name": "mla", "rope_dim": 4}),
    ("qwen3", {"name": "mla", "rope_dim": 4, "qk_norm": "fold", "frequencies": "uniform"}),
]


def mine(name, tensor, rank, gpus, kind):
    """This GPU's part of a tensor, as vLLM's loaders cut it."""
    module = name.split(".")[-2]
    if module in WHOLE or (module == "norm" and kind == "gdn"):
        return tensor
    if module in OUTPUTS:
        return tensor.chunk(gpus, dim=1)[rank] if tensor.dim() == 2 else tensor * (rank == 0)
    if name.endswith("conv1d.weight") and kind == "gdn":
        return torch.cat([third.chunk(gpus)[rank] for third in tensor.chunk(3)])
    return tensor.chunk(gpus)[rank]


def parameters(model, rank, gpus, kind):
    """{vLLM's name: tensor} of layer 0's mixer on one GPU."""
    shards, options = {}, mixer_options(model.config)
    for name, tensor in model.state_dict().items():
        if not name.startswith("model.layers.0.self_attn."):
            continue
        for part in parts(model.config, options, name, tensor):
            if part.name.endswith("rope_pairs"):
                continue
            cut = mine(part.name, part.tensor, rank, gpus, kind)
            shards.setdefault(part.name.split("self_attn.")[1], {})[
                "qkv".find(part.shard) if part.shard in ("q", "k", "v") else part.shard or 0
            ] = cut
    whole = {name: torch.cat([found[key] for key in sorted(found)]) for name, found in shards.items()}
    if "in_proj_ba.bias" in whole:
        # vLLM's parameter begins as zeros, of which the checkpoint fills b's half.
        whole["in_proj_ba.bias"] = torch.cat([whole["in_proj_ba.bias"], torch.zeros_like(whole["in_proj_ba.bias"])])
    if "A" in whole:
        whole["A"] = -whole["A"].exp()
    return whole


def served(model, u, gpus):
    """The sum over GPUs of what vLLM's layer gives for u [T, D]."""
    config, spec = model.config, model.config.mixers[0]
    kind, d = spec["name"], config.head_dim
    mixer, inv_freq, total = model.model.layers[0].self_attn, model.model.rotary_emb.inv_freq.double(), 0
    eps = spec.get("norm_eps") or config.rms_norm_eps
    for rank in range(gpus):
        p = parameters(model, rank, gpus, kind)
        if kind == "mamba2":
            total = total + reference.mamba2(p, u, d, eps)
        elif kind == "gdn":
            total = total + reference.gdn(p, u, d, eps)
        elif kind == "mla":
            pairs = mixer.rope_pairs if mixer.chosen else mixer.default_pairs()
            total = total + reference.latent(p, u, d, eps, inv_freq, mixer.rope, pairs.long())
        else:
            total = total + reference.attention(p, u, d, eps, inv_freq, spec.get("window_tokens", len(u)))
    return total


def asked(model, u):
    """What the hybrid's own module gives."""
    positions = torch.arange(len(u))[None]
    angles = tuple(angle.double() for angle in model.model.rotary_emb(u[None].double(), positions))
    with torch.no_grad():
        return model.model.layers[0].self_attn(u[None], position_embeddings=angles, attention_mask=None)[0][0]


@pytest.fixture
def u():
    return torch.randn(11, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize(("family", "spec"), CASES, ids=str)
def test_the_layer_is_the_mixer_on_one_gpu_and_on_two(u, family, spec):
    model = model_of(family, [spec]).double()
    expected = asked(model, u)
    for gpus in (1, 2):
        assert_close(served(model, u, gpus), expected, "fp32")


def wrong_repeat(rows, groups, heads):
    return rows.unflatten(0, (groups, -1)).repeat(heads // groups, *[1] * rows.dim()).flatten(0, 1)


@pytest.mark.parametrize("name", ["mamba2", "gdn"])
def test_a_wrong_order_of_heads_shows(u, name, monkeypatch):
    model = model_of("llama", [{"name": name, "heads": "grouped"}]).double()
    expected = asked(model, u)
    monkeypatch.setattr(weights, "repeat_heads", wrong_repeat)
    assert rms_ratio(served(model, u, 1), expected) > 0.05


def test_heads_are_repeated_side_by_side():
    assert repeat_heads(torch.arange(4), 2, 4).tolist() == [0, 1, 0, 1, 2, 3, 2, 3]


def test_every_tensor_has_one_place():
    mixers = ["attention", "mamba2", {"name": "gdn", "heads": "grouped"}, "mla", {"name": "streaming", "sink_tokens": 0}]
    model = model_of("llama", mixers)
    options, seen = mixer_options(model.config), set()
    for name, tensor in model.state_dict().items():
        for part in parts(model.config, options, name, tensor):
            assert (part.name, part.shard) not in seen
            seen.add((part.name, part.shard))
            assert torch.isfinite(part.tensor).all()
    assert {shard for name, shard in seen if name == "model.layers.2.self_attn.in_proj_qkvz.weight"} == {0, 1, 2, 3}
    assert ("lm_head.weight", None) in seen
    assert ("model.layers.0.mlp.gate_up_proj.weight", 1) in seen


@pytest.mark.parametrize("layer", range(4))
def test_a_tensor_of_another_mixer_is_refused(layer):
    config = model_of("llama", ["attention", "mamba2", "gdn", "mla"]).config
    with pytest.raises(CheckpointError, match=f"model.layers.{layer}.self_attn.g_proj.weight"):
        list(parts(config, mixer_options(config), f"model.layers.{layer}.self_attn.g_proj.weight", torch.zeros(2, 2)))
