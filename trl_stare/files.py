"""Files that may be read while they are written, and files that are known by what is in them."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from secrets import token_hex


def write_atomically(path: str | os.PathLike, text: str) -> None:
    """Write `text` to `path` so that a crash leaves the old file or the new one, never a part; several processes may at once."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{token_hex(4)}.partial")  # of this process alone
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def file_digest(path: str | os.PathLike) -> str:
    """SHA-256 of a file, hexadecimal, as `sha256sum` prints it."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def dataset_digest(folder: str | os.PathLike) -> str:
    """SHA-256, hexadecimal, of the names and contents of all parquet files below a folder: of a dataset, wherever it lies."""
    files = sorted((path.relative_to(folder).as_posix(), path) for path in Path(folder).rglob("*.parquet"))
    listed = "".join(f"{file_digest(path)}  {name}\n" for name, path in files)
    return hashlib.sha256(listed.encode()).hexdigest()
