"""Time and memory of a calibrated conversion: two layers of Llama-3-8B's shape, one of them seeded on text.

The text is random token ids, which costs what any text costs. The conversion runs in a child process; its peak is VmHWM.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# kernels.py lies beside this script and would pass for Hugging Face's package of that name, which transformers asks for.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from bench.convert import make_base  # noqa: E402


def child(base: str, out: str, sequences: int, tokens: int) -> None:
    """One calibrated conversion; prints seconds and peak resident bytes as JSON."""
    import torch

    from hybridize.checkpoint import open_base
    from hybridize.conversions import convert, plan

    text = torch.randint(1, 32768, (sequences, tokens), generator=torch.Generator().manual_seed(0))
    start = time.perf_counter()
    convert(plan(open_base(base), {"keep": {"layers": [1]}, "mixer": {"name": "mamba2"}}, "bench", 0), out, text)
    status = Path("/proc/self/status").read_text()
    peak = next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
    json.dump({"seconds": time.perf_counter() - start, "peak_rss_bytes": peak, "tokens": sequences * tokens}, sys.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--sequences", type=int, default=48)
    parser.add_argument("--tokens", type=int, default=256, help="tokens of a sequence")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(*options.child, options.sequences, options.tokens)
        return
    with tempfile.TemporaryDirectory() as name:
        base = Path(name) / "base"
        make_base(base, 1.3)
        command = [sys.executable, __file__, "--child", str(base), str(Path(name) / "out"),
                   "--sequences", str(options.sequences), "--tokens", str(options.tokens)]  # fmt: skip
        figures = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    print(f"{figures['tokens']} tokens: {figures['seconds']:.0f} s, peak RSS {figures['peak_rss_bytes'] / 1e6:.0f} MB")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
