"""What tokenising costs: tokens a second by number of threads, peak memory by size of text, and the second run.

    python bench/data.py TOKENIZER TEXT [--megabytes 16] [--threads 1,2] [--json FILE]

TEXT is repeated, each copy under its own number, to the size asked for. Every measurement has a process of its own. Memory is
what a process holds for itself (RssAnon) above what it held before; `per_core` is tokens per second of processor time, which
a busy machine changes less than `per_second`.
"""

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from transformers import AutoTokenizer  # noqa: E402

import hybridize.data.tokens as tokens  # noqa: E402
from hybridize.data import TrainBlocks, read_documents  # noqa: E402
from hybridize.data.stored import stored_tokens  # noqa: E402

log = logging.getLogger("bench")


def text_of(source: str, size: int) -> Iterator[str]:
    """Documents of about `size` bytes in all."""
    done = copy = 0
    while done < size:
        for document in read_documents(source):
            # Pieces of a few thousand characters, as documents are.
            for start in range(0, len(document), 4000):
                part = f"{copy} {document[start : start + 4000]}"
                done += len(part.encode()) + 1
                yield part
                if done >= size:
                    return
        copy += 1


def watched(work: Callable[[], Any]) -> dict[str, Any]:
    """Seconds, processor seconds and highest memory of a call, and its result."""

    def held() -> int:
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(status["RssAnon"].split()[0]) * 1024

    before, most, done = held(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            most.append(held())

    thread = threading.Thread(target=watch)
    thread.start()
    began, processor = time.perf_counter(), time.process_time()
    try:
        result = work()
    finally:
        done.set()
        thread.join()
    return {
        "seconds": time.perf_counter() - began, "processor": time.process_time() - processor, "peak_bytes": max(most) - before,
        "result": result,
    }  # fmt: skip


def measure(tokenizer: str, text: str, size: int, threads: int, cache: Path) -> dict[str, float]:
    """One call of stored_tokens, and then one step's batch of 8 rows of 2,048."""
    tokens.MOST_THREADS = threads
    loaded = AutoTokenizer.from_pretrained(tokenizer)
    found = watched(lambda: stored_tokens(loaded, lambda: text_of(text, size), cache))
    read = found.pop("result")
    blocks = TrainBlocks(read, 2048, 8, 0, read.bos_id)
    blocks.batch(0)
    began = time.perf_counter()
    for step in range(1, 51):
        blocks.batch(step)
    count = len(read.ids)
    return {
        **found, "tokens": count, "per_second": count / found["seconds"], "per_core": count / found["processor"],
        "batch_seconds": (time.perf_counter() - began) / 50,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizer")
    parser.add_argument("text")
    parser.add_argument("--megabytes", type=float, default=16)
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--cache", type=Path, help="measure once, here, and print the figures")
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if args.cache:
        figures = measure(args.tokenizer, args.text, int(args.megabytes * 1e6), int(args.threads), args.cache)
        sys.stdout.write(json.dumps(figures) + "\n")
        return

    def alone(megabytes: float, threads: str, cache: str) -> dict[str, float]:
        words = [sys.executable, str(Path(__file__).resolve()), args.tokenizer, args.text, "--megabytes", str(megabytes)]
        done = subprocess.run([*words, "--threads", threads, "--cache", cache], capture_output=True, text=True, check=True)
        figures = json.loads(done.stdout.splitlines()[-1])
        log.info("%s MB, %s threads: %s", megabytes, threads, figures)
        return figures

    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for threads in args.threads.split(","):
            found[f"{threads} threads"] = alone(args.megabytes, threads, f"{folder}/{threads}")
            found[f"{threads} threads, a quarter"] = alone(args.megabytes / 4, threads, f"{folder}/{threads}")
        found["second run"] = alone(args.megabytes, threads, f"{folder}/{threads}")
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
