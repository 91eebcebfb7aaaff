"""Weights divided over two processes: the numbers of one process, its gradients, and each process its part only."""

import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from safetensors.torch import load_file
from torch.distributed.fsdp import FSDPModule

import hybridize
from hybridize.checkpoint import load_model, open_checkpoint
from hybridize.data import Batch
from hybridize.distill import distill, metrics_path
from hybridize.distill.guards import Guard
from hybridize.distill.run import load_pair
from hybridize.distill.saves import Position
from hybridize.distill.sharded_saves import latest_folder, names_of, read_about, read_into, read_whole, write_sharded
from hybridize.distill.sharding import asked_to_shard, divided, load_sharded_pair, make_mesh
from hybridize.distill.stages import STAGES
from hybridize.errors import CheckpointError, ConfigError, TrainingError
from hybridize.storage import partial_folder
from tests.distill import test_distill
from tests.distill.pair import BOTH, KEEP, STREAMING, tiny_pair, tiny_tokens
from tests.tolerances import TOLERANCES, rms_ratio

MAMBA = {"name": "mamba2"}
SMALL = {"tokens": 4096, "seq_tokens": 16, "rows": 4}
CPU = torch.device("cpu")
STAGES_TRIED = [
    {"name": "align", **SMALL, "losses": BOTH},
    {"name": "align", **SMALL, "losses": [{"name": "mixer_output"}], "dtype": "bf16"},
    {"name": "kl", **SMALL},
    {"name": "kl", **SMALL, "train": ["*.self_attn.*"], "dtype": "bf16"},
    {"name": "kl", **SMALL, "gradient_checkpointing": True},
]


def rows():
    return Batch(torch.from_numpy(tiny_tokens(64).ids.astype("int64")).view(4, 16))


def worker(folders, results):
    dist.init_process_group("gloo")
    folders = [Path(folder) for folder in folders]
    rank = dist.get_rank()
    mesh = make_mesh(CPU)
    # Once more with the mean of FSDP in place of the sum.
    for number, spec in enumerate([*STAGES_TRIED, STAGES_TRIED[0]]):
        options = STAGES.build(spec)
        student, teacher, trained = load_sharded_pair(folders[1], folders[0], options, spec["name"], set(), CPU, mesh)
        for module in student.modules() if number == len(STAGES_TRIED) else ():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(2.0)
        step = options.start(student, teacher, rows())
        mine = rows()[rank * 2 : rank * 2 + 2]
        # Two micro-batches: gradients must add up, not replace each other.
        parts = [step(part, 0.25)["loss"] for part in mine.split(1)]
        grads = {name: p.grad.full_tensor() for name, p in trained.items()}
        held = sum(p.to_local().numel() if hasattr(p, "to_local") else p.numel() for p in student.parameters() if not p.is_meta)
        torch.save((sum(parts) / len(parts), grads, held), f"{results}/{number}-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def folders(request, tmp_path_factory):
    # Sizes that two processes cannot halve evenly everywhere.
    return tiny_pair(tmp_path_factory.mktemp("pair"), (MAMBA, KEEP, STREAMING), vocab_size=65, tie_word_embeddings=request.param)


def whole_gradients(folders, spec):
    options = STAGES.build(spec)
    student, teacher, trained = load_pair(folders[1], folders[0], options, spec["name"], {}, CPU)
    loss = options.start(student, teacher, rows())(rows(), 1.0)["loss"]
    return loss, torch.cat([p.grad.flatten() for p in trained.values()]), trained


@pytest.mark.slow
def test_two_processes_have_the_gradients_of_one(folders, group, tmp_path):
    done = group.run(worker, folders, tmp_path, processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [[torch.load(tmp_path / f"{n}-{rank}.pt") for rank in range(2)] for n in range(len(STAGES_TRIED) + 1)]
    for spec, ranks in zip(STAGES_TRIED, found[:-1], strict=True):
        row = "bf16" if spec.get("dtype") == "bf16" else "fp32"
        loss, grads, trained = whole_gradients(folders, spec)
        assert list(ranks[0][1]) == list(trained)
        joined = torch.cat([grad.flatten() for grad in ranks[0][1].values()])
        assert rms_ratio(joined, grads) <= TOLERANCES[row][1], spec
        assert rms_ratio((ranks[0][0] + ranks[1][0]) / 2, loss) <= TOLERANCES[row][0], spec
        # Half each, but for norms of alignment and the odd row.
        total = sum(torch.Size(shape).numel() for shape in open_checkpoint(folders[1]).shapes.values())
        assert max(rank[2] for rank in ranks) < 0.53 * total
    _, grads, _ = whole_gradients(folders, STAGES_TRIED[0])
    joined = torch.cat([grad.flatten() for grad in found[-1][0][1].values()])
    assert rms_ratio(joined, grads) == pytest.approx(0.5, rel=0.01)


def run_and_stop(student, out, stop_after, stages, shard, teacher=None):
    """In each process of a group: it asks itself to stop after so many steps, 0 for never."""
    calls = []

    def progress(label, done, total):
        calls.append(label)
        if len(calls) == stop_after:
            os.kill(os.getpid(), signal.SIGTERM)

    distill(student, stages, tiny_tokens(), out, resume=True, progress=progress, shard=shard, teacher=teacher)


@pytest.mark.slow
def test_layers_shared_out_give_what_one_process_gives(group, tmp_path):
    """With a stop after three steps and a resumption; a reader of another layer goes with the layer it reads."""
    folders = tiny_pair(tmp_path, (MAMBA, STREAMING, {"name": "gmu", "reads": 0}))
    stages = [{**test_distill.STAGES[0], "clip": 0.05}]
    whole = distill(folders[1], stages, tiny_tokens(), tmp_path / "whole")
    shared = [{**stages[0], "parallel": "layers"}]
    for stop_after in (3, 0):
        done = group.run(run_and_stop, folders[1], tmp_path / "out", stop_after, shared, False, processes=2)
        assert (done.returncode == 0) == (stop_after == 0), done.stderr[-3000:]
    one, two = (load_file(folder / "model.safetensors") for folder in (whole, tmp_path / "out"))
    start = load_file(folders[1] / "model.safetensors")
    assert all(bool((one[key] != start[key]).any()) for key in one if ".self_attn." in key and "1.self_attn" not in key)
    joined = [torch.cat([(w[n] - start[n]).flatten() for n in sorted(w)]) for w in (two, one)]
    assert rms_ratio(*joined) <= 1e-3
    rows = [[json.loads(line) for line in metrics_path(tmp_path / name).read_text().splitlines()] for name in ("whole", "out")]
    assert [row["step"] for row in rows[1]] == [1, 2, 3, 4, 5]
    for one_row, two_row in zip(*rows, strict=True):
        for key in ("loss", "layer.0", "layer.1", "layer.2", "mixer_output", "grad_norm"):
            assert two_row[key] == pytest.approx(one_row[key], rel=1e-4)


@pytest.mark.slow
def test_two_then_one_then_two_processes_give_what_one_undisturbed_gives(folders, group, tmp_path):
    """SIGTERM at the main process after steps 3 and 7 of 10; each time another number of processes goes on."""
    whole = distill(folders[1], test_distill.STAGES, tiny_tokens(), tmp_path / "whole")
    out = tmp_path / "out"
    for count, stop_after, expected in ((2, 3, "state-00-000000004"), (1, 4, "state-01-00000000"), (2, 0, "")):
        done = group.run(run_and_stop, folders[1], out, stop_after, test_distill.STAGES, True, processes=count)
        if stop_after:
            assert done.returncode != 0
            names = sorted(path.name for path in (partial_folder(out) / "scratch").glob("state-*"))
            assert names[-1].startswith(expected), (names, done.stderr[-3000:])
            assert not out.exists()
        else:
            assert done.returncode == 0, done.stderr[-3000:]
    one, two = (load_file(folder / "model.safetensors") for folder in (whole, out))
    start = load_file(folders[1] / "model.safetensors")
    change_one, change_two = (torch.cat([(w[n] - start[n]).flatten() for n in sorted(start)]) for w in (one, two))
    # Sums of gradients are rounded otherwise with another number of processes, so the bytes are not the same.
    torch.testing.assert_close(change_two, change_one, rtol=0, atol=0.05 * float(change_one.abs().max()))
    joined = [torch.cat([w[n].flatten() for n in sorted(w)]) for w in (two, one)]
    assert rms_ratio(*joined) <= TOLERANCES["fp32"][0]
    rows = [json.loads(line)["step"] for line in metrics_path(out).read_text().splitlines()]
    assert rows == [1, 2, 3, 4, 5] * 2


@pytest.mark.slow
def test_one_process_with_shards_resumes_to_the_same_bytes_and_without_them(folders, group, tmp_path):
    """A group of one: the state's format, its resumption, and that a run that divides nothing can read it."""
    outs = {name: tmp_path / name for name in ("whole", "again", "plain")}
    for name, calls in (("whole", [(True, 0)]), ("again", [(True, 3), (True, 0)]), ("plain", [(True, 3), (False, 0)])):
        for shard, stop_after in calls:
            done = group.run(run_and_stop, folders[1], outs[name], stop_after, test_distill.STAGES, shard)
            assert done.returncode == (143 if stop_after else 0), done.stderr[-3000:]
    whole, again, plain = (load_file(out / "model.safetensors") for out in outs.values())
    assert all(torch.equal(whole[key], again[key]) for key in whole)
    assert rms_ratio(*(torch.cat([w[n].flatten() for n in sorted(w)]) for w in (plain, whole))) <= TOLERANCES["fp32"][0]


@pytest.fixture
def mesh():
    yield make_mesh(CPU)
    dist.destroy_process_group()


def test_a_state_of_divided_weights_comes_back_whole_or_divided(mesh, tmp_path):
    weights = {name: torch.randn(shape) for name, shape in (("a", (5, 3)), ("b", (2,)))}
    parts = {name: divided(value.clone(), value, mesh) for name, value in weights.items()}
    moments = {"a": {"step": torch.tensor(7.0), "exp_avg": parts["a"] * 2, "exp_avg_sq": parts["a"] * 3}}
    alone = SimpleNamespace(is_main_process=True, wait_for_everyone=lambda: None)
    guards = {f"layer.{index}": Guard(losses=[1 / 3] * 128, skipped=2) for index in range(9)}
    for step in (1, 2, 3):
        write_sharded(alone, tmp_path, Position(stage=0, step=step), guards, parts, moments)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["state-00-000000002", "state-00-000000003"]
    # A folder that a kill left half written has another name, and is no state.
    (tmp_path / ".state-00-000000009.tmp").mkdir()
    folder = latest_folder(tmp_path)
    assert read_about(folder) == (Position(stage=0, step=3), guards)
    assert names_of(folder) == {"a", "b"}
    whole = read_whole(folder)
    assert all(torch.equal(whole.weights[name], value) for name, value in weights.items())
    assert torch.equal(whole.moments["a"]["exp_avg_sq"], weights["a"] * 3)
    empty = {name: divided(torch.zeros_like(value), value, mesh) for name, value in weights.items()}
    back = read_into(folder, empty, {"a": empty["a"]})
    assert torch.equal(empty["a"].to_local(), weights["a"])
    assert back["a"]["step"] == 7
    parts["a"].to_local()[0, 0] = float("nan")
    with pytest.raises(TrainingError, match="weight/a holds a value that is not finite"):
        write_sharded(alone, tmp_path, Position(stage=0, step=4), guards, parts, moments)
    (folder / ".metadata").write_bytes(b"")
    with pytest.raises(CheckpointError, match="no training state that can be read"):
        names_of(folder)


def test_parameters_are_filled_as_transformers_loads_them(folders, mesh):
    options = STAGES.build(STAGES_TRIED[2])
    student, _, trained = load_sharded_pair(folders[1], folders[0], options, "kl", set(), CPU, mesh)
    expected = load_model(folders[1], torch.float32)
    assert {name: p.dtype for name, p in student.named_parameters()} == {n: p.dtype for n, p in expected.named_parameters()}
    assert all(torch.equal(p.to_local(), q) for p, q in zip(student.parameters(), expected.parameters(), strict=True))
    own = dict(student.named_buffers())
    assert all(torch.equal(own[name], buffer) and own[name].dtype == buffer.dtype for name, buffer in expected.named_buffers())


@pytest.mark.parametrize(
    ("stage", "reason"),
    [
        ({"name": "sft"}, "it needs them whole"),
        ({"name": "dpo"}, "it needs them whole"),
        ({"name": "kl", "lora": {"targets": ["*.self_attn.q_proj"]}}, "an adapter of it needs them whole"),
        ({"name": "kl", "losses": [{"name": "features"}]}, "the loss 'features' needs layers"),
        ({"name": "align", "losses": [{"name": "mixing_matrix"}]}, "the loss 'mixing_matrix' needs matrix"),
        ({"name": "align", "losses": [{"name": "mixer_output", "at": "context"}]}, "the loss 'mixer_output' needs context"),
    ],
)
def test_what_needs_whole_weights_is_refused_before_any_work(folders, tmp_path, stage, reason):
    with pytest.raises(ConfigError, match=reason) as caught:
        distill(folders[1], [{"tokens": 128, "seq_tokens": 16, "rows": 4, **stage}], tiny_tokens(), tmp_path / "out", shard=True)
    assert "run it without --shard" in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_launch_configs_say_what_we_make_of_them(monkeypatch):
    folder = Path(hybridize.__file__).parent / "configs" / "accelerate"
    found = {path.stem: load_config_from_file(str(path)) for path in sorted(folder.glob("*.yaml"))}
    assert {name: str(config.distributed_type.value) for name, config in found.items()} == {
        "ddp": "MULTI_GPU", "fsdp2": "FSDP", "single": "NO",
    }  # fmt: skip
    assert not asked_to_shard(False)
    assert asked_to_shard(True)
    # What `accelerate launch` puts into the environment for such a config.
    arguments = launch_command_parser().parse_args(["--config_file", str(folder / "fsdp2.yaml"), "x.py"])
    arguments, _, _ = _validate_launch_command(arguments)
    environment = prepare_multi_gpu_env(arguments)
    assert environment["ACCELERATE_USE_FSDP"] == "true"
    for key, value in environment.items():
        if key.startswith(("FSDP_", "ACCELERATE_USE_FSDP")):
            monkeypatch.setenv(key, value)
    assert asked_to_shard(False)
    monkeypatch.setenv("FSDP_VERSION", "1")
    with pytest.raises(ConfigError, match="fsdp_version is 1, expected 2"):
        asked_to_shard(False)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ConfigError, match="DeepSpeed, which is not supported; use accelerate/fsdp2.yaml"):
        asked_to_shard(False)
