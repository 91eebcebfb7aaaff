"""The whole verb: what it writes, and that a run which stops ends as one that does not."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.tracking import GeneralTracker
from safetensors.torch import load_file, save_file

from hybridize.checkpoint import open_checkpoint
from hybridize.data import Tokens
from hybridize.distill import distill, loop, metrics_path
from hybridize.errors import ConfigError, DataError, TrainingError
from hybridize.lineage import read_lineage, verify_files
from hybridize.storage import file_sha256, partial_folder
from tests.distill.pair import BOTH, tiny_pair, tiny_tokens
from tests.tolerances import assert_close

STAGES = [
    {"name": "align", "tokens": 5 * 64, "seq_tokens": 16, "rows": 4, "lr": 3e-3, "save_tokens": 128, "losses": BOTH},
    {"name": "kl", "tokens": 5 * 64, "seq_tokens": 16, "rows": 2, "accumulate": 2, "lr": 1e-3, "save_tokens": 128},
]
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return tiny_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def whole(folders, tmp_path_factory):
    """A run that was never disturbed."""
    torch.set_num_threads(1)
    return distill(folders[1], STAGES, tiny_tokens(), tmp_path_factory.mktemp("whole") / "out")


def hashes(folder):
    return {path.name: file_sha256(path) for path in sorted(folder.iterdir())}


def rows_of(out):
    return [json.loads(line) for line in metrics_path(out).read_text().splitlines()]


class Stop(Exception):
    pass


def stop_after(count):
    calls = []

    def progress(label, done, total):
        calls.append(label)
        if len(calls) == count:
            raise Stop

    return progress


def test_the_output_is_a_directory_like_the_students(folders, whole):
    base, student = folders
    verify_files(whole)
    before, after = open_checkpoint(student), open_checkpoint(whole)
    assert {n: (i.dtype, i.shape) for n, i in before.tensors.items()} == {n: (i.dtype, i.shape) for n, i in after.tensors.items()}
    assert before.raw_config == after.raw_config
    assert set(hashes(whole)) == set(hashes(student))
    lineage = read_lineage(whole)
    assert lineage["base"] == {"location": str(base)}
    assert [s["name"] for s in lineage["distill"][0]["stages"]] == ["align", "kl"]
    assert not partial_folder(whole).exists()


def test_the_loss_falls_and_every_step_is_logged(whole):
    rows = rows_of(whole)
    assert [(r["stage"], r["step"], r["tokens"]) for r in rows] == [(s, i, 64 * i) for s in (1, 2) for i in range(1, 6)]
    assert rows[4]["loss"] < rows[0]["loss"]
    assert rows[9]["loss"] < rows[5]["loss"]
    assert {"layer.0", "layer.2", "mixer_output", "hidden_state", "lr", "grad_norm", "tokens_per_s"} <= set(rows[0])
    assert "kl" in rows[5]


def test_the_same_inputs_give_the_same_bytes(folders, whole, tmp_path):
    torch.rand(1)
    state = torch.get_rng_state()
    again = distill(folders[1], STAGES, tiny_tokens(), tmp_path / "again")
    assert torch.equal(torch.get_rng_state(), state)
    assert hashes(again) == hashes(whole)
    other = distill(folders[1], STAGES, tiny_tokens(), tmp_path / "other", seed=1)
    assert hashes(other)["model.safetensors"] != hashes(whole)["model.safetensors"]


# With nothing saved, at the end of a stage, amid the last; kills at any step are in test_kill_distill.py.
@pytest.mark.parametrize("steps", [1, 5, 9])
def test_a_stopped_run_resumes_to_the_same_bytes(folders, whole, tmp_path, steps):
    out = tmp_path / "out"
    with pytest.raises(Stop):
        distill(folders[1], STAGES, tiny_tokens(), out, progress=stop_after(steps))
    assert not out.exists()
    distill(folders[1], STAGES, tiny_tokens(), out, resume=True)
    assert hashes(out) == hashes(whole)
    drop = {"tokens_per_s"}
    assert [{k: v for k, v in r.items() if k not in drop} for r in rows_of(out)] == [
        {k: v for k, v in r.items() if k not in drop} for r in rows_of(whole)
    ]
    # A finished run is left as it is.
    assert distill(folders[1], STAGES, tiny_tokens(), out, resume=True) == out


def test_a_resume_that_lost_its_moments_would_show(folders, whole, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with pytest.raises(Stop):
        distill(folders[1], STAGES, tiny_tokens(), out, progress=stop_after(3))
    monkeypatch.setattr(loop, "restore_moments", lambda *a: None)
    distill(folders[1], STAGES, tiny_tokens(), out, resume=True)
    assert hashes(out) != hashes(whole)


def test_only_the_same_job_resumes(folders, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(Stop):
        distill(folders[1], STAGES, tiny_tokens(), out, progress=stop_after(3))
    with pytest.raises(ConfigError, match="--resume"):
        distill(folders[1], STAGES, tiny_tokens(), out)
    with pytest.raises(ConfigError, match="another job"):
        distill(folders[1], STAGES, tiny_tokens(seed=1), out, resume=True)
    assert len(list((partial_folder(out) / "scratch").glob("state-*"))) == 1
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("x")
    with pytest.raises(ConfigError, match="not empty"):
        distill(folders[1], STAGES, tiny_tokens(), tmp_path / "taken")


def test_a_bf16_checkpoint_trains_in_fp32_and_stays_bf16(tmp_path):
    base, student = tiny_pair(tmp_path, dtype="bfloat16")
    assert open_checkpoint(student).dtype == torch.bfloat16
    out = distill(student, STAGES, tiny_tokens(), tmp_path / "out")
    assert {info.dtype for info in open_checkpoint(out).tensors.values()} == {torch.bfloat16}
    # A rate far below bf16's spacing still adds up.
    slow = [{**STAGES[1], "lr": 8e-5, "tokens": 25 * 64, "schedule": "constant"}]
    slow = distill(student, slow, tiny_tokens(), tmp_path / "slow")
    before, after = load_file(student / "model.safetensors"), load_file(slow / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    assert (before[name] != after[name]).float().mean() > 0.3


def poison(student, tmp_path, tensor):
    """A copy of the student whose tensor holds one value that overflows as soon as it is used."""
    import shutil

    copy = tmp_path / "poisoned"
    shutil.copytree(student, copy)
    weights = load_file(copy / "model.safetensors")
    weights[tensor].view(-1)[0] = float("inf")
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


@pytest.mark.parametrize(("stage", "where"), [(0, r"layer\.2"), (1, "loss")])
def test_a_loss_that_is_not_finite_stops_before_the_update(folders, tmp_path, stage, where):
    student = poison(folders[1], tmp_path, "model.layers.2.self_attn.o_proj.weight")
    with pytest.raises(TrainingError, match=f"step 1, stopped before the update.*start of the stage.*{where}.* is (nan|inf)"):
        distill(student, [STAGES[stage]], tiny_tokens(), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not partial_folder(tmp_path / "out").exists()


def test_a_gradient_that_is_not_finite_stops_and_names_the_last_state(folders, tmp_path, monkeypatch):
    real, calls = loop.gradients, []

    def gradients(run, options, micro_step, trained, batch, asked):
        losses = real(run, options, micro_step, trained, batch, asked)
        calls.append(1)
        if len(calls) == 4:
            trained["model.layers.0.self_attn.v_proj.weight"].grad[0, 0] = float("nan")
        return losses

    monkeypatch.setattr(loop, "gradients", gradients)
    with pytest.raises(TrainingError, match=r"\(align\), step 4.*last saved state: step 2: the gradient of .*0.*v_proj"):
        distill(folders[1], STAGES, tiny_tokens(), tmp_path / "out")
    monkeypatch.undo()
    distill(folders[1], STAGES, tiny_tokens(), tmp_path / "out", resume=True)
    assert all(bool(t.isfinite().all()) for t in load_file(tmp_path / "out" / "model.safetensors").values())


def test_bad_calls_are_one_line(folders, tmp_path):
    base, student = folders
    out = tmp_path / "out"
    for stages, message in (
        ([], "got no stages"),
        ([{"name": "algin", "tokens": 64}], "Did you mean 'align'"),
        ([{**STAGES[0], "train": ["nothing.*"]}], "matches none"),
    ):
        with pytest.raises(ConfigError, match=message):
            distill(student, stages, tiny_tokens(), out)
    with pytest.raises(DataError, match="expected at least one row of 15"):
        distill(student, STAGES, tiny_tokens(10), out)
    foreign = Tokens(ids=tiny_tokens().ids + 60, text_bytes=1, sha256="x", bos_id=1)
    with pytest.raises(ConfigError, match="outside the student's vocabulary of 64"):
        distill(student, STAGES, foreign, out)
    with pytest.raises(ConfigError, match="tracker"):
        distill(student, STAGES, tiny_tokens(), out, tracker="no-such-tracker")
    assert not out.exists()
    assert not partial_folder(out).exists()


class Collector(GeneralTracker):
    name = "collector"
    requires_logging_directory = False

    def __init__(self):
        super().__init__()
        self.rows = []

    @property
    def tracker(self):
        return self.rows

    def log(self, values, step=None, **kwargs):
        self.rows.append((step, values))


def test_a_tracker_sees_every_step(folders, tmp_path):
    collector = Collector()
    distill(folders[1], STAGES[:1], tiny_tokens(), tmp_path / "out", tracker=collector)
    assert [step for step, _ in collector.rows] == [1, 2, 3, 4, 5]
    assert all("loss" in values for _, values in collector.rows)


WORKER = """
import sys, torch
torch.set_num_threads(1)
from hybridize.distill import distill
from tests.distill.pair import tiny_tokens
from tests.distill.test_distill import STAGES
distill(sys.argv[1], STAGES, tiny_tokens(), sys.argv[2], resume=True)
"""


@pytest.mark.slow
def test_two_processes_give_what_one_gives(folders, whole, tmp_path):
    (tmp_path / "worker.py").write_text(WORKER)
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
        str(tmp_path / "worker.py"), str(folders[1]), str(tmp_path / "out"),
    ]  # fmt: skip
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = (load_file(folder / "model.safetensors") for folder in (whole, tmp_path / "out"))
    start = load_file(folders[1] / "model.safetensors")
    # The change, not the weight, so that doing nothing or half of it would show.
    change_one, change_two = (torch.cat([(w[n] - start[n]).flatten() for n in sorted(start)]) for w in (one, two))
    torch.testing.assert_close(change_two, change_one, rtol=0, atol=0.05 * float(change_one.abs().max()))
    assert_close(torch.cat([two[n].flatten() for n in sorted(two)]), torch.cat([one[n].flatten() for n in sorted(one)]), "fp32")
    assert len(rows_of(tmp_path / "out")) == 10


def test_rows_are_shared_out_evenly():
    batch = torch.arange(6)
    assert torch.cat([loop.own_rows(batch, rank, 3) for rank in range(3)]).equal(batch)
    with pytest.raises(ConfigError, match="expected a multiple of the 4 processes"):
        loop.own_rows(batch, 0, 4)
