"""Low-rank keys and values: the mixer against its formula, and at full rank against the base, whatever the cache goes through."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

import hybridize.modeling as modeling
from hybridize.cache import LatentLayer, cache_bytes
from hybridize.checkpoint import load_model, open_base
from hybridize.conversions import convert, plan
from hybridize.errors import ConfigError
from hybridize.families import FAMILIES
from hybridize.mixers import MIXERS
from tests.tiny import SIZES, tiny_base
from tests.tolerances import assert_close, rms_ratio

ROPES = {
    "default": {},
    "llama3": {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "yarn": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32},
}  # fmt: skip
SHAPE = {"num_attention_heads": 8, "num_key_value_heads": 4}


def module(family, **options):
    """A mixer with random weights in fp64, and its config."""
    config = modeling.hybrid_config(AutoConfig.for_model(family, **{**SIZES, **SHAPE}), [{"name": "attention"}] * 3)
    torch.manual_seed(2)
    mixer = MIXERS.build({"name": "low_rank_kv", **options}).build(config, 0).double().eval()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return mixer, config


def slowly(mixer, config, u, positions, group_of):
    """The formula by loops over heads and tokens, fp64. `group_of` tells the group of each key/value head."""
    s = {name: tensor.double() for name, tensor in mixer.state_dict().items()}
    heads, kv, d = config.num_attention_heads, config.num_key_value_heads, 8
    r, vr = mixer.rank, mixer.v_rank
    frequencies = 10000.0 ** (-torch.arange(0, d, 2, dtype=torch.float64) / d)

    def turned(x, position):
        turn = torch.polar(torch.ones(d // 2, dtype=torch.float64), float(position) * frequencies)
        pair = torch.complex(x[: d // 2], x[d // 2 :]) * turn
        return torch.cat([pair.real, pair.imag])

    def norm(x, name):
        if name not in s:
            return x
        return x / torch.sqrt(x.pow(2).mean() + config.rms_norm_eps) * s[name]

    tokens = u.shape[0]
    out = torch.zeros(tokens, 32, dtype=torch.float64)
    for h in range(heads):
        j = h // (heads // kv)
        c, place = group_of(j), j % (kv // mixer.groups)
        keys, latents = [], []
        for t in range(tokens):
            latent = s["k_down.weight"][c * r : (c + 1) * r] @ u[t]
            key = s["k_up.weight"][c, place * d : (place + 1) * d] @ latent
            bias = s.get("k_up.bias", torch.zeros(kv * d, dtype=torch.float64))[j * d : (j + 1) * d]
            key = norm(key + bias, "k_norm.weight")
            keys.append(turned(key, positions[t]))
            latents.append(s["v_down.weight"][c * vr : (c + 1) * vr] @ u[t])
        for t in range(tokens):
            q = s["q_proj.weight"][h * d : (h + 1) * d] @ u[t]
            if "q_proj.bias" in s:
                q = q + s["q_proj.bias"][h * d : (h + 1) * d]
            q = turned(norm(q, "q_norm.weight"), positions[t])
            scores = torch.stack([q @ keys[i] for i in range(t + 1)]) * d**-0.5
            mixed = (scores.softmax(0)[:, None] * torch.stack(latents[: t + 1])).sum(0)
            out[t] += s["o_proj.weight"][:, h * vr : (h + 1) * vr] @ mixed
    return out + s.get("o_proj.bias", 0)


def angles(positions):
    turn = positions[..., None].double() * 10000.0 ** (-torch.arange(0, 8, 2, dtype=torch.float64) / 8)
    turn = torch.cat([turn, turn], dim=-1)
    return turn.cos(), turn.sin()


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_its_formula(family):
    mixer, config = module(family, rank=5, v_share=0.6, group_heads=2)
    assert (mixer.groups, mixer.rank, mixer.v_rank) == (2, 4, 6)
    u = torch.randn(1, 7, 32, dtype=torch.float64)
    positions = torch.tensor([[3, 4, 5, 6, 9, 10, 11]])
    with torch.no_grad():
        found = mixer(u, angles(positions))[0][0]
        expected = slowly(mixer, config, u[0], positions[0], lambda j: j // 2)
        wrong = slowly(mixer, config, u[0], positions[0], lambda j: j % 2)
        one = torch.cat([mixer(u[:, :1], angles(positions[:, :1]))[0][0], found[1:]])
    # transformers' own norm works in fp32, whatever it is given.
    row = "fp32" if FAMILIES[family].qk_norm else "fp64"
    assert_close(found, expected, row)
    assert_close(one, expected, row)
    assert rms_ratio(found, wrong) > 0.1


@pytest.fixture(scope="module", params=[("llama", "default"), ("qwen3", "yarn"), ("qwen2", "llama3")], ids=str)
def twins(request, tmp_path_factory):
    """A base, and its conversion at full rank."""
    family, rope = request.param
    folder = tmp_path_factory.mktemp("twins")
    extra = {"rope_parameters": ROPES[rope]} if ROPES[rope] else {}
    path = tiny_base(family, folder, **SHAPE, **extra)
    mixer = {"name": "low_rank_kv", "rank": "full", "group_heads": 2, "method": "svd"}
    convert(plan(open_base(path), {"keep": {"layers": [1]}, "mixer": mixer}, "t", 0), folder / "out")
    return AutoModelForCausalLM.from_pretrained(path).eval(), load_model(folder / "out").eval()


@pytest.fixture(scope="module")
def ids():
    return torch.randint(3, 64, (2, 40), generator=torch.Generator().manual_seed(3))


def stepwise(model, ids, sizes, mask=None, positions=None):
    cache, out, start = DynamicCache(config=model.config), [], 0
    for size in sizes:
        stop = start + size
        kwargs = {} if mask is None else {"attention_mask": mask[:, :stop]}
        if positions is not None:
            kwargs["position_ids"] = positions[:, start:stop]
        with torch.no_grad():
            out.append(model(ids[:, start:stop], past_key_values=cache, use_cache=True, **kwargs).logits)
        start = stop
    return torch.cat(out, dim=1), cache


def right_padded():
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[1, 9:14] = 0
    return mask, (mask.cumsum(1) - 1).clamp(min=0)


def left_padded():
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[1, :9] = 0
    return mask, (mask.cumsum(1) - 1).clamp(min=0)


CASES = {
    "plain": (None, None),
    "left padding": left_padded(),
    "padding in the middle": right_padded(),
    "gaps": (None, torch.arange(40)[None] + torch.arange(40)[None] // 7),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("sizes", [(14, 1, 1, 24), (5, 9, 26)], ids=str)
def test_full_rank_is_the_base_whatever_the_cache_goes_through(twins, ids, sizes, case):
    base, hybrid = twins
    mask, positions = CASES[case]
    found, _ = stepwise(hybrid, ids, sizes, mask, positions)
    expected, _ = stepwise(base, ids, sizes, mask, positions)
    real = torch.ones(2, 40, dtype=torch.bool) if mask is None else mask.bool()
    assert_close(found[real], expected[real], "fp32")


def test_positions_matter_and_are_those_of_the_cache(twins, ids, monkeypatch):
    """Keys that are rebuilt at their place in the cache, not at their position, would show."""
    base, hybrid = twins
    mask, positions = right_padded()
    expected, _ = stepwise(base, ids, (14, 26), mask, positions)
    original = LatentLayer.extend

    def by_place(self, keys, values, given):
        keys, values, true = original(self, keys, values, given)
        return keys, values, torch.arange(true.shape[1])[None].expand_as(true)

    monkeypatch.setattr(LatentLayer, "extend", by_place)
    found, _ = stepwise(hybrid, ids, (14, 26), mask, positions)
    assert rms_ratio(found[mask.bool()], expected[mask.bool()]) > 1e-3


def assert_rolled_back_alike(twins, ids):
    """A base and a hybrid that is exactly it, after cropping and choosing rows of a left-padded cache; beams and guesses too."""
    mask, positions = left_padded()
    outs = []
    for model in twins:
        _, cache = stepwise(model, ids[:, :20], (12, 8), mask, positions)
        cache.crop(-5)
        cache.batch_repeat_interleave(2)
        cache.reorder_cache(torch.tensor([2, 0, 1, 3]))
        cache.batch_select_indices(torch.tensor([0, 1]))
        rows = torch.tensor([1, 0])
        with torch.no_grad():
            kwargs = {"attention_mask": mask[rows, :18], "position_ids": positions[rows, 15:18]}
            outs.append(model(ids[rows, 15:18], past_key_values=cache, use_cache=True, **kwargs).logits)
    assert_close(outs[1], outs[0], "fp32")
    kept = {"num_beams": 2, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(*(model.generate(ids, attention_mask=mask, **kept) for model in twins))
    guessed = {"max_new_tokens": 8, "do_sample": False, "prompt_lookup_num_tokens": 3, "pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(*(model.generate(ids[:1], **guessed) for model in twins))


def test_rollback_and_choice_of_rows(twins, ids):
    assert_rolled_back_alike(twins, ids)


def test_a_mask_of_any_form_is_followed(twins, ids):
    base, hybrid = twins
    seen = torch.rand(2, 1, 40, 40, generator=torch.Generator().manual_seed(1)) < 0.6
    seen = seen.tril() | torch.eye(40, dtype=torch.bool)
    for mask in (seen, torch.where(seen, 0.0, torch.finfo(torch.float32).min)):
        with torch.no_grad():
            found, expected = (m(ids, attention_mask=mask, use_cache=False).logits for m in (hybrid, base))
        assert_close(found, expected, "fp32")
    still = tuple(angle.float() for angle in angles(torch.arange(4)[None]))
    with pytest.raises(ConfigError, match="attn_implementation='sdpa'"):
        hybrid.model.layers[0].self_attn(torch.zeros(1, 4, 32), still, attention_mask=torch.ones(1, 4))


def test_a_bf16_cast_turns_queries_and_keys_alike(twins, ids):
    hybrid = twins[1].to(torch.bfloat16)
    found, _ = stepwise(hybrid, ids, (12,) + (1,) * 28)
    with torch.no_grad():
        expected = hybrid(ids, use_cache=False).logits
    twins[1].to(torch.float32)
    assert rms_ratio(found.float(), expected.float()) < 0.03


@pytest.mark.parametrize(
    ("options", "ranks"),
    [
        ({}, (1, 10, 22)),
        ({"rank": "full"}, (1, 32, 32)),
        ({"rank": 32}, (1, 32, 32)),
        ({"rank": 30}, (1, 28, 32)),
        ({"rank": 1}, (1, 1, 1)),
        ({"rank": 0.25, "v_share": 0.5}, (1, 8, 8)),
        ({"rank": 0.5, "v_share": 0.5, "group_heads": 1}, (4, 4, 4)),
    ],
    ids=str,
)
def test_ranks_and_bytes(options, ranks):
    mixer, config = module("llama", **options)
    assert (mixer.groups, mixer.rank, mixer.v_rank) == ranks
    cache = DynamicCache(config=config)
    positions = torch.arange(6)[None]
    with torch.no_grad():
        mixer.float()(
            torch.randn(1, 6, 32), tuple(a.float() for a in angles(positions)), past_key_values=cache, position_ids=positions
        )
    declared = MIXERS.build({"name": "low_rank_kv", **options}).state_bytes(config, 6)
    assert declared == 6 * (4 * ranks[0] * (ranks[1] + ranks[2]) + 4) == cache_bytes(cache)


def test_group_of_an_odd_number_of_heads():
    config = AutoConfig.for_model("llama", **{**SIZES, "hidden_size": 48, "num_attention_heads": 12, "num_key_value_heads": 6})
    assert MIXERS.build({"name": "low_rank_kv"}).heads_per_group(config) == 3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rank": 0}, "rank is 0, expected an integer >= 1"),
        ({"rank": 1.0}, "rank is 1.0, expected a share between 0 and 1"),
        ({"rank": 33}, "rank is 33, expected at most 32: 4 heads of 8"),
        ({"rank": 17, "group_heads": 2}, "rank is 17, expected at most 16"),
        ({"group_heads": 3}, "group_heads is 3, expected a divisor of the base's 4"),
        ({"group_heads": 0}, "group_heads is 0"),
        ({"v_share": 1.0}, "v_share is 1.0"),
        ({"rank": "half"}, "rank is 'half'"),
    ],
    ids=str,
)
def test_bad_options_are_refused_when_planned(options, words, tmp_path):
    base = open_base(tiny_base("llama", tmp_path, **SHAPE))
    with pytest.raises(ConfigError, match=words) as caught:
        plan(base, {"keep": {"every": 3}, "mixer": {"name": "low_rank_kv", **options}}, "t", 0)
    assert "\n" not in str(caught.value)


def test_a_cache_without_positions_is_refused():
    mixer, config = module("llama")
    with pytest.raises(ConfigError, match="no position_ids"):
        mixer(torch.randn(1, 2, 32).double(), angles(torch.arange(2)[None]), past_key_values=DynamicCache(config=config))
