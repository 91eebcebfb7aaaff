"""Windowed attention beside a recurrent branch: the sum of two mixers that have tests of their own, and nothing else."""

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

import hybridize.modeling as modeling
from hybridize.cache import BranchedLayer, RecurrentLayer, SinkWindowLayer
from hybridize.checkpoint import load_model, open_base
from hybridize.conversions import convert, plan
from hybridize.conversions.mamba2_from_gqa import Mamba2FromGQA
from hybridize.conversions.parallel_from_gqa import ParallelFromGQA
from hybridize.conversions.plan import build_mixer
from hybridize.errors import ConfigError
from hybridize.families import FAMILIES
from hybridize.mixers import MIXERS
from tests.mixers.test_contract import in_chunks, logits
from tests.tiny import WHOLE_WAY, tiny_base
from tests.tolerances import assert_close, rms_ratio

WINDOW = {"sink_tokens": 2, "window_tokens": 5}


def seeded(base, folder, text=None, **mixer):
    """A hybrid with layer 1 converted."""
    convert(plan(base, {"keep": {"layers": [0, 2]}, "mixer": mixer}, "t", 0), folder, text)
    return load_model(folder).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_it_starts_as_streaming_and_as_the_base(family, tmp_path):
    base = open_base(tiny_base(family, tmp_path))
    ids = torch.randint(3, 64, (2, 20), generator=torch.Generator().manual_seed(3))
    mimetic = {"name": "mamba2", "method": "mimetic"}
    streaming = seeded(base, tmp_path / "a", name="streaming", **WINDOW)
    parallel = seeded(base, tmp_path / "b", name="parallel", recurrent=mimetic, **WINDOW)
    assert torch.equal(logits(parallel, ids), logits(streaming, ids))
    with torch.no_grad():
        parallel.model.layers[1].self_attn.recurrent_scale.fill_(0.1)
    assert not torch.allclose(logits(parallel, ids), logits(streaming, ids), atol=1e-3)
    wide = seeded(base, tmp_path / "c", name="parallel", recurrent=mimetic, window_tokens=20)
    teacher = AutoModelForCausalLM.from_pretrained(base.path).eval()
    assert torch.allclose(logits(wide, ids), logits(teacher, ids), atol=2e-5)
    assert not torch.allclose(logits(parallel, ids), logits(teacher, ids), atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_the_sum_of_its_branches(family, tmp_path):
    config = open_base(tiny_base(family, tmp_path)).config
    torch.manual_seed(0)
    both = MIXERS.build({"name": "parallel", **WINDOW}).build(config, 1).eval()
    with torch.no_grad():
        for parameter in both.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
    state = both.state_dict()
    branch = {n.removeprefix("recurrent."): t for n, t in state.items() if n.startswith("recurrent.")}
    attention = MIXERS.build({"name": "streaming", **WINDOW}).build(config, 1).eval()
    attention.load_state_dict({n: t for n, t in state.items() if not n.startswith("recurrent") and "scale" not in n})
    mamba = MIXERS.build({"name": "mamba2"}).build(config, 1).eval()
    mamba.load_state_dict(branch)
    u = torch.randn(2, 20, 32)
    angles = FAMILIES[family].rotary(config)(u, torch.arange(20)[None])
    with torch.no_grad():
        near, far = attention(u, angles)[0], mamba(u)[0]
        found = both(u, angles)[0]
        assert_close(found, both.attention_scale * near + both.recurrent_scale * far, "fp32")
        assert rms_ratio(found, both.recurrent_scale * near + both.attention_scale * far) > 0.1


def test_gradient_reaches_the_weight_of_a_silent_branch(tmp_path):
    base = open_base(tiny_base("llama", tmp_path))
    model = seeded(base, tmp_path / "a", name="parallel", recurrent={"name": "mamba2", "method": "mimetic"}, **WINDOW)
    ids = torch.randint(3, 64, (2, 20), generator=torch.Generator().manual_seed(3))
    model(ids, labels=ids).loss.backward()
    mixer = model.model.layers[1].self_attn
    assert not bool(mixer.recurrent_scale.any())
    assert bool((mixer.recurrent_scale.grad != 0).all())
    assert bool((mixer.attention_scale.grad != 0).all())


def test_one_entry_holds_both_caches(tmp_path):
    base = open_base(tiny_base("llama", tmp_path))
    model = seeded(base, tmp_path / "a", name="parallel", recurrent={"name": "mamba2", "method": "mimetic"}, **WINDOW)
    ids = torch.randint(3, 64, (1, 20), generator=torch.Generator().manual_seed(3))
    entry = in_chunks(model, ids, (9, 11))[1].layers[1]
    assert isinstance(entry, BranchedLayer)
    assert set(entry.parts) == {SinkWindowLayer, RecurrentLayer}
    attention, mamba = (MIXERS.build(s) for s in ({"name": "streaming", **WINDOW}, {"name": "mamba2"}))
    wanted = attention.state_bytes(model.config, 20) + mamba.state_bytes(model.config, 20)
    assert sum(t.numel() * t.element_size() for t in entry.held()) == wanted
    entry.reset()
    assert entry.held() == []
    cache = DynamicCache(config=model.config)
    assert cache.get_seq_length() == 0


def test_the_branch_is_seeded_by_its_own_conversion(tmp_path):
    base = open_base(tiny_base("qwen2", tmp_path))
    prefix = "model.layers.1.self_attn."
    source = {n.removeprefix(prefix): base.read(n) for n in base.tensors if n.startswith(prefix)}
    mixer = build_mixer(MIXERS.build({"name": "parallel"}), base.config, 1)
    seed = {"name": "mamba2", "method": "mimetic"}
    made = ParallelFromGQA(recurrent_seed=seed)(source, mixer, base.config, torch.Generator().manual_seed(1), None)
    alone = Mamba2FromGQA(method="mimetic")(source, mixer.recurrent, base.config, torch.Generator().manual_seed(1), None)
    assert all(torch.equal(made[name], source[name]) for name in source)
    assert all(torch.equal(made[f"recurrent.{name}"], alone[name]) for name in alone)


@pytest.mark.parametrize("family", WHOLE_WAY)
def test_a_calibrated_branch_makes_up_for_the_window(family, tmp_path):
    """Seeded on what the window leaves over, and weighed by least squares, it brings the layer nearer to the base's."""
    base = open_base(tiny_base(family, tmp_path))
    text = torch.randint(3, 64, (24, 48), generator=torch.Generator().manual_seed(0))
    fresh = torch.randint(3, 64, (8, 48), generator=torch.Generator().manual_seed(9))

    def mixed(model):
        found = []
        hook = model.model.layers[1].self_attn.register_forward_hook(lambda m, args, out: found.append(out[0]))
        logits(model, fresh)
        hook.remove()
        return found[0]

    want = mixed(AutoModelForCausalLM.from_pretrained(base.path).eval())
    fitted = rms_ratio(mixed(seeded(base, tmp_path / "a", text, name="parallel", start="fitted", **WINDOW)), want)
    window = rms_ratio(mixed(seeded(base, tmp_path / "b", text, name="parallel", **WINDOW)), want)
    assert fitted < 0.99 * window


@pytest.mark.parametrize(
    ("mixer", "words"),
    [
        ({"recurrent": {"name": "streaming"}}, "whose cache grows with the text"),
        ({"recurrent": {"name": "attention"}}, "whose cache grows with the text"),
        ({"recurrent": {"name": "parallel"}}, "whose cache grows with the text"),
        ({"recurrent": {"name": "mamba3"}}, "Did you mean 'mamba2'"),
        ({"recurrent": {"name": "mamba2", "conv_token": 3}}, "recurrent: mixer 'mamba2' has no option 'conv_token'"),
        ({"recurrent": "mamba2"}, "expected a mapping with a name"),
        ({"recurrent_seed": {"name": "mamba2"}}, "has no option 'recurrent_seed'"),
        ({"start": "fitted", "recurrent": {"name": "mamba2", "method": "mimetic"}}, "start: fitted needs text"),
        ({"window_tokens": 0}, "window_tokens 0"),
    ],
)
def test_bad_options(mixer, words, tmp_path):
    base = open_base(tiny_base("llama", tmp_path))
    with pytest.raises(ConfigError, match=words) as caught:
        plan(base, {"keep": {"every": 2}, "mixer": {"name": "parallel", **mixer}}, "t", 0)
    assert "\n" not in str(caught.value)


def test_a_plan_says_all_of_both(tmp_path):
    base = open_base(tiny_base("llama", tmp_path))
    mixer = {"name": "parallel", "recurrent": {"name": "mamba2", "method": "mimetic", "conv_tokens": 3}}
    made = plan(base, {"keep": {"every": 2}, "mixer": mixer}, "t", 0)
    inner = made.layers[0].mixer["recurrent"]
    assert (inner["name"], inner["conv_tokens"], inner["heads"]) == ("mamba2", 3, "grouped")
    assert made.layers[0].conversion["recurrent_seed"] == {"name": "mamba2", "method": "mimetic"}
    assert made.native["target"] == "none"
    assert "falcon_h1" in made.native["reason"]
    config = modeling.hybrid_config(base.config, [layer.mixer for layer in made.layers])
    assert modeling.state_bytes(config, 1024) == sum(layer.state_bytes["1024"] for layer in made.layers)
