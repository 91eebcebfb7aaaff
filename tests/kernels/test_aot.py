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
    ("ssd_backward_writes", 100): (8, "only with documents; with 4 warps 24"),
    ("gdn_input_grads", 80): (336, "squares of 64 x 64 in five layouts; rows for sm_80 are narrower already"),
    ("gdn_channels", 80): (24, "tiles are chosen for sm_90"),
    ("gdn_channel_grads", 80): (16, "tiles are chosen for sm_90"),
    ("gdn_advance", 80): (16, "only with rows"),
    ("gdn_states", 100): (8, "tiles are chosen for sm_90"),
    ("gdn_input_grads", 100): (40, "tiles are chosen for sm_90"),
    ("gdn_channel_grads", 100): (16, "tiles are chosen for sm_90"),
}


def compiled(architecture, function, folder, *options):
    target = folder / "aot.json"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(ROOT / "bench/aot.py"), "--arch", str(architecture), "--op", function, "--json", str(target)]
    done = subprocess.run([*command, *options], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return json.loads(target.read_text(encoding="utf-8"))


@pytest.mark.parametrize("function", [spec.name for spec in specs() if "triton" in spec.impls])
class TestCompiled:
    @pytest.mark.parametrize("architecture", [80, 90, 100])
    def test_it_fits_and_spills_nothing_that_is_not_listed(self, function, architecture, tmp_path):
        rows = compiled(architecture, function, tmp_path)
        assert rows
        for row in rows:
            allowed, _ = SPILLS.get((row["kernel"], architecture), (0, ""))
            assert row["spills"] <= allowed, row
