"""Text that every machine with CPython has: the standard library's own sources, split by module.

The split is decided by the module's name, not by its place in a list, so that a module held out on one machine is held
out on every other, whatever the CPython version. A module and its tests (`heapq`, `test.test_heapq`) fall on one side.
"""

import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path

HELD_OUT_SHARE = 0.1
SEPARATOR = "<|endoftext|>"
# Generated tables and binary-like listings, not text: they would only teach a model to count.
SKIPPED_NAMES = ("cp", "iso8859", "mac_", "koi8", "kz1048", "ptcp154", "tis_620", "hp_roman8")
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "lib-dynload", "config", "data"}
MAX_FILE_BYTES = 400_000


def module_key(path: Path) -> str:
    """Name that decides the split: the top-level package, with `test_` taken off a test's name."""
    parts = [part for part in path.with_suffix("").parts if part not in ("test", "tests", "idle_test")]
    return parts[0].removeprefix("test_") if parts else path.stem


def is_held_out(key: str) -> bool:
    """Whether a module of this name was kept from training."""
    digest = hashlib.sha256(key.encode()).digest()
    return int.from_bytes(digest[:4], "big") < HELD_OUT_SHARE * 2**32


def documents(held_out: bool, root: Path | None = None) -> Iterator[tuple[str, str]]:
    """Yield (relative path, text) of every source file of one side of the split, in sorted order.

    Args:
        held_out: True for the modules no bundled model was trained on.
        root: the folder of the standard library; None is the running interpreter's.

    Source: CPython's Lib/, Python Software Foundation License.
    """
    root = root or Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        folders = set(relative.parts[:-1])
        if folders & SKIPPED_FOLDERS or path.stat().st_size > MAX_FILE_BYTES:
            continue
        if relative.parts[0] == "encodings" and relative.name.startswith(SKIPPED_NAMES):
            continue
        if is_held_out(module_key(relative)) != held_out:
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # a few of CPython's own tests are deliberately in other encodings
        if text.strip():
            yield str(relative), text


def write_text(out: Path, held_out: bool, max_bytes: int | None = None) -> int:
    """Write one side of the split as a .txt with separator lines; return the number of files taken.

    Files are taken in the order of their name's hash, so that a cut at `max_bytes` is a fair sample.
    """
    taken = 0
    size = 0
    chosen = sorted(documents(held_out), key=lambda item: hashlib.sha256(item[0].encode()).digest())
    with out.open("w", encoding="utf-8") as file:
        for _, text in chosen:
            piece = text.rstrip("\n") + f"\n{SEPARATOR}\n"
            size += len(piece.encode())
            if max_bytes is not None and taken and size > max_bytes:
                break
            file.write(piece)
            taken += 1
    return taken


def write_demo_text(folder: Path) -> tuple[Path, Path]:
    """Write the demonstration's two texts; return (train, held out). Same interpreter, same bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    train, held_out = folder / "train.txt", folder / "held_out.txt"
    write_text(train, held_out=False, max_bytes=8_000_000)
    write_text(held_out, held_out=True, max_bytes=400_000)
    return train, held_out
