"""Finding the metric that a gate or a table means."""

from hybridize.core import Metric, Report
from hybridize.errors import ConfigError
from hybridize.registry import suggest


def family(report: Report, name: str) -> dict[int, str]:
    """Metrics `name@N` of a report, by N."""
    found = {}
    for metric in report.metrics:
        head, at, tail = metric.rpartition("@")
        if at and head == name and tail.isdigit():
            found[int(tail)] = metric
    return found


def resolve(name: str, reports: dict[str, Report]) -> str:
    """The full name of a metric that all `reports` hold: as given, or `name@N` with the largest N they share.

    Args:
        name: such as "perplexity" or "state_bytes".
        reports: by the word that an error calls them.

    Raises:
        ConfigError: a report lacks it; the message lists what that report has.
    """
    if all(name in report.metrics for report in reports.values()):
        return name
    shared = set.intersection(*(set(family(report, name)) for report in reports.values()))
    if shared:
        return f"{name}@{max(shared)}"
    for word, report in reports.items():
        if name not in report.metrics and not family(report, name):
            raise ConfigError(f"metric {name!r} is not in the {word}. {suggest(name, sorted(report.metrics))}")
    raise ConfigError(f"metric {name!r} is at no length that both {' and '.join(reports)} have; measure both alike")


def resolve_all(name: str, reports: dict[str, Report]) -> list[str]:
    """As `resolve`; `name@*` is every `name@N` that all reports hold, by N. Raises ConfigError where there is none."""
    if not name.endswith("@*"):
        return [resolve(name, reports)]
    found = [family(report, name.removesuffix("@*")) for report in reports.values()]
    shared = sorted(set.intersection(*map(set, found)))
    if not shared:
        resolve(name.removesuffix("@*"), reports)
        raise ConfigError(f"metric {name!r} is at no length in {' and '.join(reports)}; leave the @* away")
    return [found[0][length] for length in shared]


def metric(report: Report, name: str) -> tuple[str, Metric]:
    """A metric of one report and its full name. Raises ConfigError as `resolve`."""
    full = resolve(name, {"report": report})
    return full, report.metrics[full]
