"""The seeds of native hybrid attention: the published start to the letter, the calibrated one nearer to the base."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from hybridize.checkpoint import load_model, open_base
from hybridize.conversions import convert, plan
from hybridize.conversions.nha_from_gqa import NHAFromGQA, carried
from hybridize.conversions.plan import build_mixer
from hybridize.errors import ConfigError
from hybridize.families import FAMILIES
from hybridize.mixers import MIXERS
from tests.tiny import WHOLE_WAY, tiny_base
from tests.tolerances import rms_ratio


def parts(family, tmp_path, **options):
    base = open_base(tiny_base(family, tmp_path))
    prefix = "model.layers.1.self_attn."
    source = {n.removeprefix(prefix): base.read(n) for n in base.tensors if n.startswith(prefix)}
    return base, source, build_mixer(MIXERS.build({"name": "nha", **options}), base.config, 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_published_start(family, tmp_path):
    base, source, mixer = parts(family, tmp_path)
    made = NHAFromGQA(method="copy")(source, mixer, base.config, torch.Generator(), None)
    assert all(torch.equal(made[name], source[name]) for name in source)
    assert torch.equal(made["gate_proj.weight"], source["k_proj.weight"])
    assert torch.equal(made["gate_proj.bias"], source.get("k_proj.bias", torch.zeros(16)))
    assert float(made["slot_bias"].abs().sum()) == 0


@pytest.mark.parametrize(("slots", "rows"), [(3, [0, 1, 2, 8, 9, 10]), (9, [*range(8), 0, *range(8, 16), 8])])
def test_slots_stay_with_their_head(slots, rows, tmp_path):
    _, source, mixer = parts("llama", tmp_path, slots=slots)
    assert torch.equal(carried(source, mixer)["gate_proj.weight"], source["k_proj.weight"][rows])


def divergence(folder, teacher, fresh):
    with torch.no_grad():
        want = teacher(fresh).logits.log_softmax(-1)
        return float((want.exp() * (want - load_model(folder).eval()(fresh).logits.log_softmax(-1))).sum(-1).mean())


@pytest.mark.parametrize("family", WHOLE_WAY)
def test_calibrated_conversion_of_every_family(family, tmp_path):
    base = open_base(tiny_base(family, tmp_path))
    text = torch.randint(3, 64, (24, 48), generator=torch.Generator().manual_seed(0))
    teacher = AutoModelForCausalLM.from_pretrained(base.path).eval()
    fresh = torch.randint(3, 64, (8, 48), generator=torch.Generator().manual_seed(9))

    def mixed(model):
        found = []
        hook = model.model.layers[1].self_attn.o_proj.register_forward_hook(lambda m, args, out: found.append(out))
        with torch.no_grad():
            model(fresh)
        hook.remove()
        return found[0]

    def seeded(folder, **mixer):
        made = plan(base, {"keep": {"layers": [0, 2]}, "mixer": mixer}, "t", 0)
        convert(made, tmp_path / folder, text)
        return rms_ratio(mixed(load_model(tmp_path / folder).eval()), mixed(teacher))

    ours = seeded("a", name="nha", window_tokens=8)
    if family == "llama":
        # The same bytes twice, whatever the family.
        seeded("b", name="nha", window_tokens=8)
        assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()
    assert ours < 0.98 * seeded("c", name="nha", window_tokens=8, method="copy")
    assert ours < 0.98 * seeded("d", name="streaming", window_tokens=8, sink_tokens=0)


def test_text_shorter_than_the_window_leaves_the_base(tmp_path):
    """Nothing lies beyond the window, so that nothing says what slots are for: they are muted."""
    base = open_base(tiny_base("qwen2", tmp_path))
    text = torch.randint(3, 64, (6, 32), generator=torch.Generator().manual_seed(0))
    teacher = AutoModelForCausalLM.from_pretrained(base.path).eval()
    for window, kept in ((40, True), (8, False)):
        made = plan(base, {"keep": {"layers": [0, 1]}, "mixer": {"name": "nha", "window_tokens": window}}, "t", 0)
        convert(made, tmp_path / str(window), text)
        assert (divergence(tmp_path / str(window), teacher, text) < 1e-6) is kept


def test_no_text_is_an_error(tmp_path):
    base, source, mixer = parts("llama", tmp_path)
    with pytest.raises(ConfigError, match="method copy"):
        NHAFromGQA()(source, mixer, base.config, torch.Generator(), None)


def test_no_native_class(tmp_path):
    base = open_base(tiny_base("llama", tmp_path))
    verdict = plan(base, {"keep": {"every": 3}, "mixer": {"name": "nha"}}, "t", 0).native
    assert verdict["target"] == "none"
    assert "slots" in verdict["reason"]
