"""Groups of processes as torchrun starts them, each a fork of one interpreter, so that no time goes into imports.

A run is a function of a module of the tests with arguments that are JSON. `tests/distill/test_distill.py` starts one group
with torchrun itself.
"""

import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
# How long the others may live once one process of a group has failed.
GRACE_SECONDS = 20


@dataclass(frozen=True)
class Done:
    """How a group ended: the first code that is not 0 (minus the signal's number for one that was killed), and what it said."""

    returncode: int
    stderr: str


class Server:
    """The other end of `serve`.

    Args:
        log: the file that everything said by the processes goes to.
    """

    def __init__(self, log: Path):
        self.log = log
        with open(log, "wb") as said:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.distill.group"], cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=said, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            )  # fmt: skip

    def run(self, function: Any, *arguments: Any, processes: int = 0) -> Done:
        """Call a function in so many processes; with 0 in one that knows of no group."""
        call = [function.__module__, function.__name__, arguments, processes]
        began = self.log.stat().st_size
        print(json.dumps(call, default=str), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        said = self.log.read_bytes()[began:].decode()
        assert answer, said
        return Done(int(answer), said)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait(30)


def serve() -> None:
    """A group for each line of stdin, and its code as a line of stdout."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    # As in the tests' own process: see tests/conftest.py.
    os.fsync = os.fstat  # type: ignore[assignment]
    for module in ("hybridize.distill", "tests.distill.test_sharding"):
        importlib.import_module(module)
    for line in sys.stdin:
        module, name, arguments, processes = json.loads(line)
        function = getattr(importlib.import_module(module), name)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        children = {fork(function, arguments, rank, processes, port) for rank in range(processes or 1)}
        print(ended(children), file=answers, flush=True)


def fork(function: Any, arguments: list, rank: int, processes: int, port: int) -> int:
    child = os.fork()
    if child:
        return child
    if processes:
        os.environ |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        }  # fmt: skip
    torch.set_num_threads(1)
    code = 1
    try:
        function(*arguments)
        code = 0
    except SystemExit as left:
        traceback.print_exc()
        code = left.code if isinstance(left.code, int) else 1
    except BaseException:
        traceback.print_exc()
    sys.stderr.flush()
    # Nothing of the server's own may be torn down twice.
    os._exit(code)


def ended(children: set[int]) -> int:
    """The first code that is not 0, once all have ended; what outlives a failure for too long is killed."""
    first, deadline = 0, float("inf")
    while children:
        child, status = os.waitpid(-1, os.WNOHANG)
        if child:
            children.discard(child)
            code = os.waitstatus_to_exitcode(status)
            if code and not first:
                first, deadline = code, time.monotonic() + GRACE_SECONDS
        elif time.monotonic() > deadline:
            for late in children:
                os.kill(late, signal.SIGKILL)
            deadline = float("inf")
        else:
            time.sleep(0.01)
    return first


if __name__ == "__main__":
    serve()
