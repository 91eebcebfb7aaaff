"""Which licence a base has, and what it asks of who publishes a model made from it. Read from files and ids, never guessed.

Quoted: Meta Llama 3, Llama 3.1, 3.2, 3.3 and Llama 4 Community License Agreements, section 1.b; Llama 2's, section 1.b.iii.
"""

import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from hybridize.companions import LICENCES
from hybridize.errors import ConfigError
from hybridize.untrusted import inside, read_small

log = logging.getLogger(__name__)

LICENCE_BYTES = 1 << 20
CARD = "README.md"

_NAME_3 = (
    "If you use the Llama Materials to create, train, fine tune, or otherwise improve an AI model, which is distributed or made "
    "available, you shall also include “Llama 3” at the beginning of any such AI model name."
)
_NAME = (
    "If you use the Llama Materials or any outputs or results of the Llama Materials to create, train, fine tune, or otherwise "
    "improve an AI model, which is distributed or made available, you shall also include “Llama” at the beginning of any such "
    "AI model name."
)
_OUTPUTS_3 = (
    "You will not use the Llama Materials or any output or results of the Llama Materials to improve any other large language "
    "model (excluding Meta Llama 3 or derivative works thereof)."
)
_NOTICE = "Llama {0} is licensed under the Llama {0} Community License, Copyright © Meta Platforms, Inc. All Rights Reserved."


@dataclass(frozen=True, kw_only=True)
class Terms:
    """What a Llama licence asks beyond a copy of itself."""

    version: str
    notice: str
    """For the file NOTICE."""
    built_with: str | None = None
    """To be displayed prominently."""
    prefix: str | None = None
    """What the model's name begins with."""
    rule: str | None = None
    """The sentence that asks for that."""
    of_outputs: bool = False
    """Whether the name is asked of models trained on outputs too, as a teacher's students are."""
    outputs_forbidden: str | None = None
    """The sentence that forbids to improve other models with its outputs."""

    def allows(self, name: str) -> bool:
        """Whether a repository's name, without the owner, begins as it has to. Names on the Hub have no spaces."""
        if self.prefix is None:
            return True
        # "Llama-3.1" is another model's name than Llama 3, and "Llama-30" none of either.
        pattern = re.escape(self.prefix).replace(r"\ ", "[-_]?") + (r"(?![0-9]|\.[0-9])" if " " in self.prefix else "")
        return re.match(pattern, name) is not None


TERMS = {
    "llama2": Terms(version="2", notice="Llama 2 is licensed under the LLAMA 2 Community License, Copyright (c) Meta Platforms, "
                    "Inc. All Rights Reserved."),
    "llama3": Terms(version="3", notice="Meta Llama 3 is licensed under the Meta Llama 3 Community License, Copyright © Meta "
                    "Platforms, Inc. All Rights Reserved.", built_with="Built with Meta Llama 3", prefix="Llama 3", rule=_NAME_3,
                    outputs_forbidden=_OUTPUTS_3),
    **{f"llama{version}": Terms(version=version, notice=_NOTICE.format(version), built_with="Built with Llama", prefix="Llama",
                                rule=_NAME, of_outputs=True) for version in ("3.1", "3.2", "3.3", "4")},
}  # fmt: skip

# Headings of licence texts, whitespace folded.
_HEADINGS = (
    (re.compile(r"LLAMA (\d(?:\.\d)?) COMMUNITY LICENSE AGREEMENT", re.IGNORECASE), "llama{}"),
    (re.compile(r"Apache License,? Version 2\.0"), "apache-2.0"),
    (re.compile(r"Permission is hereby granted, free of charge, to any person obtaining a copy"), "mit"),
    (re.compile(r"Qwen RESEARCH LICENSE AGREEMENT", re.IGNORECASE), "qwen-research"),
    (re.compile(r"Qwen LICENSE AGREEMENT", re.IGNORECASE), "qwen"),
)
# Meta's own repositories carry the licence's version in their names.
_META = re.compile(r"meta-llama/(?:Meta-)?Llama-(2|3\.1|3\.2|3\.3|3|4)-[\w.-]+")
# Licences that the Hub's cards have no id for.
_OTHERS = ("qwen", "qwen-research")


@dataclass(frozen=True, kw_only=True)
class Licence:
    """A licence, and where that is said."""

    id: str
    """As the Hub's cards spell it; "other" with a name beside it."""
    source: str
    name: str | None = None
    link: str | None = None

    @property
    def title(self) -> str:
        return self.name or self.id

    @property
    def terms(self) -> Terms | None:
        return TERMS.get(self.title.lower()) or TERMS.get(self.id)


def card_licence(folder: Path) -> Licence | None:
    """What the card in a directory says, None where it has none or says nothing."""
    path = folder / CARD
    if not path.is_file():
        return None
    text = read_small(inside(folder, CARD), LICENCE_BYTES).decode("utf-8", errors="replace")
    block = re.match(r"---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|$)", text, re.DOTALL)
    try:
        said = yaml.safe_load(block[1]) if block else None
    except yaml.YAMLError:
        log.info("%s: its metadata is not valid YAML and says nothing", path)
        said = None
    said = said if isinstance(said, dict) else {}
    words = {key: said[key] for key in ("license", "license_name", "license_link") if isinstance(said.get(key), str)}
    if not words.get("license"):
        return None
    return Licence(id=words["license"], name=words.get("license_name"), link=words.get("license_link"), source="the base's card")


def licence_files(folder: Path | None) -> dict[str, bytes]:
    """The licence texts, notices and use policies of a directory, by name."""
    if folder is None:
        return {}
    names = [name for name in sorted(os.listdir(folder)) if name.upper().startswith(LICENCES)]
    return {name: read_small(inside(folder, name), LICENCE_BYTES) for name in names if inside(folder, name).is_file()}


def text_licence(files: dict[str, bytes]) -> Licence | None:
    """The licence that a text among `licence_files` is, by its heading; None where none is a known one's."""
    for name, data in files.items():
        if name.upper().startswith(("NOTICE", "USE_POLICY")):
            continue
        text = " ".join(data.decode("utf-8", errors="replace").split())
        for heading, spelled in _HEADINGS:
            if match := heading.search(text[:4000]):
                found = spelled.format(*match.groups())
                id, title = ("other", found) if found in _OTHERS else (found, None)
                return Licence(id=id, name=title, source=f"the text in {name}")
    return None


def repo_licence(repo: str | None) -> Licence | None:
    """The licence of one of Meta's own repositories, which carry it in their names; None for any other."""
    match = _META.fullmatch(repo or "")
    return None if match is None else Licence(id=f"llama{match[1]}", source=f"the repository {repo}")


def settle(found: list[Licence], given: str | None, option: str) -> Licence | None:
    """The one licence that all sources name, or the one that was given where none names any.

    Raises:
        ConfigError: two sources name different ones, or what was given is none of them.
    """
    titles = {licence.title.lower(): licence for licence in found}
    if given is not None and titles and given.lower() not in titles and given.lower() not in {one.id for one in found}:
        first = found[0]
        raise ConfigError(f"{option}: got {given!r}, but {first.source} says {first.title}. Leave it out, or mend that file")
    if given is not None:
        return next((one for one in found if given.lower() in (one.title.lower(), one.id)), None) or Licence(
            id=given, source=option
        )
    if len(titles) > 1:
        said = "; ".join(f"{one.source} says {one.title}" for one in titles.values())
        raise ConfigError(f"licence: {said}. Say which holds with {option}")
    # The one that knows a name and a link, where there is one.
    return max(found, key=lambda one: (one.link is not None, one.name is not None), default=None)


def check_name(repo: str, terms: Terms, of: str, base: str, suffix: str) -> None:
    """Refuse a repository's name that the licence does not allow.

    Args:
        repo: owner/name.
        terms: of the base or teacher.
        of: whose terms they are, for the message.
        base: the base's name, for a name that would do.
        suffix: the same.

    Raises:
        ConfigError: the rule, quoted, and a name that would do.
    """
    owner, name = repo.split("/")
    if terms.allows(name):
        return
    stem = base.split("/")[-1].removeprefix("Meta-")
    if not terms.allows(stem):
        stem = f"Llama-{terms.version}"
    raise ConfigError(
        f"{repo}: the name has to begin with {terms.prefix!r}, since {of} is under the Llama {terms.version} licence, 1.b.i: "
        f'"{terms.rule}" Such as {owner}/{stem}-{suffix}'
    )


def notice(files: dict[str, bytes], terms: Terms) -> tuple[str, bytes]:
    """The name and bytes of the notice file that a licence asks for: the base's own where it says so, else one more."""
    asked = " ".join(terms.notice.split())
    for name, data in files.items():
        if name.upper().startswith("NOTICE") and asked in " ".join(data.decode("utf-8", errors="replace").split()):
            return name, data
    taken = {name.upper() for name in files}
    return "NOTICE" if "NOTICE" not in taken else f"NOTICE-Llama-{terms.version}", f"{terms.notice}\n".encode()


def describe_search(folder: Path, base: Path | None, record: dict[str, Any]) -> str:
    """What was looked at to find a licence, for the message that none was found."""
    where = [f"licence files in {folder.name}"]
    where.append(
        f"licence files and card in {base.name}" if base is not None else f"the base {record.get('name')!r}, which is not here"
    )
    where.append(f"the repository {record['repo']}" if record.get("repo") else "no repository in lineage.json")
    return ", ".join(where)
