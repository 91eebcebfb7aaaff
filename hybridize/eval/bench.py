"""The bench verb: speed, memory and cache bytes, against another checkpoint in the same run."""

import statistics
from pathlib import Path
from typing import Any

import torch

from hybridize.errors import ConfigError
from hybridize.eval.context import Progress
from hybridize.eval.evaluate import load_for_test
from hybridize.eval.timing import PeakMemory, decode, prefill, race, random_ids
from hybridize.lineage import versions
from hybridize.storage import write_json


def bench(
    checkpoint: Path | str,
    against: Path | str | None = None,
    contexts: tuple[int, ...] | list[int] = (1024, 8192),
    batch: int = 1,
    out: Path | None = None,
    repeats: int = 5,
    new_tokens: int = 16,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure speed and memory; with `against`, both models take turns in every round.

    Args:
        checkpoint: a base or hybrid directory.
        against: the directory to compare with, usually the base; None is no comparison.
        contexts: tokens in the cache when decoding begins; may exceed the trained context.
        batch: sequences at once.
        out: where to write the figures as JSON; None is nowhere.
        repeats: rounds of decoding.
        new_tokens: decode steps in a round.
        progress: called with (label, done, total).

    Returns:
        {"checkpoint", "against", "device", "dtype", "threads", "batch", "versions", "contexts", "crossover_tokens"}.
        `contexts` has for each length, by model ("model", "base"): prefill_tokens_per_s, decode_tokens_per_s (and its
        spread over rounds), time_to_first_token_s, cache_bytes (all sequences), weight_bytes, peak_bytes (weights,
        cache and working memory); with `against` also prefill_speedup, decode_speedup, cache_ratio, peak_ratio.
        `crossover_tokens` is the shortest length from which on decoding is at least as fast as the base's, or None.

    Raises:
        ConfigError: a length, batch or count below 1.
        CheckpointError: a checkpoint that cannot be used.
    """
    if not contexts or min([*contexts, batch, repeats, new_tokens]) < 1:
        raise ConfigError(f"bench: got contexts {list(contexts)}, batch {batch}, repeats {repeats}; expected at least 1 of each")
    paths = {"model": Path(checkpoint)} | ({} if against is None else {"base": Path(against)})
    models = {name: load_for_test(path) for name, path in paths.items()}
    rows = {}
    for tokens in sorted(contexts):
        times = race(models, tokens, batch, new_tokens, repeats, prefills=2, progress=progress)
        rows[str(tokens)] = {name: _figures(models[name], times[name], tokens, batch) for name in models}
        if against is not None:
            rows[str(tokens)] |= _ratios(times, rows[str(tokens)])
    model = models["model"]
    result = {
        "checkpoint": str(checkpoint),
        "against": None if against is None else str(against),
        "device": torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else "cpu",
        "dtype": str(model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "batch": batch,
        "contexts": rows,
        "crossover_tokens": None if against is None else _crossover(rows),
        "versions": versions(),
    }
    if out is not None:
        write_json(Path(out), result)
    return result


def _figures(model: Any, times: dict[str, Any], tokens: int, batch: int) -> dict[str, Any]:
    weights = sum(tensor.numel() * tensor.element_size() for tensor in model.parameters())
    with PeakMemory(model.device) as peak:
        cache, _ = prefill(model, random_ids(model, batch, tokens, 0))
        decode(model, cache, batch, 2)
    steps = [batch / seconds for seconds in times["decode_s"]]
    first = statistics.median(times["prefill_s"])
    return {
        "prefill_tokens_per_s": batch * tokens / first,
        "decode_tokens_per_s": statistics.median(steps),
        "decode_tokens_per_s_spread": [min(steps), max(steps)],
        # The prompt's last chunk gives the first token's logits.
        "time_to_first_token_s": first,
        "cache_bytes": times["cache_bytes"],
        "weight_bytes": weights,
        "peak_bytes": weights + peak.bytes,
    }


def _ratios(times: dict[str, dict[str, Any]], row: dict[str, Any]) -> dict[str, float]:
    ratios = {
        f"{what}_speedup": statistics.median(
            base / own for base, own in zip(times["base"][f"{what}_s"], times["model"][f"{what}_s"], strict=True)
        )
        for what in ("prefill", "decode")
    }
    return ratios | {f"{what}_ratio": row["model"][f"{what}_bytes"] / row["base"][f"{what}_bytes"] for what in ("cache", "peak")}


def _crossover(rows: dict[str, dict[str, Any]]) -> int | None:
    found = None
    for tokens in sorted((int(length) for length in rows), reverse=True):
        if rows[str(tokens)]["decode_speedup"] < 1:
            break
        found = tokens
    return found
