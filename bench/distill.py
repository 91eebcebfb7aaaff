"""What a training step costs, against a plain cross-entropy step, dense logits and transformers' Trainer, in one run.

    python bench/distill.py [--json FILE]

Ratios, each of the shortest of several interleaved measurements: `align_over_ce` and `kl_over_ce` are whole steps
(forward, backward, update) of the two stages over a plain cross-entropy step of the same hybrid, half of whose layers are
converted (`..._over_base_ce`: of the base); `fused_<loss>_time` and `..._peak` are each chunked divergence over the dense KL,
forward and backward; `over_trainer` and `kl_over_trainer` are our loop over Trainer, with cross-entropy and with a kl stage on
dense logits.

`align_disk_peak_ratio` is the peak of anonymous memory of a whole distill with `engine: disk`, of a student of 16 layers over
one of 4 (`..._above_start`: less what the process had before it), `align_memory_activations_ratio` the same of what
`engine: memory` has above its lowest point while it trains. `align_disk_over_memory_cpu` is processor time of the two
engines, 4 layers, shortest of two. Each run is a process of its own. `--only engines` measures nothing else.
"""

import argparse
import json
import logging
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from functools import partial
from pathlib import Path

# kernels.py lies beside this script and would pass for Hugging Face's package of that name, which transformers asks for.
sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from accelerate import Accelerator  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments  # noqa: E402

from hybridize.checkpoint import save_checkpoint  # noqa: E402
from hybridize.data import Batch, Tokens, TrainBlocks  # noqa: E402
from hybridize.distill import distill  # noqa: E402
from hybridize.distill.align import Align  # noqa: E402
from hybridize.distill.kl import KLStage  # noqa: E402
from hybridize.distill.loop import Run, train  # noqa: E402
from hybridize.distill.losses import LOSSES  # noqa: E402
from hybridize.distill.run import share_frozen  # noqa: E402
from hybridize.distill.saves import Position, State  # noqa: E402
from hybridize.distill.signals import Head, Signals  # noqa: E402
from hybridize.modeling import build_model, hybrid_config  # noqa: E402
from hybridize.storage import Staging  # noqa: E402

log = logging.getLogger("bench")

LAYERS, SEQ, ROWS, VOCAB = 8, 256, 2, 2048


def config(hidden: int, layers: int = LAYERS, vocab: int = VOCAB) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocab, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers, num_attention_heads=8,
        num_key_value_heads=4, head_dim=hidden // 8, max_position_embeddings=1024, dtype="float32",
    )  # fmt: skip


def pair(hidden: int, mixer: str, converted: list[int], vocab: int = VOCAB) -> tuple:
    teacher = LlamaForCausalLM(config(hidden, vocab=vocab)).eval().requires_grad_(False)
    specs = [{"name": mixer if i in converted else "attention"} for i in range(LAYERS)]
    student = build_model(hybrid_config(teacher.config, specs)).train()
    weights = teacher.state_dict()
    own = student.state_dict()
    same = {name: weights[name] for name in own if name in weights and weights[name].shape == own[name].shape}
    student.load_state_dict({**own, **same})
    return student, teacher


def stage_step(options, student, teacher, ids):
    """A function that takes one whole step of a stage."""
    student.requires_grad_(False)
    trained = options.choose(options.candidates(student), "bench")
    for parameter in trained.values():
        parameter.requires_grad_(True)
    share_frozen(student, teacher)
    micro_step, optimizer = options.start(student, teacher, Batch(ids)), options.optimizer(trained)

    def step() -> None:
        micro_step(Batch(ids), 1.0)
        torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def plain_step(model, ids):
    """A function that takes one training step on the text alone, as anyone would write it."""
    model.train().requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        model(ids, labels=ids, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def shortest(steps: dict, repeats: int) -> dict[str, float]:
    """Seconds of the shortest run of each function; they take turns, so that a busy machine is busy for all."""
    times = {name: [] for name in steps}
    for step in steps.values():
        step()
    for _ in range(repeats):
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - began)
    return {name: min(values) for name, values in times.items()}


def stages(hidden: int, mixer: str, repeats: int) -> dict[str, float]:
    ids = torch.randint(VOCAB, (ROWS, SEQ))
    common = {"tokens": SEQ * ROWS, "seq_tokens": SEQ, "rows": ROWS}
    half = list(range(0, LAYERS, 2))
    both = [{"name": "mixer_output"}, {"name": "hidden_state"}]
    steps = {
        "ce": plain_step(pair(hidden, mixer, half)[0], ids),
        "base_ce": plain_step(LlamaForCausalLM(config(hidden)), ids),
        "align": stage_step(Align(**common), *pair(hidden, mixer, half), ids),
        "align_with_hidden": stage_step(Align(**common, losses=both), *pair(hidden, mixer, half), ids),
        "align_all_layers": stage_step(Align(**common), *pair(hidden, mixer, list(range(LAYERS))), ids),
        "kl": stage_step(KLStage(**common), *pair(hidden, mixer, half), ids),
        "kl_attention_student": stage_step(KLStage(**common), *pair(hidden, mixer, []), ids),
    }
    times = shortest(steps, repeats)
    log.info("seconds a step, %s: %s", mixer, {name: round(value, 4) for name, value in times.items()})
    over = {f"{name}_over_ce": value / times["ce"] for name, value in times.items() if not name.endswith("ce")}
    over |= {f"{name}_over_base_ce": value / times["base_ce"] for name, value in times.items() if not name.endswith("ce")}
    return over


def peak_above(work) -> int:
    """Bytes of resident memory that a function adds at its highest point, its second time (Linux)."""
    work()
    Path("/proc/self/clear_refs").write_text("5")
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    before = int(status["VmRSS"].split()[0])
    work()
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return (int(status["VmHWM"].split()[0]) - before) * 1024


def fused_kl(repeats: int) -> dict[str, float]:
    tokens, hidden, vocab = 2048, 512, 16_384
    teacher, wt = torch.randn(1, tokens, hidden), torch.randn(vocab, hidden) * hidden**-0.5
    student = (teacher + 0.1 * torch.randn_like(teacher)).requires_grad_()
    ws = wt.clone().requires_grad_()

    ids = torch.randint(vocab, (1, tokens))

    def fused(name: str) -> None:
        sides = [Signals(hidden=x, head=Head(weight=w), ids=ids) for x, w in ((student, ws), (teacher, wt))]
        LOSSES.build({"name": name})(*sides, None).backward()
        student.grad = ws.grad = None

    def dense() -> None:
        with torch.no_grad():
            log_p = F.log_softmax(teacher @ wt.T, dim=-1)
        log_q = F.log_softmax(student @ ws.T, dim=-1)
        F.kl_div(log_q.flatten(0, 1), log_p.flatten(0, 1), reduction="batchmean", log_target=True).backward()
        student.grad = ws.grad = None

    runs = {"dense": dense, **{name: partial(fused, name) for name in ("kl", "jsd", "top_k_kl", "sampled_kl")}}
    peaks = {name: peak_above(run) for name, run in runs.items()}
    times = shortest(runs, repeats)
    log.info("KL of %d x %d: seconds %s, extra bytes %s", tokens, vocab, times, peaks)
    times_and_peaks = {"time": times, "peak": peaks}
    return {f"fused_{n}_{what}": own[n] / own["dense"] for what, own in times_and_peaks.items() for n in runs if n != "dense"}


class Rows(torch.utils.data.Dataset):
    def __init__(self, ids):
        self.ids = ids

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


class Distiller(Trainer):
    """The kl stage as anyone would write it: dense logits of both models, the mean over tokens of their divergence."""

    def __init__(self, *args, teacher, **kwargs):
        super().__init__(*args, **kwargs)
        self.teacher = teacher

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        with torch.no_grad():
            log_p = F.log_softmax(self.teacher(inputs["input_ids"], use_cache=False).logits, dim=-1)
        log_q = F.log_softmax(model(inputs["input_ids"], use_cache=False).logits, dim=-1)
        return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1).mean()


def over_trainer(hidden: int, mixer: str, steps: int, repeats: int) -> dict[str, float]:
    """Our loop's time over Trainer's: cross-entropy of the base, and kl of a hybrid with 32,000 words."""
    found = {}
    for loss, vocab in (("cross_entropy", VOCAB), ("kl", 32_000)):
        ids = np.random.default_rng(0).integers(vocab, size=steps * ROWS * SEQ).astype(np.int32)
        options = KLStage(
            tokens=steps * ROWS * SEQ, seq_tokens=SEQ, rows=ROWS, losses=[{"name": loss}], lr=1e-4, save_tokens=1 << 40
        )  # fmt: skip
        blocks = TrainBlocks(Tokens(ids=ids, text_bytes=1, sha256=""), SEQ, ROWS, 0, None)
        rows = torch.cat([blocks.batch(step).ids for step in range(steps)])
        models = partial(pair, hidden, mixer, list(range(0, LAYERS, 2)) if loss == "kl" else [], vocab)
        times: dict[str, list[float]] = {"ours": [], "theirs": []}
        with tempfile.TemporaryDirectory() as folder:
            for _ in range(repeats):
                times["ours"].append(_our_seconds(options, blocks, *models()))
                times["theirs"].append(_their_seconds(loss, rows, Path(folder), *models()))
        log.info("seconds for %d steps of %s: %s", steps, loss, times)
        found["over_trainer" if loss == "cross_entropy" else "kl_over_trainer"] = min(times["ours"]) / min(times["theirs"])
    return found


def _our_seconds(options, blocks, student, teacher) -> float:
    run = Run(accelerator=Accelerator(cpu=not torch.cuda.is_available()), seed=0, scratch=Path(), metrics=None, progress=None)
    trained = dict(student.named_parameters())
    micro_step = options.start(student, teacher, blocks.batch(0))
    start = State(position=Position(stage=0, step=0), weights={}, moments={})
    began = time.perf_counter()
    train(run, 0, "bench", options, micro_step, trained, {}, blocks, start)
    return time.perf_counter() - began


def _their_seconds(loss: str, rows, folder: Path, student, teacher) -> float:
    options = TrainingArguments(
        output_dir=str(folder), max_steps=len(rows) // ROWS, per_device_train_batch_size=ROWS, report_to=[], save_strategy="no",
        logging_steps=1, disable_tqdm=True, use_cpu=not torch.cuda.is_available(), learning_rate=1e-4,
        dataloader_pin_memory=False,
    )  # fmt: skip
    kind = partial(Distiller, teacher=teacher) if loss == "kl" else Trainer
    trainer = kind(model=student, train_dataset=Rows(rows), args=options)
    began = time.perf_counter()
    trainer.train()
    return time.perf_counter() - began


ENGINE_STEPS = 4


def engine_stage(engine: str) -> dict:
    return {"name": "align", "tokens": ENGINE_STEPS * SEQ * ROWS, "seq_tokens": SEQ, "rows": ROWS, "engine": engine}


def engine_child(engine: str, folder: Path) -> None:
    """Run one engine on the pair in `folder` and print what it took; a process of its own."""
    torch.set_num_threads(1)
    ids = np.random.default_rng(0).integers(VOCAB, size=ENGINE_STEPS * ROWS * SEQ + 1).astype(np.int32)
    found = {"peak": 0, "training": 0, "floor": 1 << 62, "steps": 0}
    over = threading.Event()

    def anonymous() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

    def watch() -> None:
        while not over.is_set():
            now = anonymous()
            found["peak"] = max(found["peak"], now)
            if 0 < found["steps"] < ENGINE_STEPS:
                found["training"], found["floor"] = max(found["training"], now), min(found["floor"], now)
            time.sleep(0.002)

    def progress(label: str, done: float, total: float) -> None:
        found["steps"] += 1

    start, began = anonymous(), time.process_time()
    watcher = threading.Thread(target=watch)
    watcher.start()
    distill(
        folder / "student", [engine_stage(engine)], Tokens(ids=ids, text_bytes=1, sha256="random"), folder / f"out-{os.getpid()}",
        teacher=folder / "base", progress=progress,
    )  # fmt: skip
    over.set()
    watcher.join()
    json.dump({**found, "start": start, "cpu": time.process_time() - began}, sys.stdout)


def engines(hidden: int, mixer: str) -> dict[str, float]:
    """Alignment in memory and from disk; see the module docstring."""
    runs: dict[tuple[str, int], list[dict]] = {}
    # Freed blocks go back at once: by itself glibc keeps holes of some MB a layer, for which real models' tensors are too large.
    settings = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
    with tempfile.TemporaryDirectory() as name:
        for layers in (4, 16):
            folder = Path(name) / str(layers)
            torch.manual_seed(0)
            base = LlamaForCausalLM(config(hidden, layers))
            base.save_pretrained(folder / "base")
            student = build_model(hybrid_config(base.config, [{"name": mixer}] * layers))
            with Staging(folder / "student", False, "bench") as staging:
                save_checkpoint(student, folder / "base", staging, {"base": {"location": str(folder / "base")}})
                staging.finish()
            for turn in ("disk", "memory") * (2 if layers == 4 else 1):
                command = [sys.executable, __file__, "--child", turn, str(folder)]
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=settings)
                runs.setdefault((turn, layers), []).append(json.loads(done.stdout))
    log.info("engines: %s", runs)
    disk, whole = ([runs[engine, layers][0] for layers in (4, 16)] for engine in ("disk", "memory"))
    above = [run["peak"] - run["start"] for run in disk]
    activations = [run["training"] - run["floor"] for run in whole]
    cpu = {engine: min(run["cpu"] for run in runs[engine, 4]) for engine in ("disk", "memory")}
    return {
        "align_disk_peak_ratio": disk[1]["peak"] / disk[0]["peak"], "align_disk_peak_above_start_ratio": above[1] / above[0],
        "align_memory_peak_ratio": whole[1]["peak"] / whole[0]["peak"],
        "align_memory_activations_ratio": activations[1] / activations[0],
        "align_disk_over_memory_cpu": cpu["disk"] / cpu["memory"],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--mixer", default="mamba2")
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", choices=["engines"], help="measure this alone")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        engine_child(args.child[0], Path(args.child[1]))
        return
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    ratio = engines(args.hidden, args.mixer)
    if args.only is None:
        ratio |= {**fused_kl(args.repeats), **stages(args.hidden, args.mixer, args.repeats)}
        ratio |= over_trainer(args.hidden, args.mixer, 8, 3)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    found = {"ratio": ratio, "peak_rss_bytes": peak, "hidden": args.hidden, "mixer": args.mixer, "threads": args.threads}
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n")
    log.info("%s", json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
