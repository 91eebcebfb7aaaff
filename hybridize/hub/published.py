"""What of our records may be seen by others: no folder of this machine, and no token."""

import os
import re
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from hybridize.lineage import origin

_ABSOLUTE = re.compile(r"(?:file:/*)?(?:/|~[\w-]*/|[A-Za-z]:[\\/]|\\\\)[^\n]*")


def published(value: Any) -> Any:
    """A JSON value without this machine's folders.

    An absolute path becomes its last name, one in the Hub's cache the repository it is of; inside longer texts the home and
    working directories are cut off.
    """
    if isinstance(value, dict):
        return {_text(key) if isinstance(key, str) else key: published(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [published(item) for item in value]
    return _text(value) if isinstance(value, str) else value


def _text(text: str) -> str:
    if _ABSOLUTE.fullmatch(text):
        if found := origin(text):
            return found["repo"]
        kind = PureWindowsPath if "\\" in text or re.match(r"[A-Za-z]:", text) else PurePosixPath
        return kind(text).name or "."
    for folder in sorted({str(Path.home()), os.getcwd()}, key=len, reverse=True):
        if len(folder) > 1:
            text = text.replace(folder + os.sep, "")
    return text


def published_lineage(lineage: dict[str, Any], base_is_demo: bool) -> dict[str, Any]:
    """lineage.json as it is uploaded: the base is named by repository and commit, or by its last name.

    Args:
        lineage: as it lies on this disk.
        base_is_demo: the base comes with the package, so that it is found again wherever that is installed.
    """
    found = published(lineage)
    if base_is_demo:
        found["base"]["location"] = "demo"
    return found
