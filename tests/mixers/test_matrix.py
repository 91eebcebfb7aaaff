"""The materialised matrix of each mixer that has one: what it weighs is what the mixer mixes."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from hybridize.families import FAMILIES
from hybridize.mixers import MIXERS, gdn, mamba2
from hybridize.mixers.windowed import attention_matrix, base_heads, has_base_heads
from tests.mixers.test_contract import build
from tests.tiny import tiny_base
from tests.tolerances import assert_close

# What does not come down to one matrix a head, and whose q, k and v are the base's own.
NO_MATRIX = {"attention", "parallel", "gmu", "xkv"}
BASE_HEADS = {"streaming", "block_sparse", "streaming_heads", "gla", "lolcats", "nha", "parallel"}
# The scan between v and y: the module that calls it, its name and v's place; y is what the norm reads.
INNER = {"mamba2": (mamba2, "ssd", 0, "norm"), "gdn": (gdn, "gdn", 2, "norm"), "kda": (gdn, "gdn", 2, "o_norm")}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    root = tmp_path_factory.mktemp("bases")
    return {family: tiny_base(family, root) for family in FAMILIES}


@pytest.fixture(scope="module")
def given():
    """What a mixer reads, [B, T, D], and its angles."""
    generator = torch.Generator().manual_seed(4)
    return torch.randn(2, 20, 32, generator=generator, dtype=torch.float64)


def angles(model):
    cos, sin = model.model.rotary_emb(torch.zeros(1, dtype=torch.float32), torch.arange(20)[None])
    return cos.double(), sin.double()


def values_and_mixture(name, mixer, hidden, position_embeddings, monkeypatch):
    """(v [B, T, H or groups, d], y [B, T, H, d]) as the mixer's own forward pass has them."""
    seen = {}
    if name in INNER:
        module, op, place, norm = INNER[name]
        real = getattr(module, op)
        monkeypatch.setattr(module, op, lambda *a: seen.update(v=a[place]) or real(*a))
        handle = getattr(mixer, norm).register_forward_pre_hook(lambda m, args: seen.update(y=args[0]))
        mixer(hidden, position_embeddings=position_embeddings)
        handle.remove()
        return seen["v"], seen["y"].view(*hidden.shape[:2], mixer.num_heads, -1)
    handle = mixer.o_proj.register_forward_pre_hook(lambda m, args: seen.update(y=args[0]))
    mixer(hidden, position_embeddings=position_embeddings)
    handle.remove()
    if name == "mla":
        _, _, latent, _ = mixer.project(hidden, position_embeddings)
        v = mixer.kv_b_proj(latent).unflatten(-1, (mixer.num_heads, -1))[..., mixer.plain :]
    elif name == "low_rank_kv":
        v = mixer.v_down(hidden).unflatten(-1, (mixer.groups, -1))
    else:
        v = mixer.v_proj(hidden).unflatten(-1, (-1, mixer.head_dim))
    return v, seen["y"].unflatten(-1, (-1, v.shape[-1]))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", sorted(set(MIXERS.names()) - NO_MATRIX))
def test_the_matrix_times_the_values_is_the_mixture(bases, family, name, given, monkeypatch):
    model = build(bases, family, name).double()
    mixer, cos_sin = model.model.layers[2].self_attn, angles(model)
    with torch.no_grad():
        matrix = mixer.mixing_matrix(given, cos_sin)
        v, y = values_and_mixture(name, mixer, given, cos_sin, monkeypatch)
    heads = y.shape[2]
    assert matrix.shape == (2, heads, 20, 20)
    assert not matrix.triu(1).any()
    v = v.double().repeat_interleave(heads // v.shape[2], dim=2)
    mixed, swapped = (torch.einsum("bhts,bshd->bthd", m.double(), v) for m in (matrix, matrix.roll(1, 1)))
    # Recurrent decays are fp32 whatever the model is.
    row = "fp32" if name in INNER else "fp64"
    assert_close(mixed, y.double(), row)
    with pytest.raises(AssertionError):
        assert_close(swapped, y, row)


@pytest.mark.parametrize("name", MIXERS.names())
def test_who_has_a_matrix_and_the_bases_heads(bases, name):
    """A new mixer has a `mixing_matrix`, or stands in NO_MATRIX."""
    mixer = build(bases, "qwen3", name).model.layers[2].self_attn
    if name == "attention":
        return
    assert (getattr(mixer, "mixing_matrix", None) is None) == (name in NO_MATRIX)
    assert has_base_heads(mixer) == (name in BASE_HEADS)


@pytest.mark.parametrize("name", sorted(set(MIXERS.names()) - NO_MATRIX))
def test_a_gradient_goes_through_the_matrix(bases, name, given):
    model = build(bases, "llama", name).double()
    mixer = model.model.layers[2].self_attn
    mixer.mixing_matrix(given, angles(model)).square().sum().backward()
    queries = [p for n, p in mixer.named_parameters() if n.startswith(("q_proj", "in_proj"))]
    assert queries
    assert any(p.grad is not None and bool(p.grad.any()) for p in queries)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_bases_matrix_is_what_its_eager_attention_gives(bases, family):
    model = AutoModelForCausalLM.from_pretrained(bases[family], attn_implementation="eager").double().eval()
    ids = torch.randint(3, 64, (2, 20), generator=torch.Generator().manual_seed(3))
    seen = {}
    attention = model.model.layers[1].self_attn
    handle = attention.register_forward_hook(lambda m, a, kwargs, out: seen.update(kwargs, weights=out[1]), with_kwargs=True)
    with torch.no_grad():
        model(ids, use_cache=False, output_attentions=True)
        handle.remove()
        matrix = attention_matrix(attention, seen["hidden_states"], seen["position_embeddings"])
        # transformers rounds the scores' softmax to fp32.
        assert_close(matrix, seen["weights"], "fp32")
        cos, sin = seen["position_embeddings"]
        unrotated = attention_matrix(attention, seen["hidden_states"], (torch.ones_like(cos), torch.zeros_like(sin)))
        with pytest.raises(AssertionError):
            assert_close(unrotated, seen["weights"], "fp32")
        q, k, v = base_heads(attention, seen["hidden_states"], seen["position_embeddings"])
    assert q.shape == (2, 4, 20, 8)
    assert k.shape == v.shape == (2, 2, 20, 8)
