"""The score verb: metrics of a base, layer by layer, for a plan that reads no weights."""

from collections.abc import Callable
from typing import Any

from hybridize.checkpoint import Checkpoint
from hybridize.conversions.plan import candidates_of
from hybridize.conversions.scores import SCORES
from hybridize.core import Scores, ScoreTable
from hybridize.data import Tokens
from hybridize.errors import ConfigError

Progress = Callable[[str, float, float], None]


def score(
    base: Checkpoint,
    metrics: list[dict[str, Any]],
    text: Tokens | None = None,
    section: dict[str, Any] | None = None,
    progress: Progress | None = None,
) -> Scores:
    """Measure a base layer by layer.

    Args:
        base: the validated base.
        metrics: {"name": ..., **options} each.
        text: tokens of the base's tokenizer, for metrics that need text.
        section: a recipe's `plan`, whose mixers are the candidates; None is every mixer that a metric is about, at its defaults.
        progress: called with ("score <metric>", steps done, steps).

    Returns:
        One table for each metric.

    Raises:
        ConfigError: an unknown metric or option, one that is asked for twice, or no text for one that needs it.
    """
    if not metrics:
        raise ConfigError(f"score: got no metric, expected at least one of {', '.join(SCORES.names())}")
    built = [(spec["name"], SCORES.build(spec)) for spec in metrics]
    names = [name for name, _ in built]
    for name, metric in built:
        if names.count(name) > 1:
            raise ConfigError(f"score: metric {name} is asked for twice. Ask once")
        if metric.needs_text and text is None:
            raise ConfigError(f"score: metric {name} is measured on text. Give --data TEXT")
    candidates = None if section is None else candidates_of(section, base.config.num_hidden_layers)
    tables = []
    for name, metric in built:

        def advance(done: int, steps: int, label: str = f"score {name}") -> None:
            if progress is not None:
                progress(label, done, steps)

        rows = metric(base, text, candidates, advance)
        used = text.sha256 if metric.needs_text and text is not None else None
        tables.append(ScoreTable(metric=SCORES.spec(name, metric), text=used, rows=rows))
    return Scores(base=str(base.path), base_hash=base.config_hash, tables=tuple(tables))
