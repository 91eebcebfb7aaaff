"""The files that go along with weights: tokenizer, generation settings, licence."""

import os
from pathlib import Path

from hybridize.storage import write_bytes
from hybridize.untrusted import inside, read_small

# What goes along with the weights: tokenizer, generation settings, and the licence, which has to.
COMPANIONS = {
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json", "generation_config.json",
}  # fmt: skip
LICENCES = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY", "COPYING")


def companions(path: Path) -> tuple[str, ...]:
    """The files of a directory that go along with its weights. Raises CheckpointError for a link that leads out of it."""
    names = sorted(name for name in os.listdir(path) if name in COMPANIONS or name.upper().startswith(LICENCES))
    return tuple(name for name in names if inside(path, name).is_file())


def copy_companions(source: Path, folder: Path) -> None:
    """Copy `companions(source)` into `folder`."""
    for name in companions(source):
        write_bytes(folder / name, read_small(inside(source, name), limit=1 << 30))
