"""Seeds of shared latents: exact at full rank, the best latents there are below it, and what they are told of layers above."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from hybridize.checkpoint import load_model, open_base
from hybridize.conversions import convert, plan
from hybridize.conversions.calibrate import calibrate
from hybridize.conversions.layer import LayerCalibration, layer_generator
from hybridize.conversions.low_rank_from_gqa import query_metric
from hybridize.conversions.plan import build_mixer
from hybridize.conversions.xkv_from_gqa import XKVFromGQA, leading
from hybridize.errors import ConfigError
from hybridize.families import FAMILIES
from hybridize.mixers import MIXERS
from tests.conversions.real import perplexity, stories_rows
from tests.tiny import WHOLE_WAY, tiny_base
from tests.tolerances import assert_close, rms_ratio

SHAPE = {"num_attention_heads": 8, "num_key_value_heads": 2}


def text(rows, seed):
    return torch.randint(3, 64, (rows, 24), generator=torch.Generator().manual_seed(seed))


def hybrid(path, out, calibration, workers=None, keep=(), **options):
    section = {"keep": {"layers": list(keep)}, "mixer": {"name": "xkv", **options}}
    convert(plan(open_base(path), section, "t", 0), out, calibration, workers=workers)
    return load_model(out).eval()


@pytest.mark.parametrize("method", ["calibrated", "xkv"])
@pytest.mark.parametrize("family", [*FAMILIES, "llama with biases"])
def test_full_rank_is_the_base(family, method, tmp_path):
    extra = {"attention_bias": True} if "biases" in family else {}
    path = tiny_base(family.split()[0], tmp_path, **SHAPE, **extra)
    ids = text(2, 1)
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(path).eval()(ids).logits
        model = hybrid(path, tmp_path / "out", text(2, 2), rank="full", method=method)
        assert_close(model(ids).logits, expected, "fp32")
        top = model.model.layers[2].self_attn
        assert (top.reads, top.shared, top.own) == (0, 32, 32)
        top.v_up.weight.copy_(top.v_up.weight.roll(1, 1))
        assert rms_ratio(model(ids).logits, expected) > 1e-2


def group(family, tmp_path, rank=3, own_share=0.0, reads=None):
    """A base, its layers' attention, the owner or (with `reads`) the layer above, what two layers read, and the angles."""
    base = open_base(tiny_base(family, tmp_path, **SHAPE))
    sources = []
    for index in range(3):
        prefix = f"model.layers.{index}.self_attn."
        sources.append({n.removeprefix(prefix): base.read(n) for n in base.tensors if n.startswith(prefix)})
    spec = {"name": "xkv", "rank": rank, "own_share": own_share, "group_layers": 3, "reads": reads}
    mixer = build_mixer(MIXERS.build(spec), base.config, 0 if reads is None else 1)
    torch.manual_seed(4)
    below = torch.randn(3, 40, 32) @ torch.diag(torch.linspace(0.1, 2, 32)) @ torch.randn(32, 32) / 6 + 0.3
    above = [(below @ torch.randn(32, 32) / 6 + torch.randn(3, 40, 32)).tanh() for _ in range(2)]
    turn = torch.arange(40)[None, :, None] * 10000.0 ** (-torch.arange(0, 8, 2) / 8)
    turn = torch.cat([turn, turn], dim=-1)
    return base, sources, mixer, [below, *above], (turn.cos(), turn.sin())


def wanted(sources, mixer, config, streams, angles, weighted):
    """M^1/2 (W_l u_l) of every layer of the group, side by side, [N T, .], fp64, from the definition; and u_0."""
    columns = []
    for source, stream in zip(sources, streams, strict=True):
        u = stream.flatten(0, 1).double()
        for name in ("k", "v"):
            y = u @ source[f"{name}_proj.weight"].double().T
            if weighted:
                y = y - y.mean(0)
                if name == "k":
                    metric = query_metric(source, mixer, config, stream, angles)
                    y = torch.cat([part @ torch.linalg.cholesky(m) for part, m in zip(y.split(8, 1), metric, strict=True)], 1)
                y = y / y.pow(2).sum().sqrt()
            columns.append(y)
    u = streams[0].flatten(0, 1).double()
    return columns, u - u.mean(0) if weighted else u


def left(columns, u, down):
    """What no linear map of the latents explains, by least squares."""
    latents = u @ down.double().T
    return sum(float((y - latents @ torch.linalg.lstsq(latents, y).solution).pow(2).sum()) for y in columns)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_the_owners_latents_are_the_best_there_are(family, tmp_path):
    """Against the bound that a singular value decomposition gives; worse with the wrong streams or layers, or when moved."""
    base, sources, owner, streams, angles = group(family, tmp_path)
    seed = XKVFromGQA()
    still = {"context": torch.zeros(3, 40, 64), "target": torch.randn(3, 40, 32), "angles": angles}

    def down(streams, sources):
        ahead = tuple(
            seed.ahead(source, owner, base.config, streams[0], seen, angles)
            for source, seen in zip(sources[1:], streams[1:], strict=True)
        )
        calibration = LayerCalibration(inputs=streams[0], ahead=ahead, **still)
        return seed(sources[0], owner, base.config, layer_generator(0, 0), calibration)["down.weight"]

    columns, u = wanted(sources, owner, base.config, streams, angles, True)
    y = torch.cat(columns, 1)
    fitted = u @ torch.linalg.lstsq(u, y).solution
    bound = float((y - fitted).pow(2).sum() + torch.linalg.svdvals(fitted)[9:].pow(2).sum())
    found = down(streams, sources)
    assert found.shape == (9, 32)
    assert bound * (1 - 1e-9) < left(columns, u, found) < bound * 1.001
    latents = u @ found.double().T
    assert_close(latents.T @ latents / len(u), torch.eye(9, dtype=torch.float64) * 1.0, "bf16")
    torch.manual_seed(6)
    for _ in range(5):
        assert left(columns, u, found + 0.1 * found.abs().mean() * torch.randn(9, 32)) > 1.0005 * bound
    for wrong in (
        down([streams[0], streams[2], streams[1]], sources),
        down(streams, [sources[0], sources[2], sources[1]]),
        down([streams[0], streams[1].roll(1, 1), streams[2].roll(1, 1)], sources),
        down(streams[:1], sources[:1]),
    ):
        assert left(columns, u, wrong) > 1.02 * bound


def test_a_layers_own_latents_are_of_what_the_shared_ones_leave(tmp_path):
    base, sources, above, streams, angles = group("llama", tmp_path, rank=4, own_share=0.5, reads=0)
    assert (above.shared, above.own) == (8, 2)
    memory = streams[0] @ torch.randn(32, 8, generator=torch.Generator().manual_seed(1))
    calibration = LayerCalibration(
        inputs=streams[1], context=torch.zeros(3, 40, 64), target=torch.randn(3, 40, 32), angles=angles, memory=memory
    )
    made = XKVFromGQA()(sources[1], above, base.config, layer_generator(0, 1), calibration)
    columns, u = wanted(sources[1:2], above, base.config, streams[1:2], angles, True)
    known = memory.flatten(0, 1).double()
    known = known - known.mean(0)

    def unexplained(rows, by):
        return rows - by @ torch.linalg.lstsq(by, rows).solution

    y, rest = unexplained(torch.cat(columns, 1), known), unexplained(u, known)
    fitted = rest @ torch.linalg.lstsq(rest, y).solution
    bound = float((y - fitted).pow(2).sum() + torch.linalg.svdvals(fitted)[2:].pow(2).sum())

    def lost(down):
        return float(unexplained(torch.cat(columns, 1), torch.cat([known, u @ down.double().T], 1)).pow(2).sum())

    assert bound * (1 - 1e-9) < lost(made["down.weight"]) < 1.001 * bound
    alone = LayerCalibration(
        inputs=streams[1], context=torch.zeros(3, 40, 64), target=torch.randn(3, 40, 32), angles=angles,
        memory=torch.randn(3, 40, 8),
    )  # fmt: skip
    assert lost(XKVFromGQA()(sources[1], above, base.config, layer_generator(0, 1), alone)["down.weight"]) > 1.02 * bound
    # Keys and values are least squares in all that is cached, about the means.
    cached = torch.cat([known, u @ made["down.weight"].double().T], 1)
    raw = torch.cat([memory.flatten(0, 1), streams[1].flatten(0, 1) @ made["down.weight"].T], 1).double()
    for name in ("k", "v"):
        y = streams[1].flatten(0, 1).double() @ sources[1][f"{name}_proj.weight"].double().T
        best = y.mean(0) + cached @ torch.linalg.lstsq(cached, y - y.mean(0)).solution
        found = raw @ made[f"{name}_up.weight"].double().T + made[f"{name}_up.bias"].double()
        assert rms_ratio(found, best) < 1e-3
        assert rms_ratio(found - made[f"{name}_up.bias"].double(), best) > 1e-2


def test_published_choices_are_truncated_svds(tmp_path):
    """Latents of keys beside latents of values, without weights or means: each against torch's SVD of the regression."""
    base, sources, owner, streams, angles = group("llama", tmp_path, rank=2)
    seed = XKVFromGQA(method="xkv")
    ahead = tuple(
        seed.ahead(source, owner, base.config, streams[0], seen, angles)
        for source, seen in zip(sources[1:], streams[1:], strict=True)
    )
    calibration = LayerCalibration(
        inputs=streams[0], context=torch.zeros(3, 40, 64), target=torch.randn(3, 40, 32), angles=angles, ahead=ahead
    )
    made = seed(sources[0], owner, base.config, layer_generator(0, 0), calibration)
    columns, u = wanted(sources, owner, base.config, streams, angles, False)
    for part, rank, rows in ((0, 2, slice(0, 2)), (1, 4, slice(2, 6))):
        y = torch.cat(columns[part::2], 1)
        fitted = u @ torch.linalg.lstsq(u, y).solution
        bound = float((y - fitted).pow(2).sum() + torch.linalg.svdvals(fitted)[rank:].pow(2).sum())
        assert bound * (1 - 1e-9) < left(columns[part::2], u, made["down.weight"][rows]) < 1.001 * bound
        assert left(columns[1 - part :: 2], u, made["down.weight"][rows]) > 0
    assert torch.equal(made["o_proj.weight"], sources[0]["o_proj.weight"])
    assert not made["k_up.bias"].any()


def test_latents_of_a_stream_that_lies_flat():
    """Fewer directions than the stream has: no failure, and what is asked of them is found."""
    torch.manual_seed(3)
    u = torch.randn(200, 5, dtype=torch.float64) @ torch.randn(5, 12, dtype=torch.float64)
    weight = torch.randn(3, 12, dtype=torch.float64)
    latents = u @ leading(weight.T @ weight, u.T @ u / 200, 3).T
    y = u @ weight.T
    assert rms_ratio(latents @ torch.linalg.lstsq(latents, y).solution, y) < 1e-3
    assert rms_ratio(latents[:, :2] @ torch.linalg.lstsq(latents[:, :2], y).solution, y) > 1e-2


@pytest.mark.parametrize("family", WHOLE_WAY)
def test_calibrated_conversion_of_every_family(family, tmp_path):
    path = tiny_base(family, tmp_path, **SHAPE)
    teacher = AutoModelForCausalLM.from_pretrained(path).eval()
    fresh, errors = text(12, 9), {}
    for method in ("calibrated", "xkv"):
        model = hybrid(path, tmp_path / method, text(96, 0), workers=1, rank=0.25, method=method)
        with torch.no_grad():
            errors[method] = rms_ratio(model(fresh).logits, teacher(fresh).logits)
    assert errors["calibrated"] < errors["xkv"]
    if family == "llama":
        # The same bytes twice, whatever the family.
        hybrid(path, tmp_path / "again", text(96, 0), workers=3, rank=0.25)
        again, first = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("again", "calibrated"))
        assert again == first


def test_the_pass_looks_ahead_with_the_teacher_and_only_where_it_must(tmp_path, monkeypatch):
    """Layer 0 is converted first, so that teacher and student differ where layer 1 looks at layers 3 and 4."""
    base = open_base(tiny_base("llama", tmp_path, num_hidden_layers=6))
    far = {"name": "xkv", "reads": 1, "group_layers": 3}
    layers = {0: {"name": "streaming", "window_tokens": 3}, 1: {"name": "xkv", "reads": None, "group_layers": 3}, 3: far, 4: far}
    made = plan(base, {"layers": {**layers, "default": {"name": "attention"}}}, "t", 0)
    rows, asked = text(6, 0), []
    ahead = XKVFromGQA.ahead

    def watched(self, source, mixer, config, inputs, seen, angles):
        asked.append((mixer.layer_idx, source["k_proj.weight"], inputs, seen))
        return ahead(self, source, mixer, config, inputs, seen, angles)

    monkeypatch.setattr(XKVFromGQA, "ahead", watched)
    convert(made, tmp_path / "out", rows)
    assert [index for index, *_ in asked] == [1, 1]
    read = {}
    models = {"teacher": AutoModelForCausalLM.from_pretrained(base.path).eval(), "student": load_model(tmp_path / "out").eval()}
    for name, model in models.items():
        for index in (1, 3, 4):
            model.model.layers[index].input_layernorm.register_forward_hook(
                lambda m, a, out, key=(name, index): read.update({key: out})
            )
        with torch.no_grad():
            model(rows, use_cache=False)
    for (_, weight, inputs, seen), index in zip(asked, (3, 4), strict=True):
        assert torch.equal(weight, base.read(f"model.layers.{index}.self_attn.k_proj.weight"))
        assert_close(inputs, read["student", 1], "fp32")
        assert_close(seen, read["teacher", index], "fp32")
        assert rms_ratio(inputs, read["teacher", 1]) > 1e-3
        assert rms_ratio(seen, read["student", index]) > 1e-3
    # Another pass over finished layers computes none again, and gives the same files.
    folder = tmp_path / "pass"
    folder.mkdir()
    first = {index: path.read_bytes() for index, path in calibrate(made, base, rows, folder).items()}
    asked.clear()
    (folder / "layer-00004.safetensors").unlink()
    assert {index: path.read_bytes() for index, path in calibrate(made, base, rows, folder).items()} == first
    assert asked == []


def test_no_more_than_one_layers_weights_at_a_time(tmp_path, monkeypatch):
    """Each decoder layer that the pass makes is gone before it makes the next."""
    import weakref

    from hybridize.conversions import calibrate as module

    base = open_base(tiny_base("llama", tmp_path, num_hidden_layers=5))
    alive, most, original = [], [0], module.decoder_layer

    def counted(base, index):
        most[0] = max(most[0], sum(ref() is not None for ref in alive))
        layer = original(base, index)
        alive.append(weakref.ref(layer))
        return layer

    monkeypatch.setattr(module, "decoder_layer", counted)
    convert(plan(base, {"keep": {"layers": []}, "mixer": {"name": "xkv"}}, "t", 0), tmp_path / "out", text(4, 0))
    # Once for the teacher, once for the student but for the last, and three times ahead from layer 0.
    assert len(alive) == 5 + 4 + 3
    assert most[0] <= 1


def test_text_is_asked_for_and_no_native_class_is_promised(tmp_path):
    base, sources, owner, _, _ = group("llama", tmp_path)
    with pytest.raises(ConfigError, match="needs text and the latents of the layer it reads"):
        XKVFromGQA()(sources[0], owner, base.config, layer_generator(0, 0), None)
    verdict = plan(base, {"keep": {"layers": []}, "mixer": {"name": "xkv"}}, "t", 0).native
    assert verdict["target"] == "none"
    assert "shares one layer's latents" in verdict["reason"]


@pytest.mark.slow
@pytest.mark.data
def test_real_model_before_any_training(shared_data, tmp_path):
    """stories260K, every layer: a quarter of the cache, against low-rank keys and values of each layer alone, ours and Palu's."""
    path = shared_data / "models" / "stories260K"
    base = open_base(path)
    train, dev = stories_rows(shared_data, "v1_train.txt", 24), stories_rows(shared_data, "v1_dev.txt", 8)
    found = {"base": math.log(perplexity(load_model(path), dev))}
    mixers = {
        "shared": {"name": "xkv"},
        "low rank": {"name": "low_rank_kv"},
        "palu": {"name": "low_rank_kv", "method": "palu", "v_share": 0.5},
    }
    for name, mixer in mixers.items():
        convert(plan(base, {"keep": {"layers": []}, "mixer": {**mixer, "rank": 0.25}}, "t", 0), tmp_path / name, train)
        found[name] = math.log(perplexity(load_model(tmp_path / name), dev))
    assert found["base"] < found["shared"] < found["low rank"] < found["palu"]
    assert found["shared"] - found["base"] < 0.5 * (found["low rank"] - found["base"])
