"""Prefill and decode speed of several models in one run, turn by turn, so that a busy machine slows them alike."""

import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import torch
from transformers.cache_utils import Cache, DynamicCache

from hybridize.cache import cache_bytes
from hybridize.eval.context import Progress
from hybridize.eval.filled import filled_cache

CHUNK_TOKENS = 512
Fill = Literal["prefill", "random"]


def random_ids(model: Any, batch: int, tokens: int, seed: int) -> torch.Tensor:
    """[batch, tokens] token ids; which ones does not matter for speed."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, model.config.vocab_size, (batch, tokens), generator=generator)
    return ids.to(model.device)


def _now(model: Any) -> float:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()


@torch.no_grad()
def prefill(model: Any, ids: torch.Tensor, cache: Cache | None = None) -> tuple[Cache, float]:
    """Add `ids` [B, T] to a cache, None for a new one, 512 tokens at a time; return it and the seconds it took.

    Chunks bound the memory of a long prompt, and only the last token's logits are made.
    """
    if cache is None:
        cache = DynamicCache(config=model.config)
    start = _now(model)
    for chunk in ids.split(CHUNK_TOKENS, dim=1):
        model(input_ids=chunk, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache, _now(model) - start


def prompted(model: Any, batch: int, tokens: int, seed: int, fill: Fill) -> tuple[Cache, float, int]:
    """A cache of `tokens` tokens, the seconds that a prompt took, and its tokens in each sequence.

    Args:
        model: a causal LM of transformers.
        batch: sequences at once.
        tokens: in the cache at the end.
        seed: of the prompt.
        fill: "prefill" reads the whole prompt; "random" puts random numbers for all but the last 512 tokens into the
            cache and reads those alone, since a step's time follows from shapes.
    """
    if fill == "prefill":
        return *prefill(model, random_ids(model, batch, tokens, seed)), tokens
    chunk = min(CHUNK_TOKENS, tokens)
    ids = random_ids(model, batch, chunk, seed)
    if tokens == chunk:
        return *prefill(model, ids), tokens
    return *prefill(model, ids, filled_cache(model, tokens - chunk, batch)), chunk


@torch.no_grad()
def decode(model: Any, cache: Cache, batch: int, new_tokens: int) -> float:
    """Seconds per step of `new_tokens` greedy steps after what the cache holds; the cache grows by as many tokens."""
    token = torch.zeros(batch, 1, dtype=torch.long, device=model.device)
    start = _now(model)
    for _ in range(new_tokens):
        logits = model(input_ids=token, past_key_values=cache, use_cache=True).logits
        token = logits[:, -1:].argmax(-1)
    return (_now(model) - start) / new_tokens


def race(
    models: dict[str, Any],
    tokens: int,
    batch: int = 1,
    new_tokens: int = 16,
    repeats: int = 5,
    prefills: int = 2,
    progress: Progress | None = None,
    fill: Fill = "prefill",
) -> dict[str, dict[str, Any]]:
    """Time all models at one context length, one after another in every round.

    Args:
        models: by name.
        tokens: context length.
        batch: sequences at once.
        new_tokens: decode steps in a round.
        repeats: rounds of decoding.
        prefills: rounds of prefilling.
        progress: called with (label, done, total) rounds.
        fill: as in `prompted`.

    Returns:
        By name: `prefill_s` and `decode_s` (seconds per prompt batch and per step, a list with one entry a round),
        `prompt_tokens` (of each sequence, that a prefill reads) and `cache_bytes` (of the real cache after it, all
        sequences).
    """
    out: dict[str, dict[str, Any]] = {name: {"prefill_s": [], "decode_s": []} for name in models}
    caches: dict[str, Cache] = {}
    for model in models.values():
        warm, _ = prefill(model, random_ids(model, batch, min(tokens, 64), 0))
        decode(model, warm, batch, 2)
    for round_ in range(prefills):
        for name, model in models.items():
            caches.pop(name, None)
            caches[name], seconds, read = prompted(model, batch, tokens, round_, fill)
            out[name]["prefill_s"].append(seconds)
            out[name]["prompt_tokens"] = read
        if progress is not None:
            progress(f"prefill {tokens}", round_ + 1, prefills)
    for name, cache in caches.items():
        out[name]["cache_bytes"] = cache_bytes(cache)
    for round_ in range(repeats):
        for name, model in models.items():
            out[name]["decode_s"].append(decode(model, caches[name], batch, new_tokens))
        if progress is not None:
            progress(f"decode {tokens}", round_ + 1, repeats)
    return out


def anonymous_bytes() -> int:
    """Memory of this process that is not backed by a file, in bytes (Linux: RssAnon)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no RssAnon, expected Linux 4.5 or later")


class PeakMemory:
    """How far memory rose above its level at the start of a `with` block, in bytes, in `.bytes` after it.

    On CUDA by torch's own counter; on the CPU by reading the process's anonymous memory every 2 ms.
    """

    def __init__(self, device: torch.device):
        self.device, self.bytes = device, 0

    def __enter__(self) -> "PeakMemory":
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self.level = torch.cuda.memory_allocated(self.device)
        else:
            self.level, self.stop = anonymous_bytes(), threading.Event()
            self.watcher = threading.Thread(target=self._watch, daemon=True)
            self.watcher.start()
        return self

    def _watch(self) -> None:
        while not self.stop.wait(0.002):
            self.bytes = max(self.bytes, anonymous_bytes() - self.level)

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self.device) - self.level
        else:
            self.stop.set()
            self.watcher.join()
            self.bytes = max(self.bytes, anonymous_bytes() - self.level)
