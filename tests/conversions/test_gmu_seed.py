"""Seeds of the gated memory unit: the ridge onto the memory is one, `zero` adds nothing, and the memory is the student's."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from hybridize.checkpoint import load_model, open_base
from hybridize.conversions import calibrate, convert, plan
from hybridize.conversions.fitting import OPEN_GATE, RIDGE
from hybridize.conversions.gmu_from_gqa import GMUFromGQA
from hybridize.conversions.layer import LayerCalibration, convert_layer, materialised
from hybridize.conversions.plan import build_mixer
from hybridize.errors import ConfigError
from hybridize.families import FAMILIES
from hybridize.mixers import MIXERS
from tests.tiny import WHOLE_WAY, tiny_base
from tests.tolerances import assert_close

KEEP, MAMBA = {"name": "attention"}, {"name": "mamba2", "method": "mimetic"}


def parts(tmp_path, family="llama", **overrides):
    base = open_base(tiny_base(family, tmp_path, **overrides))
    prefix = "model.layers.1.self_attn."
    source = {n.removeprefix(prefix): base.read(n) for n in base.tensors if n.startswith(prefix)}
    return base, source, build_mixer(MIXERS.build({"name": "gmu", "reads": 0}), base.config, 1)


def measured(seed=0, rows=10):
    generator = torch.Generator().manual_seed(seed)
    u, context, memory = (torch.randn(rows, 24, 32, generator=generator) for _ in range(3))
    still = (torch.ones(1, 24, 8), torch.zeros(1, 24, 8))
    return LayerCalibration(inputs=u, context=context, target=torch.randn(rows, 24, 32, generator=generator), angles=still,
                            memory=memory)  # fmt: skip


@pytest.mark.parametrize("bias", [False, True])
def test_calibrated_is_ridge_regression_on_the_memory(bias, tmp_path):
    """Against least squares over stacked rows, in fp64: text and prior in one system. Ten rows: the last piece is not full."""
    base, source, mixer = parts(tmp_path, attention_bias=bias)
    found = measured()
    made = GMUFromGQA()(source, mixer, base.config, torch.Generator(), found)
    assert not made["in_proj.weight"].any()
    gate = torch.nn.functional.silu(made["in_proj.bias"].double())
    assert torch.allclose(gate, torch.ones(32, dtype=torch.float64), atol=1e-7)

    def expected(memory, prior):
        rows, wanted = memory.flatten(0, 1).double(), found.target.flatten(0, 1).double() - (source["o_proj.bias"] if bias else 0)
        weight = (RIDGE * rows.pow(2).sum(0).mean()) ** 0.5
        stacked = torch.cat([rows, weight * torch.eye(32, dtype=torch.float64)])
        return torch.linalg.lstsq(stacked, torch.cat([wanted, weight * prior.double().T])).solution.T

    prior = source["o_proj.weight"]
    assert_close(made["out_proj.weight"], expected(found.memory, prior), "fp32")
    for wrong in (expected(found.memory, 0 * prior), expected(found.memory.roll(1, 1), prior), expected(found.inputs, prior)):
        with pytest.raises(AssertionError):
            assert_close(made["out_proj.weight"], wrong, "fp32")
    assert ("out_proj.bias" in made) == bias
    if bias:
        assert torch.equal(made["out_proj.bias"], source["o_proj.bias"])


def test_where_the_memory_says_nothing_the_bases_projection_stays(tmp_path):
    base, source, mixer = parts(tmp_path)
    found = measured()
    found.memory[..., 5:9] = 0
    made = GMUFromGQA()(source, mixer, base.config, torch.Generator(), found)["out_proj.weight"]
    assert_close(made[:, 5:9], source["o_proj.weight"][:, 5:9], "fp32")


def test_calibrated_finds_a_map_of_the_memory(tmp_path):
    base, source, mixer = parts(tmp_path)
    found = measured(rows=24)
    found.target.copy_(found.memory @ torch.randn(32, 32, generator=torch.Generator().manual_seed(5)))
    module = materialised(mixer, GMUFromGQA()(source, mixer, base.config, torch.Generator(), found))
    with torch.no_grad():
        out = module.out_proj(module.context(found.inputs, found.memory))
        late = module.out_proj(module.context(found.inputs, found.memory.roll(1, 1)))
    energy = found.target.pow(2).sum()
    assert float((out - found.target).pow(2).sum() / energy) < 1e-4
    assert float((late - found.target).pow(2).sum() / energy) > 0.5


@pytest.mark.parametrize("method", ["calibrated", "zero"])
@pytest.mark.parametrize("family", [*FAMILIES, "biased"])
def test_every_tensor_is_used_or_dropped_by_name(family, method, tmp_path):
    biased = {"attention_bias": True} if family == "biased" else {}
    base, source, mixer = parts(tmp_path, "llama" if biased else family, **biased)
    seed = GMUFromGQA(method=method)
    assert set(source) - seed.drops == ({"o_proj.weight", "o_proj.bias"} & set(source) if method == "calibrated" else set())
    convert_layer(seed, source, mixer, base.config, torch.Generator(), measured() if seed.calibrated else None, "layer 1")


def test_without_text_or_memory_it_is_refused(tmp_path):
    base, source, mixer = parts(tmp_path)
    with pytest.raises(ConfigError, match="needs text and the read layer's memory"):
        GMUFromGQA()(source, mixer, base.config, torch.Generator(), None)


@pytest.mark.parametrize("family", [*FAMILIES, "biased"])
def test_zero_adds_nothing(family, tmp_path):
    biased = {"attention_bias": True} if family == "biased" else {}
    base = open_base(tiny_base("llama" if biased else family, tmp_path, **biased))
    units = {"layers": {0: MAMBA, 2: {"name": "gmu", "method": "zero"}, "default": KEEP}}
    convert(plan(base, units, "t", 0), tmp_path / "units")
    convert(plan(base, {"layers": {0: MAMBA, "default": KEEP}}, "t", 0), tmp_path / "without")
    model, without = (load_model(tmp_path / name).eval() for name in ("units", "without"))
    silent = without.model.layers[2].self_attn.register_forward_hook(lambda m, a, out: (torch.zeros_like(out[0]), out[1]))
    ids = torch.randint(3, 64, (2, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(model(ids).logits, without(ids).logits)
        silent.remove()
        assert not torch.allclose(model(ids).logits, without(ids).logits, atol=1e-2)
    # Trained, it opens: the projection has a gradient, and the gate follows once that is no longer zero.
    model(ids, labels=ids).loss.backward()
    assert bool(model.model.layers[2].self_attn.out_proj.weight.grad.any())


@pytest.mark.parametrize("family", WHOLE_WAY)
def test_calibrated_conversion_of_every_family(family, tmp_path):
    base = open_base(tiny_base(family, tmp_path))
    text = torch.randint(3, 64, (24, 32), generator=torch.Generator().manual_seed(0))
    fresh = torch.randint(3, 64, (8, 32), generator=torch.Generator().manual_seed(9))
    teacher = AutoModelForCausalLM.from_pretrained(base.path).eval()
    with torch.no_grad():
        want = teacher(fresh).logits.log_softmax(-1)
    found = {}
    # The same bytes twice, whatever the family.
    for name, method in (("a", "calibrated"), ("c", "zero"), *([("b", "calibrated")] if family == "llama" else [])):
        section = {"layers": {0: MAMBA, 1: {"name": "gmu", "method": method}, "default": KEEP}}
        convert(plan(base, section, "t", 0), tmp_path / name, text)
        with torch.no_grad():
            got = load_model(tmp_path / name).eval()(fresh).logits.log_softmax(-1)
        found[name] = float((want.exp() * (want - got)).sum(-1).mean())
    if family == "llama":
        assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()
    assert found["a"] < 0.95 * found["c"]


def test_the_pass_hands_over_the_students_memory_and_keeps_no_more_than_is_read(tmp_path, monkeypatch):
    base = open_base(tiny_base("llama", tmp_path, num_hidden_layers=6))
    mixers = {0: MAMBA, 1: {"name": "gmu"}, 2: MAMBA, 3: KEEP, 4: {"name": "gmu"}, 5: {"name": "gmu", "method": "zero"}}
    text = torch.randint(3, 64, (6, 16), generator=torch.Generator().manual_seed(0))
    given, held = {}, []
    seed, run = GMUFromGQA.__call__, calibrate._run

    def watched_seed(self, source, mixer, config, generator, found):
        given[mixer.layer_idx] = found
        return seed(self, source, mixer, config, generator, found)

    def watched_run(*args, memories=None, **kwargs):
        held.append(sorted(memories or ()))
        return run(*args, memories=memories, **kwargs)

    monkeypatch.setattr(GMUFromGQA, "__call__", watched_seed)
    monkeypatch.setattr(calibrate, "_run", watched_run)
    convert(plan(base, {"layers": mixers}, "t", 0), tmp_path / "out", text)
    # Teacher and student by turns; layer 5 is not calibrated, so that the pass ends with layer 4.
    assert [keys for keys in held if keys] == [[0], [0], [2]]
    model, left = load_model(tmp_path / "out").eval(), {}
    for index in (1, 4):
        unit = model.model.layers[index].self_attn
        unit.register_forward_hook(
            lambda m, a, k, out: left.update({m.layer_idx: (k["hidden_states"], k["memories"].take(m.reads))}), with_kwargs=True
        )
    with torch.no_grad():
        model(text, use_cache=False)
    for index in (1, 4):
        assert_close(given[index].inputs, left[index][0], "fp32")
        assert_close(given[index].memory, left[index][1], "fp32")
        with pytest.raises(AssertionError):
            assert_close(given[index].memory, left[5 - index][1], "fp32")


def test_the_gate_opens_at_one():
    assert torch.nn.functional.silu(torch.tensor(OPEN_GATE, dtype=torch.float64)).item() == pytest.approx(1, abs=1e-15)
