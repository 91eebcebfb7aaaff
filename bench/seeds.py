r"""Perplexity before any training: each mixer and seeding in a share of a real model's layers.

Layers are spread evenly over the depth (half of five layers: 1 and 3). Rows of the model's context, at most 256 tokens.

    python bench/seeds.py demo --mixer '{name: mamba2, method: calibrated}' --mixer '{name: mamba2, method: mimetic}'
    python bench/seeds.py DIR --data train.txt --held-out dev.txt --shares 0.5,1 --json seeds.json
    python bench/seeds.py DIR --data train.txt --held-out dev.txt --scores scores.json \
        --mixer '{name: low_rank_kv, rank: {fisher: 0.25}}'
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

# kernels.py lies beside this script and would pass for Hugging Face's package of that name, which transformers asks for.
sys.path[0] = str(Path(__file__).resolve().parents[1])

import yaml  # noqa: E402
from transformers.utils import logging  # noqa: E402

from hybridize.checkpoint import open_base  # noqa: E402
from hybridize.conversions import convert, plan  # noqa: E402
from hybridize.core import Scores  # noqa: E402
from hybridize.demo.stdlib_text import write_demo_text  # noqa: E402
from hybridize.eval import evaluate  # noqa: E402
from hybridize.hub import DEMO, resolve_base  # noqa: E402
from hybridize.pipeline import calibration_rows, load_tokenizer, split_text  # noqa: E402
from hybridize.recipe import parse_recipe  # noqa: E402
from hybridize.storage import write_json  # noqa: E402

MIXERS = [
    "{name: mamba2, method: calibrated}",
    "{name: mamba2, method: calibrated, heads: expanded}",
    "{name: mamba2, method: mimetic}",
    "{name: mamba2, method: mamba_in_llama}",
]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", nargs="+", help="directories of base checkpoints, or 'demo'")
    parser.add_argument("--data", help="text to calibrate on; the standard library's for 'demo'")
    parser.add_argument("--held-out", help="text to measure on")
    parser.add_argument("--mixer", action="append", help="a plan's mixer in YAML; may be given several times")
    parser.add_argument("--shares", default="0.25,0.5,1", help="shares of the layers to convert, with commas between")
    parser.add_argument("--scores", type=Path, help="layer scores of the base, for ranks that follow them")
    parser.add_argument("--tokens", type=int, default=24_576, help="held-out tokens to measure on")
    parser.add_argument("--json", type=Path, help="write the figures here")
    return parser.parse_args()


def spread(count: int, share: float) -> list[int]:
    """Which of `count` layers make up `share` of them, evenly over the depth."""
    wanted = max(1, round(count * share - 1e-9))
    return [int((place + 0.5) * count / wanted) for place in range(wanted)]


def perplexity(folder: Path, text: Any, tokens: int, context: int) -> float:
    probe = {"name": "perplexity", "tokens": tokens, "context": context}
    return evaluate(folder, [probe], text).metrics["perplexity"].value


def measure(name: str, options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """{"base": perplexity, mixer: {layers: perplexity}} of one base."""
    folder = resolve_base(name)
    train, held_out = (str(path) for path in write_demo_text(work / "text")) if name == DEMO else (options.data, options.held_out)
    base = open_base(folder)
    train, test = split_text(load_tokenizer(folder), train, held_out, 0.1)
    context = min(256, base.config.max_position_embeddings)
    rows = calibration_rows(train, parse_recipe({"name": "seeds", "plan": {}}, "seeds"), base.config)
    found: dict[str, Any] = {"base": perplexity(folder, test, options.tokens, context)}
    count = base.config.num_hidden_layers
    choices = list(dict.fromkeys(tuple(spread(count, float(share))) for share in options.shares.split(",")))
    for mixer in options.mixer or MIXERS:
        for layers in choices:
            section = {"keep": {"layers": sorted(set(range(count)) - set(layers))}, "mixer": yaml.safe_load(mixer)}
            out = work / f"{len(list(work.iterdir()))}"
            made = plan(base, section, "seeds", 0, None if options.scores is None else Scores.read(options.scores))
            convert(made, out, rows)
            value = perplexity(out, test, options.tokens, context)
            found.setdefault(mixer, {})[",".join(map(str, layers))] = value
            print(
                f"{name}: {mixer} at layers {layers}: {value:.4g} (base {found['base']:.4g}), KV {made.kv_share:.2%}", flush=True
            )
    return found


def main() -> None:
    options = arguments()
    logging.disable_progress_bar()
    figures = {}
    for name in options.base:
        with tempfile.TemporaryDirectory() as work:
            figures[Path(name).name] = measure(name, options, Path(work))
    for name, found in figures.items():
        print(f"\n| {name}, base {found['base']:.4g} | " + " | ".join(next(v for k, v in found.items() if k != "base")) + " |")
        for mixer, values in found.items():
            if mixer != "base":
                print(f"| {mixer} | " + " | ".join(f"{value:.4g}" for value in values.values()) + " |")
    if options.json:
        write_json(options.json, figures)


if __name__ == "__main__":
    main()
