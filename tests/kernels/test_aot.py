"""Every launch at the shapes of models, compiled for GPUs by Triton's own assembler: it fits, and nothing spills unseen."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hybridize.kernels._core.table import specs

pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
# Bytes that a kernel may spill at the tiles of the table, by (kernel, architecture), with the reason.
SHARED_C = "only where output heads share a head of C; rows of 16 would not, but read each state twice as often"
SPILLS: dict[tuple[str, int], tuple[int, str]] = {
    ("ssd_backward_reads", 80): (64, SHARED_C),
    ("ssd_backward_reads", 90): (40, SHARED_C),
    ("ssd_backward_reads", 100): (48, SHARED_C),
    ("stream_dkdv", 100): (168, "tiles are chosen for wgmma, 64 queries by 64 keys"),
    ("ssd_backward_writes", 100): (24, "only with documents, and where P or N is no power of two"),
    ("gdn_input_grads", 80): (336, "squares of 64 x 64 in five layouts; rows for sm_80 are narrower already"),
    ("gdn_channels", 80): (24, "tiles are chosen for sm_90"),
    ("gdn_channel_grads", 80): (16, "tiles are chosen for sm_90"),
    ("gdn_advance", 80): (16, "only with rows"),
    ("gdn_states", 100): (8, "tiles are chosen for sm_90"),
    ("gdn_input_grads", 100): (40, "tiles are chosen for sm_90"),
    ("gdn_channel_grads", 100): (16, "tiles are chosen for sm_90"),
}


def compiled(architecture, folder):
    """Every launch of every op, compiled in one process: importing costs more than most kernels."""
    target = folder / "aot.json"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(ROOT / "bench/aot.py"), "--arch", str(architecture), "--json", str(target)]
    # All shapes for the card that tiles were chosen for; for the others the first and the last, which takes half the time.
    command += [] if architecture == 90 else ["--few"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    return done, json.loads(target.read_text(encoding="utf-8"))


@pytest.fixture(scope="class")
def rows(request, tmp_path_factory):
    done, rows = compiled(request.cls.architecture, tmp_path_factory.mktemp("aot"))
    # Shared memory that does not fit is its exit status.
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return rows


class Compiled:
    """Made into a class for each architecture below, so that they spread over workers."""

    architecture = 0

    def test_every_function_is_there(self, rows):
        known = {case.split("/")[0] for row in rows for case in row["cases"]}
        assert known == {spec.name for spec in specs() if "triton" in spec.impls}

    def test_nothing_spills_that_is_not_listed(self, rows):
        limits = {kernel: most for (kernel, architecture), (most, _) in SPILLS.items() if architecture == self.architecture}
        assert [row for row in rows if row["spills"] > limits.get(row["kernel"], 0)] == []

    def test_what_is_listed_spills(self, rows):
        spilling = {(row["kernel"], self.architecture) for row in rows if row["spills"]}
        assert {key for key in SPILLS if key[1] == self.architecture == 90} <= spilling


for _architecture in (80, 90, 100):
    _name = f"TestSm{_architecture}"
    globals()[_name] = type(_name, (Compiled,), {"architecture": _architecture})
