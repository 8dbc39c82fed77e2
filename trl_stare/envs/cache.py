"""A folder for what is derived once from installed files: decimated meshes, shaders."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path


def cache_folder() -> Path:
    """Where derived files are kept: `$TRL_STARE_CACHE/visuals`, by default `~/.cache/trl_stare/visuals`."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trl_stare"
    return Path(os.environ.get("TRL_STARE_CACHE") or default) / "visuals"


def build_once(name: str, build: Callable[[Path], None]) -> Path:
    """The cached folder `name`, filled by `build(folder)` where it is not there yet.

    It appears all at once under its final name, so that a killed build leaves nothing half-made and two processes may
    build at the same time.

    Raises:
        PermissionError: the cache cannot be written.
    """
    folder = cache_folder() / name
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(prefix=".building-", dir=folder.parent))
    except OSError as error:
        raise PermissionError(
            f"the cache of light visuals and shaders must be a folder that can be written, got {folder.parent} "
            f"({error}). Set `TRL_STARE_CACHE` to one that can."
        ) from error
    try:
        build(building)
        with contextlib.suppress(OSError):  # another process was faster; its folder is as good as ours
            building.rename(folder)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return folder
