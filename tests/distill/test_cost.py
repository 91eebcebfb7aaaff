"""What a run will cost, against what is built, run and counted."""

import json

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig

from hybridize.checkpoint import describe, load_model
from hybridize.cli import app
from hybridize.data import Batch
from hybridize.distill.cost import Machine, Sizes, advise, device_bytes, refuse, run_cost, stage_cost
from hybridize.distill.run import build_stages, load_pair
from hybridize.distill.stages import STAGES
from hybridize.errors import ConfigError
from hybridize.modeling import hybrid_config
from tests.distill.pair import BOTH, KEEP, STREAMING, tiny_pair, tiny_tokens

MAMBA = {"name": "mamba2"}
WIDER = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "head_dim": 32, "vocab_size": 256}
STAGE = {"tokens": 640, "seq_tokens": 32, "rows": 4}
ALIGN = {"name": "align", **STAGE, "losses": BOTH}
KL = {"name": "kl", **STAGE}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """(teacher, student) in bf16: a recurrent layer, one that is kept, one with a window."""
    return tiny_pair(tmp_path_factory.mktemp("pair"), (MAMBA, KEEP, STREAMING), noise=0.0, dtype="bfloat16", **WIDER)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The same without the recurrent layer, whose many small operations take long to count: one layer of each kind."""
    sizes = {**WIDER, "num_hidden_layers": 2}
    return tiny_pair(tmp_path_factory.mktemp("plain"), (STREAMING, KEEP), noise=0.0, dtype="bfloat16", **sizes)


@pytest.fixture(scope="module")
def known():
    """What was counted, for all tests of one student."""
    return {}


def costs_of(folders, stages, known):
    """As run_cost, with what other tests counted."""
    student, teacher = (describe(folder) for folder in reversed(folders))
    costs, before = [], set()
    for name, options in stages:
        cost, trained = stage_cost(student, teacher, name, options, before, Machine(), known)
        costs.append(cost)
        before |= trained
    return costs


def built(spec):
    return spec["name"], STAGES.build(spec)


def storages(tensors):
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


@pytest.mark.parametrize(
    "spec",
    [
        ALIGN,
        KL,
        pytest.param({**KL, "train": ["*.self_attn.*"], "dtype": "bf16"}, marks=pytest.mark.slow),
        pytest.param({**KL, "train": ["*.layers.1.*"], "dtype": "bf16"}, marks=pytest.mark.slow),
        pytest.param({**KL, "dtype": "bf16", "gradient_checkpointing": True}, marks=pytest.mark.slow),
        {**ALIGN, "losses": [{"name": "mixer_output"}], "dtype": "bf16", "train": ["*.layers.2.*q_proj*"]},
    ],
)
def test_memory_and_flops_are_those_of_a_real_step(folders, known, spec):
    name, options = built(spec)
    cost = costs_of(folders, [(name, options)], known)[0]
    student, teacher, trained = load_pair(folders[1], folders[0], options, name, {}, torch.device("cpu"))
    step = options.start(student, teacher, Batch(torch.from_numpy(tiny_tokens(128).ids.astype("int64")).view(4, 32)))
    optimizer = options.optimizer(trained)
    batch = Batch(torch.from_numpy(tiny_tokens(128, seed=1).ids.astype("int64")).view(4, 32))
    known = {t.untyped_storage()._cdata for m in (student, teacher) for t in (*m.parameters(), *m.buffers())}
    alive, most = {}, [0]

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            alive[storage._cdata] = storage
            most[0] = max(most[0], sum(s.nbytes() for s in alive.values()))
        return tensor

    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        step(batch, 1.0)
    # This backend takes the whole square of causal attention, and a checkpoint does not compute its last product again.
    assert cost.flops / cost.tokens == pytest.approx(counter.get_total_flops() / 128, rel=0.05)
    if name == "kl" and not options.gradient_checkpointing:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            step(batch, 1.0)
        logits = 4 * 4 * 128 * 256
        assert cost.memory["activations"] - logits == pytest.approx(most[0], rel=0.1)
    optimizer.step()
    assert cost.trained_parameters == sum(p.numel() for p in trained.values())
    assert cost.memory["weights"] == storages(trained.values())
    assert cost.memory["gradients"] == storages([p.grad for p in trained.values()])
    moments = [state[key] for state in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
    assert cost.memory["moments"] == storages(moments)
    own = {id(p) for p in trained.values()}
    frozen = [p for model in (student, teacher) for p in model.parameters() if id(p) not in own]
    assert cost.memory["frozen"] == storages(frozen)


@pytest.mark.slow
def test_from_disk_one_layer_is_all_there_is(folders):
    """The layer with the most weights, gradients and moments: counted from the directories, in fp32."""
    student, teacher = (describe(folder) for folder in folders[::-1])
    cost, whole = (run_cost(folders[1], folders[0], [built({**ALIGN, "engine": e})], Machine())[0] for e in ("disk", "memory"))

    def numbers(found, index, part=""):
        return sum(torch.Size(shape).numel() for name, shape in found.shapes.items() if f".layers.{index}.{part}" in name)

    # Mamba2's parameters are more than those of the layer with a window, and norm and MLP are the teacher's.
    assert cost.memory["weights"] == cost.memory["gradients"] == 4 * numbers(student, 0, "self_attn")
    assert cost.memory["moments"] == 8 * numbers(student, 0, "self_attn")
    assert cost.memory["frozen"] == 4 * numbers(teacher, 0)
    assert cost.certain_bytes < 0.5 * whole.certain_bytes
    assert (cost.flops, cost.trained_parameters) == (whole.flops, whole.trained_parameters)
    trained = [numbers(student, index, "self_attn") for index in (0, 2)]
    assert cost.disk_bytes == 640 * 2 * 128 * 4 + 8 * sum(trained) + 36 * max(trained)
    assert whole.disk_bytes == 0
    assert run_cost(folders[1], folders[0], [built({**ALIGN, "engine": "disk"})], Machine(bytes_each=1e5))[0].advice.startswith(
        "will not fit: needs 0.00 GB for one layer"
    )


LORA = {"targets": ["*.self_attn.q_proj"], "rank": 4}


@pytest.mark.parametrize(
    "spec",
    [
        {**KL, "lora": LORA, "dtype": "bf16"},
        {**KL, "lora": LORA, "train": ["*.layers.1.mlp.*"]},
        {"name": "sft", **STAGE},
        {"name": "sft", **STAGE, "lora": LORA, "dtype": "bf16"},
        {"name": "dpo", **STAGE},
        {"name": "dpo", **STAGE, "train": ["*.layers.1.*"], "dtype": "bf16"},
        {"name": "dpo", **STAGE, "reference": "teacher", "lora": LORA},
    ],
)
def test_weights_of_adapters_and_of_stages_without_a_teacher_of_their_own(folders, known, spec):
    """After a stage that trained the first layer: what of it is fp32, and what is the reference's too."""
    stages = [built({**KL, "train": ["*.layers.0.mlp.*"]}), built(spec)]
    name, options = stages[1]
    cost = costs_of(folders, stages, known)[1]
    parameters = load_model(folders[1]).named_parameters()
    before = {key: p.detach().float() + 1 for key, p in parameters if key.startswith("model.layers.0.mlp.")}
    teacher_dir, own = (folders[1], before) if options.follows_itself else (folders[0], {})
    student, teacher, trained = load_pair(folders[1], teacher_dir, options, name, before, torch.device("cpu"), own)
    assert cost.memory["weights"] == storages(trained.values())
    mine = {id(p) for p in trained.values()}
    models = [student] if teacher is None else [student, teacher]
    assert cost.memory["frozen"] == storages([p for model in models for p in model.parameters() if id(p) not in mine])
    if options.lora is not None and options.train is None:
        plain = costs_of(folders, [built({key: value for key, value in spec.items() if key != "lora"})], known)[0]
        assert cost.trained_parameters < plain.trained_parameters
    if name == "sft":
        assert cost.flops < costs_of(folders, [built({**KL, "dtype": options.dtype})], known)[0].flops


def test_what_an_earlier_stage_trained_is_not_shared_with_the_teacher(folders, known):
    stages = [built({**KL, "dtype": "bf16"}), built({**KL, "dtype": "bf16", "train": ["*.layers.0.*"]})]
    first, second = costs_of(folders, stages, known)
    alone = costs_of(folders, stages[1:], known)[0]
    apart = first.memory["weights"] - second.memory["weights"]
    assert second.memory["frozen"] > alone.memory["frozen"]
    assert second.memory["frozen"] - first.memory["frozen"] == apart


def llama_8b(tmp_path, mixer):
    """Directories of the published shape, config.json alone."""
    config = AutoConfig.for_model(
        "llama", vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, rms_norm_eps=1e-5, rope_theta=5e5, max_position_embeddings=8192, dtype="bfloat16",
    )  # fmt: skip
    config.save_pretrained(tmp_path / "base")
    hybrid_config(config, [mixer] * 32).save_pretrained(tmp_path / "hybrid")
    return describe(tmp_path / "hybrid"), describe(tmp_path / "base")


@pytest.mark.slow
def test_the_published_formulas_at_8b(tmp_path):
    """fwd = 2 (N_mix + N_mlp + V H) + A; kl = fwd_T + 3 fwd_S; align of mixers alone = 2 (N_mix + N_mlp) + A + 6 N_mix."""
    mix, mlp = 32 * (2 * 4096**2 + 2 * 4096 * 1024), 32 * 3 * 4096 * 14336
    head, attention = 128256 * 4096, 2 * 32 * 4096 * 2048
    student, teacher = llama_8b(tmp_path, KEEP)
    kl = {"name": "kl", "tokens": 2_000_000, "seq_tokens": 2048, "rows": 2, "dtype": "bf16"}
    known = {}
    cost, _ = stage_cost(student, teacher, *built(kl), set(), Machine(), known)
    # V D (3 + 1) for the head, as the loss takes its gradient with the logits.
    assert cost.flops / cost.tokens == pytest.approx(4 * (2 * (mix + mlp + head) + attention), rel=0.01)
    assert cost.trained_parameters == mix + mlp + 2 * head + 65 * 4096
    assert cost.certain_bytes == pytest.approx(18 * 8.03e9, rel=0.01)
    assert cost.gpu_hours == pytest.approx(cost.flops / (0.4 * 989e12) / 3600)
    frozen = {**kl, "train": ["*.self_attn.*"]}
    cost, _ = stage_cost(student, teacher, *built(frozen), set(), Machine(), known)
    once = 2 * (mix + mlp + head) + attention
    assert cost.flops / cost.tokens == pytest.approx(3 * once + 2 * mix, rel=0.03)
    assert cost.certain_bytes == pytest.approx(2 * 8.03e9 + 16 * mix, rel=0.01)
    student, teacher = llama_8b(tmp_path, {"name": "streaming", "window_tokens": 4096})
    align = {**kl, "name": "align", "losses": [{"name": "mixer_output"}]}
    cost, _ = stage_cost(student, teacher, *built(align), set(), Machine(), known)
    # Nothing flows into a mixer's input, so that of its first products one of three is not taken.
    first = 2 * 32 * (4096**2 + 2 * 4096 * 1024)
    expected = 2 * (mix + mlp) + attention + 6 * mix - first
    assert cost.flops / cost.tokens == pytest.approx(expected, rel=0.08)
    assert abs(cost.flops / cost.tokens / (2 * (mix + mlp) + attention) - 1) > 0.3


@pytest.mark.slow
def test_long_rows_cost_what_a_straight_line_says(folders):
    counts = {}
    for tokens in (512, 1024, 1536):
        options = STAGES.build({**KL, "tokens": tokens * 4, "seq_tokens": tokens})
        cost, _ = stage_cost(describe(folders[1]), describe(folders[0]), "kl", options, set(), Machine())
        counts[tokens] = cost.flops / cost.tokens
    # What grows is the kept layer's attention: four forwards' worth of 2 n_h d a token, in the teacher's three layers too.
    assert (counts[1536] - counts[1024]) / (counts[1024] - counts[512]) == pytest.approx(1, rel=0.05)


def test_shards_divide_and_what_would_fit_is_said():
    sizes = Sizes(
        frozen=16 * 10**9, trained=32 * 10**9, largest_unit=2 * 10**9, saved_row=18e9, saved_row_checkpointed=1e9, fixed=0.0
    )
    options = STAGES.build({"name": "kl", "tokens": 1 << 20, "seq_tokens": 4096, "rows": 2})
    for processes, checkpointing, expected in (
        (2, True, "--shard over 2 processes and gradient_checkpointing=true"),
        (2, False, ""),
    ):
        del checkpointing
        machine = Machine(processes=processes, bytes_each=80e9)
        said = advise(sizes, options, machine, True)
        assert said.startswith("will not fit: needs 180.00 GB a process, have 80.00 GB; would fit with --shard over")
        assert expected in said
    assert advise(sizes, options, Machine(bytes_each=181e9), True) == ""
    assert advise(sizes, options, Machine(bytes_each=150e9), True).endswith("would fit with gradient_checkpointing=true")
    assert "not even shards" in advise(sizes, options, Machine(bytes_each=2e9), True)
    assert advise(sizes, options, Machine(), True) == ""
    with pytest.raises(ConfigError, match="mfu 1.5"):
        Machine(mfu=1.5)


@pytest.mark.slow
def test_what_other_stages_counted_changes_nothing(plain):
    """A count that is used again must be of the same layer: with other rows, weights that learn, dtypes or adapters it is not."""
    specs = [KL, {**KL, "seq_tokens": 16}, {**KL, "dtype": "bf16"}, {**KL, "train": ["*.layers.0.*"]}, {**KL, "lora": LORA}]
    stages = [built(spec) for spec in specs]
    found = run_cost(plain[1], plain[0], stages, Machine())
    assert [cost.stage for cost in found] == [1, 2, 3, 4, 5]
    assert [cost.flops for cost in found] == [costs_of(plain, [stage], {})[0].flops for stage in stages]


@pytest.mark.slow
def test_the_command_says_it_before_anything_is_loaded(plain, tmp_path, capsys):
    folders = plain
    (tmp_path / "r.json").write_text(json.dumps({"name": "x", "plan": {}, "distill": [ALIGN, KL]}))
    call = ["distill", str(folders[1]), "--recipe", str(tmp_path / "r.json"), "--out", str(tmp_path / "out")]
    assert app([*call, "--dry-run", "--memory-gb", "0.001"]) == 0
    out = capsys.readouterr().out
    assert "40% of 989 TFLOP/s" in out
    assert "kl: will not fit: needs 0.0" in out
    assert not (tmp_path / "out").exists()
    assert app([*call, "--dry-run", "--shard", "--processes", "4", "--json"]) == 0
    align, kl = json.loads(capsys.readouterr().out)
    one = run_cost(folders[1], folders[0], build_stages([ALIGN, KL]), Machine())
    assert [align["trained_parameters"], kl["trained_parameters"]] == [cost.trained_parameters for cost in one]
    for part in ("weights", "gradients", "moments", "frozen"):
        assert kl["memory"][part] == one[1].memory[part] / 4
    shared = run_cost(folders[1], folders[0], build_stages([{**ALIGN, "parallel": "layers"}]), Machine(processes=2))[0]
    assert shared.memory["moments"] == one[0].memory["moments"] / 2
    assert shared.memory["weights"] == one[0].memory["weights"]
    assert app([*call, "--data", "nowhere.txt", "--memory-gb", "0.001"]) == 2
    assert "stage 1 (align): will not fit" in capsys.readouterr().err
    assert app([*call, "--processes", "2"]) == 2
    costs = run_cost(folders[1], folders[0], build_stages([ALIGN]), Machine(bytes_each=device_bytes()))
    refuse(costs, Machine(bytes_each=device_bytes()))
