"""The verb that publishes: push."""

from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from hybridize.cli import shared
from hybridize.cli.shared import cli
from hybridize.errors import ConfigError


@cli.command()
def push(
    what: Annotated[Path, typer.Argument(metavar="DIR", help="A hybrid, its export, a run's WORKDIR, scores.json or plan.json.")],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="On the Hub: owner/name.")],
    report: Annotated[Optional[Path], typer.Option(help="What was measured on these weights.")] = None,  # noqa: UP045
    baseline: Annotated[Optional[Path], typer.Option(help="What was measured on the base.")] = None,  # noqa: UP045
    verdict: Annotated[Optional[Path], typer.Option(help="What the gates said of that report.")] = None,  # noqa: UP045
    run: Annotated[Optional[Path], typer.Option(metavar="WORKDIR", help="Take these three and the recipe from a run.")] = None,  # noqa: UP045
    without_verdict: Annotated[bool, typer.Option("--without-verdict", help="Publish unjudged; the card says so.")] = False,
    license_: Annotated[Optional[str], typer.Option("--license", help="The base's, where no file says it: apache-2.0.")] = None,  # noqa: UP045
    base_model: Annotated[Optional[str], typer.Option(help="The base, where lineage.json names none: owner/name.")] = None,  # noqa: UP045
    teacher_license: Annotated[Optional[str], typer.Option(help="Of a teacher other than the base, as --license.")] = None,  # noqa: UP045
    data_license: Annotated[Optional[str], typer.Option(help="Of the text it was trained on, for the card.")] = None,  # noqa: UP045
    public: Annotated[bool, typer.Option("--public", help="For all to see; private otherwise.")] = False,
    revision: Annotated[Optional[str], typer.Option(metavar="BRANCH", help="Not the main branch.")] = None,  # noqa: UP045
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the files, print the card; touch no network.")] = False,
) -> None:
    """Publish a hybrid on the Hub, with its card.

    Needs a passed verdict of these very weights. Weights go first, then one commit shows everything at once; called again after
    it was cut, it sends nothing twice. The token is that of `hf auth login`, or HF_TOKEN.
    """
    from hybridize.hub import Evidence, Statement, bundle_document, bundle_model

    if what.is_file():
        given = [report, baseline, verdict, run, license_, base_model, teacher_license, data_license]
        if any(value is not None for value in given) or without_verdict:
            raise ConfigError(f"push: {what} is scores or a plan, which takes none of the options for models; leave them out")
        bundle = bundle_document(what, repo)
    else:
        folder, found = _documents(what, run, {"report": report, "baseline": baseline, "verdict": verdict})
        said = Statement(licence=license_, base_model=base_model, teacher_licence=teacher_license, data_licence=data_license)
        bundle = bundle_model(folder, repo, Evidence(**found, waived=without_verdict), said)
    rows = [["file", "bytes", "from"], *([file.name, f"{file.size:,}", file.origin] for file in bundle.files)]
    shared.screen.table(rows, f"{repo} ({'public' if public else 'private'}), {sum(file.size for file in bundle.files):,} bytes")
    if bundle.left_out:
        shared.screen.say(f"stays here, as no lineage lists it: {', '.join(bundle.left_out)}")
    files = [{"name": file.name, "bytes": file.size, "from": file.origin} for file in bundle.files]
    result: dict[str, Any] = {"repo": repo, "dry_run": dry_run, "private": not public, "files": files,
                              "left_out": list(bundle.left_out), "card": bundle.card}  # fmt: skip
    if dry_run:
        shared.screen.say(f"\n{bundle.card}" if bundle.card is not None else "no card: what is there keeps its own")
        shared.screen.result(result)
        return
    shared.screen.result({**result, **_send(bundle, public, revision)})


def publish_run(work: Path, section: Any) -> dict[str, Any]:
    """Publish what a run made, as its recipe's `push` says; what `push --json` says of the sending.

    Raises:
        HybridizeError: as `push`.
    """
    from hybridize.hub import Evidence, Statement, bundle_model

    folder, found = _documents(work, None, {"report": None, "baseline": None, "verdict": None})
    said = Statement(licence=section.license, base_model=section.base_model, teacher_licence=section.teacher_license,
                     data_licence=section.data_license)  # fmt: skip
    return _send(bundle_model(folder, section.repo, Evidence(**found, waived=False), said), section.public, None)


def _send(bundle: Any, public: bool, revision: str | None) -> dict[str, Any]:
    from hybridize.hub import push as send

    done = send(bundle, public=public, revision=revision, progress=shared.screen.progress)
    for name in done.removed:
        shared.screen.say(f"removed {name}, of an earlier push")
    shared.screen.say(f"pushed to {done.url} ({'private' if done.private else 'public'}, {done.revision}, commit {done.commit})")
    return {"url": done.url, "commit": done.commit, "revision": done.revision, "private": done.private,
            "removed": list(done.removed)}  # fmt: skip


def _documents(what: Path, run: Path | None, given: dict[str, Path | None]) -> tuple[Path, dict[str, Any]]:
    """The directory to publish, and report, baseline, verdict and recipe as far as they are there."""
    from hybridize.core import Report, Verdict
    from hybridize.errors import CheckpointError
    from hybridize.lineage import is_complete

    folder, work = what, run
    if not what.is_dir():
        raise CheckpointError(f"{what}: no such directory or file; expected a hybrid, a run's directory, scores or a plan")
    if not (what / "config.json").exists() and (what / "plan.json").is_file():
        if run is not None:
            raise ConfigError(f"push: {what} is a run's directory itself; leave --run out")
        work = what
        folder = what / ("distilled" if is_complete(what / "distilled") else "converted")
    names = {"report": "report.json", "baseline": "report-base.json", "verdict": "verdict.json"}
    if work is not None:
        if not (work / "plan.json").is_file():
            raise CheckpointError(f"{work}: holds no plan.json; expected the directory of `hybridize run`")
        given = {key: path or (work / names[key] if (work / names[key]).is_file() else None) for key, path in given.items()}
    kinds = {"report": Report, "baseline": Report, "verdict": Verdict}
    found: dict[str, Any] = {key: None if path is None else kinds[key].read(path) for key, path in given.items()}
    recipe = None if work is None else work / "recipe.yaml"
    found["recipe"] = recipe.read_text(encoding="utf-8") if recipe is not None and recipe.is_file() else None
    return folder, found
