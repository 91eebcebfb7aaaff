"""Speed against the base, in one run."""

import statistics
from dataclasses import dataclass, field

from hybridize.core import Metric
from hybridize.errors import ConfigError
from hybridize.eval.context import EvalContext, ProbeResult
from hybridize.eval.timing import race


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Prefill and decode tokens per second; with a base, the ratios too. Lengths may exceed the trained context."""

    contexts: list[int] = field(default_factory=lambda: [1024, 8192])
    """Tokens in the cache when decoding begins."""
    batch: int = 1
    """Sequences at once."""
    new_tokens: int = 16
    """Decode steps in a round."""
    repeats: int = 5
    """Rounds of decoding; base and checkpoint take turns in each."""
    prefills: int = 2
    """Rounds of prefilling."""

    def __post_init__(self) -> None:
        if not self.contexts or min([*self.contexts, self.batch, self.new_tokens, self.repeats, self.prefills]) < 1:
            raise ConfigError("contexts, batch, new_tokens, repeats and prefills must be at least 1")

    def __call__(self, context: EvalContext) -> ProbeResult:
        """Measure.

        Returns:
            `prefill_tokens_per_s@T` and `decode_tokens_per_s@T`; with a base other than the checkpoint itself also
            `prefill_speedup@T` and `decode_speedup@T`. Values are medians over rounds, a ratio is taken within a round;
            stderr is that of a median, from the spread over rounds.
        """
        models = {"model": context.model}
        if context.load_base is not None and context.base is not context.model:
            models["base"] = context.base
        metrics: dict[str, Metric] = {}
        for tokens in self.contexts:
            times = race(models, tokens, self.batch, self.new_tokens, self.repeats, self.prefills, context.progress)
            for what, work in (("prefill", self.batch * tokens), ("decode", self.batch)):
                ours = times["model"][f"{what}_s"]
                metrics[f"{what}_tokens_per_s@{tokens}"] = _median([work / s for s in ours], "tokens/s")
                if "base" in models:
                    pairs = zip(times["base"][f"{what}_s"], ours, strict=True)
                    metrics[f"{what}_speedup@{tokens}"] = _median([base / own for base, own in pairs], "x the base")
        return ProbeResult(metrics=metrics)


def _median(values: list[float], unit: str) -> Metric:
    # The standard error of a median of roughly normal values is sqrt(pi / 2) of the mean's.
    stderr = 1.2533 * statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    return Metric(value=statistics.median(values), stderr=stderr, unit=unit, higher_is_better=True, samples=len(values))
