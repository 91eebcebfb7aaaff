"""Associative recall: pairs are shown, then each key is asked for again."""

from dataclasses import dataclass, field

import numpy as np
import torch

from hybridize.core import Metric
from hybridize.errors import ConfigError
from hybridize.eval.context import EvalContext, ProbeResult, item_hash, mean_metric
from hybridize.eval.prompts import WORDS, check_template, draw_facts, encode
from hybridize.eval.scoring import batches, hits


@dataclass(frozen=True, kw_only=True)
class Recall:
    """Share of keys whose whole value is the model's greedy choice, with `pairs` facts in sight (arXiv 2312.04927)."""

    pairs: list[int] = field(default_factory=lambda: [8])
    """Facts in a prompt; each number N gives `recall@N`."""
    samples: int = 64
    """Prompts for each number of pairs; the independent items of the standard error."""
    queries: int = 8
    """Keys asked for in a prompt, at most its pairs. A later one sees the answers of earlier ones, of other keys."""
    template: str = "{key} = {value}\n"
    """One fact, and one question with its answer."""
    batch_tokens: int = 4096
    """Tokens in one forward pass."""

    def __post_init__(self) -> None:
        check_template(self.template)
        if not self.pairs or not all(1 <= count <= len(WORDS) for count in self.pairs):
            raise ConfigError(f"pairs is {self.pairs}, expected numbers from 1 to {len(WORDS)}")
        if self.samples < 1 or self.queries < 1:
            raise ConfigError(f"samples is {self.samples} and queries {self.queries}, expected at least 1")

    def __call__(self, context: EvalContext) -> ProbeResult:
        """Measure, by one teacher-forced pass over each prompt with its answers.

        Returns:
            `recall@N`: accuracy with its stderr over prompts; samples are each prompt's accuracy.

        Raises:
            ConfigError: no tokenizer, one that cannot spell the template, or a prompt longer than the model's context.
        """
        metrics: dict[str, Metric] = {}
        samples: dict[str, list[float]] = {}
        hashes: dict[str, str] = {}
        for count in self.pairs:
            name = f"recall@{count}"
            samples[name], texts = self._accuracies(context, count)
            metrics[name] = mean_metric(samples[name], "share of values", True)
            hashes[name] = item_hash(texts)
        return ProbeResult(metrics=metrics, samples=samples, item_hashes=hashes)

    def prompt(self, seed: int, count: int, index: int) -> tuple[str, list[tuple[int, int]]]:
        """Text of one prompt, and where each asked value stands in it, in characters."""
        generator = np.random.default_rng([seed, count, index])
        facts = draw_facts(generator, count)
        text = "".join(self.template.format(key=key, value=value) for key, value in facts.items())
        spans = []
        for key in generator.permutation(np.array(list(facts)))[: self.queries]:
            start = len(text) + len(self.template.split("{value}")[0].format(key=key))
            spans.append((start, start + len(facts[key])))
            text += self.template.format(key=key, value=facts[key])
        return text, spans

    def _accuracies(self, context: EvalContext, count: int) -> tuple[list[float], list[str]]:
        tokenizer = context.need_tokenizer("recall")
        bos = [] if context.bos_id is None else [context.bos_id]
        rows, places, texts = [], [], []
        for index in range(min(self.samples, context.limit or self.samples)):
            text, spans = self.prompt(context.seed, count, index)
            ids, found = encode(tokenizer, text, spans)
            texts.append(text)
            rows.append(torch.tensor(bos + ids))
            places.append([(first + len(bos), stop + len(bos)) for first, stop in found])
        # Padding on the right is out of sight of everything that is scored.
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        context.need_context(f"recall with {count} pairs", ids.shape[1])
        accuracies: list[float] = []
        for part in batches(ids, self.batch_tokens):
            for right in hits(context.model, part):
                # Entry t - 1 of `right` is about token t.
                asked = [bool(right[first - 1 : stop - 1].all()) for first, stop in places[len(accuracies)]]
                accuracies.append(sum(asked) / len(asked))
            context.tell(f"recall@{count}", len(accuracies), len(ids))
        return accuracies, texts
