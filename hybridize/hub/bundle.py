"""What a push uploads, settled before anything is sent: which files, whose verdict, whose licence, and the card."""

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from hybridize.checkpoint import Checkpoint, open_checkpoint
from hybridize.core import Plan, Report, Verdict, digest
from hybridize.errors import CheckpointError, ConfigError, GateFailedError
from hybridize.fingerprint import weights_hash
from hybridize.hub.card import LENGTHS, Facts, card, plan_of, result_files
from hybridize.hub.fetch import demo_model
from hybridize.hub.layer_map import NAME as PICTURE
from hybridize.hub.layer_map import layer_map
from hybridize.hub.licences import (
    Licence,
    Terms,
    card_licence,
    check_name,
    describe_search,
    licence_files,
    notice,
    repo_licence,
    settle,
    text_licence,
)  # fmt: skip
from hybridize.hub.published import published, published_lineage
from hybridize.lineage import LINEAGE, is_complete, read_lineage
from hybridize.modeling import hybrid_config, mixer_options, state_bytes
from hybridize.native import native_verdict, target
from hybridize.redact import holds_secret, known_secrets, scrub
from hybridize.shards import parse_json, read_header
from hybridize.storage import file_sha256, to_json
from hybridize.untrusted import inside, read_small

log = logging.getLogger(__name__)

# The length at which the card's picture compares layers.
PICTURE_TOKENS = 32768
# No text, config or tokenizer is larger; a file that is, is not looked through and not sent.
TEXT_BYTES = 1 << 30


@dataclass(frozen=True, kw_only=True)
class Upload:
    """One file of a push."""

    name: str
    """Its path in the repository."""
    source: Path | bytes
    origin: str
    """Where it comes from, in words."""

    @property
    def size(self) -> int:
        return len(self.source) if isinstance(self.source, bytes) else self.source.stat().st_size

    @property
    def content(self) -> bytes | str:
        """As huggingface_hub takes it: the bytes, or the true path of the file."""
        return self.source if isinstance(self.source, bytes) else str(self.source.resolve())


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """A push settled to the byte."""

    repo: str
    files: tuple[Upload, ...]
    card: str | None
    """None for scores and plans."""
    left_out: tuple[str, ...]
    """Files of the directory that no lineage lists; they stay here."""
    what: str
    """For the commit's message."""


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What was measured and judged."""

    report: Report | None = None
    baseline: Report | None = None
    verdict: Verdict | None = None
    recipe: str | None = None
    """YAML."""
    waived: bool = False
    """Publish without a passed verdict, and say so."""


@dataclass(frozen=True, kw_only=True)
class Statement:
    """What the publisher says where files do not."""

    licence: str | None = None
    base_model: str | None = None
    teacher_licence: str | None = None
    data_licence: str | None = None


def check_repo(repo: str) -> None:
    """Refuse what cannot be owner/name on the Hub. Raises ConfigError, without what looks like a token."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    shown = scrub(repo)
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ConfigError(f"{shown}: is no name of a repository, expected owner/name of letters, digits, - _ and .") from error
    if repo.count("/") != 1:
        raise ConfigError(f"{shown}: names no owner, expected owner/name such as me/{shown}")
    if shown != repo:
        raise ConfigError(f"{shown}: holds what looks like a token, expected owner/name")


def bundle_model(folder: Path, repo: str, evidence: Evidence, said: Statement) -> Bundle:
    """Everything that a push of a hybrid, or of its export to a native class, uploads. Touches no network.

    Args:
        folder: the directory; complete, its files as its lineage lists them.
        repo: owner/name.
        evidence: the verdict has to have passed and be of these weights, but for `waived`.
        said: licences and names that no file says.

    Raises:
        CheckpointError: the directory is not ours, not whole, or was changed.
        GateFailedError: no verdict, one that did not pass, or one of other weights.
        ConfigError: a wrong name, by the Hub's rules or the licence's; an unknown licence; a token in a file.
    """
    check_repo(repo)
    if not is_complete(folder):
        raise CheckpointError(f"{folder}: has no lineage.json, expected a hybrid or export of hybridize that is complete")
    lineage = read_lineage(folder)
    hashes = _verified(folder, lineage)
    of = lineage.get("of") or {}
    found = None if lineage.get("verb") == "export" else _opened(folder)
    hybrid = lineage if found is not None else of.get("lineage") or {}
    # What a verdict names these weights by; an export's is its hybrid's.
    _check_evidence(folder, evidence, of.get("weights") if found is None else weights_hash(found, hashes), lineage)
    base = _local_base(lineage["base"])
    is_demo = base is not None and base.resolve() == demo_model().resolve()
    texts = licence_files(base) | licence_files(folder)
    licence = _licence(folder, base, lineage["base"], texts, said)
    name = (
        lineage["base"].get("repo")
        or said.base_model
        or ("the model bundled with hybridize" if is_demo else lineage["base"].get("name", "a model without a name"))
    )
    terms = _check_terms(repo, lineage, licence, texts, name, hybrid, said)
    for one in terms:
        texts = {**texts, **dict([notice(texts, one)])}
    facts = Facts(
        repo=repo, base=name, base_repo=name if name.count("/") == 1 and " " not in name else None,
        base_revision=lineage["base"].get("revision"), licence=licence, licence_names=tuple(sorted(texts)), terms=tuple(terms),
        lineage=published(hybrid or lineage), verdict=evidence.verdict, report=evidence.report, baseline=evidence.baseline,
        recipe=None if evidence.recipe is None else yaml.safe_dump(published(yaml.safe_load(evidence.recipe)), sort_keys=False),
        teachers=tuple(teacher["name"] for teacher in _other_teachers(hybrid)), data_licence=said.data_licence,
        **_shape(folder, lineage, hybrid, found),
    )  # fmt: skip
    text = card(facts)
    files = _files(folder, lineage, is_demo, texts, facts, evidence, text)
    check_secrets(files)
    left = sorted(set(os.listdir(folder)) - {file.name for file in files})
    what = f"{name} as a hybrid" if found is not None else f"{name} as a hybrid, stored as {lineage.get('target')}"
    return Bundle(repo=repo, files=files, card=text, left_out=tuple(left), what=what)


def check_secrets(files: tuple[Upload, ...]) -> None:
    """Refuse a file with a token or key in it, or in its name. Raises ConfigError naming the file, not the token."""
    secrets = known_secrets()
    for file in files:
        if isinstance(file.source, bytes):
            data = file.source
        elif file.name.endswith(".safetensors"):
            data = read_header(file.source)[1]
        else:
            data = read_small(file.source, TEXT_BYTES)
        if holds_secret(file.name.encode(), secrets):
            raise ConfigError(
                f"{scrub(file.name, secrets)}: its name holds what looks like a token or key. Rename it, then push again"
            )
        if holds_secret(data, secrets):
            raise ConfigError(f"{file.name} ({file.origin}): holds what looks like a token or key. Take it out, then push again")


def _verified(folder: Path, lineage: dict[str, Any]) -> dict[str, str]:
    """sha256 of every file that the lineage lists, as it lists them."""
    for name, expected in lineage["files"].items():
        path = inside(folder, name)
        if not path.is_file() or file_sha256(path) != expected:
            raise CheckpointError(f"{path}: is absent or was changed (sha256 differs). Make the folder again")
    return dict(lineage["files"])


def _opened(folder: Path) -> Checkpoint:
    found = open_checkpoint(folder)
    if not found.is_hybrid:
        raise CheckpointError(f"{folder}: is a {found.config.model_type}, not a hybrid; there is nothing of ours to publish")
    return found


def _check_evidence(folder: Path, evidence: Evidence, weights: str | None, lineage: dict[str, Any]) -> None:
    verdict, report = evidence.verdict, evidence.report
    for what, document in (("report", report), ("verdict", verdict)):
        if document is None:
            continue
        if not document.weights:
            raise ConfigError(f"{what}: names no weights, as earlier versions wrote it. Evaluate and gate {folder} again")
        if document.weights != weights:
            raise GateFailedError(
                f"{what}: is of other weights ({document.weights[:12]}) than {folder} ({str(weights)[:12]}). Judge these"
            )
    if evidence.waived:
        return
    waive = "--without-verdict publishes it all the same, and its card says so"
    if verdict is None:
        raise GateFailedError(f"{folder}: has no verdict. Give --verdict verdict.json, or --run WORKDIR; {waive}")
    if not verdict.passed:
        failed = ", ".join(gate.name for gate in verdict.gates if not gate.passed)
        raise GateFailedError(f"{folder}: its verdict did not pass ({failed}). Train more, or choose other gates; {waive}")
    if lineage.get("approximate"):
        raise GateFailedError(f"{folder}: computes not quite what was judged ({lineage['approximate']}); {waive}")


def _local_base(base: dict[str, Any]) -> Path | None:
    """The base's directory, as far as it is on this disk."""
    from huggingface_hub import try_to_load_from_cache

    location = base.get("location")
    if location == "demo":
        return demo_model()
    if isinstance(location, str) and Path(location).is_dir():
        return Path(location)
    if base.get("repo"):
        found = try_to_load_from_cache(base["repo"], "config.json", revision=base.get("revision"))
        if isinstance(found, str):
            return Path(found).parent
    return None


def _licence(folder: Path, base: Path | None, record: dict[str, Any], texts: dict[str, bytes], said: Statement) -> Licence:
    """The base's licence, by its files, card and repository, else by what the publisher says."""
    repo = record.get("repo")
    found = [text_licence(texts), None if base is None else card_licence(base), repo_licence(repo or said.base_model)]
    known = settle([one for one in found if one is not None], said.licence, "--license")
    if known is None:
        raise ConfigError(
            f"{folder}: the licence of its base cannot be told; looked at {describe_search(folder, base, record)}. Say it with "
            "--license, such as apache-2.0 or llama3.1, and which model it is with --base-model"
        )
    if known.source == "--license" and repo is None and said.base_model is None:
        raise ConfigError(
            f"{folder}: no file says which model its base is. With --license, name it by --base-model owner/name or in words"
        )
    return known


def _other_teachers(lineage: dict[str, Any]) -> list[dict[str, Any]]:
    """Teachers that are not the base; the record of a run says which model's answers it learnt from."""
    base = digest([lineage.get("base", {}).get("hash"), {}])
    records, named = lineage.get("distill", []), lineage.get("teachers", [])
    named = [*named, *[{"name": "a model without a name"}] * (len(records) - len(named))]
    return [teacher for record, teacher in zip(records, named, strict=True) if record.get("teacher") not in (None, base)]


def _check_terms(
    repo: str,
    lineage: dict[str, Any],
    licence: Licence,
    texts: dict[str, bytes],
    name: str,
    hybrid: dict[str, Any],
    said: Statement,
) -> list[Terms]:
    """The Llama licences that hold, after their rules were checked: of the base, and of teachers."""
    suffix = (hybrid.get("plan") or {}).get("recipe") or "hybrid"
    terms = []
    if licence.terms is not None:
        check_name(repo, licence.terms, "its base", name, suffix)
        if text_licence(texts) is None:
            raise ConfigError(
                f"{repo}: the Llama {licence.terms.version} licence asks for a copy of itself beside the model (1.b.i), and "
                "there is none. Put its text beside config.json as LICENSE"
            )
        terms.append(licence.terms)
    for teacher in _other_teachers(hybrid):
        found = repo_licence(teacher.get("repo")) or (
            Licence(id=said.teacher_licence, source="") if said.teacher_licence else None
        )
        if found is None:
            raise ConfigError(
                f"{repo}: was trained on what {teacher['name']!r} said, and no file says that teacher's licence, which may ask "
                "for a name or forbid it. Say it with --teacher-license"
            )
        if found.terms is None:
            continue
        if found.terms.outputs_forbidden and licence.id != found.id:
            raise ConfigError(f"{repo}: was trained on what {teacher['name']!r} said, whose licence (1.b.v) reads: "
                              f"\"{found.terms.outputs_forbidden}\" Train on another teacher")  # fmt: skip
        if found.terms.of_outputs:
            check_name(repo, found.terms, f"its teacher {teacher['name']!r}", name, suffix)
            terms.append(found.terms)
    return terms


def _shape(folder: Path, lineage: dict[str, Any], hybrid: dict[str, Any], found: Checkpoint | None) -> dict[str, Any]:
    """What the card says of layers and memory: a hybrid's by its config, an export's by its hybrid's plan."""
    plan = plan_of(hybrid, str(folder / LINEAGE))
    if found is None:
        raw = parse_json(read_small(inside(folder, "config.json")), str(folder / "config.json"))
        states = {} if plan is None else {t: (_planned(plan, t), plan.base_state_bytes[str(t)]) for t in LENGTHS}
        mixers = [] if plan is None else [layer.mixer for layer in plan.layers]
        family = raw["model_type"] if plan is None else plan.family
        layers = () if plan is None else tuple(layer.state_bytes[str(PICTURE_TOKENS)] for layer in plan.layers)
        return {"family": family, "mixers": mixers, "plan": plan, "state_bytes": states, "layer_bytes": layers,
                "native": raw["model_type"], "engines": target(str(lineage.get("target"))).served,
                "proof": tuple(lineage.get("proof") or ()),
                "approximate": lineage.get("approximate")}  # fmt: skip
    kept = hybrid_config(found.config, [{"name": "attention"}] * len(found.config.mixers))
    states = {t: (state_bytes(found.config, t), state_bytes(kept, t)) for t in LENGTHS}
    layers = tuple(options.state_bytes(found.config, PICTURE_TOKENS) for options in mixer_options(found.config))
    verdict = native_verdict(found.config, found.config.mixers)
    engines = {engine: said["reason"] for engine, said in verdict["engines"].items() if said["target"] != "none"}
    return {"family": found.family, "mixers": found.config.mixers, "plan": plan, "state_bytes": states, "layer_bytes": layers,
            "could_be": None if verdict["target"] == "none" else verdict["target"], "engines": engines,
            "remote_code": "auto_map" in found.raw_config}  # fmt: skip


def _planned(plan: Plan, tokens: int) -> int:
    return sum(layer.state_bytes[str(tokens)] for layer in plan.layers)


def _files(
    folder: Path, lineage: dict[str, Any], is_demo: bool, texts: dict[str, bytes], facts: Facts, evidence: Evidence, text: str
) -> tuple[Upload, ...]:
    """All files, in order of their names."""
    files = {name: Upload(name=name, source=folder / name, origin=folder.name) for name in lineage["files"]}
    own = licence_files(folder)
    for name, data in texts.items():
        files[name] = Upload(name=name, source=data, origin=folder.name if own.get(name) == data else "the base and its licence")

    def made(name: str, data: bytes | str, origin: str) -> None:
        files[name] = Upload(name=name, source=data.encode() if isinstance(data, str) else data, origin=origin)

    made(LINEAGE, to_json(published_lineage(lineage, is_demo)), f"{folder.name}, without local folders")
    made("README.md", text, "the card")
    for name, document in (("report", evidence.report), ("report-base", evidence.baseline), ("verdict", evidence.verdict)):
        if document is not None:
            made(f"hybridize/{name}.json", to_json(published(document.to_dict())), f"the {name}, without local folders")
    if facts.recipe is not None:
        made("hybridize/recipe.yaml", facts.recipe, "the recipe, without local folders")
    for name, data in result_files(evidence.report).items():
        made(name, data, "the report, for the Hub")
    if facts.layer_bytes:
        base = facts.state_bytes[PICTURE_TOKENS][1] // len(facts.layer_bytes)
        made(PICTURE, layer_map(facts.mixers, list(facts.layer_bytes), base, PICTURE_TOKENS), "drawn from the config")
    return tuple(files[name] for name in sorted(files))
