"""The low-rank seeds: exact at full rank, the best factors there are below it, and ours at least as good as the published."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from hybridize.checkpoint import load_model, open_base
from hybridize.conversions import convert, plan
from hybridize.conversions.layer import LayerCalibration, layer_generator
from hybridize.conversions.low_rank_from_gqa import LowRankFromGQA, factor, query_metric
from hybridize.conversions.plan import build_mixer
from hybridize.errors import ConfigError
from hybridize.families import FAMILIES
from hybridize.mixers import MIXERS
from tests.conversions.real import perplexity, stories_rows
from tests.tiny import WHOLE_WAY, tiny_base
from tests.tolerances import assert_close, rms_ratio

SHAPE = {"num_attention_heads": 8, "num_key_value_heads": 4}


def text(rows, seed):
    return torch.randint(3, 64, (rows, 24), generator=torch.Generator().manual_seed(seed))


def hybrid(path, out, calibration=None, **options):
    convert(
        plan(open_base(path), {"keep": {"layers": [1]}, "mixer": {"name": "low_rank_kv", **options}}, "t", 0), out, calibration
    )
    return load_model(out).eval()


@pytest.mark.parametrize("method", ["calibrated", "palu", "svd"])
@pytest.mark.parametrize("family", [*FAMILIES, "llama with biases"])
def test_full_rank_is_the_base(family, method, tmp_path):
    extra = {"attention_bias": True} if "biases" in family else {}
    path = tiny_base(family.split()[0], tmp_path, **SHAPE, **extra)
    ids = text(2, 1)
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(path).eval()(ids).logits
        model = hybrid(path, tmp_path / "out", text(2, 2), rank="full", method=method, group_heads=2)
        assert_close(model(ids).logits, expected, "fp32")
        if method == "svd":
            wrongs = ["heads"] + (["bias"] if "q_proj.bias" in dict(model.model.layers[0].self_attn.named_parameters()) else [])
            for wrong in wrongs:
                assert rms_ratio(spoilt(model, wrong)(ids).logits, expected) > 1e-2, wrong


def spoilt(model, how):
    """With the value heads of a group taken modulo instead of side by side, or without the biases of keys and values."""
    attention = model.model.layers[0].self_attn
    if how == "heads":
        heads = attention.o_proj.weight.data.view(32, 8, -1)
        heads.copy_(heads[:, [0, 2, 1, 3, 4, 6, 5, 7]])
    else:
        attention.k_up.bias.data.zero_()
        attention.o_proj.bias.data.zero_()
    return model


def parts(family, tmp_path, **options):
    base = open_base(tiny_base(family, tmp_path, **SHAPE))
    prefix = "model.layers.1.self_attn."
    source = {n.removeprefix(prefix): base.read(n) for n in base.tensors if n.startswith(prefix)}
    torch.manual_seed(4)
    inputs = torch.randn(3, 40, 32) @ torch.diag(torch.linspace(0.1, 3, 32)) @ torch.randn(32, 32)
    turn = torch.arange(40)[None, :, None] * 10000.0 ** (-torch.arange(0, 8, 2) / 8)
    turn = torch.cat([turn, turn], dim=-1)
    calibration = LayerCalibration(
        inputs=inputs, context=torch.zeros(3, 40, 64), target=torch.randn(3, 40, 32), angles=(turn.cos(), turn.sin())
    )
    return base, source, build_mixer(MIXERS.build({"name": "low_rank_kv", **options}), base.config, 1), calibration


@pytest.mark.parametrize("method", ["palu", "svd"])
def test_published_methods_are_truncated_svds_by_definition(method, tmp_path):
    """Against torch's SVD of the whitened weights, the whitening by its Cholesky factor, as Palu writes it."""
    base, source, mixer, calibration = parts("qwen2", tmp_path, rank=5, v_share=0.5, group_heads=2)
    made = LowRankFromGQA(method=method)(source, mixer, base.config, layer_generator(0, 1), calibration)
    x = calibration.inputs.flatten(0, 1).double()
    white = torch.linalg.cholesky(x.T @ x) if method == "palu" else torch.eye(32, dtype=torch.float64)
    for group in range(2):
        w = source["k_proj.weight"].double()[group * 16 : (group + 1) * 16]
        u, s, v = torch.linalg.svd(w @ white, full_matrices=False)
        expected = (u[:, :5] * s[:5]) @ v[:5] @ torch.linalg.inv(white)
        found = made["k_up.weight"][group].double() @ made["k_down.weight"][group * 5 : (group + 1) * 5].double()
        assert rms_ratio(found, expected) < 1e-4
        plain, _, _ = torch.linalg.svd(w)
        other = plain[:, :5] @ plain[:, :5].T @ w
        assert (rms_ratio(found, other) > 1e-2) == (method == "palu")
        # Values: what o_proj reads of head h is head h // 2 of group h // 4.
        w = source["v_proj.weight"].double()[group * 16 : (group + 1) * 16]
        u, s, v = torch.linalg.svd(w @ white, full_matrices=False)
        kept = (u[:, :5] * s[:5]) @ v[:5] @ torch.linalg.inv(white)
        for head in range(group * 4, group * 4 + 4):
            place = (head // 2) % 2
            out = source["o_proj.weight"].double()[:, head * 8 : (head + 1) * 8]
            down = made["v_down.weight"][group * 5 : (group + 1) * 5].double()
            found = made["o_proj.weight"][:, head * 5 : (head + 1) * 5].double() @ down
            assert rms_ratio(found, out @ kept[place * 8 : (place + 1) * 8]) < 1e-4
            assert rms_ratio(found, out @ kept[(1 - place) * 8 : (2 - place) * 8]) > 0.1
    through = source["o_proj.weight"].double() @ source["v_proj.bias"].double().view(4, 8).repeat_interleave(2, 0).flatten()
    assert_close(made["o_proj.bias"], through.float(), "fp32")


def test_a_metric_is_minimised(tmp_path):
    """No other factors of the rank do better; those without the metric do worse."""
    torch.manual_seed(5)
    w, root, x = (torch.randn(*s, dtype=torch.float64) for s in ((12, 20), (12, 12), (50, 20)))
    metric, inputs = root.T @ root, x.T @ x

    def loss(up, down):
        return float(((root @ (w - up @ down) @ x.T) ** 2).sum())

    up, down = factor(w, inputs, metric, 4)
    best = torch.linalg.svdvals(root @ w @ torch.linalg.cholesky(inputs))[4:].pow(2).sum()
    assert math.isclose(loss(up, down), float(best), rel_tol=1e-3)
    assert loss(*factor(w, inputs, None, 4)) > 1.02 * float(best)
    assert loss(*factor(w, None, metric, 4)) > 1.02 * float(best)
    assert torch.equal(factor(w, None, None, 12)[1], w)


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_query_metric_by_definition(family, tmp_path):
    """Every query, key token and head in turn, with rotations as complex numbers, fp64."""
    base, source, mixer, calibration = parts(family, tmp_path)
    calibration = LayerCalibration(
        inputs=calibration.inputs[:1, :9] / 30, context=calibration.context[:1, :9], target=calibration.target[:1, :9],
        angles=tuple(angle[:, :9] for angle in calibration.angles),
    )  # fmt: skip
    found = query_metric(source, mixer, base.config, calibration.inputs, calibration.angles)
    s = {name: tensor.double() for name, tensor in source.items()}
    x = calibration.inputs[0].double()
    frequencies = 10000.0 ** (-torch.arange(0, 8, 2, dtype=torch.float64) / 8)

    def turned(v, position):
        pair = torch.complex(v[:4], v[4:]) * torch.polar(torch.ones(4, dtype=torch.float64), position * frequencies)
        return torch.cat([pair.real, pair.imag])

    def head(name, t, h):
        v = (
            s[f"{name}_proj.weight"][h * 8 : h * 8 + 8] @ x[t]
            + s.get(f"{name}_proj.bias", torch.zeros(64).double())[h * 8 : h * 8 + 8]
        )
        size = torch.ones(8, dtype=torch.float64)
        if f"{name}_norm.weight" in s:
            size = s[f"{name}_norm.weight"] * torch.rsqrt(v.pow(2).mean() + base.config.rms_norm_eps)
        return v * size, size

    expected = torch.zeros(4, 8, 8, dtype=torch.float64)
    for h in range(8):
        for t in range(9):
            scores = torch.stack([turned(head("q", t, h)[0], t - i) @ head("k", i, h // 2)[0] for i in range(t + 1)])
            p = (scores * 8**-0.5).softmax(0)
            for i in range(t + 1):
                read = turned(head("q", t, h)[0], t - i) * head("k", i, h // 2)[1]
                expected[h // 2] += p[i] * (1 - p[i]) * torch.outer(read, read)
    assert rms_ratio(found, expected) < 1e-5
    assert rms_ratio(found, expected.flip(0)) > 0.1


@pytest.mark.parametrize("family", WHOLE_WAY)
def test_calibrated_conversion_of_every_family(family, tmp_path):
    path = tiny_base(family, tmp_path, **SHAPE)
    teacher = AutoModelForCausalLM.from_pretrained(path).eval()
    fresh, errors = text(12, 9), {}
    for method in ("calibrated", "palu", "svd"):
        model = hybrid(path, tmp_path / method, text(96, 0), rank=0.5, v_share=0.5, method=method)
        with torch.no_grad():
            errors[method] = rms_ratio(model(fresh).logits, teacher(fresh).logits)
    assert errors["calibrated"] < min(errors["palu"], errors["svd"])
    if family == "llama":
        # The same bytes twice, whatever the family.
        hybrid(path, tmp_path / "again", text(96, 0), rank=0.5, v_share=0.5)
        again, first = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("again", "calibrated"))
        assert again == first


def test_text_is_asked_for_and_no_native_class_is_promised(tmp_path):
    base, source, mixer, _ = parts("llama", tmp_path)
    with pytest.raises(ConfigError, match="needs text to calibrate on"):
        LowRankFromGQA(method="palu")(source, mixer, base.config, layer_generator(0, 1), None)
    verdict = plan(base, {"keep": {"every": 3}, "mixer": {"name": "low_rank_kv"}}, "t", 0).native
    assert verdict["target"] == "none"
    assert "before the rotary embedding" in verdict["reason"]


@pytest.mark.slow
@pytest.mark.data
def test_real_model_before_any_training(shared_data, tmp_path):
    """stories260K, every layer: a quarter of the cache, against both published methods at the same bytes."""
    path = shared_data / "models" / "stories260K"
    base = open_base(path)
    train, dev = stories_rows(shared_data, "v1_train.txt", 24), stories_rows(shared_data, "v1_dev.txt", 8)
    found = {"base": perplexity(load_model(path), dev)}
    for method, options in {"calibrated": {}, "palu": {"v_share": 0.5}, "svd": {"v_share": 0.5}}.items():
        mixer = {"name": "low_rank_kv", "rank": 0.25, "method": method, **options}
        convert(plan(base, {"keep": {"layers": []}, "mixer": mixer}, "t", 0), tmp_path / method, train)
        found[method] = perplexity(load_model(tmp_path / method), dev)
    assert found["calibrated"] < 1.8 * found["base"]
    assert found["calibrated"] < 0.8 * found["palu"] < found["svd"]
