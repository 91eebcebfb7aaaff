"""Long procedural output: links of a path in disorder, and the whole path written down in order."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hybridize.errors import ConfigError
from hybridize.eval.answers import SHOWN, Prompt, at_lengths, bos_of, check_lengths, decode, result_of, score
from hybridize.eval.context import EvalContext, Item, ProbeResult
from hybridize.eval.prompts import (
    NoRoom,
    ask,
    check_template,
    draw_words,
    encode,
    hay_of,
    spelled,
)
from hybridize.eval.scoring import batches, generate

EXAMPLE_LINKS = 4


@dataclass(frozen=True)
class Path:
    """One prompt less what stands in front of it."""

    ids: list[int]
    first: int
    """Where the output begins."""
    head: str
    """What stands in front of the first row, in words; of that row the model is shown its key."""
    rows: list[str]
    """The output, row by row."""


@dataclass(frozen=True, kw_only=True)
class Procedure:
    """Share of rows written rightly by greedy generation (path traversal of LongProc, arXiv 2501.05414).

    The text has links "a = b" of one path in disorder. The output is the path: each row's key is the value of the row before, so
    that one slip may lose all that follows. An answered example of four links stands in front, held-out text fills up.
    """

    lengths_tokens: list[int] | None = None
    """Tokens of prompt and output; None is a quarter, a half and the whole of what the model is trained for."""
    most_rows: int = 256
    """Rows of output, at most; links fill the rest of the prompt."""
    samples: int = 8
    """Paths for each length."""
    template: str | None = None
    """A link, and a row of output; None is the first of "{key} = {value}\\n" and "{key} is {value}; " that the tokenizer can
    spell."""
    batch_tokens: int = 4096
    """Tokens in one forward pass, and tokens generated together, prompts counted."""

    def __post_init__(self) -> None:
        check_template(self.template)
        check_lengths(self.lengths_tokens, self.samples)
        if self.most_rows < 1:
            raise ConfigError(f"most_rows is {self.most_rows}, expected at least 1")

    def __call__(self, context: EvalContext) -> ProbeResult:
        """Measure, by greedy generation through the cache, and one teacher-forced pass.

        Returns:
            `procedure@L`: the share of rows of the output that stand in their place, to the letter; `procedure_nll@L`: mean
            -log p per token of the right output. Samples are paths.

        Raises:
            ConfigError: no text or tokenizer, or a length beyond the model's context or with no room for two links.
            DataError: the text is shorter than what is to be filled up.
        """
        context.need_tokenizer("procedure")
        context.need_text("procedure")
        return at_lengths(context, "procedure", self.lengths_tokens, lambda length: self._at(context, length))

    def _at(self, context: EvalContext, length: int) -> ProbeResult:
        tokenizer, bos = context.tokenizer, bos_of(context)
        template = spelled(self.template, tokenizer)
        count = min(self.samples, context.limit or self.samples)
        # All prompts of one length, so that they can be continued together without padding.
        over, new_tokens, room, paths = 0, 0, 0, []
        while not paths or room + new_tokens > length:
            over += max(0, room + new_tokens - length)
            paths = [self.path(context, template, length, index, over) for index in range(count)]
            room, new_tokens = (
                max(sizes) for sizes in zip(*((len(bos) + p.first, len(p.ids) - p.first) for p in paths), strict=True)
            )
        prompts = []
        for index, path in enumerate(paths):
            missing = room - len(bos) - path.first
            generator = np.random.default_rng([context.seed, length, index, 1])
            text = hay_of(context.need_text("procedure"), missing, generator, "procedure") if missing else []
            prompts.append(Prompt([*bos, *text, *path.ids], [(room, room + len(path.ids) - path.first)]))
        starts = torch.tensor([prompt.ids[:room] for prompt in prompts])
        given: list[torch.Tensor] = []
        for part in batches(starts, max(1, self.batch_tokens * room // (room + new_tokens))):
            given += generate(context.model, part, new_tokens)
            context.tell(f"procedure@{length}", len(given), count)
        rights, items = [], []
        for path, prompt, tokens in zip(paths, prompts, given, strict=True):
            # Prompt and output in one piece, as a space may be in the last token of the one or in the first of the other.
            text = decode(tokenizer, path.ids[: path.first] + tokens[: len(path.ids) - path.first].tolist()).lstrip(" ")
            written = rows_of(template, text[len(path.head.lstrip(" ")) :], len(path.rows))
            rights.append(share_of_rows(written, path.rows))
            shown = decode(tokenizer, prompt.ids[max(0, room - SHOWN) : room])[-SHOWN:]
            items.append(Item(prompt=shown, expected="\n".join(path.rows)[:SHOWN], given="\n".join(written)[:SHOWN]))
        forced = score(context, "procedure", length, prompts, self.batch_tokens)
        name = f"procedure_nll@{length}"
        return result_of("procedure", length, rights, forced.samples[name], "share of rows", forced.item_hashes[name], items)

    def path(self, context: EvalContext, template: str, length: int, index: int, over: int = 0) -> Path:
        """Path number `index`, of as many links as leave room for the output in `length` tokens less `over`."""
        tokenizer: Any = context.tokenizer
        generator = np.random.default_rng([context.seed, length, index])
        # A link has at least four tokens; twice that where all links are rows of the output too.
        most = length // 8 if length // 8 <= self.most_rows else length // 4
        names = draw_words(generator, EXAMPLE_LINKS + most + 2)
        example, links = _links(names[: EXAMPLE_LINKS + 1]), _links(names[EXAMPLE_LINKS + 1 :])
        orders = generator.permutation(len(example)), generator.permutation(len(links))
        room = length - over - len(bos_of(context))
        sizes = np.cumsum([len(encode(tokenizer, template.format(key=key, value=value), [])[0]) for key, value in links])
        fits = [count for count in range(1, len(links) + 1) if sizes[count - 1] + sizes[min(count, self.most_rows) - 1] <= room]
        for count in range(len(fits), 1, -1):
            path, order = links[:count], [place for place in orders[1] if place < count]
            blocks = [[example[place] for place in orders[0]], example, [path[place] for place in order]]
            head = "".join(_lines(template, block) for block in blocks)
            output, spans = ask(template, path[: self.most_rows])
            ids, ((first, stop),) = encode(tokenizer, head + output, [(len(head) + spans[0][0], len(head) + spans[-1][1])])
            if stop <= room:
                rows = [template.format(key=key, value=value).strip() for key, value in path[: self.most_rows]]
                return Path(ids, first, head, rows)
        raise NoRoom(f"eval: procedure@{length} leaves no room for two links, expected a longer prompt")


def _links(names: list[str]) -> list[tuple[str, str]]:
    return list(zip(names[:-1], names[1:], strict=True))


def _lines(template: str, facts: list[tuple[str, str]]) -> str:
    """Facts one behind another, and an empty line where facts are lines."""
    return "".join(template.format(key=key, value=value) for key, value in facts) + ("\n" if template.endswith("\n") else "")


def rows_of(template: str, text: str, count: int) -> list[str]:
    """The first `count` rows of a text, as they would stand in the output; what follows the last ending is one too."""
    ending = template.split("{value}")[1]
    return [row.strip() + ending.rstrip() for row in text.split(ending)[:count]]


def share_of_rows(written: list[str], rows: list[str]) -> float:
    """Rows that stand in their place, as a share of those asked for; `written` may be shorter."""
    return sum(ours == theirs for ours, theirs in zip(written, rows, strict=False)) / len(rows)
