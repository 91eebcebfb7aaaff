"""What a probe is given and what it gives back."""

import functools
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hybridize.core import Metric
from hybridize.data import Tokens
from hybridize.errors import ConfigError

Progress = Callable[[str, float, float], None]


@dataclass(frozen=True, kw_only=True)
class Item:
    """One item of a probe as a person would read it."""

    prompt: str
    """The end of what the model was shown."""
    expected: str
    given: str
    """What the model answered; where answers are only scored, the one it holds most likely, or nothing."""


@dataclass(frozen=True, kw_only=True)
class ProbeResult:
    """What one probe measured."""

    metrics: dict[str, Metric]
    samples: dict[str, list[float]] = field(default_factory=dict)
    """Per-item scores by metric name, in item order; their mean is the metric, or decides it."""
    item_hashes: dict[str, str] = field(default_factory=dict)
    """By metric name: hash of the items, for every metric with samples."""
    items: dict[str, list[Item]] = field(default_factory=dict)
    """By metric name, where a person can read them: as many as samples, in the same order."""
    versions: dict[str, str] = field(default_factory=dict)
    """Other software the numbers depend on."""


@dataclass(kw_only=True)
class EvalContext:
    """One checkpoint under test, loaded, and what it is measured with."""

    checkpoint: Path
    model: Any
    tokenizer: Any
    """None for a checkpoint without one."""
    text: Tokens | None = None
    """The held-out text."""
    load_base: Callable[[], Any] | None = None
    """Loads the base model; called at most once, and not at all when no probe asks for it."""
    seed: int = 0
    limit: int | None = None
    """At most so many items (blocks, prompts, documents) in each probe."""
    progress: Progress | None = None
    accelerator: Any = None
    """The processes that measure together, as Accelerate knows them; None for one alone."""
    answers: Path | None = None
    """Folder for what this very model answers, on this device and these versions; None keeps nothing."""

    @functools.cached_property
    def base(self) -> Any:
        """The base model. Raises ConfigError when none was given."""
        if self.load_base is None:
            raise ConfigError("eval: a probe compares with the base, got no base. Name it with --base")
        return self.load_base()

    @property
    def rank(self) -> int:
        """Number of this process; probes that are not divided run in 0 alone."""
        return 0 if self.accelerator is None else self.accelerator.process_index

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def bos_id(self) -> int | None:
        """Id of BOS; without a tokenizer, what the config says."""
        return self.model.config.bos_token_id if self.tokenizer is None else self.tokenizer.bos_token_id

    @property
    def usual_tokens(self) -> int:
        """Tokens of a block where none are asked for: at most 1024, and the base's context where the model's was stretched."""
        return min(self.trained_tokens, 1024)

    @property
    def trained_tokens(self) -> int:
        """The longest context that the model was trained for; its base's where it was stretched, so that both are asked alike."""
        config = self.model.config
        original = (config.rope_parameters or {}).get("original_max_position_embeddings", config.max_position_embeddings)
        return min(config.max_position_embeddings, original)

    def need_text(self, probe: str) -> Tokens:
        if self.text is None:
            raise ConfigError(f"eval: probe {probe!r} reads held-out text, got none. Name a file with --data")
        return self.text

    def need_tokenizer(self, probe: str) -> Any:
        if self.tokenizer is None:
            raise ConfigError(f"{self.checkpoint}: probe {probe!r} needs the tokenizer, found none; expected tokenizer.json")
        return self.tokenizer

    def need_context(self, probe: str, tokens: int) -> None:
        """Raise ConfigError for more tokens than the model has positions for."""
        known = self.model.config.max_position_embeddings
        if tokens > known:
            raise ConfigError(
                f"eval: probe {probe!r} asks for {tokens} tokens, {self.checkpoint} has "
                f"max_position_embeddings {known}; ask for fewer"
            )

    def tell(self, label: str, done: float, total: float) -> None:
        if self.progress is not None:
            self.progress(label, done, total)


def merged(results: list[ProbeResult]) -> ProbeResult:
    """Several results as one; their metrics differ in name."""
    return ProbeResult(
        metrics={name: metric for result in results for name, metric in result.metrics.items()},
        samples={name: scores for result in results for name, scores in result.samples.items()},
        item_hashes={name: text for result in results for name, text in result.item_hashes.items()},
        items={name: items for result in results for name, items in result.items.items()},
        versions={name: version for result in results for name, version in result.versions.items()},
    )


def item_hash(items: Tensor | list[str]) -> str:
    """sha256 of the items of a probe: token ids (int64), or texts."""
    if isinstance(items, Tensor):
        return hashlib.sha256(items.cpu().numpy().tobytes()).hexdigest()
    return hashlib.sha256("\0".join(items).encode()).hexdigest()


def mean_metric(values: list[float], unit: str, higher_is_better: bool) -> Metric:
    """The mean of independent items with its standard error; None for a single item, which has none."""
    samples = torch.tensor(values, dtype=torch.float64)
    stderr = (samples.std() / len(values) ** 0.5).item() if len(values) > 1 else None
    return Metric(value=samples.mean().item(), stderr=stderr, unit=unit, higher_is_better=higher_is_better, samples=len(values))
