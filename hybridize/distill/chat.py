"""Chats and preference pairs as tokens, each with a mark on those that are learnt.

A source is a .jsonl file, a glob of them, or several with commas between. A line of chat data has `messages`, or `prompt`
and `completion`, or `text`; a line of preferences `prompt`, `chosen` and `rejected`, or the last two as whole conversations.
Prompts and answers are strings or lists of messages; messages go through the tokenizer's chat template.
"""

import glob
import hashlib
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hybridize.data import read_documents
from hybridize.errors import DataError, MissingDependencyError

log = logging.getLogger(__name__)

GENERATION = "{% generation %}"


@dataclass(frozen=True, kw_only=True, eq=False)
class Example:
    """One text as the model reads it."""

    ids: np.ndarray
    """[tokens], int32."""
    learnt: np.ndarray
    """[tokens], bool: whether the loss counts the prediction of this token. Never true of the first."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Examples:
    """A data set: each item one text, or the chosen and the rejected one of a pair."""

    items: list[tuple[Example, ...]]
    sha256: str
    """Hash of the tokens and their marks."""

    @property
    def highest_id(self) -> int:
        return max(int(example.ids.max()) for item in self.items for example in item)


def read_chats(tokenizer: Any, source: str | Path, seq_tokens: int) -> Examples:
    """Texts to learn from; of a chat the assistant's tokens are learnt, of a plain text all.

    Args:
        tokenizer: of transformers.
        source: .jsonl files, or plain text as `data.read_documents` takes it.
        seq_tokens: longer texts are cut at their end.

    Raises:
        DataError: a line that cannot be used, or nothing to learn within `seq_tokens`.
        MissingDependencyError: a template without marks on the assistant's part, and no trl to know it.
    """
    if not any(part.strip().endswith(".jsonl") for part in str(source).split(",")):
        items = [(_text(tokenizer, document),) for document in read_documents(source)]
    else:
        template = _Template(tokenizer)
        items = [(_chat(template, line, where),) for where, line in _lines(source)]
    return _examples(items, seq_tokens, source)


def read_pairs(tokenizer: Any, source: str | Path, seq_tokens: int) -> Examples:
    """Preference pairs (chosen, rejected), in which the answers' tokens are learnt.

    Args:
        tokenizer: of transformers.
        source: .jsonl files.
        seq_tokens: longer texts are cut at their end; a pair with no token of an answer left is dropped.

    Raises:
        DataError: a line that cannot be used, or no pair that fits.
        MissingDependencyError: conversations without trl.
    """
    template = _Template(tokenizer)
    return _examples([_pair(template, line, where) for where, line in _lines(source)], seq_tokens, source)


def _lines(source: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file and line number, object) of every line."""
    for part in (part.strip() for part in str(source).split(",")):
        files = sorted(glob.glob(part, recursive=True)) if any(mark in part for mark in "*?[") else [part]
        if not files or not part.endswith(".jsonl"):
            raise DataError(f"{part}: expected .jsonl files with one chat or pair a line")
        for name in files:
            found = False
            try:
                with open(name, encoding="utf-8") as file:
                    for number, line in enumerate(file, 1):
                        if line.strip():
                            found = True
                            yield f"{name}: line {number}", _object(line, f"{name}: line {number}")
            except UnicodeDecodeError as error:
                raise DataError(f"{name}: not UTF-8 at byte {error.start}; convert it first") from error
            except OSError as error:
                raise DataError(f"{name}: cannot be read ({error.strerror or error})") from error
            if not found:
                raise DataError(f"{name}: is empty, expected one chat or pair a line")


def _object(line: str, where: str) -> dict[str, Any]:
    try:
        item = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where} is not JSON ({error.msg})") from error
    if not isinstance(item, dict):
        raise DataError(f"{where} is {type(item).__name__}, expected an object")
    return item


def _examples(items: list[tuple[Example, ...]], seq_tokens: int, source: str | Path) -> Examples:
    """The items cut to length, without those that have nothing left to learn."""
    cut = [tuple(Example(ids=e.ids[:seq_tokens], learnt=e.learnt[:seq_tokens]) for e in item) for item in items]
    kept = [item for item in cut if all(example.learnt.any() for example in item)]
    shortened = sum(any(len(e.ids) > seq_tokens for e in item) for item in items)
    if not kept:
        raise DataError(
            f"{source}: none of {len(items)} items has a token to learn within seq_tokens = {seq_tokens}; "
            "give more seq_tokens or answers that are not empty"
        )
    sha = hashlib.sha256()
    for item in kept:
        for example in item:
            sha.update(len(example.ids).to_bytes(8, "little") + example.ids.tobytes() + example.learnt.tobytes())
    log.info("%s: %d items, %d of them cut to %d tokens, %d dropped as nothing of theirs can be learnt",
             source, len(kept), shortened, seq_tokens, len(items) - len(kept))  # fmt: skip
    return Examples(items=kept, sha256=sha.hexdigest())


def _ids(tokenizer: Any, text: str) -> list[int]:
    # verbose=False: what is longer than the context is cut later.
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def _example(parts: list[tuple[list[int], bool]]) -> Example:
    ids = np.array([token for tokens, _ in parts for token in tokens], dtype=np.int32)
    learnt = np.array([mark for tokens, mark in parts for _ in tokens], dtype=bool)
    # Nothing comes before a first token that could predict it.
    learnt[:1] = False
    return Example(ids=ids, learnt=learnt)


def _ended(tokenizer: Any, ids: list[int]) -> list[int]:
    """Ids with the end-of-text token behind them, where the tokenizer has one and it is not there yet."""
    end = tokenizer.eos_token_id
    return ids if end is None or ids[-1:] == [end] else [*ids, end]


def _start(tokenizer: Any) -> list[int]:
    return [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]


def _text(tokenizer: Any, text: str) -> Example:
    return _example([(_start(tokenizer), False), (_ended(tokenizer, _ids(tokenizer, text)), True)])


class _Template:
    """A tokenizer and what turns conversations into its text."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self._marked: str | None = None

    def need(self, where: str) -> None:
        if self.tokenizer.chat_template is None:
            raise DataError(
                f"{where} is a conversation and the tokenizer has no chat template; add a chat_template.jinja to the "
                "checkpoint, or give prompt and completion as text"
            )

    def marked(self, where: str) -> str:
        """The chat template, with marks around what the assistant says."""
        self.need(where)
        if self._marked is None:
            own = self.tokenizer.chat_template
            self._marked = own if GENERATION in own else self._known(where)
        assert self._marked is not None
        return self._marked

    def _known(self, where: str) -> Any:
        try:
            return _trl(where).get_training_chat_template(self.tokenizer) or self.tokenizer.chat_template
        except ValueError as error:
            raise DataError(
                f"{where}: the tokenizer's chat template does not mark what the assistant says, and is none that trl knows; "
                f"put {GENERATION} and {{% endgeneration %}} around it, or give prompt and completion"
            ) from error

    def render(self, item: dict[str, Any], where: str) -> dict[str, str]:
        """A conversational line of prompt and answers as text."""
        import jinja2

        self.need(where)
        try:
            return _trl(where).apply_chat_template(item, self.tokenizer)
        except (ValueError, KeyError, TypeError, jinja2.TemplateError) as error:
            raise DataError(f"{where}: the chat template cannot take it ({str(error).splitlines()[0]})") from error

    def masked(self, messages: list[dict[str, Any]], where: str) -> Example:
        """A conversation in which the assistant's tokens are learnt."""
        import jinja2

        try:
            found = self.tokenizer.apply_chat_template(
                messages, chat_template=self.marked(where), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
            )
        except (ValueError, KeyError, TypeError, jinja2.TemplateError) as error:
            raise DataError(f"{where}: the chat template cannot take it ({str(error).splitlines()[0]})") from error
        return _example([([token], bool(mark)) for token, mark in zip(found["input_ids"], found["assistant_masks"], strict=True)])

    def answered(self, prompt: Any, answer: Any, where: str) -> Example:
        """A prompt and its answer, each tokenised alone, as when the answer is generated."""
        if isinstance(prompt, str):
            head, tail = (
                _start(self.tokenizer) + _ids(self.tokenizer, prompt),
                _ended(self.tokenizer, _ids(self.tokenizer, answer)),
            )
        else:
            text = self.render({"prompt": prompt, "completion": answer}, where)
            head, tail = (_ids(self.tokenizer, text[key]) for key in ("prompt", "completion"))
        return _example([(head, False), (tail, True)])


def _trl(where: str) -> Any:
    try:
        import trl
    except ImportError as error:
        raise MissingDependencyError(f"{where}: conversations need trl: pip install 'hybridize[train]'") from error
    return trl


def _is_chat(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(m, dict) and "role" in m for m in value)


def _chat(template: _Template, item: dict[str, Any], where: str) -> Example:
    if _is_chat(item.get("messages")):
        return template.masked(item["messages"], where)
    prompt, answer = item.get("prompt"), item.get("completion")
    if (isinstance(prompt, str) and isinstance(answer, str)) or (_is_chat(prompt) and _is_chat(answer)):
        return template.answered(prompt, answer, where)
    if isinstance(item.get("text"), str):
        return _text(template.tokenizer, item["text"])
    raise DataError(f"{where} has {', '.join(item)}; expected messages, or prompt and completion, or text")


def _pair(template: _Template, item: dict[str, Any], where: str) -> tuple[Example, Example]:
    prompt, chosen, rejected = (item.get(key) for key in ("prompt", "chosen", "rejected"))
    if _is_chat(chosen) and _is_chat(rejected) and not _is_chat(prompt):
        # Whole conversations, whose common beginning is the prompt.
        split = _trl(where).extract_prompt({"chosen": chosen, "rejected": rejected})
        prompt, chosen, rejected = (split[key] for key in ("prompt", "chosen", "rejected"))
    texts = all(isinstance(value, str) for value in (prompt, chosen, rejected))
    if not texts and not all(_is_chat(value) for value in (prompt, chosen, rejected)):
        raise DataError(f"{where} has {', '.join(item)}; expected prompt, chosen and rejected, each text or each messages")
    if chosen == rejected:
        raise DataError(f"{where}: chosen and rejected are equal, expected a preference; remove the line")
    return template.answered(prompt, chosen, where), template.answered(prompt, rejected, where)
