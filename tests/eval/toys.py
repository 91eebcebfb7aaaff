"""What the tests measure: a small tokenizer and text, tiny hybrids, and a model that knows every answer."""

from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import AutoConfig, AutoTokenizer, GenerationMixin, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from hybridize.data import Tokens, tokenize
from hybridize.eval.context import EvalContext
from hybridize.modeling import build_model, hybrid_config
from tests.tiny import tiny_base

VOCAB = 320
DOCUMENTS = [
    f"The {a} saw the {b} near the {c}. It was {n} steps away, and nobody spoke.\n"
    for n, (a, b, c) in enumerate([("king", "fox", "lake"), ("girl", "ship", "harbour"), ("horse", "moon", "wall")] * 40)
]


def save_tokenizer(path: Path) -> None:
    """Write a byte-level BPE tokenizer with BOS 1 and EOS 2."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(DOCUMENTS, trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    wrapped.save_pretrained(path)


def toy_base(tmp: Path, family: str = "llama", **overrides) -> Path:
    """A tiny random base with a tokenizer that fits it."""
    path = tiny_base(family, tmp, **{"vocab_size": VOCAB, "max_position_embeddings": 256, **overrides})
    save_tokenizer(path)
    return path


def toy_hybrid(base: Path, tmp: Path, mixers: list[dict]) -> Path:
    """A random hybrid of a base's config, with its tokenizer."""
    torch.manual_seed(0)
    model = build_model(hybrid_config(AutoConfig.from_pretrained(base), mixers))
    path = tmp / f"{base.name}-hybrid"
    model.save_pretrained(path)
    AutoTokenizer.from_pretrained(base).save_pretrained(path)
    return path


def toy_text(tokenizer) -> Tokens:
    return tokenize(tokenizer, DOCUMENTS)


class _Reader(nn.Module):
    """One-hot of the token foretold at each place; a cache holds the tokens themselves."""

    def __init__(self, guess: Callable[[list[int]], int]):
        super().__init__()
        self.guess = guess

    def forward(self, input_ids, past_key_values=None, use_cache=False, **_):
        seen = input_ids
        if past_key_values is not None:
            kept = input_ids[:, None, :, None].float()
            seen = past_key_values.update(kept, kept, 0)[0][:, 0, :, 0].long()
        before = seen.shape[1] - input_ids.shape[1]
        rows = [[self.guess(row[: t + 1]) for t in range(before, len(row))] for row in seen.tolist()]
        hidden = nn.functional.one_hot(torch.tensor(rows), VOCAB).float()
        return BaseModelOutputWithPast(last_hidden_state=hidden, past_key_values=past_key_values)


class Foretelling(PreTrainedModel, GenerationMixin):
    """A model of transformers, with a cache and `generate`, that is certain of one next token."""

    config_class = PreTrainedConfig
    base_model_prefix = "reader"

    def __init__(self, guess: Callable[[list[int]], int]):
        super().__init__(PreTrainedConfig(num_hidden_layers=1, vocab_size=VOCAB, bos_token_id=1))
        self.config.max_position_embeddings = 256
        self.config.rope_parameters = None
        self.reader = _Reader(guess)
        self.head = nn.Linear(VOCAB, VOCAB, bias=False)
        nn.init.eye_(self.head.weight)

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids, logits_to_keep=0, **inputs):
        out = self.reader(input_ids, **inputs)
        logits = self.head(out.last_hidden_state[:, -logits_to_keep:])
        return CausalLMOutputWithPast(logits=logits, past_key_values=out.past_key_values)


class CopyingModel(Foretelling):
    """Foretells the token that followed the longest earlier match of the text so far, of at most `longest` tokens."""

    def __init__(self, longest: int = 1000):
        super().__init__(self.last_match)
        self.longest = longest

    def last_match(self, seen: list[int]) -> int:
        best, answer = 0, 0
        for stop in range(1, len(seen)):
            length = 0
            while length < min(stop, self.longest) and seen[stop - 1 - length] == seen[-1 - length]:
                length += 1
            if length >= best and length > 0:
                best, answer = length, seen[stop]
        return answer


class Parrot(Foretelling):
    """Knows some rows by heart, and says 0 to all else."""

    def __init__(self, rows: list[list[int]]):
        super().__init__(self.known)
        self.rows = rows

    def known(self, seen: list[int]) -> int:
        return next((row[len(seen)] for row in self.rows if row[: len(seen)] == seen and len(row) > len(seen)), 0)


def context_of(model, tokenizer, **fields) -> EvalContext:
    return EvalContext(checkpoint=Path("toy"), model=model, tokenizer=tokenizer, text=toy_text(tokenizer), **fields)
