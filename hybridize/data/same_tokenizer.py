"""Whether two directories read text as the same tokens: what a teacher's logits are worth to a student rests on it.

What is compared is what the libraries make of the files, since that is what text is read with: token ids, the model with its
merges or scores, normaliser, pre-tokeniser, added tokens, and BOS, which goes in front of rows. Decoders, chat templates, and
EOS and padding tokens put no id into a row of ours and may differ, as they do between base and instruct models of a family.
"""

import hashlib
import json
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from hybridize.core import canonical
from hybridize.data.tokens import identity
from hybridize.errors import CheckpointError, ConfigError

FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
"""A directory has a tokenizer where one of these is."""


def tokenizer_file(folder: Path) -> Path | None:
    """The file that a directory's tokenizer is read from, None where there is none."""
    return next((folder / name for name in FILES if (folder / name).is_file()), None)


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a checkpoint. Raises CheckpointError when it has none."""
    if tokenizer_file(folder) is None:
        raise CheckpointError(
            f"{folder}: has no tokenizer.json, which is needed to read text; copy the base's beside the weights"
        )
    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def tokenizer_hash(folder: Path) -> str | None:
    """Hash of what decides the ids that a directory's tokenizer gives, None where there is no tokenizer."""
    if tokenizer_file(folder) is None:
        return None
    tokenizer = load_tokenizer(folder)
    return hashlib.sha256(f"{identity(tokenizer)}\0{tokenizer.bos_token_id}".encode()).hexdigest()


def check_same_tokenizer(ours: Path, theirs: Path) -> int | None:
    """Check that a teacher's directory reads text as the student's does.

    Args:
        ours: the student's.
        theirs: the teacher's.

    Returns:
        The highest id of any token, None where neither directory has a tokenizer: then nothing can be compared.

    Raises:
        ConfigError: the first difference, or a tokenizer that one of the two has not got.
    """
    files = [tokenizer_file(folder) for folder in (ours, theirs)]
    if files == [None, None]:
        return None
    for folder, file, other in zip((ours, theirs), files, (theirs, ours), strict=True):
        if file is None:
            raise ConfigError(
                f"{folder}: has no tokenizer.json, so that nothing shows that it reads the tokens that {other} does; "
                "copy its own tokenizer files there"
            )
    own, other = load_tokenizer(ours), load_tokenizer(theirs)
    if difference := next(differences(own, other), None):
        raise ConfigError(
            f"{files[1]}: {difference} as {ours} has it; a teacher must read the student's tokens: take one of its family"
        )
    return max(own.get_vocab().values())


def differences(own: Any, other: Any) -> Iterator[str]:
    """What of two tokenizers of transformers would give other ids, each as "X is A, expected B"; nothing where they agree."""
    ids, others = own.get_vocab(), other.get_vocab()
    for token, place in sorted(ids.items(), key=lambda item: item[1]):
        if others.get(token) != place:
            yield f"token {token!r} {f'has id {others[token]}' if token in others else 'is missing'}, expected id {place}"
    for token, place in sorted(others.items(), key=lambda item: item[1]):
        if token not in ids:
            yield f"token {token!r} has id {place}, expected no such token"
    if own.bos_token_id != other.bos_token_id:
        yield f"bos_token_id is {other.bos_token_id}, expected {own.bos_token_id}"
    fast = [bool(getattr(tokenizer, "is_fast", False)) for tokenizer in (own, other)]
    if fast != [True, True]:
        if identity(own) != identity(other):
            yield f"the tokenizer is {type(other).__name__}, expected {type(own).__name__}"
        return
    parts, theirs = (json.loads(tokenizer.backend_tokenizer.to_str()) for tokenizer in (own, other))
    yield from _model_differences(parts["model"], theirs["model"])
    for name in ("normalizer", "pre_tokenizer"):
        if parts[name] != theirs[name]:
            yield f"{name} is {_short(theirs[name])}, expected {_short(parts[name])}"
    added = [{entry["id"]: entry for entry in side["added_tokens"]} for side in (parts, theirs)]
    for place in sorted(added[0].keys() | added[1].keys()):
        a, b = (side.get(place) for side in added)
        if a != b:
            yield f"added token {place} is {_short(b)}, expected {_short(a)}"


def _model_differences(own: dict[str, Any], other: dict[str, Any]) -> Iterator[str]:
    """Of the backend's model: kind, merges or scores in order, and its settings."""
    if own["type"] != other["type"]:
        yield f"the model is {other['type']}, expected {own['type']}"
        return
    # Older files spell a merge as one text with a space, newer ones as a pair.
    merges = (
        [tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m) for m in side.get("merges", [])] for side in (own, other)
    )
    for number, (a, b) in enumerate(zip_longest(*merges)):
        if a != b:
            yield f"merge {number} is {_merge(b)}, expected {_merge(a)}"
    if isinstance(own["vocab"], list):
        for place, (a, b) in enumerate(zip_longest(own["vocab"], other["vocab"])):
            if a != b:
                yield f"id {place} with its score is {_short(b)}, expected {_short(a)}"
    for name in sorted((own.keys() | other.keys()) - {"merges", "vocab", "type"}):
        if own.get(name) != other.get(name):
            yield f"the model's {name} is {_short(other.get(name))}, expected {_short(own.get(name))}"


def _merge(pair: tuple[str, ...] | None) -> str:
    return "missing" if pair is None else repr(" ".join(pair))


def _short(value: Any) -> str:
    text = "missing" if value is None else canonical(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
