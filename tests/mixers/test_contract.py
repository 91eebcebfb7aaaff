"""What every mixer must do in every family. A new mixer is covered by adding it to the table, and nothing else."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

import hybridize.modeling as modeling
from hybridize.cache import cache_bytes
from hybridize.errors import ConfigError
from hybridize.eval.filled import filled_cache
from hybridize.families import FAMILIES
from hybridize.mixers import MIXERS
from tests.tiny import tiny_base

# Small values of options, so that twenty tokens fill every cache.
SMALL = {
    "streaming": {"sink_tokens": 2, "window_tokens": 5},
    "block_sparse": {"sink_tokens": 1, "window_tokens": 4, "block_tokens": 3, "stride_blocks": 3},
    "streaming_heads": {"sink_tokens": 2, "window_tokens": 5, "full_heads": [1]},
    "gla": {"window_tokens": 5},
    "lolcats": {"window_tokens": 5},
    "gmu": {"reads": 0},
    "xkv": {"reads": 0, "group_layers": 2},
    "parallel": {"sink_tokens": 2, "window_tokens": 5},
    "nha": {"slots": 3, "sink_tokens": 1, "window_tokens": 5},
}
# What a mixer that reads another layer needs in layer 0.
BELOW = {"gmu": {"name": "mamba2"}, "xkv": {"name": "xkv", "group_layers": 2}}
# Mixers without a rotary embedding, as they are by default.
TURNS_NOTHING = {"mamba2", "gdn", "kda", "gmu"}
CASES = [(family, name) for family in FAMILIES for name in MIXERS.names()]
ATOL = 2e-5


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    root = tmp_path_factory.mktemp("bases")
    return {family: tiny_base(family, root) for family in FAMILIES}


def build(bases, family, name, keep=(1,), angles=None, **options):
    """A hybrid with random weights: `name` everywhere but on the layers of `keep`, and on layer 0 where it needs one below."""
    config = AutoConfig.from_pretrained(bases[family])
    spec = {"name": name, **SMALL.get(name, {}), **options}
    specs = [{"name": "attention"} if i in keep else spec for i in range(config.num_hidden_layers)]
    specs[0] = BELOW.get(name, specs[0])
    if angles is not None:
        config.rope_parameters = angles
    torch.manual_seed(1)
    model = modeling.build_model(modeling.hybrid_config(config, specs)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module", params=CASES, ids=lambda c: "-".join(c))
def model(request, bases):
    return build(bases, *request.param)


@pytest.fixture(scope="module")
def ids():
    return torch.randint(3, 64, (2, 20), generator=torch.Generator().manual_seed(3))


def logits(model, ids, **kwargs):
    with torch.no_grad():
        return model(ids, use_cache=False, **kwargs).logits


def in_chunks(model, ids, sizes, mask=None):
    """Logits from a cache filled chunk by chunk."""
    cache, out, start = DynamicCache(config=model.config), [], 0
    for size in sizes:
        part = ids[:, start : start + size]
        kwargs = {}
        if mask is not None:
            seen = mask[:, : start + size]
            kwargs = {"attention_mask": seen, "position_ids": (seen.cumsum(1) - 1).clamp(min=0)[:, start:]}
        with torch.no_grad():
            out.append(model(part, past_key_values=cache, use_cache=True, **kwargs).logits)
        start += size
    return torch.cat(out, dim=1), cache


@pytest.fixture(scope="module")
def whole(model, ids):
    """Logits of all tokens at once, without a cache."""
    return logits(model, ids)


@pytest.fixture(scope="module")
def decoded(model, ids):
    """(logits, bytes of the cache after each token), token by token."""
    cache, out, held = DynamicCache(config=model.config), [], []
    with torch.no_grad():
        for at in range(ids.shape[1]):
            out.append(model(ids[:, at : at + 1], past_key_values=cache, use_cache=True).logits)
            held.append(cache_bytes(cache))
    assert cache.get_seq_length() == 20
    return torch.cat(out, dim=1), held


def test_causal(model, ids, whole):
    changed = ids.clone()
    changed[:, 12:] = 63 - changed[:, 12:] % 60
    before, after = whole, logits(model, changed)
    assert torch.allclose(before[:, :12], after[:, :12], atol=ATOL)
    assert not torch.allclose(before[:, 12:], after[:, 12:], atol=1e-3)


@pytest.mark.parametrize("sizes", [(20,), (7, 1, 1, 8, 3), (1, 19)], ids=str)
def test_prefill_is_chunked(model, ids, whole, sizes):
    out, cache = in_chunks(model, ids, sizes)
    assert torch.allclose(out, whole, atol=ATOL)
    assert cache.get_seq_length() == 20


def test_decode_is_prefill(whole, decoded):
    assert torch.allclose(decoded[0], whole, atol=ATOL)


def test_a_dropped_past_would_show(model, ids, whole):
    second = ids[:, 10:]
    assert not torch.allclose(logits(model, second), whole[:, 10:], atol=1e-3)


@pytest.mark.parametrize("sizes", [(20,), (6, 1, 1, 12)], ids=str)
def test_left_padding(model, ids, whole, sizes):
    pads = [0, 4]
    padded = ids.clone()
    padded[1, 4:] = ids[1, :16]
    padded[1, :4] = 0
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    alone = logits(model, ids[1:, :16])
    out, _ = in_chunks(model, padded, sizes, mask)
    assert torch.allclose(out[1:, pads[1] :], alone, atol=ATOL)
    assert torch.allclose(out[:1], whole[:1], atol=ATOL)
    if sizes == (20,):
        ignored = logits(model, padded)
        assert not torch.allclose(ignored[1:, 4:], alone, atol=1e-3)


def test_packed_documents_do_not_leak(model, ids, whole):
    positions = torch.cat([torch.arange(13), torch.arange(7)])[None].expand(2, -1)
    packed = logits(model, ids, position_ids=positions)
    assert torch.allclose(packed[:, :13], logits(model, ids[:, :13]), atol=ATOL)
    assert torch.allclose(packed[:, 13:], logits(model, ids[:, 13:]), atol=ATOL)
    assert not torch.allclose(whole[:, 13:], packed[:, 13:], atol=1e-3)


def test_gradient_reaches_every_parameter(model, ids):
    model.zero_grad()
    model(ids, labels=ids).loss.backward()
    dead = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    model.zero_grad()
    # A key bias of plain softmax attention shifts every score of a query alike: its gradient is nothing by nature.
    assert [name for name in dead if "k_proj.bias" not in name] == []


def test_save_and_load_are_bit_equal(model, ids, whole, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(loaded) is type(model)
    assert torch.equal(logits(loaded, ids), whole)


def test_declared_bytes_are_the_cache(model, ids, decoded):
    for tokens in (1, 4, 20):
        _, cache = in_chunks(model, ids[:1, :tokens], (tokens,))
        assert cache_bytes(cache) == modeling.state_bytes(model.config, tokens)
    # Of two rows.
    assert decoded[1] == [2 * modeling.state_bytes(model.config, tokens) for tokens in range(1, 21)]


def test_generate_uses_the_cache(model, ids):
    common = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with_cache = model.generate(ids, use_cache=True, **common)
    assert torch.equal(with_cache, model.generate(ids, use_cache=False, **common))


def test_sampling(model, ids):
    torch.manual_seed(0)
    out = model.generate(ids, max_new_tokens=5, do_sample=True, pad_token_id=0, eos_token_id=None)
    assert out.shape == (2, 25)


def test_rollback_is_refused_not_wrong(model, ids):
    _, cache = in_chunks(model, ids, (20,))
    if not model.model.forgets:
        return
    # Older transformers ask for `_is_stateful` alone.
    assert not getattr(cache, "is_croppable", False)
    with pytest.raises(ConfigError, match="keeps no past"):
        cache.crop(-2)
    with pytest.raises(ValueError, match="stateful"):
        model.generate(ids[:1], max_new_tokens=4, prompt_lookup_num_tokens=2, pad_token_id=0)


def test_unfit_input_is_refused(model, ids):
    if not model.model.forgets:
        return
    with pytest.raises(ConfigError, match="expected \\[batch, tokens\\]"):
        model(ids, attention_mask=torch.ones(2, 1, 20, 20))
    mask = torch.ones_like(ids)
    mask[0, -3:] = 0
    with pytest.raises(ConfigError, match="pad on the left"):
        model(ids, attention_mask=mask, use_cache=True)


@pytest.mark.parametrize("name", [n for n in MIXERS.names() if n != "attention"])
def test_every_layer_may_be_converted(bases, ids, name):
    model = build(bases, "llama", name, keep=())
    out, cache = in_chunks(model, ids, (9, 1, 10))
    assert torch.allclose(out, logits(model, ids), atol=ATOL)
    assert cache.get_seq_length() == 20
    # What beams put in order are entries of the cache, which no family changes.
    common = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(model.generate(ids, **common), model.generate(ids, use_cache=False, **common))


@pytest.mark.parametrize("name", MIXERS.names())
def test_a_stretched_rotary_embedding_beyond_the_original_context(bases, ids, name):
    """Twenty tokens where the base was made for eight: decode is prefill, and whoever turns keys reads the new angles."""
    yarn = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 8}
    models = []
    for rope in (yarn, None):
        model = build(bases, "llama", name, keep=(), angles=rope)
        models.append(model)
    stretched, plain = models
    out, cache = in_chunks(stretched, ids, (7, 1, 1, 11))
    assert torch.allclose(out, logits(stretched, ids), atol=ATOL)
    assert cache_bytes(cache) == 2 * modeling.state_bytes(stretched.config, 20)
    same = torch.allclose(out, logits(plain, ids), atol=1e-3)
    assert same is (name in TURNS_NOTHING)


@pytest.mark.parametrize("family", FAMILIES)
def test_keep_everything_is_the_base(bases, ids, family):
    base = AutoModelForCausalLM.from_pretrained(bases[family]).eval()
    config = modeling.hybrid_config(base.config, [{"name": "attention"}] * 3)
    hybrid = modeling.build_model(config).eval()
    hybrid.load_state_dict(base.state_dict(), strict=True)
    assert torch.equal(logits(hybrid, ids), logits(base, ids))


@pytest.mark.parametrize("family", FAMILIES)
def test_wide_window_is_the_base(bases, ids, family):
    base = AutoModelForCausalLM.from_pretrained(bases[family]).eval()
    for window, equal in ((20, True), (19, False)):
        spec = {"name": "streaming", "sink_tokens": 0, "window_tokens": window}
        hybrid = modeling.build_model(modeling.hybrid_config(base.config, [spec] * 3)).eval()
        hybrid.load_state_dict(base.state_dict(), strict=True)
        assert torch.allclose(logits(hybrid, ids), logits(base, ids), atol=ATOL) is equal


def test_long_streaming_text_is_the_dense_mask(bases):
    """Blocks of queries against their slices of keys, against one mask over all."""
    model = build(bases, "llama", "streaming", keep=(), sink_tokens=3, window_tokens=70)
    long = torch.randint(3, 64, (1, 600), generator=torch.Generator().manual_seed(4))
    plain = logits(model, long)
    # One segment id for all takes the general path, whose mask is over every key.
    attention = model.model.layers[0].self_attn
    hidden = torch.randn(1, 600, 32)
    angles = model.model.rotary_emb(hidden, torch.arange(600)[None])
    with torch.no_grad():
        fast = attention(hidden, angles)[0]
        slow = attention(hidden, angles, segment_ids=torch.zeros(1, 600, dtype=torch.long))[0]
    assert torch.allclose(fast, slow, atol=1e-5)
    assert torch.allclose(in_chunks(model, long, (256, 100, 1, 243))[0], plain, atol=5e-5)


def tensors(entry):
    """Names, shapes and dtypes of what a cache entry holds, and how many tokens it says it saw."""
    held = {
        name: (tuple(value.shape), value.dtype) for name, value in sorted(vars(entry).items()) if isinstance(value, torch.Tensor)
    }
    below = {kind.__name__: tensors(part) for kind, part in getattr(entry, "parts", {}).items()}
    return type(entry).__name__, entry.get_seq_length(), held, below


@pytest.mark.parametrize("name", MIXERS.names())
def test_a_cache_filled_without_a_prompt_has_the_shapes_of_a_real_one(bases, name):
    model = build(bases, "llama", name)
    ids = torch.randint(3, 64, (2, 300), generator=torch.Generator().manual_seed(3))
    real, filled = DynamicCache(config=model.config), filled_cache(model, 300, 2)
    with torch.no_grad():
        model(ids, past_key_values=real, use_cache=True)
        assert [tensors(entry) for entry in filled.layers] == [tensors(entry) for entry in real.layers]
        for cache in (real, filled):
            out = model(ids[:, :3], past_key_values=cache, use_cache=True).logits
            assert out.isfinite().all()
    assert cache_bytes(filled) == cache_bytes(real)
