"""Latent attention by itself: absorbed is expanded, sizes that cannot be are refused, the cache can be cropped."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

import hybridize.modeling as modeling
from hybridize.cache import cache_bytes
from hybridize.errors import ConfigError
from hybridize.families import FAMILIES
from hybridize.mixers import MIXERS
from tests.tiny import tiny_base
from tests.tolerances import assert_close, rms_ratio

SHAPES = [{}, {"kv_rank": 5, "rope_dim": 4}, {"kv_rank": 3, "rope_dim": "full"}, {"kv_rank": "full", "latent_norm": "rms"},
          {"kv_rank": 7, "rope_dim": 4, "frequencies": "uniform"}]  # fmt: skip


YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}


def mixer_of(family, tmp_path, rope=None, **options):
    extra = {"rope_parameters": rope} if rope else {}
    config = AutoModelForCausalLM.from_pretrained(tiny_base(family, tmp_path, **extra)).config
    torch.manual_seed(2)
    return MIXERS.build({"name": "mla", **options}).build(config, 0).eval(), config


@pytest.mark.parametrize("options", [*SHAPES, {"rope_dim": 4, "rope": YARN}], ids=str)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_absorbed_is_expanded(family, options, tmp_path):
    mixer, config = mixer_of(family, tmp_path, **options)
    mixer = mixer.double()
    x = torch.randn(2, 9, 32, dtype=torch.float64)
    angles = FAMILIES[family].rotary(config)(x, torch.arange(9)[None])
    with torch.no_grad():
        plain, turned, latent, key = mixer.project(x, angles)
        rows = plain[:, :, 5:], turned[:, :, 5:], latent[:, None], key[:, None]
        seen = torch.ones(2, 1, 4, 9, dtype=torch.bool).tril(5)
        seen[1, :, :, :3] = False
        additive = torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, float("-inf"))
        for mask in (None, seen, additive):
            assert_close(mixer.absorbed(*rows, mask), mixer.expanded(*rows, mask), "fp64")
        # The wrong mask, aligned with the first key instead of the last, shows.
        wrong = mixer.absorbed(*rows, torch.ones(1, 1, 4, 9, dtype=torch.bool).tril())
        assert rms_ratio(wrong, mixer.expanded(*rows, None)) > 0.1


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_yarn_makes_every_score_larger_by_one_factor(family, tmp_path):
    """Its temperature is that of the softmax: by definition in fp64, from angles that are not lengthened."""
    mixer, config = mixer_of(family, tmp_path, rope=YARN, rope_dim=4)
    mixer = mixer.double()
    x = torch.randn(2, 9, 32, dtype=torch.float64)
    angles = FAMILIES[family].rotary(config)(x, torch.arange(9)[None])
    length = 0.1 * math.log(4.0) + 1
    unit = [angle / length for angle in angles]
    assert_close(unit[0].square() + unit[1].square(), torch.ones_like(unit[0]), "fp32")

    def matrix(factor):
        """Weights from scores of plain and rotary parts before either is lengthened."""
        plain, turned, latent, key = mixer.project(x, unit)
        up, _ = mixer.kv_b_proj(latent).unflatten(-1, (4, -1)).transpose(1, 2).split([mixer.plain, mixer.width], dim=-1)
        scores = plain / mixer.plain_scale @ up.mT + turned @ key[:, None].mT
        later = torch.ones(9, 9, dtype=torch.bool).triu(1)
        return (scores * factor * mixer.width**-0.5).masked_fill(later, float("-inf")).softmax(-1)

    with torch.no_grad():
        found = mixer.mixing_matrix(x, angles)
        assert_close(found, matrix(length**2), "fp64")
        assert rms_ratio(found, matrix(1.0)) > 1e-3
        # Wrong on purpose: the plain part as it is.
        mixer.plain_scale = 1.0
        assert rms_ratio(mixer.mixing_matrix(x, angles), found) > 1e-3


def test_few_tokens_after_a_past_are_absorbed(tmp_path, monkeypatch):
    mixer, config = mixer_of("llama", tmp_path, kv_rank=12)
    used = []
    for name in ("absorbed", "expanded"):
        method = getattr(mixer, name)
        monkeypatch.setattr(mixer, name, lambda *a, m=method, n=name: used.append(n) or m(*a))
    cache = DynamicCache(config=config)
    for start, stop in ((0, 5), (5, 6), (6, 60)):
        x = torch.randn(1, stop - start, 32)
        angles = FAMILIES["llama"].rotary(config)(x, torch.arange(start, stop)[None])
        with torch.no_grad():
            mixer(x, angles, None, cache)
    assert used == ["expanded", "absorbed", "expanded"]


@pytest.mark.parametrize("options", SHAPES, ids=str)
def test_the_cache_holds_latent_and_rotary_key_and_crops(options, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(tiny_base("llama", tmp_path))
    model = modeling.build_model(modeling.hybrid_config(base.config, [{"name": "mla", **options}] * 3)).eval()
    rank, rope = MIXERS.build({"name": "mla", **options}).sizes(base.config)
    ids = torch.randint(3, 64, (1, 12))
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        whole = model(ids, past_key_values=cache).logits
        assert [tuple(t.shape) for t in (cache.layers[0].keys, cache.layers[0].values)] == [(1, 1, 12, rank), (1, 1, 12, rope)]
        assert cache_bytes(cache) == 3 * 12 * (rank + rope) * 4 == modeling.state_bytes(model.config, 12)
        cache.crop(-4)
        again = model(ids[:, 8:], past_key_values=cache).logits
    assert torch.allclose(again, whole[:, 8:], atol=2e-5)
    assert not model.model.forgets
    text = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None)
    drafted = model.generate(
        ids, max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None, prompt_lookup_num_tokens=2
    )
    assert torch.equal(text, drafted)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rope_dim": 5}, "rope_dim is 5, expected an even number"),
        ({"rope_dim": 0}, "rope_dim is 0"),
        ({"kv_rank": 0}, "kv_rank is 0, expected 1 or more"),
        ({"rope_dim": 18}, "rope_dim is 18, expected at most n_kv \\* head_dim = 16"),
        ({"kv_rank": 25}, "kv_rank is 25, expected at most 24 beside rope_dim 8"),
        ({"kv_rank": 17, "rope_dim": "full"}, "at most 16 beside rope_dim 16"),
        ({"rope_dim": 6, "frequencies": "uniform"}, "a divisor or a multiple of head_dim = 8"),
    ],
)
def test_impossible_sizes(options, words, tmp_path):
    with pytest.raises(ConfigError, match=words):
        mixer_of("llama", tmp_path, **options)


def test_a_mask_of_another_kind_is_refused(tmp_path):
    mixer, config = mixer_of("llama", tmp_path)
    x = torch.randn(1, 4, 32)
    angles = FAMILIES["llama"].rotary(config)(x, torch.arange(4)[None])
    with pytest.raises(ConfigError, match="attn_implementation"):
        mixer(x, angles, torch.ones(1, 4))


@pytest.mark.parametrize("options", [{"kv_rank": 5, "rope_dim": 4}, {"kv_rank": 3, "rope_dim": "full"}], ids=str)
def test_one_token_is_decoded_by_the_kernel(options, tmp_path, monkeypatch):
    """Under the interpreter, with padding on the left: the logits of the PyTorch path."""
    pytest.importorskip("triton", reason="Triton is not installed")
    import hybridize.kernels.mla_decode.triton_impl as kernels

    base = AutoModelForCausalLM.from_pretrained(tiny_base("qwen3", tmp_path))
    model = modeling.build_model(modeling.hybrid_config(base.config, [{"name": "mla", **options}, *[{"name": "attention"}] * 2]))
    model.eval()
    ids, mask = torch.randint(3, 64, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    mask[0, :3] = 0
    calls, decode = [], kernels.mla_decode
    monkeypatch.setattr(kernels, "mla_decode", lambda *arguments: calls.append(arguments) or decode(*arguments))

    def last():
        """Logits of the last token, after a cache of those before it."""
        with torch.no_grad():
            cache = model(ids[:, :-1], attention_mask=mask[:, :-1]).past_key_values
            return model(ids[:, -1:], attention_mask=mask, past_key_values=cache).logits

    expected = last()
    assert not calls
    monkeypatch.setenv("HYBRIDIZE_KERNELS", "triton")
    assert torch.allclose(last(), expected, atol=2e-5)
    assert len(calls) == 1
    # Wrong on purpose: padding that is seen.
    monkeypatch.setattr(kernels, "mla_decode", lambda *a: decode(*a[:6], None, a[7]))
    assert not torch.allclose(last(), expected, atol=1e-3)
