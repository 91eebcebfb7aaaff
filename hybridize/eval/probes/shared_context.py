"""Several questions on one cached text: the cache is filled once, and every question goes on from a copy of it."""

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hybridize.errors import ConfigError
from hybridize.eval.answers import SHOWN, Prompt, at_lengths, bos_of, check_lengths, decode, result_of
from hybridize.eval.context import EvalContext, Item, ProbeResult, item_hash
from hybridize.eval.prompts import Values, ask, check_template, draw_facts, encode, hay_of, hide, lead, spelled
from hybridize.eval.scoring import cached_nll, generate
from hybridize.eval.timing import prefill


@dataclass(frozen=True, kw_only=True)
class SharedContext:
    """Share of questions answered rightly by greedy generation behind a shared, cached text (SCBench, arXiv 2412.10319).

    Held-out text with a fact for each question hidden in it is read once into the model's cache. Each question begins with a
    copy of that cache, as a server does for a prefix that many requests share: states have no way back, so a cache cannot be
    shortened to where it was. Questions do not see each other.
    """

    lengths_tokens: list[int] | None = None
    """Tokens of the text with its longest question and answer; None is a quarter, a half and the whole of what the model is
    trained for."""
    questions: int = 4
    """Questions on each text, about as many facts."""
    samples: int = 16
    """Texts for each length."""
    values: Values = "numbers"
    """What keys are given: numbers of three or four digits, or words, for models that met no digits."""
    template: str | None = None
    """A fact, and a question with its answer; None is the first of "{key} = {value}\\n" and "{key} is {value}; " that the
    tokenizer can spell."""

    def __post_init__(self) -> None:
        check_template(self.template)
        check_lengths(self.lengths_tokens, self.samples)
        if self.questions < 1:
            raise ConfigError(f"questions is {self.questions}, expected at least 1")

    def __call__(self, context: EvalContext) -> ProbeResult:
        """Measure: answers are generated token by token behind the question; their -log p is of one cached pass.

        Returns:
            `shared_context@L`: share of answers; `shared_context_nll@L`: mean -log p per answer token. Samples are texts.

        Raises:
            ConfigError: no text or tokenizer, or a length beyond the model's context or with no room for text.
            DataError: the text is shorter than a prompt.
        """
        context.need_tokenizer("shared_context")
        context.need_text("shared_context")
        return at_lengths(context, "shared_context", self.lengths_tokens, lambda length: self._at(context, length))

    def _at(self, context: EvalContext, length: int) -> ProbeResult:
        rights, nlls, items, rows = [], [], [], []
        count = min(self.samples, context.limit or self.samples)
        for index in range(count):
            prefix, questions = self.prompt(context, length, index)
            rows.append(torch.tensor([*prefix, *(token for question in questions for token in question.ids)]))
            given, own_nlls = answers(context.model, prefix, questions)
            wanted = [torch.tensor(question.ids[question.answers[0][0] :]) for question in questions]
            rights.append(sum(torch.equal(*pair) for pair in zip(given, wanted, strict=True)) / len(questions))
            nlls.append(torch.cat(own_nlls).double().mean().item())
            items.append(self._item(context, prefix, questions, wanted, given))
            context.tell(f"shared_context@{length}", index + 1, count)
        hashed = item_hash(torch.nn.utils.rnn.pad_sequence(rows, batch_first=True))
        return result_of("shared_context", length, rights, nlls, "share of values", hashed, items)

    def _item(
        self,
        context: EvalContext,
        prefix: list[int],
        questions: list[Prompt],
        wanted: list[torch.Tensor],
        given: list[torch.Tensor],
    ) -> Item:
        asked = [decode(context.tokenizer, question.ids[: question.answers[0][0]]).strip() for question in questions]
        shown = decode(context.tokenizer, prefix[-SHOWN:]) + "".join(
            f"\n[{number + 1}] {text}" for number, text in enumerate(asked)
        )
        expected, answered = (
            ", ".join(decode(context.tokenizer, ids.tolist()).strip() for ids in some) for some in (wanted, given)
        )
        return Item(prompt=shown[-SHOWN:], expected=expected[:SHOWN], given=answered[:SHOWN])

    def prompt(self, context: EvalContext, length: int, index: int) -> tuple[list[int], list[Prompt]]:
        """Ids of text number `index`, BOS included, and of each question with its answer, which ends it."""
        tokenizer, bos = context.tokenizer, bos_of(context)
        template = spelled(self.template, tokenizer)
        generator = np.random.default_rng([context.seed, length, index])
        facts = list(draw_facts(generator, self.questions, self.values).items())
        gap = lead(template)
        needles = [encode(tokenizer, gap + template.format(key=key, value=value), [])[0] for key, value in facts]
        questions = []
        for place in generator.permutation(len(facts)):
            text, spans = ask(template, [facts[place]])
            ids, found = encode(tokenizer, gap + text, [(start + len(gap), stop + len(gap)) for start, stop in spans])
            questions.append(Prompt(ids, found))
        room = length - len(bos) - sum(map(len, needles)) - max(len(question.ids) for question in questions)
        hay = hay_of(context.need_text("shared_context"), room, generator, f"shared_context@{length}")
        return bos + hide(hay, needles, np.sort(generator.random(len(needles))).tolist()), questions


def answers(model: Any, prefix: list[int], questions: list[Prompt]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Greedy answers to questions behind a text, and -log p of the right ones, each question with a cache of its own.

    Args:
        model: a causal LM of transformers.
        prefix: ids of the text.
        questions: each ends with its answer.

    Returns:
        (tokens of each answer, int64; -log p of the right ones, fp32, nats), on the CPU.
    """
    cache, _ = prefill(model, torch.tensor([prefix], device=model.device))
    given, nlls = [], []
    for question in questions:
        ((first, stop),) = question.answers
        ids = torch.tensor(question.ids)
        whole = torch.tensor([prefix + question.ids[:first]])
        given.append(generate(model, whole, stop - first, copy.deepcopy(cache))[0])
        nlls.append(cached_nll(model, copy.deepcopy(cache), ids, first))
    return given, nlls
