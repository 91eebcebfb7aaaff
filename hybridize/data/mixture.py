"""Several texts with weights, read as one.

Which text a row comes from is fixed for a window of rows and repeats, so that it follows from the row's number alone. No
prefix of rows is a whole row away from any text's share.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from hybridize.core import digest
from hybridize.data.documents import read_documents, source_files
from hybridize.data.stored import Progress, stored_tokens
from hybridize.data.tokens import Tokens, tokenize
from hybridize.errors import ConfigError

# Weights without a common denominator up to this are rounded to multiples of one over it.
LONGEST_WINDOW = 4096


@dataclass(frozen=True, kw_only=True, eq=False)
class Mixture:
    """Texts of one tokenizer, and how many rows come from each. Raises ConfigError for weights that give one no row."""

    names: tuple[str, ...]
    """What messages call them."""
    parts: tuple[Tokens, ...]
    weights: tuple[float, ...]
    """Share of the rows up to a common factor; above 0."""

    def __post_init__(self) -> None:
        if not self.parts:
            raise ConfigError("data: the mixture is empty, expected at least one source and its weight")
        for name, weight in zip(self.names, self.weights, strict=True):
            check_weight(name, weight)
        for name, count in zip(self.names, self.counts, strict=True):
            if count == 0:
                raise ConfigError(
                    f"data: the weight of {name} is below 1/{LONGEST_WINDOW} of the whole; leave it out or raise it"
                )

    @cached_property
    def counts(self) -> list[int]:
        """Rows of each text in a window."""
        exact = [Fraction(str(weight)) for weight in self.weights]
        shares = [weight / sum(exact) for weight in exact]
        window = math.lcm(*(share.denominator for share in shares))
        if window <= LONGEST_WINDOW:
            return [int(share * window) for share in shares]
        counts = [int(share * LONGEST_WINDOW) for share in shares]
        # Largest remainders, the first of equals.
        rest = sorted(range(len(shares)), key=lambda i: counts[i] - shares[i] * LONGEST_WINDOW)
        for index in rest[: LONGEST_WINDOW - sum(counts)]:
            counts[index] += 1
        return counts

    @cached_property
    def order(self) -> np.ndarray:
        """The text of each row of a window, [window], int64.

        For every n, a text has fewer than one row more or less than its share of the first n. A text's row number j (from 0)
        may come from row floor(j / share) + 1 on and must have come by row ceil((j + 1) / share); the most urgent one goes
        first, which always works out.

        Source: Steiner and Yeomans, Level Schedules for Mixed-Model, Just-in-Time Processes, Management Science 1993.
        """
        counts, window = self.counts, sum(self.counts)
        taken = [0] * len(counts)
        order = np.zeros(window, dtype=np.int64)
        for row in range(window):
            open_now = [i for i, count in enumerate(counts) if taken[i] * window < (row + 1) * count]
            order[row] = min(open_now, key=lambda i: -(-(taken[i] + 1) * window // counts[i]))
            taken[order[row]] += 1
        return order

    @cached_property
    def before(self) -> np.ndarray:
        """How many earlier rows of its window have the same text, of each row, [window], int64."""
        seen = np.zeros(len(self.parts), dtype=np.int64)
        before = np.zeros_like(self.order)
        for row, part in enumerate(self.order):
            before[row] = seen[part]
            seen[part] += 1
        return before

    def place(self, row: int) -> tuple[int, int]:
        """Where a row of the mixture, counted from 0, comes from: (the text's place, the row's number in that text)."""
        window, at = divmod(row, len(self.order))
        part = int(self.order[at])
        return part, window * self.counts[part] + int(self.before[at])

    @property
    def sha256(self) -> str:
        """Hash of the texts and their shares."""
        return digest([[part.sha256, count] for part, count in zip(self.parts, self.counts, strict=True)])

    @property
    def bos_id(self) -> int | None:
        return self.parts[0].bos_id

    @property
    def max_id(self) -> int:
        """The largest id."""
        return max(part.max_id for part in self.parts)


Sources = str | Path | Mapping[str, float]


def check_weight(name: str, weight: Any) -> None:
    """Raise a ConfigError unless a weight is a number above 0."""
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < math.inf:
        raise ConfigError(f"data: the weight of {name} is {weight!r}, expected a number above 0")


def weighted_sources(sources: Sources) -> dict[str, float]:
    """Sources with their weights; a single one has weight 1.

    Raises:
        ConfigError: no source, a weight that is not above 0, or a file that two of them name.
        DataError: no such file.
    """
    if not isinstance(sources, Mapping):
        return {str(sources): 1.0}
    if not sources:
        raise ConfigError("data: the mixture is empty, expected at least one source and its weight")
    seen: dict[str, str] = {}
    for source, weight in sources.items():
        check_weight(source, weight)
        for name in source_files(source):
            if name in seen:
                raise ConfigError(f"data: {name} is in the mixture twice, under {seen[name]!r} and {source!r}; expected it once")
            seen[name] = source
    return dict(sources)


def read_tokens(
    tokenizer: Any, sources: Sources, cache: Path | None = None, progress: Progress | None = None,
    documents: Callable[[str], Iterable[str]] = read_documents,
) -> Tokens | Mixture:  # fmt: skip
    """Sources as one tokenizer reads them.

    Args:
        tokenizer: of transformers.
        sources: one as `read_documents` takes it, or several with weights.
        cache: folder for tokens, see `stored_tokens`; None tokenises in memory.
        progress: called with (label, done, total).
        documents: what a source holds, read anew at each call.

    Returns:
        Tokens of a single source, else a Mixture.

    Raises:
        ConfigError: as `weighted_sources` does.
        DataError: a source that cannot be read or holds no text, or a damaged cache.
    """
    weights = weighted_sources(sources)
    parts = []
    for source in weights:
        read = partial(documents, source)
        parts.append(tokenize(tokenizer, read()) if cache is None else stored_tokens(tokenizer, read, cache, progress))
    if len(parts) == 1:
        return parts[0]
    return Mixture(names=tuple(weights), parts=tuple(parts), weights=tuple(weights.values()))
