"""A tiny tokenizer of single characters with a chat template, and chats and preference pairs for it."""

import json
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.distill.pair import tiny_pair

SPECIAL = ["<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<unk>"]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}<|user|>{{ m['content'] }}{% else %}<|assistant|>"
    "{% generation %}{{ m['content'] }}{{ eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def tiny_tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    signs = [*LETTERS, *"0123456789", " ", "\n", "=", "?", ".", ","]
    vocab = {word: index for index, word in enumerate([*SPECIAL, *signs])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        additional_special_tokens=["<|user|>", "<|assistant|>"],
    )  # fmt: skip
    if template is not None:
        fast.chat_template = template
    return fast


def chat_pair(tmp: Path, *args, **kwargs) -> tuple[Path, Path]:
    """As tiny_pair, with the tokenizer beside the weights of both."""
    folders = tiny_pair(tmp, *args, **kwargs)
    for folder in folders:
        tiny_tokenizer().save_pretrained(folder)
    return folders


def words(draw: np.random.Generator, low: int = 2, high: int = 14) -> str:
    return "".join(draw.choice(list(LETTERS), size=draw.integers(low, high)))


def write_lines(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_chats(path: Path, count: int = 24, seed: int = 0) -> Path:
    """Conversations of one or two turns, prompts with completions, and plain texts, by turns."""
    draw = np.random.default_rng(seed)

    def turn():
        return [{"role": "user", "content": words(draw)}, {"role": "assistant", "content": words(draw)}]

    rows = []
    for index in range(count):
        kinds = (
            {"messages": turn() * (1 + index % 2)},
            {"prompt": words(draw), "completion": words(draw)},
            {"text": words(draw)},
        )
        rows.append(kinds[index % 3])
    return write_lines(path, rows)


def write_pairs(path: Path, count: int = 24, seed: int = 1) -> Path:
    draw = np.random.default_rng(seed)
    return write_lines(
        path, [{"prompt": words(draw), "chosen": words(draw), "rejected": words(draw) + "?"} for _ in range(count)]
    )
