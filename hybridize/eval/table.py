"""The before/after table."""

from hybridize.core import Metric, Report, human_bytes, show

__all__ = ["ORDER", "compares_with_base", "comparison_table", "head_of", "human_bytes", "name_order", "over", "show"]

# Rows come in this order; what is not named here follows by name.
ORDER = (
    "perplexity", "bits_per_byte", "kl_to_base", "top1_agreement", "greedy_agreement", "recall", "needle", "needle_multikey",
    "needle_multivalue", "needle_multiquery", "tracking", "threading", "passkey", "copying", "induction", "procedure",
    "shared_context",
)  # fmt: skip
# These say how near a model is to the base; the base's own are given.
AGAINST_BASE = ("kl_to_base", "top1_agreement", "greedy_agreement")
# And these come last.
LAST = (
    "state_bytes", "prefill_tokens_per_s", "prefill_speedup", "decode_tokens_per_s", "decode_speedup",
)  # fmt: skip


def compares_with_base(name: str) -> bool:
    """Whether a metric is about the distance from the base, so that base and student are not to be compared by it."""
    return name.split("@")[0] in AGAINST_BASE


def head_of(name: str) -> str:
    """The family of a metric: "recall" of "recall@8" and of "recall_nll@8"; a name without a length is its own."""
    head, at, tail = name.rpartition("@")
    return head.removesuffix("_nll") if at and tail.isdigit() else name


def name_order(name: str) -> tuple[int, str, int]:
    """Where a metric stands among others, for sorting: ORDER, then others by name, then LAST; each by its length."""
    head, at, tail = name.rpartition("@")
    head, length = (head, int(tail)) if at and tail.isdigit() else (name, 0)
    # How likely the answers were comes right after how many were right.
    first = head.removesuffix("_nll")
    if head in LAST:
        return len(ORDER) + 1 + LAST.index(head), head, length
    return (ORDER.index(first) if first in ORDER else len(ORDER)), head, length


def over(first: Metric | None, last: Metric | None) -> str:
    """One over the other; a dash where one is absent, and for speeds, which were measured at different times."""
    if first is None or last is None or first.value == 0 or last.unit == "tokens/s":
        return "-"
    return f"{last.value / first.value:.4g}"


def comparison_table(reports: dict[str, Report]) -> list[list[str]]:
    """Reports side by side.

    Args:
        reports: by column name, in column order, such as base, converted, distilled.

    Returns:
        Rows of text, the heading first: metric, one column for each report, and with more than one report the ratio of
        the last to the first. What a report does not have is a dash.
    """
    columns = list(reports)
    heading = ["metric", *columns] + ([f"{columns[-1]} / {columns[0]}"] if len(columns) > 1 else [])
    rows = [heading]
    for name in sorted({name for report in reports.values() for name in report.metrics}, key=name_order):
        found = [report.metrics.get(name) for report in reports.values()]
        row = [name, *("-" if metric is None else show(metric) for metric in found)]
        if len(columns) > 1:
            row.append(over(found[0], found[-1]))
        rows.append(row)
    return rows
