"""Time and memory of a conversion against copying the same files, on a synthetic checkpoint of Llama-3-8B's shape.

Both are cold (the page cache of the source is dropped), both end on the disk (cp is followed by sync, convert fsyncs and
writes its manifest), and they take turns in one run. The conversion runs in a child process, whose peak memory is VmHWM.

`--recipe NAME` takes the recipe's mixer. One that is seeded on text is measured without the model's forward over that text:
two layers of the shape are read, seeded on activations drawn at random and written, in one process on one core, and their
mean stands for 32 layers on two (`scaled` in the JSON). `cpu_seconds` is the same of processor time, for a busy machine.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# kernels.py lies beside this script and would pass for Hugging Face's package of that name, which transformers asks for.
sys.path[0] = str(Path(__file__).resolve().parents[1])

SHAPE = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "hidden_size": 4096,
    "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256,
    "max_position_embeddings": 8192, "rms_norm_eps": 1e-05, "rope_theta": 500000.0, "hidden_act": "silu",
    "tie_word_embeddings": False,
}  # fmt: skip
# The real vocabulary alone would fill 2 GB and leave no layer to convert.
VOCABULARY = 32768


def make_base(path: Path, gib: float) -> int:
    """Write the base: random bf16 of an 8B's layers, as many pairs of them as come nearest to `gib`. Returns its bytes."""
    import torch

    from hybridize.checkpoint import group_of, skeleton
    from hybridize.shards import Planned, index_of, plan_shards, tensor_bytes, write_shard
    from hybridize.storage import write_json
    from hybridize.untrusted import build_config

    data = Path(os.environ.get("HYBRIDIZE_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
    real = data / "configs" / "llama-3-8b" / "config.json"
    fields = json.loads(real.read_text()) if real.is_file() else dict(SHAPE)
    fields["vocab_size"] = VOCABULARY
    fields["bos_token_id"] = fields["eos_token_id"] = 0
    hidden, kv = fields["hidden_size"], fields["num_key_value_heads"] * fields["head_dim"]
    layer = 2 * hidden * (2 * hidden + 2 * kv + 3 * fields["intermediate_size"])
    pairs = (gib * 2**30 - 4 * VOCABULARY * hidden) / (2 * layer)
    fields["num_hidden_layers"] = 2 * max(1, round(pairs))
    path.mkdir()
    write_json(path / "config.json", fields)
    shapes = skeleton(build_config(fields, "config.json"))
    shards = plan_shards([Planned(name=name, dtype=torch.bfloat16, shape=s, group=group_of(name)) for name, s in shapes.items()])
    generator = torch.Generator().manual_seed(0)
    noise = tensor_bytes((torch.randn(4 << 20, generator=generator) * 0.02).to(torch.bfloat16))

    def pieces(tensor: Planned) -> Iterator[memoryview]:
        for start in range(0, tensor.nbytes, len(noise)):
            yield noise[: min(len(noise), tensor.nbytes - start)]

    for shard in shards:
        write_shard(path, shard, pieces)
    if len(shards) > 1:
        write_json(path / "model.safetensors.index.json", index_of(shards))
    return sum(shard.nbytes for shard in shards)


def child(base: str, out: str, mixer: str) -> None:
    """One conversion; prints seconds and peak resident bytes as JSON."""
    from hybridize.checkpoint import open_base
    from hybridize.conversions import convert, plan

    start = time.perf_counter()
    section = {"keep": {"every": 2}, "mixer": json.loads(mixer)}
    convert(plan(open_base(base), section, "bench", 0), out)
    seconds = time.perf_counter() - start
    json.dump({"seconds": seconds, "peak_rss_bytes": peak_bytes()}, sys.stdout)


def seed_child(base: str, out: str, mixer: str) -> None:
    """Every layer of the base, read, seeded on random activations, written; prints seconds of each and peak bytes."""
    import torch
    from safetensors.torch import save

    from hybridize.checkpoint import open_base
    from hybridize.conversions import plan
    from hybridize.conversions.job import Job
    from hybridize.conversions.layer import LayerCalibration, convert_layer, layer_generator
    from hybridize.conversions.plan import build_mixer
    from hybridize.families import family_of
    from hybridize.mixers import MIXERS
    from hybridize.recipe import parse_recipe
    from hybridize.storage import write_bytes

    opened = open_base(base)
    job = Job(plan(opened, {"keep": {"layers": []}, "mixer": json.loads(mixer)}, "bench", 0), opened)
    data = parse_recipe({"name": "bench", "plan": {}}, "bench").data
    tokens, config = data.calibration_seq_tokens, opened.config
    count = data.calibration_tokens // tokens
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(count, tokens, config.hidden_size, generator=generator)
    angles = family_of(config).rotary(config)(inputs[:1], torch.arange(tokens)[None])
    # What is measured does not depend on the values; one tensor stands for all three to leave memory to the seeding.
    measured = LayerCalibration(inputs=inputs, context=inputs, target=inputs, angles=angles)
    seconds, processor = [], []
    Path(out).mkdir()
    for index, conversion in enumerate(job.conversions):
        start, busy = time.perf_counter(), time.process_time()
        module = build_mixer(MIXERS.build(job.plan.layers[index].mixer), config, index)
        made = convert_layer(
            conversion, job.source(index), module, config, layer_generator(0, index), measured, f"layer {index}"
        )  # fmt: skip
        write_bytes(Path(out) / f"{index}.safetensors", save(made))
        seconds.append(time.perf_counter() - start)
        processor.append(time.process_time() - busy)
    json.dump({"layer_seconds": seconds, "layer_cpu_seconds": processor, "peak_rss_bytes": peak_bytes()}, sys.stdout)


def peak_bytes() -> int:
    """VmHWM of this process."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))


def seeding(mixer: str, folder: Path | None) -> dict[str, Any]:
    """Figures of a seeding on text; see the module docstring."""
    with tempfile.TemporaryDirectory(dir=folder) as name:
        base, out = Path(name) / "base", Path(name) / "out"
        size = make_base(base, 1.0)
        make_cold(base)
        command = [sys.executable, __file__, "--seed-child", str(base), str(out), mixer]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        run = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment)
        figures = json.loads(run.stdout)
    each, busy = (statistics.mean(figures[name]) for name in ("layer_seconds", "layer_cpu_seconds"))
    return {
        "bytes": size, "seconds": each * 32 / 2, "cpu_seconds": busy * 32 / 2,
        "scaled": f"{len(figures['layer_seconds'])} layers on one core to 32 on two",
        **figures,
    }  # fmt: skip


def make_cold(folder: Path) -> None:
    """Everything written, then nothing of `folder` in the page cache."""
    os.sync()
    for path in folder.iterdir():
        handle = os.open(path, os.O_RDONLY)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--gb", type=float, default=2.0, help="size of the base in GiB, to the nearest pair of layers")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to work; a disk, not a tmpfs (default: the temporary folder)")
    parser.add_argument("--mixer", default='{"name": "mamba2", "method": "mimetic"}', help="JSON of the mixer")
    parser.add_argument("--recipe", help="take this recipe's mixer")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--seed-child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(*options.child)
        return
    if options.seed_child:
        seed_child(*options.seed_child)
        return
    if options.recipe:
        from hybridize.conversions.plan import split_options
        from hybridize.recipe import load_recipe

        options.mixer = json.dumps(load_recipe(options.recipe).plan["mixer"])
        if split_options(json.loads(options.mixer), "mixer")[1].calibrated:
            figures = seeding(options.mixer, options.folder)
            print(
                f"seeding without the model's forward: {statistics.mean(figures['layer_seconds']):.1f} s a layer on one core, "
                f"{figures['seconds']:.0f} s "
                f"({figures['cpu_seconds']:.0f} s of processor time) scaled from {figures['scaled']}, "
                f"peak RSS {figures['peak_rss_bytes'] / 1e6:.0f} MB"
            )
            if options.json:
                options.json.write_text(json.dumps(figures, indent=2) + "\n")
            return
    ours, copies, peaks = [], [], []
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        work = Path(name)
        base, out, copy = work / "base", work / "out", work / "copy"
        size = make_base(base, options.gb)
        for turn in range(options.rounds):
            make_cold(base)
            start = time.perf_counter()
            subprocess.run(["cp", "-r", base, copy], check=True)
            subprocess.run(["sync", *copy.iterdir()], check=True)
            copies.append(time.perf_counter() - start)
            shutil.rmtree(copy)
            make_cold(base)
            command = [sys.executable, __file__, "--child", str(base), str(out), options.mixer]
            result = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
            ours.append(result["seconds"])
            peaks.append(result["peak_rss_bytes"])
            shutil.rmtree(out)
            print(f"round {turn + 1}: cp + sync {copies[-1]:.2f} s, convert {ours[-1]:.2f} s, peak {peaks[-1] / 1e6:.0f} MB")
    figures = {
        "bytes": size, "seconds": statistics.median(ours), "cp_seconds": statistics.median(copies),
        "ratio": statistics.median(ours) / statistics.median(copies), "peak_rss_bytes": max(peaks),
    }  # fmt: skip
    print(
        f"{size / 1e9:.2f} GB, medians of {options.rounds}: cp + sync {figures['cp_seconds']:.2f} s, "
        f"convert {figures['seconds']:.2f} s, ratio {figures['ratio']:.2f}, peak RSS {figures['peak_rss_bytes'] / 1e6:.0f} MB"
    )
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
