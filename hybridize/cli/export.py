"""The verb that turns a hybrid into a class that transformers already has."""

import dataclasses
from typing import Annotated, Any

import typer

from hybridize.cli import shared
from hybridize.cli.shared import DirArg, OutOpt, ResumeOpt, TextOpt, cli


@cli.command()
def export(
    checkpoint: DirArg,
    out: OutOpt,
    to: Annotated[str, typer.Option("--to", metavar="CLASS", help="A native class, or auto: the first that fits.")] = "auto",
    data: TextOpt = None,
    allow_approximate: Annotated[
        bool, typer.Option("--allow-approximate", help="Keep an export whose logits differ, and say by how much.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, write nothing.")] = False,
    resume: ResumeOpt = False,
) -> None:
    """Write a hybrid as a class that transformers has, where one computes the same; what it writes loads without hybridize.

    The logits of both are compared, on random tokens and on text (--data, or Python's own help), before the output appears.

    `hybridize info DIR` says which classes fit, and which engines serve them.
    """
    from hybridize.checkpoint import open_checkpoint
    from hybridize.hub import resolve_base
    from hybridize.native import native_verdict
    from hybridize.native.export import export as run_export

    found = open_checkpoint(resolve_base(checkpoint))
    texts = {} if dry_run else _texts(found, data)
    summary = run_export(found.path, to, out, resume, dry_run, allow_approximate, texts, shared.screen.progress)
    rows = [["compared on", "tokens", "largest logit difference", "logits' rms", "KL, nats", "same top-1"]]
    for proof in summary.proof:
        rows.append([proof.text, f"{proof.tokens:,}", f"{proof.max_difference:.2e}", f"{proof.logit_rms:.3g}",
                     f"{proof.kl:.2e}", f"{proof.same_top1:.2%}"])  # fmt: skip
    if summary.proof:
        shared.screen.table(rows, f"{summary.target} against the hybrid, fp32")
    done = "would write" if dry_run else "wrote"
    shared.screen.say(
        f"{done} {out}: {summary.target}, {summary.tensors} tensors, {summary.bytes:,} bytes in {summary.shards} shards"
    )
    verdict: dict[str, Any] = native_verdict(found.config, found.config.mixers, summary.target)
    shared.show_engines(verdict)
    shared.screen.result({**{key: str(value) if key == "out" else value for key, value in dataclasses.asdict(summary).items()},
                          "dry_run": dry_run, "engines": verdict["engines"]})  # fmt: skip


def _texts(found: Any, data: str | None) -> dict[str, Any]:
    """The real text to compare on, as token ids; none for a checkpoint without a tokenizer."""
    import torch

    from hybridize.data import read_tokens
    from hybridize.data.same_tokenizer import load_tokenizer, tokenizer_file
    from hybridize.errors import ConfigError
    from hybridize.native.proof import ROWS, sequence_tokens

    if data is None and tokenizer_file(found.path) is None:
        return {}
    tokenizer, length = load_tokenizer(found.path), sequence_tokens(found.config)
    if data is None:
        from pydoc_data.topics import topics

        ids = tokenizer("\n\n".join(topics[name] for name in sorted(topics)), add_special_tokens=False)["input_ids"]
        name = "Python's help"
    else:
        tokens: Any = read_tokens(tokenizer, data)
        ids, name = tokens.ids[: ROWS * length].tolist(), "given"
    rows = len(ids) // length
    if rows == 0:
        raise ConfigError(f"--data has {len(ids)} tokens, expected at least {length}: a sequence as long as the context needs")
    return {name: torch.tensor(ids[: min(ROWS, rows) * length]).view(-1, length)}
