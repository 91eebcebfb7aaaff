r"""Perplexity, KL to the base and recall after training: each way to distil, on real models, at equal numbers of tokens.

Layers are spread evenly over the depth; all but one keeps the last. Every way trains the same hybrid (calibrated seed), but for
`zebra`, whose seed is the published one too, and `base, ce`: the base itself on the same text, since a small base that never saw
this text gains from it. The recipe `hybrid` trains as `align+kl+hidden`. `elsewhere` is perplexity on another kind of text.
Cells that the file of --json holds are not run again.

    python bench/quality.py demo --json quality.json
    python bench/quality.py DIR --data train.txt --held-out dev.txt --budgets 4e6 --ways 'kl;align+kl+hidden' --json quality.json
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

# kernels.py lies beside this script and would pass for Hugging Face's package of that name, which transformers asks for.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from transformers.utils import logging  # noqa: E402

from bench.seeds import spread  # noqa: E402
from hybridize.checkpoint import open_base  # noqa: E402
from hybridize.conversions import convert, plan  # noqa: E402
from hybridize.demo.stdlib_text import write_demo_text  # noqa: E402
from hybridize.distill import distill  # noqa: E402
from hybridize.errors import ConfigError  # noqa: E402
from hybridize.eval import evaluate  # noqa: E402
from hybridize.hub import DEMO, resolve_base  # noqa: E402
from hybridize.pipeline import calibration_rows, load_tokenizer, split_text  # noqa: E402
from hybridize.recipe import parse_recipe  # noqa: E402
from hybridize.storage import write_json  # noqa: E402

MIXED, HIDDEN = {"name": "mixer_output"}, {"name": "hidden_state"}
PUBLISHED = {"norm": "full_l2", "relative": False}
ILD = [MIXED | PUBLISHED, HIDDEN | PUBLISHED]
KL, CE, FEATURES = {"name": "kl"}, {"name": "cross_entropy"}, {"name": "features"}
# Share of the tokens for align, its losses, those of the stage from end to end, and whether mixers have a rate of their own.
WAYS: dict[str, tuple[float, list[dict[str, Any]], list[dict[str, Any]], bool]] = {
    "ce": (0.0, [], [CE], True),
    "kl": (0.0, [], [KL], True),
    "align+kl": (0.125, [MIXED], [KL], True),
    "align+kl+hidden": (0.125, [MIXED], [KL, FEATURES], True),
    "zebra": (0.2, ILD, [KL], False),
    "zebra, batchmean": (0.2, ILD, [KL | {"reduction": "published_batchmean"}], False),
    "align of both+kl": (0.125, [MIXED, HIDDEN], [KL], True),
    "align of both+kl+hidden": (0.125, [MIXED, HIDDEN], [KL, FEATURES], True),
    "base, ce": (0.0, [], [CE], False),
}
# Twice the published rates of Zebra-Llama were too low by far for models of a million weights; all ways share these.
ALIGN_LR, LR, MIXER_LR = 2e-3, 5e-4, 2e-3


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help="directory of a base checkpoint, or 'demo'")
    parser.add_argument("--data", help="text to train on; the standard library's for 'demo'")
    parser.add_argument("--held-out", help="text to measure on")
    parser.add_argument("--elsewhere", help="text of another kind to measure on")
    parser.add_argument("--budgets", default="1e6,4e6", help="tokens, with commas between")
    parser.add_argument("--shares", default="none,half,all-but-one", help="layers to convert; none is for 'base, ce'")
    parser.add_argument("--ways", default=";".join(WAYS), help="of those in WAYS, with semicolons between")
    parser.add_argument("--mixer", default="mamba2")
    parser.add_argument("--json", type=Path, required=True, help="figures, kept from run to run")
    return parser.parse_args()


def stages(way: str, tokens: int, seq: int, rows: int) -> list[dict[str, Any]]:
    """The stages of one way; together they see `tokens` tokens."""
    share, aligned, end, apart = WAYS[way]
    common = {"seq_tokens": seq, "rows": rows}
    built = [{"name": "kl", "tokens": int(tokens * (1 - share)), "lr": LR, "losses": end, **common}]
    if apart:
        built[0]["lr_groups"] = {"*.self_attn.*": MIXER_LR}
    if share:
        built.insert(0, {"name": "align", "tokens": int(tokens * share), "lr": ALIGN_LR, "losses": aligned, **common})
    return built


def measure(folder: Path, base: Path, text: Any, elsewhere: Any, context: int) -> dict[str, float]:
    """Perplexities, KL to the base and recall; a tokenizer that cannot spell the facts, or a short context, leaves recall out."""
    perplexity = {"name": "perplexity", "tokens": 49_152, "context": context}
    kl = {"name": "kl_to_base", "tokens": 16_384, "context": context}
    found = dict(evaluate(folder, [perplexity, kl], text, base=base).metrics)
    if elsewhere is not None:
        found["elsewhere"] = evaluate(folder, [perplexity | {"tokens": 16_384}], elsewhere).metrics["perplexity"]
    for pairs in (4, 16):
        try:
            found |= evaluate(folder, [{"name": "recall", "pairs": [pairs]}], text).metrics
        except ConfigError as error:
            print(f"recall@{pairs} left out: {error}", flush=True)
    return {name: metric.value for name, metric in found.items()}


def main() -> None:
    options = arguments()
    logging.disable_progress_bar()
    found: dict[str, dict[str, float]] = json.loads(options.json.read_text()) if options.json.exists() else {}
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        folder = resolve_base(options.base)
        name = Path(folder).name if options.base != DEMO else DEMO
        texts = write_demo_text(work / "text") if options.base == DEMO else (options.data, options.held_out)
        base = open_base(folder)
        train, test = split_text(load_tokenizer(folder), str(texts[0]), str(texts[1]), 0.1)
        count, context = base.config.num_hidden_layers, min(512, base.config.max_position_embeddings)
        rows = calibration_rows(train, parse_recipe({"name": "quality", "plan": {}}, "quality"), base.config)
        measured = (folder, test, options.elsewhere, context)
        if name not in found:
            found[name] = measure(folder, *measured)
            write_json(options.json, found)
        kinds = {"half": spread(count, 0.5), "all-but-one": list(range(count - 1)), "none": []}
        for budget in (int(float(number)) for number in options.budgets.split(",")):
            for kind in options.shares.split(","):
                for way in options.ways.split(";"):
                    if (way == "base, ce") != (kind == "none"):
                        continue
                    key = f"{name} | {kind} | {budget} | {way}"
                    if key in found:
                        continue
                    method = "mamba_in_llama" if way.startswith("zebra") else "calibrated"
                    start = work / f"{kind}-{method}"
                    if not start.exists():
                        keep = sorted(set(range(count)) - set(kinds[kind]))
                        mixer = {"name": options.mixer, "method": method}
                        convert(plan(base, {"keep": {"layers": keep}, "mixer": mixer}, "quality", 0), start, rows)
                    out = work / str(len(found))
                    began = time.perf_counter()
                    distill(start, stages(way, budget, context, 4096 // context), train, out)
                    found[key] = {"seconds": time.perf_counter() - began, **measure(out, *measured)}
                    write_json(options.json, found)
                    ratio = found[key]["perplexity"] / found[name]["perplexity"]
                    print(f"{key}: {ratio:.4f}x  {json.dumps(found[key])}", flush=True)


if __name__ == "__main__":
    main()
