"""Seeds of latent attention: exact at full size in every family, and at each step against definitions in fp64."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from hybridize.checkpoint import load_model, open_base
from hybridize.conversions import convert, plan
from hybridize.conversions.layer import LayerCalibration, materialised
from hybridize.conversions.mla_fit import Sample, joint_pca, rotate_keys, transmla
from hybridize.conversions.mla_from_gqa import MLAFromGQA, context
from hybridize.conversions.mla_parts import Projected, assemble, leading, principal, read_heads
from hybridize.conversions.mla_published import choose_pairs, joint_spectrum, joint_svd
from hybridize.conversions.plan import build_mixer
from hybridize.errors import ConfigError
from hybridize.families import FAMILIES
from hybridize.mixers import MIXERS
from tests.tiny import tiny_base
from tests.tolerances import TOLERANCES, assert_close, rms_ratio

METHODS = ("transmla", "svd", "partial_rope")
FULL = {"kv_rank": "full", "rope_dim": "full", "latent_norm": "none"}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 10000.0}
G, D, H, HEADS = 2, 8, 32, 4


def layer(family, tmp_path, tokens=24, rows=6, still=False, **options):
    """(source tensors, mixer, config, calibration) of one layer; extras of the base's config go through `base`.

    `still` has every token at position 0.
    """
    base = open_base(tiny_base(family, tmp_path, **options.pop("base", {})))
    prefix = "model.layers.1.self_attn."
    source = {n.removeprefix(prefix): base.read(n) for n in base.tensors if n.startswith(prefix)}
    x = torch.randn(rows, tokens, H, generator=torch.Generator().manual_seed(5))
    angles = FAMILIES[family].rotary(base.config)(x, torch.arange(tokens)[None] * (not still))
    attention = FAMILIES[family].attention(base.config, 1).eval()
    attention.load_state_dict(source)
    attention.config._attn_implementation = "sdpa"
    kept = {}
    attention.o_proj.register_forward_pre_hook(lambda m, args: kept.update(context=args[0]))
    with torch.no_grad():
        target = attention(x, position_embeddings=angles, attention_mask=None)[0]
    mixer = build_mixer(MIXERS.build({"name": "mla", **options}), base.config, 1)
    return source, mixer, base.config, LayerCalibration(inputs=x, context=kept["context"], target=target, angles=angles)


def seeded(found, **options):
    source, mixer, config, calibration = found
    seed = MLAFromGQA(**options)
    made = seed(source, mixer, config, torch.Generator(), calibration if seed.calibrated else None)
    return materialised(mixer, made), made


def output(module, calibration):
    with torch.no_grad():
        return module(calibration.inputs, calibration.angles)[0]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_full_size_is_the_base(family, method, tmp_path):
    extra = {"attention_bias": True} if family in ("llama", "qwen3") else {}
    path = tiny_base(family, tmp_path, **extra)
    base = open_base(path)
    ids = torch.randint(3, 64, (2, 20), generator=torch.Generator().manual_seed(1))
    made = plan(base, {"keep": {"layers": []}, "mixer": {"name": "mla", "method": method, **FULL}}, "t", 0)
    convert(made, tmp_path / "out", ids)
    hybrid = load_model(tmp_path / "out")
    teacher = AutoModelForCausalLM.from_pretrained(path).eval()
    with torch.no_grad():
        want = teacher(ids).logits
        assert_close(hybrid(ids).logits, want, "fp32")
        text = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        assert torch.equal(hybrid.generate(ids, **text), teacher.generate(ids, **text))
        # Wrong on purpose: value heads exchanged, and every bias left out.
        attention = hybrid.model.layers[1].self_attn
        ups = attention.kv_b_proj.weight.view(HEADS, -1, attention.rank)
        ups.copy_(ups.roll(1, dims=0).clone())
        assert rms_ratio(hybrid(ids).logits, want) > 100 * TOLERANCES["fp32"][0]
        ups.copy_(ups.roll(-1, dims=0).clone())
        assert_close(hybrid(ids).logits, want, "fp32")
        if attention.q_proj.bias is not None:
            attention.kv_a_proj_with_mqa.bias.zero_()
            assert rms_ratio(hybrid(ids).logits, want) > 100 * TOLERANCES["fp32"][0]


def test_full_size_follows_a_scaled_rotary_embedding(tmp_path):
    found = layer("llama", tmp_path, base={"rope_parameters": YARN}, **FULL)
    module, _ = seeded(found, method="svd")
    assert_close(output(module, found[3]), found[3].target, "fp32")


@pytest.mark.parametrize("method", ["transmla", "partial_rope"])
def test_plain_scores_follow_a_scaled_rotary_embedding(method, tmp_path):
    """Where all tokens are at one place nothing turns, and full rank is the base: all of its scores are lengthened."""
    found = layer("llama", tmp_path, base={"rope_parameters": YARN}, still=True, kv_rank="full", rope_dim=8)
    module, _ = seeded(found, method=method, weigh="activations", out_proj="kept", freq_fold=1)
    assert_close(output(module, found[3]), found[3].target, "fp32")
    # Wrong on purpose: the rotary part alone.
    module.plain_scale = 1.0
    assert rms_ratio(output(module, found[3]), found[3].target) > 100 * TOLERANCES["fp32"][0]


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("method", METHODS)
def test_full_rank_loses_only_the_rotary_embedding(method, family, tmp_path):
    """By definition in fp64: scores of the rotary part turn, those of the plain part do not, values are exact."""
    found = layer(family, tmp_path, kv_rank="full", rope_dim=8)
    source, mixer, config, calibration = found
    module, made = seeded(found, method=method, weigh="activations", out_proj="kept", freq_fold=1)
    s = {name: tensor.double() for name, tensor in source.items()}
    x = calibration.inputs.double()

    def rows(name):
        out = (x @ s[f"{name}_proj.weight"].T + s.get(f"{name}_proj.bias", 0)).unflatten(-1, (-1, D))
        if f"{name}_norm.weight" in s:
            out = out * torch.rsqrt(out.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps) * s[f"{name}_norm.weight"]
        return out

    q, k, v = rows("q"), rows("k"), rows("v")
    heads = read_heads(source, mixer, config, calibration)
    if method == "transmla":
        rotary = rotate_keys(heads, mixer, heads.rows("k", calibration.inputs.flatten(0, 1)), 1, None)
        key_part, query_part, plain = rotary.rope_key, rotary.rope_query, rotary.plain
        pairs = rotary.pairs
    elif method == "svd":
        pairs = torch.arange(4)
        key_part = torch.cat([torch.eye(D), torch.eye(D)], dim=1).double() / 2
        query_part = torch.eye(D).double().expand(HEADS, D, D)
        plain = torch.zeros(2 * D, 2 * D).double()
    else:
        chosen = choose_pairs(heads, mixer, "2-norm", calibration)
        assert chosen[:, 0].tolist() == [0, 0, 1, 1]
        pairs = chosen[:, 1]
        places = torch.cat([chosen[:, 0] * D + pairs, chosen[:, 0] * D + pairs + 4])
        key_part = torch.eye(2 * D).double()[places]
        query_part = torch.stack([key_part[:, (h // 2) * D : (h // 2 + 1) * D] for h in range(HEADS)])
        plain = torch.eye(2 * D).double() - key_part.T @ key_part
    half = len(pairs)
    angle = torch.arange(x.shape[1])[:, None] * (10000.0 ** (-2 * pairs.double() / D))[None]

    def turn(rows):
        first, second = rows[..., :half], rows[..., half:]
        return torch.cat([first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], dim=-1)

    key, still = turn(k.flatten(2) @ key_part.T), (k.flatten(2) @ plain.T).unflatten(-1, (G, D))
    later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)

    def expected(pair):
        out = torch.zeros(*x.shape[:2], HEADS, D, dtype=torch.float64)
        for h in range(HEADS):
            scores = turn(q[:, :, h] @ query_part[h].T) @ key.mT + q[:, :, h] @ still[:, :, pair(h)].mT
            weights = (scores * D**-0.5).masked_fill(later, float("-inf")).softmax(-1)
            out[:, :, h] = weights @ v[:, :, pair(h)]
        return out.flatten(2) @ s["o_proj.weight"].T

    assert_close(output(module, calibration), expected(lambda h: h // 2), "fp32")
    assert rms_ratio(output(module, calibration), expected(lambda h: h % 2)) > 0.05


def test_a_rotation_at_one_frequency_commutes_with_the_rotary_embedding(tmp_path):
    """All components rotary: scores are the base's. With two frequencies folded they are not."""
    source, mixer, config, calibration = layer("llama", tmp_path, rope_dim=16)
    assert mixer.full_rope
    mixer.chosen = True
    heads = read_heads(source, mixer, config, calibration)
    sample = Sample(Projected(heads, calibration))
    keys = heads.rows("k", calibration.inputs.flatten(0, 1))
    for weights in (None, sample.weights()):
        errors = [sample.rotary_error(rotate_keys(heads, mixer, keys, fold, weights)) for fold in (1, 2)]
        assert errors[0] < 1e-12
        assert errors[1] > 1e-6


def test_the_joint_decomposition_is_the_best_of_its_rank(tmp_path):
    source, mixer, config, calibration = layer("llama", tmp_path, kv_rank=6, rope_dim=8)
    heads = read_heads(source, mixer, config, calibration)
    keys, values = (heads.rows(name, calibration.inputs.flatten(0, 1)) for name in "kv")
    plain = torch.eye(2 * D, dtype=torch.float64)
    made = joint_pca(heads, mixer, keys, values, plain, None)
    ratio = values.flatten(1).norm(dim=0).mean() / keys.flatten(1).norm(dim=0).mean()
    both = torch.cat([keys.flatten(1) * ratio, values.flatten(1)], dim=1).double()
    left = torch.linalg.svdvals(both)[6:].square().sum()
    up = torch.cat([made["up_keys"][::2].flatten(0, 1) * ratio, made["up_values"].flatten(0, 1)])
    lost = (torch.cat([keys.flatten(1), values.flatten(1)], dim=1).double() @ made["down"].T @ up.T - both).square().sum()
    assert float(lost) == pytest.approx(float(left), rel=1e-5)


def test_leading_components_span_what_the_exact_ones_do():
    rows = torch.randn(90, 30, generator=torch.Generator().manual_seed(0)).double() * torch.linspace(1, 0.2, 30)
    gram = rows.T @ rows
    found, exact = leading(gram, 12), principal(gram)[1][:, :12]
    assert_close(found.T @ found, torch.eye(12).double(), "fp64")
    assert_close(found @ found.T, exact @ exact.T, "fp32")
    assert rms_ratio(leading(gram, 11) @ leading(gram, 11).T, exact @ exact.T) > 0.1


@pytest.mark.parametrize("options", [{}, {"latent_norm": "rms"}, {"rope_dim": "full"}])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_what_o_proj_reads_by_the_projections_that_are_there(family, options, tmp_path):
    source, mixer, config, calibration = layer(family, tmp_path, **{"kv_rank": 8, "rope_dim": 8, **options})
    heads = read_heads(source, mixer, config, calibration)
    projected = Projected(heads, calibration)
    factors = transmla(projected, mixer, 1, "output")
    module = materialised(mixer, assemble(heads, factors, mixer))
    some = torch.tensor([1, 3])
    with torch.no_grad():
        want = module.context(calibration.inputs[some], calibration.angles)
        assert_close(context(module, factors, projected, some), want, "fp32")
        factors.rope_query = factors.rope_query.roll(1, dims=0)
        assert rms_ratio(context(module, factors, projected, some), want) > 0.01


@pytest.mark.parametrize("tokens", [2, 48])
def test_o_proj_is_held_back_where_text_is_short(tokens, tmp_path):
    """Seeded on few tokens and on many, measured on other text: never worse than the base's own o_proj."""
    source, mixer, config, calibration = layer("llama", tmp_path, tokens=48, rows=12, kv_rank=8, rope_dim=8)
    short = LayerCalibration(
        inputs=calibration.inputs[4:, :tokens], context=calibration.context[4:, :tokens], target=calibration.target[4:, :tokens],
        angles=tuple(angle[:, :tokens] for angle in calibration.angles),
    )  # fmt: skip
    outs = [output(seeded((source, mixer, config, short), out_proj=how)[0], calibration)[:4] for how in ("solved", "kept")]
    solved, kept = (rms_ratio(out, calibration.target[:4]) for out in outs)
    assert solved < 1.02 * kept


@pytest.mark.parametrize(("family", "rope"), [("llama", None), ("llama", 4), ("qwen3", 4), ("qwen2", "full")])
def test_the_spectrum_is_what_the_rank_cuts(family, rope, tmp_path):
    """Against the matrix by its definition: the rows of every head but its strided pairs, keys at their normed size."""
    source, mixer, config, _ = layer(family, tmp_path, rope_dim=rope, kv_rank=6)
    found = joint_spectrum(source, config, rope)
    width = 2 * D if rope == "full" else rope or D
    gone = {place for pair in range(0, D // 2, D // min(width, D)) for place in (pair, pair + D // 2)}
    rows = []
    for head in range(G):
        block = source["k_proj.weight"][head * D : (head + 1) * D].double()
        if family == "qwen3":
            size = (block.square().sum() / D).sqrt()
            block = block / size * source["k_norm.weight"].double()[:, None]
        rows += [block[place] for place in range(D) if place not in gone]
    matrix = torch.stack([*rows, *source["v_proj.weight"].double()])
    assert_close(found, torch.linalg.svdvals(matrix)[: len(found)], "fp64")
    assert len(found) == len(matrix)
    if rope == 4:
        heads = read_heads(source, mixer, config, None)
        plain = torch.ones(D).double()
        plain[sorted(gone)] = 0
        made = joint_svd(heads, 6, plain.repeat(G).diag())
        basis = made["down"][:, torch.cat([plain.repeat(G), torch.ones(G * D)]) > 0].T
        left = (matrix - basis @ basis.T @ matrix).square().sum()
        assert float(left) == pytest.approx(float(found[6:].square().sum()), rel=1e-5)
        assert float(left) != pytest.approx(float(found[5:].square().sum()), rel=1e-2)


def test_a_spectrum_of_no_layout_is_refused(tmp_path):
    source, _, config, _ = layer("llama", tmp_path)
    with pytest.raises(ConfigError, match="rope_dim is 12, expected at most head_dim = 8, or full"):
        joint_spectrum(source, config, 12)


@pytest.mark.parametrize(("how", "pairs"), [("high", [0, 1]), ("low", [2, 3]), ("uniform", [0, 2])])
def test_pairs_chosen_by_frequency(how, pairs, tmp_path):
    source, mixer, config, _ = layer("llama", tmp_path, rope_dim=8)
    heads = read_heads(source, mixer, config, None)
    assert choose_pairs(heads, mixer, how, None).tolist() == [[g, p] for g in range(G) for p in pairs]


def test_uniform_frequencies_are_the_native_ones(tmp_path):
    for rope, want in ((4, [0, 2]), (8, [0, 1, 2, 3])):
        source, mixer, config, calibration = layer("llama", tmp_path, rope_dim=rope, frequencies="uniform")
        heads = read_heads(source, mixer, config, calibration)
        keys = heads.rows("k", calibration.inputs.flatten(0, 1))
        assert rotate_keys(heads, mixer, keys, 1, None).pairs.tolist() == want
        module, made = seeded((source, mixer, config, calibration))
        assert "rope_pairs" not in made
        native = 10000.0 ** (-torch.arange(0, rope, 2).float() / rope)
        assert_close(
            module._rotary(calibration.angles)[0][0, :, : rope // 2], (torch.arange(24.0)[:, None] * native).cos(), "fp32"
        )


def test_set_and_chosen_frequencies_agree_where_each_is_taken_twice(tmp_path):
    """Two components of every frequency: the same choice in another order, so the same layer."""
    outs = []
    for frequencies in ("uniform", "chosen"):
        wide = {"num_key_value_heads": 4, "num_attention_heads": 4}
        found = layer("llama", tmp_path, rows=12, base=wide, kv_rank=20, rope_dim=16, frequencies=frequencies)
        outs.append(output(seeded(found, out_proj="kept")[0], found[3]))
    assert_close(outs[0], outs[1], "fp32")


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_of_the_output_beat_the_published_balance(family, tmp_path):
    found = layer(family, tmp_path, tokens=48, rows=12, kv_rank=8, rope_dim=8)
    target = found[3].target

    def error(**options):
        return rms_ratio(output(seeded(found, **options)[0], found[3]), target)

    ours = error()
    assert ours < error(out_proj="kept") < error(weigh="activations", out_proj="kept")
    assert ours < error(method="svd")
    assert ours < error(method="partial_rope")


def test_a_normed_latent_keeps_its_size(tmp_path):
    found = layer("llama", tmp_path, kv_rank=12, rope_dim=8, latent_norm="rms")
    _, mixer, _, calibration = found
    module, made = seeded(found, out_proj="kept")
    plain = layer("llama", tmp_path, kv_rank=12, rope_dim=8)
    base = output(seeded(plain, out_proj="kept")[0], plain[3])
    right = rms_ratio(output(module, calibration), base)
    with torch.no_grad():
        # TransMLA's released code has the inverse.
        module.kv_a_layernorm.weight.copy_(1 / made["kv_a_layernorm.weight"])
    assert right < 0.5 * rms_ratio(output(module, calibration), base)
    assert seeded(found, method="svd")[1]["kv_a_layernorm.weight"].min() > 0


def test_folded_norms_are_near_and_need_text(tmp_path):
    found = layer("qwen3", tmp_path, qk_norm="fold", **FULL)
    module, made = seeded(found, out_proj="kept")
    assert not any("_norm" in name for name in made)
    near = rms_ratio(output(module, found[3]), found[3].target)
    with torch.no_grad():
        module.q_proj.weight.mul_(3)
    assert near < 0.5 * rms_ratio(output(module, found[3]), found[3].target)


@pytest.mark.parametrize("method", METHODS)
def test_same_bytes_twice(method, tmp_path):
    base = open_base(tiny_base("qwen2", tmp_path))
    made = plan(base, {"keep": {"layers": [1]}, "mixer": {"name": "mla", "method": method, "freq_fold": "search"}}, "t", 0)
    text = torch.randint(3, 64, (6, 32), generator=torch.Generator().manual_seed(0))
    for name, workers in (("a", 1), ("b", 2)):
        convert(made, tmp_path / name, text, workers=workers)
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("family", "options", "words"),
    [
        ("llama", {"freq_fold": 3}, "layer 0: mixer 'mla': freq_fold is 3, expected a divisor of head_dim / 2 = 4"),
        ("llama", {"freq_fold": 0}, "freq_fold is 0, expected 1 or more"),
        ("llama", {"rope_dim": 12, "method": "svd"}, "one rotary key of at most head_dim = 8"),
        ("qwen3", {"qk_norm": "fold", "method": "svd"}, "measures the norms on text"),
        ("llama", {"kv_rank": 99}, "kv_rank is 99, expected at most 24"),
        ("llama", {"method": "pca"}, "method is 'pca', expected one of 'transmla'"),
    ],
)
def test_what_cannot_be_is_refused_when_planned(family, options, words, tmp_path):
    base = open_base(tiny_base(family, tmp_path))
    with pytest.raises(ConfigError, match=words) as caught:
        plan(base, {"keep": {"layers": []}, "mixer": {"name": "mla", **options}}, "t", 0)
    assert "\n" not in str(caught.value)
