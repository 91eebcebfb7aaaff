"""Everything that waits for a GPU, in one command of at most ten minutes: the ops' tests, then their speeds beside the anchors.

    python bench/gpu.py --out gpu [--kit wheels]

`--kit` is a folder of wheels of the libraries to compare with (fla-core, liger-kernel, flash-qla, mamba-ssm ...), for machines
without a network: they are unpacked beside the run, and nothing is installed. What cannot be imported is a line of the table.
Writes OUT/tests.txt, OUT/kernels.json and OUT/table.md, which is made to be pasted into dev/GPU.md.
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIMIT_S = 590
TESTS_S = 240
COLUMNS = ("op", "shape", "impl", "pass", "ms", "ratio", "TFLOP/s", "GB/s", "% of bound", "peak MB", "error")


def unpacked(kit, folder):
    """Wheels of a folder, unpacked; Triton reads its kernels' source, so that an archive on the path would not do."""
    for wheel in sorted(kit.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
    return folder


def run(command, environment, seconds):
    """(exit status, output); 124 where it took too long."""
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, timeout=seconds, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
    except subprocess.TimeoutExpired as late:
        said = late.stdout or ""
        return 124, said if isinstance(said, str) else said.decode()
    return done.returncode, done.stdout


def table(rows, about):
    lines = [about, "", "| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    for row in rows:
        if "not timed" in row:
            lines.append(f"| {row['op']} | {row['shape']} | {row['impl']} | {row['not timed']} |" + " |" * (len(COLUMNS) - 4))
        else:
            cells = [row.get(name) for name in COLUMNS]
            lines.append(
                "| " + " | ".join("" if c is None else f"{c:.1e}" if c == row.get("error") else str(c) for c in cells) + " |"
            )
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--kit", type=Path, help="folder of wheels to compare with")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    started = datetime.datetime.now(datetime.timezone.utc)
    with tempfile.TemporaryDirectory() as scratch:
        paths = [str(ROOT)]
        if arguments.kit:
            paths.append(str(unpacked(arguments.kit, Path(scratch))))
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
        environment.pop("TRITON_INTERPRET", None)
        tests = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/kernels/test_gpu.py", "--tb=short"]
        status, said = run(tests, environment, TESTS_S)
        (arguments.out / "tests.txt").write_text(said, encoding="utf-8")
        print(said[-3000:], f"tests: exit {status}", sep="\n", flush=True)
        left = LIMIT_S - (datetime.datetime.now(datetime.timezone.utc) - started).total_seconds()
        target = arguments.out / "kernels.json"
        bench, said = run([sys.executable, "bench/kernels.py", "--json", str(target.resolve())], environment, left)
        print(said, f"bench: exit {bench}", sep="\n", flush=True)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    if target.exists():
        about = f"{started:%Y-%m-%d}, commit {commit or 'unknown'}: {said.splitlines()[0]}; tests exit {status}"
        rows = json.loads(target.read_text(encoding="utf-8"))
        (arguments.out / "table.md").write_text(table(rows, about), encoding="utf-8")
    return status or bench


if __name__ == "__main__":
    sys.exit(main())
