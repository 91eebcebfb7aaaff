"""What watches over a run: losses that leap, numbers that are none, and signals that ask it to stop.

Every judgement follows from what all processes share and from what a saved state holds, so that a resumed run judges as
one that was never stopped, and all processes judge alike.
"""

import logging
import math
import signal
import threading
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from hybridize.checkpoint import is_finite
from hybridize.errors import StoppedError, TrainingError

log = logging.getLogger(__name__)

OnSpike = Literal["stop", "skip", "ignore"]

WINDOW_STEPS = 128
"""Steps that a loss is compared with; half of them must be there before anything is called a spike."""
SIGMAS = 6.0
MOST_SKIPPED = 10
"""Steps left out one after the other before it is no spike any more, but where the loss has gone."""


@dataclass(kw_only=True)
class Guard:
    """The losses of the last steps, and the judgement on the next one.

    A step is a spike when its loss lies more than 6 standard deviations above the mean of the last 128 steps that were
    taken. Steps that were left out are not among them.

    Source: the rule and both numbers are those of OLMo-core's SkipStepOptimizer (allenai/OLMo-core,
    src/olmo_core/optim/skip_step_optimizer.py), for losses only.
    """

    losses: list[float] = field(default_factory=list)
    """Of the last steps that were taken, the latest last."""
    skipped: int = 0
    """Steps left out since one was taken."""

    def spike(self, loss: float) -> str | None:
        """What is wrong with a finite loss, or None."""
        if len(self.losses) < WINDOW_STEPS // 2:
            return None
        mean = math.fsum(self.losses) / len(self.losses)
        sigma = math.sqrt(math.fsum((value - mean) ** 2 for value in self.losses) / len(self.losses))
        if loss <= mean + SIGMAS * sigma:
            return None
        return f"is {loss:.6g}, more than {SIGMAS:g} sigma above the last {len(self.losses)} steps ({mean:.6g} +- {sigma:.2g})"

    def taken(self, loss: float) -> None:
        """Note a step that changed the weights."""
        self.losses = [*self.losses, loss][-WINDOW_STEPS:]
        self.skipped = 0


def _own(grad: Tensor) -> Tensor:
    return grad.to_local() if isinstance(grad, DTensor) else grad


def broken(name: str, losses: dict[str, float], norm: float, gradients: dict[str, Tensor]) -> str | None:
    """Which of the losses or gradients that `name` comes with is not finite, or None."""
    if gone := [own for own, value in losses.items() if not math.isfinite(value)]:
        return f"the loss {gone[0]!r} is {losses[gone[0]]}, expected a number"
    if math.isfinite(norm):
        return None
    at = next((key for key, grad in gradients.items() if not bool(torch.isfinite(_own(grad)).all())), None)
    where = "some gradient of another process" if at is None else f"the gradient of {at}"
    return f"{where} is not finite, its loss {name!r} is {losses[name]:.6g}"


def worst_rows(row_losses: list[float], rows: int) -> str:
    """The rows of the batch, from 0, that went through the model with the largest loss or one that is not finite.

    Args:
        row_losses: of each row, the loss of the micro-batch it was in.
        rows: of a micro-batch.
    """
    # Equal to themselves, unlike NaN: a micro-batch's rows have one loss between them.
    ranked = [value if math.isfinite(value) else math.inf for value in row_losses]
    first = max(range(len(ranked)), key=lambda row: ranked[row])
    last = first
    while last + 1 < min(len(ranked), first + rows) and ranked[last + 1] == ranked[first]:
        last += 1
    return f"rows {first} to {last}" if last > first else f"row {first}"


def judge(
    guard: Guard, on_spike: OnSpike, name: str, losses: dict[str, float], rows: str, norm: float, gradients: dict[str, Tensor],
    where: str,
) -> bool:  # fmt: skip
    """Whether a step may change the weights of what learns from one loss.

    Args:
        guard: the losses before it; left as it is but for the count of steps left out.
        on_spike: `stop`, `skip`, or `ignore`, which takes finite spikes and stops at what is not finite.
        name: of the loss, `loss` or `layer.<index>`.
        losses: of the step, that one and maybe its parts among them.
        rows: the batch's rows that stand out, for messages.
        norm: of its gradient.
        gradients: by parameter.
        where: stage, step and last saved state, for messages.

    Raises:
        TrainingError: it is not finite or a spike, and that is to stop the run; or too many were left out in a row.
    """
    wrong, finite = broken(name, losses, norm, gradients), False
    if wrong is None and (spike := guard.spike(losses[name])) is not None:
        wrong, finite = f"the loss {name!r} {spike}", True
    if wrong is None:
        return True
    if finite and on_spike == "ignore":
        log.warning("%s, %s: %s; taken all the same", where, rows, wrong)
        return True
    if on_spike != "skip":
        other = "skip or ignore" if finite else "skip"
        raise TrainingError(f"{where}: {wrong} ({rows}). With on_spike={other} for this stage, --resume goes on past it")
    guard.skipped += 1
    if guard.skipped > MOST_SKIPPED:
        raise TrainingError(
            f"{where}: {wrong} ({rows}), after {MOST_SKIPPED} steps were left out in a row: no spike, the run has gone wrong. "
            "Lower the learning rate"
        )
    log.warning("%s: %s (%s); this step changes nothing there", where, wrong, rows)
    return False


def check_saved(tensors: dict[str, Tensor], where: str) -> None:
    """Raise a TrainingError when something that is to be saved is not finite."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not is_finite(tensor):
            raise TrainingError(f"{where}: {name} holds a value that is not finite; nothing was saved. Lower the learning rate")


class StopSignals:
    """While its block runs, SIGTERM and Ctrl-C ask for an end after the step; a second Ctrl-C ends it at once.

    Only the main thread of a process may take signals over; elsewhere nothing is asked.
    """

    def __init__(self) -> None:
        self.asked: int | None = None
        self._before: dict[int, Any] = {}

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.asked == signal.SIGINT:
            raise KeyboardInterrupt
        first, self.asked = self.asked is None, number
        # Noted before it is said: whoever hears it may send the next one at once.
        if first:
            log.warning("%s: finishing the step and saving the state", signal.Signals(number).name)

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @staticmethod
    def leave(number: int, where: str) -> None:
        """Raise the StoppedError of a signal, once the state is on disk."""
        raise StoppedError(f"stopped by {signal.Signals(number).name} after {where}", 128 + number)
