"""Text from a model as it is made: one prompt, or a conversation that keeps the cache where it may.

A cache holds what was read and cannot go back (recurrent states and windows forget), so it is used again only where the new
ids begin with exactly the ids it holds. Whatever else the chat template does with earlier turns, they are read anew.
"""

import copy
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jinja2
import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.cache_utils import DynamicCache
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from hybridize.cache import cache_bytes
from hybridize.errors import ConfigError
from hybridize.mixers.attention import Attention

Write = Callable[[str], None]
# What a decoder shows for bytes that are not yet a whole character.
INCOMPLETE = "\ufffd"
# A token of one byte, for what a vocabulary has no word for. A row of them is decoded as a whole: one wrong byte changes all.
BYTE = re.compile("<0x[0-9A-F]{2}>")


@dataclass(frozen=True, kw_only=True)
class Spoken:
    """One answer and what it took."""

    text: str
    """The new text, special tokens left out."""
    ids: list[int]
    """Prompt and new tokens."""
    prompt_tokens: int
    read_tokens: int
    """Of the prompt, those that no cache held."""
    new_tokens: int
    prefill_s: float
    """Seconds from the start to the first new token."""
    decode_tokens_per_s: float | None
    """Tokens a second from the second new token on; None where there is none."""
    cache_tokens: int
    cache_bytes: int
    """Of the cache as it stands at the end, measured on its tensors."""
    base_bytes: int
    """Of a cache of keys and values for every layer at the same length and dtype."""


class Pieces(BaseStreamer):
    """Writes tokens as text, a piece whenever whole characters are there; together the pieces are the text decoded at once.

    Each piece is what a decoding grows by behind the piece before, so that a space which a tokenizer drops at the start of a
    text stays inside one (as in text-generation-inference, `decode_token`).

    Args:
        tokenizer: of transformers.
        write: called with each piece.
        continues: the new text goes on with the prompt's in the middle of a line; else it is a text of its own.
    """

    def __init__(self, tokenizer: Any, write: Write, continues: bool = False):
        self.tokenizer, self.write, self.continues = tokenizer, write, continues
        self.ids: list[int] = []
        self.special = set(tokenizer.all_special_ids)
        self.written = ""
        self.prompt: int | None = None
        # Tokens from `start` to before `shown` are written; they are decoded again for what follows them.
        self.start = self.shown = 0
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        """The prompt first, [1, T], then each new token, [1]."""
        self.times.append(time.perf_counter())
        self.ids += value.flatten().tolist()
        if self.prompt is None:
            self.prompt = self.shown = len(self.ids)
            self.start = 0 if self.continues else self.prompt
            return
        last = self.ids[-1]
        # A special token is left out, so that bytes on both its sides are one row.
        if last in self.special or BYTE.fullmatch(str(self.tokenizer.convert_ids_to_tokens(last))):
            return
        before, now = self._text(self.shown), self._text(len(self.ids))
        if len(now) > len(before) and not now.endswith(INCOMPLETE):
            self._write(now[len(before) :])
            self.start, self.shown = self.shown, len(self.ids)

    def end(self) -> None:
        """Writes what is left: a character that never became whole."""
        whole = self.text()
        if whole.startswith(self.written):
            self._write(whole[len(self.written) :])

    def text(self) -> str:
        """All new tokens, decoded at once: behind the prompt where they go on with it, else alone."""
        first = 0 if self.continues else self.prompt
        whole, prompt = (
            self.tokenizer.decode(ids, skip_special_tokens=True) for ids in (self.ids[first:], self.ids[first : self.prompt])
        )
        return whole[len(prompt) :]

    def _text(self, stop: int) -> str:
        return self.tokenizer.decode(self.ids[self.start : stop], skip_special_tokens=True)

    def _write(self, piece: str) -> None:
        if piece:
            self.written += piece
            self.write(piece)


class _WhenAsked(StoppingCriteria):
    """Ends an answer between two tokens, so that the cache stays whole."""

    def __init__(self, stopped: Callable[[], bool]):
        self.stopped = stopped

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.full((len(input_ids),), self.stopped(), device=input_ids.device)


def settings_of(
    model: Any, tokenizer: Any, tokens: int, sample: bool = False, temperature: float | None = None, top_p: float | None = None
) -> GenerationConfig:
    """How tokens are chosen: greedy without any penalty, or sampled as the checkpoint's generation_config.json says.

    Args:
        model: a causal LM of transformers.
        tokenizer: its tokenizer; the ends of its texts end an answer, and so do those of generation_config.json.
        tokens: at most so many new ones.
        sample: draw tokens.
        temperature: of the draw; None is the checkpoint's own, else 1.
        top_p: share of the probability that is drawn from; None is the checkpoint's own, else 1.

    Raises:
        ConfigError: a number out of its range, or one for sampling without `sample`.
    """
    if tokens < 1:
        raise ConfigError(f"--tokens is {tokens}, expected at least 1")
    for option, value in (("--temperature", temperature), ("--top-p", top_p)):
        if value is not None and not sample:
            raise ConfigError(f"{option} goes with --sample; without it the likeliest token is taken")
        if value is not None and not 0 < value <= (1 if option == "--top-p" else float("inf")):
            raise ConfigError(f"{option} is {value:g}, expected above 0{' and at most 1' if option == '--top-p' else ''}")
    own = model.generation_config
    chosen = copy.deepcopy(own) if sample else GenerationConfig()
    ends = own.eos_token_id if isinstance(own.eos_token_id, list) else [own.eos_token_id]
    ends = sorted({end for end in (*ends, tokenizer.eos_token_id) if end is not None})
    chosen.update(
        max_new_tokens=tokens, max_length=None, do_sample=sample, eos_token_id=ends or None,
        pad_token_id=next((pad for pad in (tokenizer.pad_token_id, own.pad_token_id, *ends) if pad is not None), 0),
    )  # fmt: skip
    if sample:
        chosen.update(temperature=temperature or own.temperature or 1.0, top_p=top_p or own.top_p or 1.0, top_k=own.top_k or 0)
    return chosen


class Speaker:
    """A model, and the cache of what it read and said last.

    Args:
        model: a causal LM of transformers, in eval mode.
        tokenizer: its tokenizer.
        settings: as `settings_of` gives them.
    """

    def __init__(self, model: Any, tokenizer: Any, settings: GenerationConfig):
        self.model, self.tokenizer, self.settings = model, tokenizer, settings
        self.forget()

    def forget(self) -> None:
        """Begin with an empty cache."""
        self.cache: Any = None
        self.held: list[int] = []

    @torch.no_grad()
    def speak(self, ids: list[int], write: Write, stopped: Callable[[], bool] = lambda: False, continues: bool = False) -> Spoken:
        """Go on with a prompt.

        Args:
            ids: the whole prompt, at least one token; where it begins with what the cache holds, only the rest is read.
            write: called with the new text, piece by piece.
            stopped: asked after each token; true ends the answer there.
            continues: as for `Pieces`.

        Raises:
            ConfigError: the prompt has no token.
        """
        if not ids:
            raise ConfigError("the prompt has no tokens, and the tokenizer puts none in front; give some text")
        cache, held = self.cache, self.held
        # What is interrupted leaves a cache that some layers have added to; it is never used again.
        self.forget()
        if not held or len(held) >= len(ids) or ids[: len(held)] != held:
            cache, held = DynamicCache(config=self.model.config), []
        pieces = Pieces(self.tokenizer, write, continues)
        prompt = torch.tensor([ids], device=self.model.device)
        kept, self.model.generation_config = self.model.generation_config, self.settings
        try:
            out = self.model.generate(
                prompt, attention_mask=torch.ones_like(prompt), past_key_values=cache, use_cache=True, streamer=pieces,
                stopping_criteria=StoppingCriteriaList([_WhenAsked(stopped)]),
            )  # fmt: skip
        finally:
            self.model.generation_config = kept
        spoken = out[0].tolist()
        # The last token was chosen and not read.
        self.cache, self.held = cache, spoken[:-1]
        assert cache.get_seq_length() == len(self.held)
        start, first, last = pieces.times[0], pieces.times[1], pieces.times[-1]
        steps, config = len(pieces.times) - 2, self.model.config
        return Spoken(
            text=pieces.text(), ids=spoken, prompt_tokens=len(ids), read_tokens=len(ids) - len(held),
            new_tokens=len(spoken) - len(ids), prefill_s=first - start,
            decode_tokens_per_s=steps / (last - first) if steps else None,
            cache_tokens=len(self.held), cache_bytes=cache_bytes(cache),
            base_bytes=config.num_hidden_layers * Attention().state_bytes(config, len(self.held)),
        )  # fmt: skip


def chat_ids(tokenizer: Any, messages: list[dict[str, str]], where: str) -> list[int]:
    """A conversation as the chat template has it, up to where the assistant is to answer.

    Raises:
        ConfigError: there is no chat template, or it refuses the messages; the message begins with `where`.
    """
    if tokenizer.chat_template is None:
        raise ConfigError(
            f"{where}: its tokenizer has no chat template. Use `generate` without --chat, or add a chat_template.jinja"
        )
    try:
        found = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
    except (jinja2.TemplateError, ValueError, TypeError, KeyError) as error:
        said = (str(error).splitlines() or ["no reason given"])[0]
        raise ConfigError(f"{where}: the chat template refuses the conversation ({said})") from error
    return list(found["input_ids"])


class Chat:
    """A conversation with a speaker, turn by turn.

    Args:
        speaker: who answers.
        where: the checkpoint, for messages.
        system: what the conversation begins with; None for nothing.

    Raises:
        ConfigError: as `chat_ids`, at once.
    """

    def __init__(self, speaker: Speaker, where: str, system: str | None = None):
        self.speaker, self.where = speaker, where
        self.begin(system)
        chat_ids(speaker.tokenizer, [*self.messages, {"role": "user", "content": "."}], where)

    def begin(self, system: str | None = None) -> None:
        """Forget all turns; begin with `system`, None for nothing."""
        self.messages = [] if system is None else [{"role": "system", "content": system}]
        self.speaker.forget()

    def answer(self, text: str, write: Write, stopped: Callable[[], bool] = lambda: False) -> Spoken:
        """Say something and hear the answer. A turn that raises leaves the conversation as it was before.

        Args:
            text: what the user says.
            write: called with the answer, piece by piece.
            stopped: as for `Speaker.speak`; what was said until then stays in the conversation.
        """
        asked = [*self.messages, {"role": "user", "content": text}]
        spoken = self.speaker.speak(chat_ids(self.speaker.tokenizer, asked, self.where), write, stopped)
        self.messages = [*asked, {"role": "assistant", "content": spoken.text}]
        return spoken
