"""Low-rank adapters: what they touch, what they leave, and that merging changes nothing but the names."""

import sys

import peft
import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig

from hybridize.checkpoint import load_model, open_checkpoint
from hybridize.data import Batch
from hybridize.distill import distill
from hybridize.distill.adapters import Lora, inject, is_adapter, merged, targeted, watched
from hybridize.distill.align import Align
from hybridize.distill.kl import KLStage
from hybridize.distill.options import decays
from hybridize.distill.run import load_pair
from hybridize.distill.stages import STAGES
from hybridize.errors import ConfigError, MissingDependencyError
from hybridize.mixers import MIXERS
from hybridize.modeling import build_model, hybrid_config
from hybridize.storage import file_sha256, partial_folder
from tests.distill.pair import tiny_pair, tiny_tokens
from tests.distill.test_distill import Stop, stop_after
from tests.distill.test_stages import CPU, SMALL
from tests.tiny import SIZES
from tests.tolerances import assert_close

QV = {"targets": ["*.self_attn.[qv]_proj"], "rank": 4, "alpha": 6}
KL = {"name": "kl", "tokens": 5 * 64, "seq_tokens": 16, "rows": 4, "lr": 1e-2, "save_tokens": 128}
LORA = [
    {**KL, "lora": {**QV, "dropout": 0.2}, "train": ["model.norm.weight"]},
    {**KL, "lora": {"targets": ["*.mlp.*"], "rank": 2}, "tokens": 2 * 64},
]


def pair(folders, options, name="kl", weights=None):
    return load_pair(folders[1], folders[0], options, name, weights or {}, CPU, seed=5)


def drawn(adapters, seed=0):
    """Gives every adapter random weights: B is zero at the start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapters.values():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def logits_with(folder, weights, ids):
    model = load_model(folder, torch.float32)
    with torch.no_grad():
        for name, weight in weights.items():
            model.get_parameter(name).copy_(weight)
        return model(ids).logits


def test_fresh_adapters_change_nothing_and_train_alone(folders, ids):
    student, _, trained = pair(folders, KLStage(**SMALL, lora=QV))
    with torch.no_grad():
        assert torch.equal(student(ids).logits, load_model(folders[1], torch.float32)(ids).logits)
    names = [f"model.layers.{i}.self_attn.{p}_proj.lora_{m}.default.weight" for i in range(3) for p in "qv" for m in "AB"]
    assert list(trained) == names
    assert [name for name, p in student.named_parameters() if p.requires_grad] == names
    assert {tuple(p.shape) for name, p in trained.items() if "q_proj.lora_A" in name} == {(4, 32)}
    with torch.no_grad():
        drawn(trained)
        assert not torch.equal(student(ids).logits, load_model(folders[1], torch.float32)(ids).logits)


def test_train_names_what_else_is_trained(folders, ids):
    options = KLStage(**SMALL, lora=QV, train=["model.norm.weight", "*.0.self_attn.q_proj.weight"])
    student, teacher, trained = pair(folders, options)
    plain = [name for name in trained if not is_adapter(name)]
    assert plain == ["model.layers.0.self_attn.q_proj.weight", "model.norm.weight"]
    drawn({name: p for name, p in trained.items() if is_adapter(name)})
    options.start(student, teacher, Batch(ids))(Batch(ids), 1.0)
    assert all(bool(p.grad.any()) for p in trained.values())
    assert KLStage(**SMALL).train == ["*"]
    assert Align(**SMALL).train == ["*.self_attn.*"]


def test_merged_weights_are_the_adapted_function(folders, ids):
    student, _, adapters = pair(folders, KLStage(**SMALL, lora=QV))
    drawn(adapters)
    with torch.no_grad():
        adapted = student(ids).logits
    weights = merged(student)
    assert set(weights) == {f"model.layers.{i}.self_attn.{p}_proj.weight" for i in range(3) for p in "qv"}
    assert_close(logits_with(folders[1], weights, ids), adapted, "fp32")
    start = load_model(folders[1], torch.float32)
    exact, wrong = {}, {}
    for name in weights:
        low = name.removesuffix("weight") + "lora_{}.default.weight"
        product = adapters[low.format("B")].double() @ adapters[low.format("A")].double()
        exact[name] = start.get_parameter(name).double() + 6 / 4 * product
        wrong[name] = start.get_parameter(name).double() + 6 / 4**0.5 * product
        assert_close(weights[name], exact[name], "fp32")
    with pytest.raises(AssertionError):
        assert_close(logits_with(folders[1], wrong, ids), adapted, "fp32")
    with pytest.raises(AssertionError):
        assert_close(logits_with(folders[1], {}, ids), adapted, "fp32")


def test_a_bf16_checkpoint_is_merged_in_fp32(tmp_path, ids):
    folders = tiny_pair(tmp_path, dtype="bfloat16")
    options = KLStage(**SMALL, lora=QV, dtype="bf16")
    student, teacher, adapters = pair(folders, options)
    assert {p.dtype for p in adapters.values()} == {torch.float32}
    drawn(adapters)
    options.start(student, teacher, Batch(ids))(Batch(ids), 1.0)
    assert all(p.grad.dtype == torch.float32 and bool(p.grad.any()) for p in adapters.values())
    for name, weight in merged(student).items():
        low = name.removesuffix("weight") + "lora_{}.default.weight"
        product = adapters[low.format("B")].double() @ adapters[low.format("A")].double()
        old = load_model(folders[1]).get_parameter(name)
        assert (weight.dtype, old.dtype) == (torch.float32, torch.bfloat16)
        assert_close(weight, old.double() + 6 / 4 * product, "fp32")
        with pytest.raises(AssertionError):
            assert_close(old + (6 / 4 * product).bfloat16(), old.double() + 6 / 4 * product, "fp32")


@pytest.fixture(scope="module")
def whole(folders, tmp_path_factory):
    torch.set_num_threads(1)
    return distill(folders[1], LORA, tiny_tokens(), tmp_path_factory.mktemp("whole") / "out")


def hashes(folder):
    return {path.name: file_sha256(path) for path in sorted(folder.iterdir())}


def test_the_output_holds_no_adapter_and_only_the_targets_changed(folders, whole):
    before, after = open_checkpoint(folders[1]), open_checkpoint(whole)
    assert set(before.tensors) == set(after.tensors)
    changed = {name for name in before.tensors if not torch.equal(before.read(name), after.read(name))}
    assert changed == {name for name in before.tensors if any(p in name for p in (".q_proj", ".v_proj", "mlp", "model.norm"))}


@pytest.mark.parametrize("steps", [3, 6])
def test_a_stopped_run_resumes_to_the_same_bytes(folders, whole, tmp_path, steps):
    out = tmp_path / "out"
    with pytest.raises(Stop):
        distill(folders[1], LORA, tiny_tokens(), out, progress=stop_after(steps))
    states = sorted((partial_folder(out) / "scratch").glob("state-00-*[1-9].safetensors"))
    if steps == 3:
        with safe_open(states[-1], "pt") as state:
            names = list(state.keys())
        assert "weight/model.layers.0.self_attn.q_proj.lora_A.default.weight" in names
        assert "exp_avg/model.layers.2.self_attn.v_proj.lora_B.default.weight" in names
        assert "weight/model.norm.weight" in names
        assert not any(name.endswith("q_proj.weight") for name in names)
    distill(folders[1], LORA, tiny_tokens(), out, resume=True)
    assert hashes(out) == hashes(whole)


def test_a_resume_that_drew_its_adapters_again_would_show(folders, whole, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with pytest.raises(Stop):
        distill(folders[1], LORA, tiny_tokens(), out, progress=stop_after(3))
    real = load_pair

    def forgetful(student_dir, teacher_dir, options, name, weights, *rest):
        return real(student_dir, teacher_dir, options, name, {k: w for k, w in weights.items() if not is_adapter(k)}, *rest)

    monkeypatch.setattr("hybridize.distill.run.load_pair", forgetful)
    distill(folders[1], LORA, tiny_tokens(), out, resume=True)
    assert hashes(out) != hashes(whole)


def test_a_stage_after_adapters_starts_from_the_merged_weights(folders, ids, tmp_path):
    """Two stages in one call end as two calls with the directory between them."""
    after = {**KL, "tokens": 64, "train": ["*.self_attn.k_proj.*"], "schedule": "constant", "warmup": 0.0}
    both = distill(folders[1], [LORA[0], after], tiny_tokens(), tmp_path / "both")
    first = distill(folders[1], LORA[:1], tiny_tokens(), tmp_path / "first")
    a, b = open_checkpoint(first), open_checkpoint(both)
    kept = [name for name in a.tensors if ".k_proj" not in name]
    assert all(torch.equal(a.read(name), b.read(name)) for name in kept)
    assert not torch.equal(a.read("model.layers.0.self_attn.k_proj.weight"), b.read("model.layers.0.self_attn.k_proj.weight"))


def test_align_adapts_converted_mixers_only(folders, ids):
    options = Align(**SMALL, lora={"targets": ["*_proj"], "rank": 2})
    student, teacher, trained = pair(folders, options, "align")
    assert {name.split(".lora")[0].split(".")[2] for name in trained} == {"0", "2"}
    drawn(trained)
    options.start(student, teacher, Batch(ids))(Batch(ids), 1.0)
    assert all(bool(p.grad.any()) for p in trained.values())
    with pytest.raises(ConfigError, match=r"lora\.targets has '\*\.mlp\.\*', which matches none of the 8 projections"):
        pair(folders, Align(**SMALL, lora={"targets": ["*.mlp.*"]}), "align")


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"targets": ["lm_head"]}, "'lm_head', which matches none of the 21 projections"),
        ({"targets": ["*.q_proj", "*.in_proj"]}, r"'\*\.in_proj', which matches none"),
        ({"targets": []}, "targets is empty"),
        ({}, "'targets' is missing"),
        ({"targets": ["*"], "rank": 0}, "rank is 0"),
        ({"targets": ["*"], "dropout": 1.0}, "dropout 1.0; expected"),
        ({"targets": ["*"], "r": 8}, "unknown option 'r'"),
        ({"targets": "*"}, "targets is '\\*', expected"),
    ],
)
def test_impossible_adapters_are_one_line(folders, lora, message):
    with pytest.raises(ConfigError, match=message) as caught:
        pair(folders, STAGES.build({"name": "kl", **SMALL, "lora": lora}))
    assert "\n" not in str(caught.value)


def test_rates_reach_adapters_by_name(folders):
    options = KLStage(**SMALL, lora=QV, lr=1e-4, lr_groups={"*.lora_B.*": 2e-3})
    _, _, trained = pair(folders, options)
    names = {id(p): name for name, p in trained.items()}
    rates = {names[id(p)]: group["full_lr"] for group in options.optimizer(trained).param_groups for p in group["params"]}
    assert {name for name, rate in rates.items() if rate == 2e-3} == {name for name in trained if ".lora_B." in name}
    with pytest.raises(ConfigError, match=r"lr_groups has '\*\.k_proj\.lora_B\.\*', which matches none of the 12"):
        pair(folders, KLStage(**SMALL, lora=QV, lr_groups={"*.k_proj.lora_B.*": 1e-3}))
    with pytest.raises(ConfigError, match="lr_groups has"):
        pair(folders, KLStage(**SMALL, lora=QV, lr_groups={"*.q_proj.weight": 1e-3}))


def tiny_model(family, mixers):
    config = AutoConfig.for_model(family, **SIZES, dtype="float32")
    return build_model(hybrid_config(config, mixers))


def test_an_adapter_that_would_do_nothing_stops_the_run(ids):
    """Latent attention reads the weight of q_rope_proj without calling it."""
    model = tiny_model("qwen3", [{"name": "mla", "kv_rank": 8, "rope_dim": 4}] * 3)

    def step(ids, share):
        model(ids).logits.square().mean().backward()
        return {}

    for glob, idle in (("*.q_proj", False), ("*.q_rope_proj", True)):
        model.requires_grad_(False)
        lora = Lora(targets=[glob])
        inject(model, lora, targeted(model, lora, dict(model.named_parameters()), "kl"), 0)
        if idle:
            with pytest.raises(ConfigError, match=r"layers\.0\.self_attn\.q_rope_proj would do nothing") as caught:
                watched(step, model, "kl")(ids, 1.0)
            assert "\n" not in str(caught.value)
        else:
            assert watched(step, model, "kl")(ids, 1.0) == {}
        model = tiny_model("qwen3", [{"name": "mla", "kv_rank": 8, "rope_dim": 4}] * 3)


def test_without_peft_the_line_names_the_package(folders, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'hybridize\[train\]'"):
        pair(folders, KLStage(**SMALL, lora=QV))


def test_the_seed_decides_the_start_and_nothing_else_moves(folders):
    torch.manual_seed(3)
    state = torch.get_rng_state()
    model = load_model(folders[1], torch.float32)
    lora = Lora(**QV)
    names = targeted(model, lora, dict(model.named_parameters()), "kl")
    first = inject(model, lora, names, 1)
    assert torch.equal(torch.get_rng_state(), state)
    same, other = (inject(load_model(folders[1], torch.float32), lora, names, seed) for seed in (1, 2))
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)
    assert peft.tuners.lora.LoraLayer in type(model.model.layers[0].self_attn.q_proj).__mro__


# Options without which a mixer has no place here, or lacks a parameter that could be missed.
NEEDED = {"gmu": {"reads": 0}, "mamba2": {"proj_bias": True}}


def spared_by_role(model):
    """Parameters that no weight decay may touch, by the module that holds them and the name of their role."""
    out = set()
    for path, module in model.named_modules():
        for leaf, _ in module.named_parameters(recurse=False):
            norm = "norm" in type(module).__name__.lower()
            if norm or isinstance(module, torch.nn.Conv1d) or leaf in ("A_log", "dt_bias", "D") or leaf.endswith("bias"):
                out.add(f"{path}.{leaf}")
    return out


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_weight_decay_spares_decays_biases_norms_and_convolutions_of_every_mixer(family):
    """By name too: a shape of two dimensions or more does not make a matrix."""
    missed = set()
    for name in MIXERS.names():
        model = tiny_model(family, [{"name": "mamba2"}, {"name": "attention"}, {"name": name, **NEEDED.get(name, {})}])
        spared = {key for key, parameter in model.named_parameters() if not decays(key, parameter)}
        assert spared_by_role(model) <= spared
        # Beside those, only what has one number a head or channel.
        assert all(model.get_parameter(key).ndim == 1 for key in spared - spared_by_role(model))
        missed |= {key.split(".")[-1] for key in spared if model.get_parameter(key).ndim > 1 and "conv1d" not in key}
    # By the number of dimensions alone these would decay.
    assert missed == {"A_log", "slot_bias"}
    options = KLStage(**SMALL, weight_decay=0.1)
    model = tiny_model("qwen3", [{"name": "kda"}] * 3)
    parameters = dict(model.named_parameters())
    names = {id(p): key for key, p in parameters.items()}
    decayed = {
        names[id(p)] for group in options.optimizer(parameters).param_groups if group["weight_decay"] for p in group["params"]
    }
    assert decayed == {key for key, p in parameters.items() if decays(key, p)}
    assert "model.layers.0.self_attn.A_log" not in decayed
