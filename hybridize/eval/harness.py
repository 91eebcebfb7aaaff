"""lm-eval's own model class around a model that is loaded: answers that are kept, several processes, one progress bar."""

import contextlib
import functools
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lm_eval.api.task
from lm_eval.api.model import CacheHook, hash_args
from lm_eval.models import huggingface
from lm_eval.models.utils import normalize_gen_kwargs

from hybridize.errors import ConfigError, DataError
from hybridize.eval.context import EvalContext
from hybridize.storage import append_line, disk_errors

log = logging.getLogger(__name__)

# lm-eval's registry types it as a bare model.
HFLM: Any = huggingface.HFLM

# Texts whose log-probability is summed window by window, before their answers are kept.
ROLLING_TEXTS = 32


class Answers:
    """What one model answered, by the hash of the request; kept in a folder where one is given.

    A line of a file is what one call of the model answered: of a call whose line a kill cut short nothing is known, so that
    what is left to ask is divided into calls as it would have been.

    Args:
        folder: of this model alone, since a request says nothing of whom it asks.
        writer: number of this process; each has its own file, all are read.
    """

    def __init__(self, folder: Path | None, writer: int = 0):
        self.known: dict[str, Any] = {}
        self._new: dict[str, Any] = {}
        self._file = None if folder is None else folder / f"{writer:05d}.jsonl"
        if folder is None:
            return
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        for path in sorted(folder.glob("*.jsonl")):
            for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
                with contextlib.suppress(json.JSONDecodeError):
                    self.known.update(json.loads(line))

    def add_partial(self, kind: str, request: Any, answer: Any) -> None:
        """Note an answer; lm-eval's name for that."""
        key = hash_args(kind, request)
        self.known[key] = self._new[key] = answer

    def keep(self) -> None:
        """Put on disk what is new."""
        if self._file is not None and self._new:
            append_line(self._file, json.dumps(self._new))
        self._new = {}


class Harness(HFLM):
    """A loaded model as lm-eval asks it.

    Two rules are not lm-eval's. A sequence, its last token included, is never longer than the context. And where a tokenizer
    merges the end of a prompt with the start of an answer, the answer is all from the first token that differs from the
    prompt's own; lm-eval counts tokens there, and so scores a part of an answer.

    Args:
        context: model, tokenizer, processes and progress.
        batch_size: requests at once.
        folder: where answers of this very model are kept; None is nowhere.
    """

    def __init__(self, context: EvalContext, batch_size: int, folder: Path | None):
        with quiet():
            super().__init__(
                pretrained=context.model, tokenizer=context.need_tokenizer("lm_eval"), batch_size=batch_size,
                device=str(context.device), max_length=context.model.config.max_position_embeddings - 1,
            )  # fmt: skip
        if context.accelerator is not None:
            # lm-eval leaves processes to whoever hands it a loaded model; these are the names it asks for.
            self.accelerator = context.accelerator
            self._rank, self._world_size = context.accelerator.process_index, context.accelerator.num_processes
        self.answers = Answers(folder, self._rank)
        self.set_cache_hook(self)
        self._tell = context.tell
        self._label, self._done, self._total = "", 0, 0
        self._cut = self._merged = self._asked = 0

    def add_partial(self, kind: str, request: Any, answer: Any) -> None:
        """Called by lm-eval with each answer."""
        self.answers.add_partial(kind, request, answer)
        self._done += 1
        self._tell(self._label, self._done, self._total)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[Any]:
        return self._answered("loglikelihood", requests, len(requests))

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[Any]:
        return self._answered("loglikelihood_rolling", requests, ROLLING_TEXTS)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[Any]:
        for request in requests:
            wanted = normalize_gen_kwargs(request.args[1], self.max_gen_toks).get("max_gen_toks", self.max_gen_toks)
            if wanted >= self.max_length:
                raise ConfigError(
                    f"lm_eval: {request.task_name} generates up to {wanted} tokens, the model's context has "
                    f"{self.max_length + 1}; leave that task out"
                )
        if any(request.args[1].get("do_sample") for request in requests):
            # Each draw is another answer.
            self.set_cache_hook(CacheHook(None))
            drawn = super().generate_until(requests, disable_tqdm=True)
            self.set_cache_hook(self)
            return drawn
        return self._answered("generate_until", requests, len(requests))

    def _answered(self, kind: str, requests: list[Any], together: int) -> list[Any]:
        """Answers to all requests, each asked once, and not at all where it is known."""
        keys = [hash_args(kind, request.args) for request in requests]
        asked = {key: request for key, request in zip(keys, requests, strict=True) if key not in self.answers.known}
        new = list(asked.values())
        self._label, self._done, self._total = f"lm_eval {kind}", 0, max(1, len(new))
        # Ranks have as many requests as are left to each; lm-eval would have them wait for one another.
        world, self._world_size = self._world_size, 1
        for start in range(0, len(new), max(1, together)):
            getattr(super(), kind)(new[start : start + together], disable_tqdm=True)
            self.answers.keep()
        self._world_size = world
        self._tell(self._label, self._total, self._total)
        answers = (self.answers.known[key] for key in keys)
        return [tuple(answer) if isinstance(answer, list) else answer for answer in answers]

    def _model_call(self, *args: Any, **kwargs: Any) -> Any:
        self.answers.keep()
        return super()._model_call(*args, **kwargs)

    def _model_generate(self, *args: Any, **kwargs: Any) -> Any:
        self.answers.keep()
        return super()._model_generate(*args, **kwargs)

    def _loglikelihood_tokens(self, requests: list[Any], disable_tqdm: bool = True, override_bs: int | None = None) -> list[Any]:
        for texts, before, answer in requests:
            if not 0 < len(answer) <= self.max_length:
                raise DataError(
                    f"lm_eval: the answer {(texts or ('', ''))[1][:40]!r} has {len(answer)} tokens, expected 1 to "
                    f"{self.max_length}, the model's context less one; leave that task out"
                )
            self._cut += len(before) + len(answer) > self.max_length + 1
        self._asked += len(requests)
        return super()._loglikelihood_tokens(requests, disable_tqdm=True, override_bs=override_bs)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        stripped = context.rstrip()
        own, whole = self.tok_encode(stripped), self.tok_encode(context + continuation)
        shared = len(os.path.commonprefix([own, whole]))
        self._merged += shared < len(own)
        return whole[:shared] or [self.prefix_token_id], whole[shared:]

    def say(self) -> None:
        """Log where prompts were not read as they stand."""
        if self._cut:
            log.warning("lm_eval: %d of %d requests are longer than the context; their first tokens are left out",
                        self._cut, self._asked)  # fmt: skip
        if self._merged:
            log.info("lm_eval: in %d of %d requests the tokenizer merges prompt and answer", self._merged, self._asked)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """lm-eval's bars and advice would drown ours."""
    logger = logging.getLogger("lm_eval")
    task: Any = lm_eval.api.task
    level, bar = logger.level, task.tqdm
    logger.setLevel(logging.ERROR)
    task.tqdm = functools.partial(bar, disable=True)
    try:
        yield
    finally:
        logger.setLevel(level)
        task.tqdm = bar
