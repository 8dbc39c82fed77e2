"""Where a checkpoint is: in a folder, or on the Hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers.utils import ADAPTER_CONFIG_NAME, CONFIG_NAME


def checkpoint_folder(model: str | Path, revision: str | None = None) -> Path:
    """The folder of a checkpoint: `model` itself, or its download from the Hub.

    Args:
        model (`str` or `Path`): a folder or a Hub id; a folder that exists comes first. revision (`str`, *optional*): on the Hub.

    Raises:
        ValueError: a folder without a checkpoint; names those in it.
        FileNotFoundError: neither a folder nor a repository that can be read.

    Example: `checkpoint_folder("outputs/ppo")` tells to take `outputs/ppo/policy`.
    """
    if Path(model).is_dir():
        require_checkpoint(Path(model))
        return Path(model)
    try:
        return Path(snapshot_download(str(model), revision=revision))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise FileNotFoundError(
            f"`model` must be a folder or a repository on the Hub, got {str(model)!r}: there is no such folder, and the Hub says "
            f"{type(error).__name__}: {error}"
        ) from error


def require_checkpoint(folder: Path) -> None:
    """Raise `ValueError` where `folder` holds neither weights' configuration nor an adapter's; name the folders in it that do."""
    names = (CONFIG_NAME, ADAPTER_CONFIG_NAME)
    if not any((folder / name).is_file() for name in names):
        inside = sorted({str(file.parent) for name in names for file in folder.glob(f"*/{name}")})
        hint = f" Did you mean {' or '.join(inside)}?" if inside else ""
        raise ValueError(f"`model` must be a checkpoint with a {CONFIG_NAME}, got {folder} without one.{hint}")
