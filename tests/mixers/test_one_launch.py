"""Decoding through kernels: layers that are one launch a token, against the PyTorch path, under the interpreter."""

import pytest
import torch
from transformers import DynamicCache

from hybridize.kernels._core.launch import INTERPRETED
from tests.mixers.test_contract import build
from tests.tiny import tiny_base

pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = pytest.mark.skipif(not INTERPRETED, reason="the interpreter is for machines without a GPU")

SMALL = {"head_dim": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 2}
STEPS = 2


def lively(tmp_path, family, name, **options):
    """A hybrid whose states weigh as much as the last token: larger channels behind the convolution, longer steps."""
    model = build({family: tiny_base(family, tmp_path, **SMALL)}, family, name, **options)
    with torch.no_grad():
        for module in model.modules():
            if hasattr(module, "conv1d"):
                module.conv1d.weight.mul_(10)
            if hasattr(module, "dt_bias"):
                module.dt_bias.add_(4)
                module.A_log.sub_(3)
    return model


def decoded(model, ids):
    """(logits of a prefill and of two tokens after it, tensors of the cache)."""
    cache, out = DynamicCache(config=model.config), []
    with torch.no_grad():
        for part in (ids[:, :5], ids[:, 5:6], ids[:, 6:]):
            out.append(model(part, past_key_values=cache, use_cache=True).logits)
    assert cache.get_seq_length() == 7
    return torch.cat(out, dim=1), cache.layers[0].held()


def counted(monkeypatch, name, changed=lambda inputs: inputs):
    """The calls of a function of the Triton implementation from now on, on inputs that may be `changed` before."""
    from hybridize.kernels.mixer_step import triton_impl

    calls, function = [], getattr(triton_impl, name)
    monkeypatch.setattr(triton_impl, name, lambda *inputs: calls.append(name) or function(*changed(inputs)))
    return calls


@pytest.mark.parametrize(
    ("name", "options", "family", "launches"),
    [
        ("mamba2", {}, "llama", STEPS),
        ("gdn", {}, "llama", STEPS),
        pytest.param("gdn", {"heads": "grouped", "beta_max": 2}, "llama", STEPS, marks=pytest.mark.slow),
        pytest.param("mamba2", {"heads": "expanded"}, "qwen2", STEPS, marks=pytest.mark.slow),
        pytest.param("mamba2", {}, "qwen3", 0, marks=pytest.mark.slow),
        pytest.param("gdn", {"rope": True}, "llama", 0, marks=pytest.mark.slow),
        pytest.param("kda", {}, "llama", 0, marks=pytest.mark.slow),
    ],
)
def test_decoding_by_kernels_is_decoding(tmp_path, monkeypatch, name, options, family, launches):
    model = lively(tmp_path, family, name, **options)
    ids = torch.randint(3, 64, (1, 7), generator=torch.Generator().manual_seed(3))
    monkeypatch.setenv("HYBRIDIZE_KERNELS", "torch")
    want, states = decoded(model, ids)
    monkeypatch.setenv("HYBRIDIZE_KERNELS", "triton")
    calls = counted(monkeypatch, "mamba2_mixer_step" if name == "mamba2" else "gdn_mixer_step")
    found, by_kernels = decoded(model, ids)
    assert len(calls) == launches
    assert torch.allclose(found, want, atol=2e-5)
    for state, other in zip(by_kernels, states, strict=True):
        assert torch.allclose(state, other, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kept", [-1, -2], ids=["state", "conv"])
def test_a_state_that_is_not_updated_shows(tmp_path, monkeypatch, kept):
    model = lively(tmp_path, "llama", "mamba2")
    ids = torch.randint(3, 64, (2, 7), generator=torch.Generator().manual_seed(3))
    want, _ = decoded(model, ids)
    monkeypatch.setenv("HYBRIDIZE_KERNELS", "triton")

    def without_update(inputs):
        inputs = list(inputs)
        inputs[kept] = inputs[kept].clone()
        return inputs

    counted(monkeypatch, "mamba2_mixer_step", without_update)
    found, _ = decoded(model, ids)
    assert torch.allclose(found[:, :6], want[:, :6], atol=2e-5)
    assert not torch.allclose(found[:, 6], want[:, 6], atol=1e-3)
