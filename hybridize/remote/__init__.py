"""The file that goes along with a hybrid's weights, so that torch and transformers alone can load them."""

from pathlib import Path
from typing import Any

from hybridize.config import CODE_FILE
from hybridize.remote.flatten import bundle, mixers_of
from hybridize.storage import write_text

__all__ = ["bundle", "mixers_of", "write_code"]


def write_code(config: Any, folder: Path) -> None:
    """Write modeling_hybridize.py, what loads a hybrid of this config, into the folder of its config.json."""
    write_text(folder / CODE_FILE, bundle(config))
