"""Which heads stay full: the choice is the best one by direct measurement, and nothing else changes."""

import itertools

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hybridize.checkpoint import load_model, open_base
from hybridize.conversions import convert, plan
from hybridize.conversions import streaming_heads as seed
from hybridize.conversions.layer import LayerCalibration, materialised
from hybridize.conversions.plan import build_mixer
from hybridize.errors import ConfigError
from hybridize.families import FAMILIES, family_of
from hybridize.mixers import MIXERS
from tests.tiny import tiny_base
from tests.tolerances import assert_close

WIDE = {"num_attention_heads": 8, "num_key_value_heads": 4}
SMALL = {"name": "streaming_heads", "sink_tokens": 1, "window_tokens": 5}


def measured(family, tmp_path, options):
    """(source, mixer, calibration with a target that is not the layer's own output, config)."""
    base = open_base(tiny_base(family, tmp_path, **WIDE))
    prefix = "model.layers.1.self_attn."
    source = {n.removeprefix(prefix): base.read(n) for n in base.tensors if n.startswith(prefix)}
    mixer = build_mixer(MIXERS.build(options), base.config, 1)
    generator = torch.Generator().manual_seed(2)
    inputs = torch.randn(6, 24, 32, generator=generator)
    angles = family_of(base.config).rotary(base.config)(inputs, torch.arange(24)[None])
    with torch.no_grad():
        target = materialised(mixer, {**source, "alpha": torch.ones(4)})(inputs, angles)[0]
    target = target + 0.3 * torch.randn(6, 24, 32, generator=generator)
    return source, mixer, LayerCalibration(inputs=inputs, context=inputs, target=target, angles=angles), base.config


@pytest.mark.parametrize("family", FAMILIES)
def test_the_choice_is_the_best_of_all(family, tmp_path):
    source, mixer, calibration, config = measured(family, tmp_path, {**SMALL, "full_share": 0.5})
    made = seed.HeadsFromGQA()(source, mixer, config, torch.Generator(), calibration)
    assert set(made) == {*source, "alpha"}
    assert all(torch.equal(made[name], source[name]) for name in source)
    errors = {}
    for full in itertools.combinations(range(4), 2):
        with torch.no_grad():
            module = materialised(mixer, {**source, "alpha": mixer.gates(list(full))})
            errors[full] = float((module(calibration.inputs, calibration.angles)[0] - calibration.target).double().pow(2).sum())
    chosen = tuple(made["alpha"].nonzero().flatten().tolist())
    assert chosen == min(errors, key=errors.__getitem__)
    # The inner products give every choice's error, not only the order.
    gram, lag = seed.changes(materialised(mixer, {**source, "alpha": torch.zeros(4)}), calibration)
    with torch.no_grad():
        exact = materialised(mixer, {**source, "alpha": mixer.gates([0, 1, 2])})
        exact.full_count = 4
        start = (exact(calibration.inputs, calibration.angles)[0] - calibration.target).double().pow(2).sum()
    for full, error in errors.items():
        near = [head for head in range(4) if head not in full]
        found = start + gram[near][:, near].sum() + 2 * lag[near].sum()
        assert_close(found, torch.tensor(error, dtype=torch.float64), "fp32")
    # Without the terms between heads, or the error that was there before, the figures would be wrong.
    assert float((gram - gram.diagonal().diag()).abs().max()) > 1e-3 * float(start)
    assert float(lag.abs().max()) > 1e-3 * float(start)


def test_beyond_what_can_be_tried_no_swap_is_better(monkeypatch):
    torch.manual_seed(0)
    for _ in range(5):
        changes = torch.randn(9, 30, dtype=torch.float64) * torch.rand(9, 1, dtype=torch.float64)
        gram, lag = changes @ changes.T, changes @ torch.randn(30, dtype=torch.float64)
        best = seed.choose(gram, lag, 4)
        with monkeypatch.context() as patch:
            patch.setattr(seed, "MOST_CHOICES", 0)
            found = seed.choose(gram, lag, 4)

        def error(chosen, gram=gram, lag=lag):
            return float(gram[chosen][:, chosen].sum() + 2 * lag[chosen].sum())

        assert len(found) == 4
        assert error(best) <= error(found)
        swaps = [sorted({*found} - {out} | {into}) for out in found for into in set(range(9)) - set(found)]
        assert all(error(found) <= error(other) for other in swaps)


@pytest.mark.parametrize("family", FAMILIES)
def test_conversion_keeps_every_tensor_and_is_deterministic(family, tmp_path):
    path = tiny_base(family, tmp_path, **WIDE, dtype="bfloat16")
    base = open_base(path)
    text = torch.randint(3, 64, (6, 24), generator=torch.Generator().manual_seed(0))
    made = plan(base, {"keep": {"layers": [1]}, "mixer": {**SMALL, "full_share": 0.25}}, "t", 0)
    for name, workers in (("a", 1), ("b", 3)):
        convert(made, tmp_path / name, text, workers=workers)
    after = load_file(tmp_path / "a" / "model.safetensors")
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()
    gates = {name: after.pop(name) for name in list(after) if name.endswith("alpha")}
    assert list(gates) == [f"model.layers.{i}.self_attn.alpha" for i in (0, 2)]
    assert all(gate.dtype == torch.bfloat16 and sorted(gate.tolist()) == [0, 0, 0, 1] for gate in gates.values())
    before = load_file(path / "model.safetensors")
    assert set(after) == set(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    loaded = load_model(tmp_path / "a")
    assert all(torch.equal(loaded.state_dict()[name], gate) for name, gate in gates.items())
    assert loaded(text).logits.isfinite().all()


def test_given_heads_and_all_heads_need_no_measurement(tmp_path):
    path = tiny_base("llama", tmp_path, **WIDE)
    base = open_base(path)
    given = {**SMALL, "full_heads": [3, 1], "method": "given"}
    convert(plan(base, {"keep": {"layers": []}, "mixer": given}, "t", 0), tmp_path / "given")
    assert load_model(tmp_path / "given").model.layers[2].self_attn.alpha.tolist() == [0, 1, 0, 1]
    text = torch.randint(3, 64, (2, 5))
    convert(plan(base, {"keep": {"layers": []}, "mixer": {**SMALL, "full_share": 1.0}}, "t", 0), tmp_path / "all", text)
    ids = torch.randint(3, 64, (2, 20))
    with torch.no_grad():
        found, want = (m(ids).logits for m in (load_model(tmp_path / "all"), AutoModelForCausalLM.from_pretrained(path)))
    assert_close(found, want, "fp32")


@pytest.mark.parametrize(
    "mixer", [SMALL, {"name": "block_sparse", "window_tokens": 5, "block_tokens": 2}], ids=lambda m: m["name"]
)
def test_the_student_can_be_trained(mixer, tmp_path):
    """No gradient goes to the gates, and every weight of the base gets one."""
    base = open_base(tiny_base("qwen3", tmp_path, **WIDE))
    text = torch.randint(3, 64, (4, 24), generator=torch.Generator().manual_seed(0))
    convert(plan(base, {"keep": {"layers": []}, "mixer": mixer}, "t", 0), tmp_path / "out", text)
    model = load_model(tmp_path / "out").train()
    assert "alpha" not in {name.rsplit(".", 1)[-1] for name, _ in model.named_parameters()}
    model(text, labels=text).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"full_heads": [0]}, "layer 0: mixer 'streaming_heads': full_heads is set, but method 'calibrated' would choose"),
        ({"method": "given"}, "method 'given' needs full_heads"),
        ({"method": "given", "full_heads": [4]}, "full_heads has 4, expected 0 to 3: the base has 4 key/value heads"),
        ({"method": "given", "full_heads": [-1]}, "full_heads has -1"),
    ],
)
def test_bad_plans(options, says, tmp_path):
    base = open_base(tiny_base("llama", tmp_path, **WIDE))
    with pytest.raises(ConfigError, match=says) as caught:
        plan(base, {"keep": {"layers": []}, "mixer": {**SMALL, **options}}, "t", 0)
    assert "\n" not in str(caught.value)


def test_text_that_tells_no_head_from_another_is_refused(tmp_path):
    base = open_base(tiny_base("llama", tmp_path, **WIDE))
    made = plan(base, {"keep": {"layers": []}, "mixer": SMALL}, "t", 0)
    with pytest.raises(ConfigError, match=r"rows of 6 calibration tokens, expected more than sink_tokens \+ window_tokens = 6"):
        convert(made, tmp_path / "out", torch.randint(3, 64, (2, 6)))
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match="needs text"):
        convert(made, tmp_path / "out")
