"""The bench verb: speed, memory and cache bytes, against another model in the same run."""

import statistics
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hybridize.errors import ConfigError
from hybridize.eval.context import Progress
from hybridize.eval.evaluate import load_for_test
from hybridize.eval.shapes import random_model
from hybridize.eval.timing import Fill, PeakMemory, decode, prompted, race
from hybridize.lineage import versions
from hybridize.modeling import state_bytes
from hybridize.storage import write_json

# Beyond this no one decodes, and the search for a break-even length ends.
LONGEST_TOKENS = 1 << 24


def bench(
    checkpoint: Path | str,
    against: Path | str | None = None,
    contexts: tuple[int, ...] | list[int] = (1024, 8192),
    batches: tuple[int, ...] | list[int] = (1,),
    out: Path | None = None,
    repeats: int = 5,
    new_tokens: int = 16,
    dtype: torch.dtype | None = None,
    fill: Fill = "prefill",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure speed and memory; with `against`, both models take turns in every round.

    Args:
        checkpoint: a base or hybrid directory.
        against: the directory to compare with, usually the base; None is no comparison.
        contexts: tokens in the cache when decoding begins; may exceed the trained context.
        batches: sequences at once; every context is measured with each.
        out: where to write the figures as JSON; None is nowhere.
        repeats: rounds of decoding.
        new_tokens: decode steps in a round.
        dtype: of the weights; None is the checkpoint's own on a GPU and fp32 on a CPU.
        fill: "prefill" reads whole prompts; "random" fills caches with random numbers and reads the last 512 tokens alone.
        progress: called with (label, done, total).

    Returns:
        {"checkpoint", "against", "device", "dtype", "threads", "fill", "versions", "rows", "crossover", "break_even"}.
        `rows` has one entry for each batch and context: "batch", "context" and by model ("model", "base"):
        prefill_tokens_per_s (all sequences; with "random" of the last 512 tokens, at that depth), decode_tokens_per_s,
        the spread of each over rounds, time_to_first_token_s (of a whole prompt; None with "random"), cache_bytes (all
        sequences), weight_bytes, peak_bytes (weights, cache and working memory); with `against` also prefill_speedup,
        decode_speedup, cache_ratio, peak_ratio.
        `crossover`: for each batch (as text) the shortest measured context from which on decoding is at least as fast as
        the base's, "measured_tokens", and where lines through the times of a step meet, "fitted_tokens"; None is nowhere.
        `break_even`: the shortest context at which the cache is no larger than the base's, "tokens" (None: never), and its
        "bytes" in one sequence, by formula; and for both models the context at which one sequence's cache is as large as
        the weights, "weights_tokens" (None: never).

    Raises:
        ConfigError: a length, batch or count below 1.
        CheckpointError: a checkpoint that cannot be used.
    """
    _check(contexts, batches, repeats, new_tokens)
    paths = {"model": Path(checkpoint)} | ({} if against is None else {"base": Path(against)})
    models = {name: load_for_test(path, dtype) for name, path in paths.items()}
    names = {"checkpoint": str(checkpoint), "against": None if against is None else str(against)}
    return _bench(models, names, contexts, batches, out, repeats, new_tokens, fill, progress)


def bench_shape(
    config: Any,
    mixers: list[dict[str, Any]] | None = None,
    name: str = "",
    contexts: tuple[int, ...] | list[int] = (1024, 8192),
    batches: tuple[int, ...] | list[int] = (1,),
    out: Path | None = None,
    repeats: int = 5,
    new_tokens: int = 16,
    dtype: torch.dtype | None = None,
    fill: Fill = "random",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """As `bench`, on random weights of a config: speed and memory follow from shapes.

    Args:
        config: of a base.
        mixers: one {"name": ..., **options} a layer: a hybrid of that base, measured against it. None is the base alone.
        name: for the record.
        contexts: as for `bench`, and so are the others.
        batches: as for `bench`.
        out: as for `bench`.
        repeats: as for `bench`.
        new_tokens: as for `bench`.
        dtype: of the weights; None is what the config says.
        fill: as for `bench`.
        progress: as for `bench`.
    """
    _check(contexts, batches, repeats, new_tokens)
    base = random_model(config, dtype or config.dtype)
    models = {"model": base} if mixers is None else {"model": random_model(config, dtype or config.dtype, mixers), "base": base}
    names = {"checkpoint": f"random weights, {name}", "against": None if mixers is None else f"random weights, {name}"}
    return _bench(models, names, contexts, batches, out, repeats, new_tokens, fill, progress)


def _check(contexts: Any, batches: Any, repeats: int, new_tokens: int) -> None:
    if not contexts or not batches or min([*contexts, *batches, repeats, new_tokens]) < 1:
        raise ConfigError(
            f"bench: got contexts {list(contexts)}, batches {list(batches)}, repeats {repeats}, new tokens {new_tokens}; "
            "expected at least 1 of each"
        )


def _bench(
    models: dict[str, Any], names: dict[str, Any], contexts: Any, batches: Any, out: Path | None, repeats: int,
    new_tokens: int, fill: Fill, progress: Progress | None,
) -> dict[str, Any]:  # fmt: skip
    rows = []
    for batch in sorted(set(batches)):
        for tokens in sorted(set(contexts)):
            times = race(models, tokens, batch, new_tokens, repeats, 2, progress, fill)
            row = {"batch": batch, "context": tokens}
            row |= {name: _figures(models[name], times[name], tokens, batch, fill) for name in models}
            rows.append(row | (_ratios(times, row) if "base" in models else {}))
    model = models["model"]
    result = names | {
        "device": torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else "cpu",
        "dtype": str(model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "fill": fill,
        "rows": rows,
        "crossover": None if "base" not in models else _crossovers(rows),
        "break_even": _break_even(models),
        "versions": versions(),
    }
    if out is not None:
        write_json(Path(out), result)
    return result


def _weights(model: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in model.parameters())


def _figures(model: Any, times: dict[str, Any], tokens: int, batch: int, fill: Fill) -> dict[str, Any]:
    with PeakMemory(model.device) as peak:
        cache, _, _ = prompted(model, batch, tokens, 0, fill)
        decode(model, cache, batch, 2)
    steps = [batch / seconds for seconds in times["decode_s"]]
    reads = [batch * times["prompt_tokens"] / seconds for seconds in times["prefill_s"]]
    return {
        "prefill_tokens_per_s": statistics.median(reads),
        "prefill_tokens_per_s_spread": [min(reads), max(reads)],
        "decode_tokens_per_s": statistics.median(steps),
        "decode_tokens_per_s_spread": [min(steps), max(steps)],
        # The prompt's last chunk gives the first token's logits.
        "time_to_first_token_s": statistics.median(times["prefill_s"]) if times["prompt_tokens"] == tokens else None,
        "cache_bytes": times["cache_bytes"],
        "weight_bytes": _weights(model),
        "peak_bytes": _weights(model) + peak.bytes,
    }


def _ratios(times: dict[str, dict[str, Any]], row: dict[str, Any]) -> dict[str, float]:
    ratios = {
        f"{what}_speedup": statistics.median(
            base / own for base, own in zip(times["base"][f"{what}_s"], times["model"][f"{what}_s"], strict=True)
        )
        for what in ("prefill", "decode")
    }
    return ratios | {f"{what}_ratio": row["model"][f"{what}_bytes"] / row["base"][f"{what}_bytes"] for what in ("cache", "peak")}


def _crossovers(rows: list[dict[str, Any]]) -> dict[str, dict[str, int | None]]:
    found = {}
    for batch in sorted({row["batch"] for row in rows}):
        own = [row for row in rows if row["batch"] == batch]
        measured = None
        for row in reversed(own):
            if row["decode_speedup"] < 1:
                break
            measured = row["context"]
        found[str(batch)] = {"measured_tokens": measured, "fitted_tokens": fitted_crossover(own)}
    return found


def fitted_crossover(rows: list[dict[str, Any]]) -> int | None:
    """Where lines through both models' times of a step against the context meet.

    A step reads the weights, and a cache that grows by the token: its time is a + b * context. Relative errors count, as noise
    is a share of a time.

    Args:
        rows: of one batch, as in `bench`.

    Returns:
        Tokens; 0 where the hybrid is ahead from the start; None with fewer than two contexts, or where the hybrid's time
        grows as fast as the base's.
    """
    if len(rows) < 2:
        return None
    contexts = np.array([row["context"] for row in rows], dtype=np.float64)
    lines = {}
    for name in ("model", "base"):
        seconds = np.array([row["batch"] / row[name]["decode_tokens_per_s"] for row in rows])
        slope, start = np.polyfit(contexts, seconds, 1, w=1 / seconds)
        lines[name] = (start, slope)
    behind, gain = lines["model"][0] - lines["base"][0], lines["base"][1] - lines["model"][1]
    return None if gain <= 0 else max(0, round(behind / gain))


def _break_even(models: dict[str, Any]) -> dict[str, Any]:
    def shortest(reached: Any) -> int | None:
        low, high = 0, 1
        while not reached(high):
            low, high = high, 2 * high
            if high > LONGEST_TOKENS:
                return None
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if reached(middle) else (middle, high)
        return high

    configs = {name: model.config for name, model in models.items()}
    found: dict[str, Any] = {
        "weights_tokens": {
            name: shortest(lambda t, name=name: state_bytes(configs[name], t) >= _weights(models[name])) for name in models
        }
    }
    if "base" in models:
        tokens = shortest(lambda t: state_bytes(configs["model"], t) <= state_bytes(configs["base"], t))
        found |= {"tokens": tokens, "bytes": None if tokens is None else state_bytes(configs["model"], tokens)}
    return found
