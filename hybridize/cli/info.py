"""The verb that says what a directory is."""

from typing import Annotated, Any

import typer

from hybridize.cli import shared
from hybridize.cli.shared import cli


@cli.command()
def info(checkpoint: Annotated[str, typer.Argument(metavar="DIR", help="Directory, hub id or alias.")]) -> None:
    """Say what a checkpoint is and what its cache costs.

    Family, layers, mixers, parameters, context, cache bytes at several lengths, and the native class that would fit.
    """
    from hybridize.checkpoint import describe
    from hybridize.eval.table import human_bytes
    from hybridize.hub import resolve_base
    from hybridize.modeling import state_bytes
    from hybridize.native import native_verdict

    found = describe(resolve_base(checkpoint, weights=False))
    if found.is_native:
        _exported(found)
        return
    mixers = found.config.mixers if found.is_hybrid else [{"name": "attention"}] * found.config.num_hidden_layers
    parameters = 0
    for shape in found.shapes.values():
        count = 1
        for size in shape:
            count *= size
        parameters += count
    if found.config.tie_word_embeddings and "lm_head.weight" in found.shapes:
        parameters -= found.config.vocab_size * found.config.hidden_size
    value = {
        "path": str(found.path), "family": found.family, "hybrid": found.is_hybrid,
        "dtype": str(found.dtype).removeprefix("torch."),
        "layers": len(mixers), "mixers": [spec["name"] for spec in mixers], "parameters": parameters,
        "context": found.config.max_position_embeddings, "rope": dict(found.config.rope_parameters),
        "state_bytes": {str(t): state_bytes(found.config, t) for t in (1024, 32768, 131072)},
        "native": native_verdict(found.config, mixers),
    }  # fmt: skip
    counts = {name: value["mixers"].count(name) for name in dict.fromkeys(value["mixers"])}
    shared.screen.table(
        [
            ["", ""], ["family", f"{found.family} ({'hybrid' if found.is_hybrid else 'base'}, {value['dtype']})"],
            ["layers", f"{len(mixers)}: " + ", ".join(f"{n} {name}" for name, n in counts.items())],
            ["parameters", f"{parameters:,}"],
            ["context", f"{value['context']:,} tokens (rope_type {value['rope']['rope_type']})"],
            *([f"state at {t} tokens", human_bytes(n)] for t, n in value["state_bytes"].items()),
        ],
        str(found.path),
    )  # fmt: skip
    shared.show_engines(value["native"])
    shared.screen.result(value)


def _exported(found: Any) -> None:
    """What a native export says of itself, and its lineage of the hybrid."""
    from hybridize.lineage import read_lineage

    lineage = read_lineage(found.path)
    worst = max((proof["max_difference"] for proof in lineage["proof"] if proof["text"] != "left-padded"), default=None)
    value = {
        "path": str(found.path), "family": found.family, "hybrid": False, "dtype": str(found.dtype).removeprefix("torch."),
        "layers": found.config.num_hidden_layers, "exported_from": lineage["of"]["name"], "base": lineage["base"].get("name"),
        "largest_logit_difference": worst, "approximate": lineage.get("approximate"),
    }  # fmt: skip
    shared.screen.table(
        [["", ""], *([name.replace("_", " "), str(said)] for name, said in list(value.items())[1:])], str(found.path)
    )
    shared.screen.say(
        f"a class of transformers: it needs no hybridize. What its cache costs: hybridize info {lineage['of']['name']}"
    )
    shared.screen.result(value)
