"""Cache bytes of one sequence, by context length."""

from dataclasses import dataclass, field

from hybridize.cache import cache_bytes
from hybridize.checkpoint import open_checkpoint
from hybridize.core import Metric
from hybridize.errors import ConfigError
from hybridize.eval.context import EvalContext, ProbeResult
from hybridize.eval.timing import prefill, random_ids
from hybridize.modeling import state_bytes


@dataclass(frozen=True, kw_only=True)
class StateBytes:
    """Bytes in the checkpoint's own dtype, by formula; the formula is held against a real cache first."""

    contexts: list[int] = field(default_factory=lambda: [1024, 8192, 32768])
    """Context lengths, in tokens; each gives `state_bytes@T`."""
    check_tokens: int = 1024
    """Length of the real cache; at most the shortest of `contexts`."""

    def __post_init__(self) -> None:
        if not self.contexts or min([*self.contexts, self.check_tokens]) < 1:
            raise ConfigError("contexts and check_tokens must be at least 1")

    def __call__(self, context: EvalContext) -> ProbeResult:
        """Measure.

        Raises:
            AssertionError: the formula and a real cache disagree, which is a bug of a mixer.
        """
        model = context.model
        tokens = min(self.check_tokens, *self.contexts)
        cache, _ = prefill(model, random_ids(model, 1, tokens, context.seed))
        held, promised = cache_bytes(cache), state_bytes(model.config, tokens)
        assert held == promised, f"{context.checkpoint}: a cache of {tokens} tokens holds {held} bytes, promised {promised}"
        stored = open_checkpoint(context.checkpoint).config
        return ProbeResult(
            metrics={
                f"state_bytes@{length}": Metric(value=state_bytes(stored, length), unit="bytes", samples=1)
                for length in self.contexts
            }
        )
