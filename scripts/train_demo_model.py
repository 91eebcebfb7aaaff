"""Train the bundled small model: a GQA Llama on the standard library's sources, from nothing but CPython.

    python scripts/train_demo_model.py --out hybridize/demo/model --steps 3000

Nine tenths of the modules are trained on; the rest are held out by name (`hybridize.demo.stdlib_text`). A share of the
sequences carries made recall tasks (assignments that are asked for again later), because source code alone teaches a model
of this size little long-range lookup, and a hybrid's first loss is just that lookup.
Trained in fp32 with Muon on the matrices and AdamW on the rest, short sequences first; stored in bf16.
"""

import argparse
import json
import math
import random
import re
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hybridize.demo.stdlib_text import documents

VOCAB = 2048
CONTEXT = 1024
RECALL_SHARE = 0.12


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<|bos|>", "<|eos|>", "<|pad|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=specials, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|bos|>", eos_token="<|eos|>", pad_token="<|pad|>",
        model_max_length=CONTEXT, clean_up_tokenization_spaces=False,
    )  # fmt: skip


def config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCAB, hidden_size=192, intermediate_size=576, num_hidden_layers=6, num_attention_heads=6,
        num_key_value_heads=3, head_dim=32, max_position_embeddings=CONTEXT, rms_norm_eps=1e-5, tie_word_embeddings=True,
        bos_token_id=0, eos_token_id=1, pad_token_id=2, rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        initializer_range=0.02,
    )  # fmt: skip


class Muon:
    """Momentum, orthogonalised by five Newton-Schulz steps (Jordan et al. 2024, github.com/KellerJordan/Muon).

    torch.optim.Muon does the same in bf16, which a CPU without bf16 units runs some thirty times slower than fp32.
    """

    def __init__(self, params: list[torch.nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.05):
        self.params, self.momentum, self.weight_decay = params, momentum, weight_decay
        self.param_groups = [{"lr": lr}]
        self.buffers = [torch.zeros_like(p) for p in params]

    @torch.no_grad()
    def step(self) -> None:
        lr = self.param_groups[0]["lr"]
        for param, buffer in zip(self.params, self.buffers, strict=True):
            buffer.lerp_(param.grad, 1 - self.momentum)
            update = param.grad.lerp(buffer, self.momentum)
            wide = update.T if update.shape[0] > update.shape[1] else update
            x = wide / (wide.norm() + 1e-7)
            for _ in range(5):
                gram = x @ x.T
                x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
            update = x.T if update.shape[0] > update.shape[1] else x
            param.mul_(1 - lr * self.weight_decay)
            param.add_(update, alpha=-lr * max(1.0, param.shape[0] / param.shape[1]) ** 0.5)

    def zero_grad(self) -> None:
        for param in self.params:
            param.grad = None


class Sampler:
    """Sequences of source code, some with recall tasks woven in."""

    def __init__(self, stream: np.ndarray, words: list[str], tokenizer: PreTrainedTokenizerFast, seed: int):
        self.stream, self.words, self.tokenizer = stream, words, tokenizer
        self.random = random.Random(seed)

    def slice(self, length: int) -> np.ndarray:
        start = self.random.randrange(len(self.stream) - length)
        return self.stream[start : start + length]

    def pair(self) -> tuple[str, str]:
        return self.random.choice(self.words), str(self.random.randrange(100, 10000))

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def recall(self, length: int) -> list[int]:
        """Many assignments, then the same ones again in another order, to the end of the context."""
        out: list[int] = []
        while len(out) < length:
            count = self.random.choice([2, 4, 8, 16, 32])
            table = dict(self.pair() for _ in range(count))
            lines = [f"{k} = {v}\n" for k, v in table.items()]
            again = [f"{k} = {v}\n" for k, v in self.random.sample(list(table.items()), min(len(table), 24))]
            out += self.ids("".join(lines + again) + "\n")
        return out[:length]

    def needles(self, length: int) -> list[int]:
        """Source code with a few assignments dropped in, each repeated later on."""
        pieces = self.slice(length).tolist()
        count = self.random.randint(1, 6)
        inserts = []
        for _ in range(count):
            key, value = self.pair()
            line = self.ids(f"\n{key} = {value}\n")
            first, second = sorted(self.random.sample(range(len(pieces)), 2))
            inserts += [(first, line), (second, line)]
        for position, line in sorted(inserts, reverse=True):
            pieces[position:position] = line
        return pieces[:length]

    def batch(self, rows: int, length: int) -> torch.Tensor:
        """Token ids, [rows, length + 1], BOS in front of each row as in evaluation."""
        out = np.zeros((rows, length + 1), dtype=np.int64)
        for row in out:
            draw = self.random.random()
            make = self.recall if draw < RECALL_SHARE / 2 else self.needles if draw < RECALL_SHARE else self.slice
            row[1:] = make(length)
        return torch.from_numpy(out)


def held_out_loss(model: LlamaForCausalLM, stream: np.ndarray, limit: int = 64) -> np.ndarray:
    """Mean loss (nats) at each position of the context over `limit` held-out blocks, [CONTEXT]."""
    model.eval()
    losses = []
    count = min(limit, len(stream) // CONTEXT)
    for index in np.linspace(0, len(stream) // CONTEXT - 1, count).astype(int):
        block = torch.from_numpy(np.concatenate([[0], stream[index * CONTEXT : (index + 1) * CONTEXT]]).astype(np.int64))[None]
        with torch.no_grad():
            logits = model(block[:, :-1]).logits.float()
        losses.append(torch.nn.functional.cross_entropy(logits[0], block[0, 1:], reduction="none").numpy())
    model.train()
    return np.stack(losses).mean(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=8192, help="tokens a step")
    parser.add_argument("--lr", type=float, default=0.02, help="Muon's; AdamW takes 0.15 of it")
    parser.add_argument("--minutes", type=float, default=None, help="stop by the clock: the schedule follows time, not steps")
    parser.add_argument("--short", type=float, default=0.6, help="share of the run on sequences of 256 tokens")
    parser.add_argument("--compile", action="store_true", help="torch.compile: 1.4x on two AVX2 cores")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--init", type=Path, default=None, help="go on from a model saved by an earlier run")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    torch.set_flush_denormal(True)
    torch.set_num_threads(args.threads)

    train_texts = [text for _, text in documents(held_out=False)]
    tokenizer = train_tokenizer(train_texts)
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(args.out)

    def stream(texts: list[str]) -> np.ndarray:
        parts = []
        for text in texts:
            parts.append(np.array(tokenizer(text, add_special_tokens=False).input_ids + [1], dtype=np.uint16))
        return np.concatenate(parts)

    train = stream(train_texts)
    random.Random(args.seed).shuffle(train_texts)
    held_out = stream([text for _, text in documents(held_out=True)])
    words = sorted({word for text in train_texts[:400] for word in re.findall(r"\b[a-z]{3,12}\b", text)})
    print(f"tokens: train {len(train):,}, held out {len(held_out):,}; recall words {len(words):,}", flush=True)

    model = LlamaForCausalLM(config())
    if args.init is not None:
        model = LlamaForCausalLM.from_pretrained(args.init, dtype=torch.float32)
    print(f"parameters: {model.num_parameters():,}", flush=True)
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    rest = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    optimizers = [
        Muon(matrices, lr=args.lr),
        torch.optim.AdamW(rest, lr=args.lr * 0.15, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    bases = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    step_model = torch.compile(model) if args.compile else model
    sampler = Sampler(train, words, tokenizer, args.seed)
    model.train()
    started = time.time()
    history = []
    step = 0
    while True:
        progress = (time.time() - started) / (60 * args.minutes) if args.minutes else step / args.steps
        if progress >= 1:
            break
        # Warm-up, constant, then a linear fall to nothing over the last 40 %.
        scale = min(1.0, (step + 1) / 50) * min(1.0, (1 - progress) / 0.4)
        for optimizer, base in zip(optimizers, bases, strict=True):
            optimizer.param_groups[0]["lr"] = base * scale
        length = 256 if progress < args.short else CONTEXT
        batch = sampler.batch(args.batch // length, length)
        logits = step_model(batch[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        step += 1
        if step % 20 == 0:
            seconds = time.time() - started
            print(f"step {step} loss {loss.item():.4f} {step * args.batch / seconds:,.0f} tokens/s", flush=True)
        if step % 200 == 0:
            held = held_out_loss(model, held_out).mean()
            history.append({"step": step, "tokens": step * args.batch, "held_out_loss": float(held)})
            print(f"step {step} held-out perplexity {math.exp(held):.3f}", flush=True)
            model.save_pretrained(args.out)

    by_position = held_out_loss(model, held_out, limit=256)
    model.to(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    model.save_pretrained(args.out)
    bands = {f"{a}-{a * 2 - 1}": float(by_position[a : a * 2].mean()) for a in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)}
    (args.out / "training.json").write_text(
        json.dumps(
            {
                "parameters": model.num_parameters(), "tokens": step * args.batch, "steps": step,
                "minutes": (time.time() - started) / 60, "held_out_perplexity": math.exp(by_position.mean()),
                "held_out_tokens": len(held_out), "loss_by_position": bands, "history": history,
            },
            indent=1,
        )
    )  # fmt: skip
    print(f"held-out perplexity {math.exp(by_position.mean()):.3f}; loss by position {bands}", flush=True)


if __name__ == "__main__":
    main()
