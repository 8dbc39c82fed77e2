"""Which weights exactly: the revision of a checkpoint and the digests of its files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trl_stare.checkpoints import checkpoint_folder
from trl_stare.data.actors import SCRIPTED
from trl_stare.files import file_digest

SUFFIXES = (".json", ".safetensors", ".model", ".txt", ".jinja", ".bin", ".py")
"""What a policy is made of. Cards, logs and training states do not decide how it acts."""
OTHER = ("training_args.bin",)
"""The Trainer's arguments, beside the weights: other in every run, be the weights the same."""


@dataclass(frozen=True)
class PolicySource:
    """Where a policy comes from.

    Args:
        name (`str`): as the user gave it.
        location (`str`): what loads it: a local folder, or one of `SCRIPTED`.
        revision (`str` or `None`): commit on the Hub; `None` for local ones.
        files (`dict[str, str]`): file name -> SHA-256, of the files at the top of the checkpoint; those of an adapter's base begin
            with `base/`.
    """

    name: str
    location: str
    revision: str | None = None
    files: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """What `eval_info.json` says of the policy."""
        return {"name": self.name, "revision": self.revision, "files": self.files}


def resolve_policy(model: str, revision: str | None = None, loading: Mapping[str, Any] | None = None) -> PolicySource:
    """Find a checkpoint, download it if it is on the Hub, and take the digests of its files.

    Args:
        model (`str`): a local folder, a Hub id, `"expert"` or `"random"`.
        revision (`str`, *optional*): branch, tag or commit of a Hub id.
        loading (`Mapping`, *optional*): what it will be loaded with from `location`, where a revision no longer counts.

    Raises:
        ValueError: if `revision` is given for something that is not on the Hub, or is in `loading`.
        OSError: if there is no such checkpoint.
    """
    if "revision" in (loading or {}):
        raise ValueError(
            f"`revision` must be given by itself, got {dict(loading)}. Say --revision, not --policy.revision."
        )
    if model in SCRIPTED or Path(model).is_dir():
        if revision is not None:
            raise ValueError(f"`revision` must be of a model on the Hub, got {revision!r} for {model!r}.")
        return PolicySource(model, model, files={} if model in SCRIPTED else _policy_digests(model))
    folder = checkpoint_folder(model, revision)
    return PolicySource(model, str(folder), revision=folder.name, files=_policy_digests(folder))


def _policy_digests(folder: str | Path) -> dict[str, str]:
    files, adapter = file_digests(folder), Path(folder) / "adapter_config.json"
    if adapter.exists():  # PEFT's: most of the weights are elsewhere
        settings = json.loads(adapter.read_text())
        base_model = settings["base_model_name_or_path"]
        base = resolve_policy(base_model, None if Path(base_model).is_dir() else settings.get("revision"))
        files |= {f"base/{name}": digest for name, digest in base.files.items()}
    return files


def file_digests(folder: str | Path) -> dict[str, str]:
    """File name -> SHA-256 (hexadecimal) of the files at the top of a checkpoint that decide how it acts."""
    digests = {}
    for path in sorted(Path(folder).iterdir()):
        if path.is_file() and path.suffix in SUFFIXES and path.name not in OTHER:
            digests[path.name] = file_digest(path)
    return digests
