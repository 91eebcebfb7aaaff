"""Decode speed of a hybrid against its full-attention base, both with random weights, turn by turn in one run.

Weights and cache contents do not change the time of a step, only their shapes do: caches are filled with random numbers
instead of by a prefill. By default a model that two CPU cores can hold; give --hidden 2048 --layers 16 --heads 32
--kv-heads 8 --vocab 128256 for the shape of a 1B.

    python bench/decode.py --json decode.json
"""

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

# kernels.py lies beside this script and would pass for Hugging Face's package of that name, which transformers asks for.
sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch  # noqa: E402
from transformers import LlamaConfig  # noqa: E402

from hybridize.cache import cache_bytes  # noqa: E402
from hybridize.eval.filled import filled_cache  # noqa: E402
from hybridize.eval.shapes import random_model  # noqa: E402
from hybridize.eval.table import human_bytes  # noqa: E402
from hybridize.eval.timing import anonymous_bytes, decode  # noqa: E402
from hybridize.storage import write_json  # noqa: E402


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--contexts", default="1024,8192,32768", help="tokens in the cache, with commas between")
    parser.add_argument("--mixer", default="mamba2", help="in place of attention, with its defaults")
    parser.add_argument("--keep-every", type=int, default=4, help="every such layer stays attention")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7, help="rounds; base and hybrid take turns in each")
    parser.add_argument("--new-tokens", type=int, default=4, help="steps in a round")
    return parser.parse_args()


def models(options: argparse.Namespace) -> dict[str, Any]:
    """The base and the hybrid, in bf16 on a GPU and in fp32 on a CPU."""
    config = LlamaConfig(
        vocab_size=options.vocab, hidden_size=options.hidden, intermediate_size=options.hidden * 7 // 2,
        num_hidden_layers=options.layers, num_attention_heads=options.heads, num_key_value_heads=options.kv_heads,
        max_position_embeddings=131072, tie_word_embeddings=True,
    )  # fmt: skip
    config.dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    kept, other = {"name": "attention"}, {"name": options.mixer}
    mixers = [kept if (i + 1) % options.keep_every == 0 else other for i in range(options.layers)]
    return {"base": random_model(config, config.dtype), "hybrid": random_model(config, config.dtype, mixers)}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """{"ratio": {context: speed-up}, "rows": [...], "peak_rss_bytes": ...}; ratios are medians over rounds."""
    pair = models(options)
    ratio, rows, peak = {}, [], 0
    print(f"{'context':>8} {'base ms':>9} {'hybrid ms':>10} {'speed-up':>9} {'base cache':>12} {'hybrid cache':>13}")
    for tokens in (int(word) for word in options.contexts.split(",")):
        caches = {name: filled_cache(model, tokens, options.batch) for name, model in pair.items()}
        held = {name: cache_bytes(cache) for name, cache in caches.items()}
        seconds: dict[str, list[float]] = {name: [] for name in pair}
        for round_ in range(options.repeats + 1):
            for name, model in pair.items():
                taken = decode(model, caches[name], options.batch, options.new_tokens)
                # The first round warms up.
                if round_ > 0:
                    seconds[name].append(taken)
            peak = max(peak, anonymous_bytes())
        speedup = statistics.median(b / h for b, h in zip(seconds["base"], seconds["hybrid"], strict=True))
        median = {name: statistics.median(values) for name, values in seconds.items()}
        ratio[str(tokens)] = speedup
        rows.append({"context": tokens, "decode_s": median, "speedup": speedup, "cache_bytes": held})
        print(
            f"{tokens:>8} {median['base'] * 1e3:>9.1f} {median['hybrid'] * 1e3:>10.1f} {speedup:>8.2f}x "
            f"{human_bytes(held['base']):>12} {human_bytes(held['hybrid']):>13}",
            flush=True,
        )
    return {"ratio": ratio, "rows": rows, "peak_rss_bytes": peak}


def main() -> None:
    options = arguments()
    result = measure(options)
    settings = {key: value for key, value in vars(options).items() if key != "json"}
    if options.json is not None:
        write_json(options.json, result | {"settings": settings, "threads": torch.get_num_threads()})


if __name__ == "__main__":
    main()
