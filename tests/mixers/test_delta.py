"""What the options of gdn and kda change, beside the contract that every mixer keeps."""

import pytest
import torch

from hybridize.cache import cache_bytes
from hybridize.errors import ConfigError
from hybridize.mixers import MIXERS
from hybridize.modeling import state_bytes
from tests.mixers.test_contract import ATOL, bases, build, ids, in_chunks, logits  # noqa: F401
from tests.tolerances import assert_close

OPTIONS = [
    {"heads": "grouped", "beta_max": 2},
    {"rope": True, "conv_tokens": 1},
    {"proj_bias": False, "qk_norm": False, "norm_eps": 1e-3},
]


@pytest.mark.parametrize("name", ["gdn", "kda"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options_keep_the_contract(bases, ids, name, options):  # noqa: F811
    model = build(bases, "qwen3", name, **options)
    whole = logits(model, ids)
    found, cache = in_chunks(model, ids, (7, 1, 1, 8, 3))
    assert torch.allclose(found, whole, atol=ATOL)
    assert cache_bytes(cache) == 2 * state_bytes(model.config, 20)
    padded, mask = ids.clone(), torch.ones_like(ids)
    padded[1, 4:], padded[1, :4], mask[1, :4] = ids[1, :16], 0, 0
    found, _ = in_chunks(model, padded, (6, 1, 1, 12), mask)
    assert torch.allclose(found[1:, 4:], logits(model, ids[1:, :16]), atol=ATOL)
    positions = torch.cat([torch.arange(13), torch.arange(7)])[None].expand(2, -1)
    packed = logits(model, ids, position_ids=positions)
    assert torch.allclose(packed[:, 13:], logits(model, ids[:, 13:]), atol=ATOL)


def test_the_rotary_embedding_is_relative(bases):  # noqa: F811
    """Positions shifted for all tokens change nothing; left out, the layer is another."""
    model = build(bases, "llama", "gdn", rope=True)
    mixer, u = model.model.layers[0].self_attn, torch.randn(1, 12, 32)
    with torch.no_grad():
        near, far = (mixer(u, model.model.rotary_emb(u, torch.arange(start, start + 12)[None]))[0] for start in (0, 40))
        still = mixer(u, (torch.ones(1, 12, 8), torch.zeros(1, 12, 8)))[0]
    assert_close(far, near, "fp32")
    assert not torch.allclose(still, near, atol=1e-3)
    with pytest.raises(ConfigError, match="position_embeddings"):
        mixer(u)


@pytest.mark.parametrize("name", ["gdn", "kda"])
def test_beta_max_doubles_beta(bases, name):  # noqa: F811
    """With beta 1 a key's old value is gone; with beta 2 it is turned round."""
    for beta_max, factor in ((1, 0.0), (2, -1.0)):
        mixer = build(bases, "llama", name, beta_max=beta_max).model.layers[0].self_attn
        last = mixer.in_proj_b if name == "gdn" else mixer.b_proj
        with torch.no_grad():
            last.weight.zero_()
            last.bias.fill_(40.0)
            beta = mixer.options.beta_max * torch.sigmoid(mixer.beta_logits(torch.randn(1, 3, 32)))
        assert torch.equal(1 - beta, torch.full_like(beta, factor))


@pytest.mark.parametrize("name", ["gdn", "kda"])
@pytest.mark.parametrize(
    ("options", "words"),
    [({"conv_tokens": 0}, "expected 1 to 16"), ({"norm_eps": 0.0}, "more than 0"), ({"beta_max": 3}, "one of 1, 2")],
    ids=str,
)
def test_bad_options(name, options, words):
    with pytest.raises(ConfigError, match=words) as caught:
        MIXERS.build({"name": name, **options})
    assert "\n" not in str(caught.value)
