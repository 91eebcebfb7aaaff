"""Answers asked for in prompts: their probability, and whether the model would have given them."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from hybridize.errors import ConfigError, DataError
from hybridize.eval.context import EvalContext, Item, ProbeResult, item_hash, mean_metric, merged
from hybridize.eval.prompts import NoRoom
from hybridize.eval.scoring import batches, scores_at

log = logging.getLogger(__name__)

# Characters of a prompt, and of an answer, that a person is shown.
SHOWN = 400
# What a prompt's score is the share of; "all values" is 1 or 0.
Judged = Literal["each value", "each token", "all values"]
UNITS = {"each value": "share of values", "each token": "share of tokens", "all values": "share of prompts"}


@dataclass(frozen=True)
class Prompt:
    """A prompt with its answers, as the model reads it."""

    ids: list[int]
    """BOS included."""
    answers: list[tuple[int, int]]
    """(first, last + 1) place of each answer's tokens in `ids`."""


def check_lengths(lengths_tokens: list[int] | None, samples: int) -> None:
    """Raise ConfigError unless there is a prompt to make."""
    if lengths_tokens is not None and (not lengths_tokens or min(lengths_tokens) < 1):
        raise ConfigError(f"lengths_tokens is {lengths_tokens}, expected numbers of tokens, or null for those of the model")
    if samples < 1:
        raise ConfigError(f"samples is {samples}, expected at least 1")


def at_lengths(context: EvalContext, probe: str, asked: list[int] | None, measure: Callable[[int], ProbeResult]) -> ProbeResult:
    """What `measure` finds at each length asked for, in tokens of a whole prompt.

    None is a quarter, a half and the whole of what the model is trained for, as `with_room` says.

    Raises:
        ConfigError: a length asked for is beyond the model's context or has no room for the prompt; or none has.
        DataError: the text is shorter than a prompt.
    """
    if asked is None:
        whole = context.trained_tokens
        return with_room(probe, [whole // 4, whole // 2, whole], measure)
    for length in asked:
        context.need_context(probe, length)
    return merged([measure(length) for length in asked])


def with_room(probe: str, sizes: list[int], measure: Callable[[int], ProbeResult]) -> ProbeResult:
    """What `measure` finds at each size, less those that the model or the text has no room for, with a line in the log.

    Raises:
        ConfigError, DataError: as of the last size, where none is left.
    """
    found = []
    for size in sizes:
        try:
            found.append(measure(size))
        except (NoRoom, DataError) as error:
            log.info("probe %r is left out at %d: %s", probe, size, error)
            if size == sizes[-1] and not found:
                raise
    return merged(found)


def score(
    context: EvalContext, name: str, size: int, prompts: list[Prompt], batch_tokens: int, judged: Judged = "each value"
) -> ProbeResult:
    """Score answers by one teacher-forced pass over each prompt.

    A value counts as given where each of its tokens is the model's own greedy choice: greedy generation from the place where
    the value begins would give it.

    Args:
        context: the model and its tokenizer (only for items in words).
        name: of the metrics.
        size: behind their @.
        prompts: of any lengths, with an answer each.
        batch_tokens: tokens in one forward pass.
        judged: what a prompt's score is.

    Returns:
        `NAME@SIZE` and `NAME_nll@SIZE` (mean -log p per answer token, nats), each with its stderr and samples over prompts.
    """
    rows = [torch.tensor(prompt.ids) for prompt in prompts]
    # Padding on the right is out of sight of everything that is scored.
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    rights: list[float] = []
    nlls: list[float] = []
    items: list[Item] = []
    for part in batches(ids, batch_tokens):
        inside = prompts[len(rights) : len(rights) + len(part)]
        places = [(row, at) for row, prompt in enumerate(inside) for span in prompt.answers for at in range(*span)]
        nll, choice = scores_at(context.model, part, torch.tensor(places))
        lengths = [sum(stop - first for first, stop in prompt.answers) for prompt in inside]
        for prompt, own_nll, own_choice in zip(inside, nll.split(lengths), choice.split(lengths), strict=True):
            nlls.append(own_nll.double().mean().item())
            given = own_choice.split([stop - first for first, stop in prompt.answers])
            wanted = [torch.tensor(prompt.ids[first:stop]) for first, stop in prompt.answers]
            rights.append(_share(given, wanted, judged))
            if context.tokenizer is not None:
                items.append(item_of(context.tokenizer, prompt.ids[: prompt.answers[0][0]], wanted, given))
        context.tell(f"{name}@{size}", len(rights), len(prompts))
    return result_of(name, size, rights, nlls, UNITS[judged], item_hash(ids), items)


def _share(given: tuple[Tensor, ...], wanted: list[Tensor], judged: Judged) -> float:
    if judged == "each token":
        return (torch.cat(given) == torch.cat(wanted)).double().mean().item()
    right = [torch.equal(*pair) for pair in zip(given, wanted, strict=True)]
    return float(all(right)) if judged == "all values" else sum(right) / len(right)


def result_of(
    name: str, size: int, rights: list[float], nlls: list[float], unit: str, items_hash: str, items: list[Item]
) -> ProbeResult:
    """`NAME@SIZE` and `NAME_nll@SIZE` over prompts; they share items and their hash."""
    both = {f"{name}@{size}": rights, f"{name}_nll@{size}": nlls}
    return ProbeResult(
        metrics={
            f"{name}@{size}": mean_metric(rights, unit, True),
            f"{name}_nll@{size}": mean_metric(nlls, "nats per token", False),
        },
        samples=both,
        item_hashes=dict.fromkeys(both, items_hash),
        items=dict.fromkeys(both, items) if items else {},
    )


def item_of(tokenizer: Any, shown: list[int], wanted: list[Tensor], given: tuple[Tensor, ...] | list[Tensor]) -> Item:
    """An item in words: the end of what was shown, and the answers with commas between."""

    def words(answers: tuple[Tensor, ...] | list[Tensor]) -> str:
        return ", ".join(decode(tokenizer, answer[:SHOWN].tolist()).strip() for answer in answers)[:SHOWN]

    return Item(prompt=decode(tokenizer, shown[-SHOWN:])[-SHOWN:], expected=words(wanted), given=words(given))


def decode(tokenizer: Any, ids: list[int]) -> str:
    """Tokens in words, spaces as they are."""
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def copy_tokens(context: EvalContext, length: int) -> int:
    """Tokens of each copy in a prompt of at most `length` tokens. Raises NoRoom below 2."""
    tokens = (length - len(bos_of(context))) // 2
    if tokens < 2:
        raise NoRoom(f"eval: {length} tokens leave no room for two copies, expected a longer prompt")
    return tokens


def twice(context: EvalContext, passage: list[int]) -> Prompt:
    """BOS, a passage, and the passage again: the answer is the second copy less its first token, which nothing foretells."""
    bos = bos_of(context)
    second = len(bos) + len(passage)
    return Prompt(bos + passage + passage, [(second + 1, second + len(passage))])


def bos_of(context: EvalContext) -> list[int]:
    """BOS as the start of a prompt; nothing for a tokenizer without one."""
    return [] if context.bos_id is None else [context.bos_id]
