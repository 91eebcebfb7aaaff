"""The verb that measures speed: bench."""

from pathlib import Path
from typing import Annotated, Any, Literal, Optional

import typer

from hybridize.cli import shared
from hybridize.cli.shared import SetOpt, cli
from hybridize.errors import ConfigError


@cli.command()
def bench(
    checkpoint: Annotated[Optional[Path], typer.Argument(metavar="[DIR]", help="Directory of a checkpoint.")] = None,  # noqa: UP045
    against: Annotated[Optional[str], typer.Option(help="The base to compare with in the same run.")] = None,  # noqa: UP045
    shape: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="In place of DIR: random weights of a shape, such as llama-3.2-1b, or of a config.json's directory."),
    ] = None,
    recipe: Annotated[Optional[str], typer.Option(help="With --shape: its hybrid against the shape itself.")] = None,  # noqa: UP045
    contexts: Annotated[str, typer.Option(help="Tokens in the cache, with commas between.")] = "1024,8192",
    batch: Annotated[str, typer.Option(help="Sequences at once, with commas between.")] = "1",
    repeats: Annotated[int, typer.Option(help="Rounds of decoding.")] = 5,
    dtype: Annotated[
        Optional[Literal["bfloat16", "float16", "float32"]],  # noqa: UP045
        typer.Option(help="Of the weights. Default: their own; float32 for a DIR on a CPU."),
    ] = None,
    fill: Annotated[
        Optional[Literal["prefill", "random"]],  # noqa: UP045
        typer.Option(help="Read whole prompts (default), or fill caches and read 512 tokens (default of --shape)."),
    ] = None,
    out: Annotated[Optional[Path], typer.Option("--out", help="Write the figures as JSON.")] = None,  # noqa: UP045
    set_: SetOpt = [],  # noqa: B006
) -> None:
    """Measure speed, peak memory and cache bytes.

    Prefill and decode; base and hybrid take turns in one run.
    """
    import torch

    from hybridize.checkpoint import describe_base
    from hybridize.conversions import plan
    from hybridize.eval import bench as run_bench
    from hybridize.eval import bench_shape
    from hybridize.hub import resolve_base, shape_of

    if (checkpoint is None) == (shape is None):
        raise ConfigError(f"bench: got {'neither' if shape is None else 'both'} DIR and --shape, expected one of them")
    if (recipe is not None and shape is None) or (against is not None and shape is not None):
        raise ConfigError("bench: --recipe goes with --shape, and --against with DIR")
    if set_ and recipe is None:
        raise ConfigError("--set changes a recipe; give --recipe")
    common: dict[str, Any] = {
        "contexts": _numbers("--contexts", contexts), "batches": _numbers("--batch", batch), "out": out, "repeats": repeats,
        "dtype": None if dtype is None else getattr(torch, dtype), "progress": shared.screen.progress,
    }  # fmt: skip
    if shape is None:
        other = None if against is None else resolve_base(against)
        figures = run_bench(str(resolve_base(str(checkpoint))), other, fill=fill or "prefill", **common)
    else:
        found = describe_base(shape_of(shape))
        mixers = None
        if recipe is not None:
            chosen = shared.load(recipe, set_, found.config)
            mixers = [layer.mixer for layer in plan(found, chosen.plan, chosen.name, chosen.seed).layers]
        name = shape if recipe is None else f"{shape} and {recipe}"
        figures = bench_shape(found.config, mixers, name, fill=fill or "random", **common)
    _show(figures)
    shared.screen.result(figures)


def _numbers(option: str, text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"{option}: got {text!r}, expected numbers such as 1024,8192") from error


def _spread(figures: dict[str, Any], what: str) -> str:
    low, high = figures[f"{what}_tokens_per_s_spread"]
    return f"{figures[f'{what}_tokens_per_s']:,.3g} ({low:,.3g} to {high:,.3g})"


def _show(figures: dict[str, Any]) -> None:
    """Print the rows, then where the hybrid begins to gain."""
    from hybridize.eval.table import human_bytes

    rows = [["batch", "context", "model", "prefill tokens/s", "decode tokens/s", "first token", "cache", "peak"]]
    for row in figures["rows"]:
        place = [str(row["batch"]), f"{row['context']:,}"]
        for name in ("model", "base"):
            if name in row:
                first = row[name]["time_to_first_token_s"]
                rows.append([*place, name, _spread(row[name], "prefill"), _spread(row[name], "decode"),
                             "-" if first is None else f"{first:.3g} s", human_bytes(row[name]["cache_bytes"]),
                             human_bytes(row[name]["peak_bytes"])])  # fmt: skip
        if "base" in row:
            rows.append([*place, "ratio", f"{row['prefill_speedup']:.2f}x", f"{row['decode_speedup']:.2f}x", "",
                         f"{row['cache_ratio']:.3f}", f"{row['peak_ratio']:.2f}"])  # fmt: skip
    shared.screen.table(rows, f"{figures['device']}, {figures['dtype']}, {figures['threads']} threads; medians and spread")
    if figures["fill"] == "random":
        shared.screen.say("caches were filled with random numbers; prefill is of the last 512 tokens, at that depth")
    for name, tokens in figures["break_even"]["weights_tokens"].items():
        if tokens is not None:
            shared.screen.say(f"one sequence's cache of {name} is as large as its weights from {tokens:,} tokens on")
    if figures["crossover"] is None:
        return
    for batch, found in figures["crossover"].items():
        measured = "at no length measured" if found["measured_tokens"] is None else f"from {found['measured_tokens']:,} tokens on"
        fitted = "" if found["fitted_tokens"] is None else f"; lines through the times meet at {found['fitted_tokens']:,}"
        shared.screen.say(f"batch {batch}: decoding is at least as fast as the base's {measured}{fitted}")
    even = figures["break_even"]
    if even["tokens"] is None:
        shared.screen.say("the cache is larger than the base's at every length")
    else:
        shared.screen.say(
            f"the cache is no larger than the base's from {even['tokens']:,} tokens on ({human_bytes(even['bytes'])})"
        )
