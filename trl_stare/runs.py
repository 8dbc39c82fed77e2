"""What a run leaves in its folder besides results: the settings it belongs to, and how long its parts took."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import yaml
from transformers import TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from trl_stare.files import write_atomically
from trl_stare.names import nearest_hint

logger = logging.getLogger(__name__)

Settings = TypeVar("Settings")

OPTIMISER = (
    "seed", "data_seed", "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "weight_decay", "optim", "optim_args",
    "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm",
)  # fmt: skip
"""Of the Trainer's own fields, what decides about the weights wherever and however long a run goes on."""
INCIDENTAL = (
    "step_micro_batch_size", "ref_cache_dir", "dataset_num_proc", "eval_temperature", "max_skipped_updates", "stop_grace_s",
    "activation_offloading", "precompute_ref_batch_size",
)  # fmt: skip
"""Of the others, what does not."""


def claim_folder(folder: str | Path, settings: Mapping[str, Any], *, free: Collection[str] = ()) -> Path:
    """Make `folder` and write `settings` to its `config.yaml`, or see that it belongs to this very configuration.

    Args:
        folder (`str` or `Path`): of a new run, or of one to continue.
        settings (`Mapping`): plain values that YAML can hold.
        free (`Collection[str]`): settings that may differ when a run is continued.

    Raises:
        ValueError: if a run with other settings is there; names them. Or if its settings cannot be read.
    """
    folder = Path(folder)
    file = folder / "config.yaml"
    before = _read_settings(file) if file.exists() else None
    if before is not None:
        names = (before.keys() | settings.keys()) - set(free)  # also one that is no longer given
        changed = sorted(name for name in names if before.get(name) != settings.get(name))
        if changed:
            raise ValueError(
                f"`output_dir` must be new or of the same run, got {folder} whose config.yaml has other {changed}. "
                "Use another `output_dir`, or the same settings to continue."
            )
    if before != settings:
        _write_settings(file, settings)
    return folder


def _write_settings(file: Path, settings: Mapping[str, Any]) -> None:
    write_atomically(file, yaml.safe_dump(dict(settings), sort_keys=False))


def _read_settings(file: Path) -> dict[str, Any]:
    try:
        settings = yaml.safe_load(file.read_text())
    except yaml.YAMLError:
        settings = None
    if not isinstance(settings, dict):
        raise ValueError(
            f"`output_dir` must be new or hold the settings of its run, got {file} that cannot be read: a full disk, perhaps. "
            "Use another `output_dir`; if you know that the run there has these settings, delete the file and continue."
        )
    return settings


def training_settings(config: TrainingArguments) -> dict[str, Any]:
    """What of a trainer's configuration a run that is continued must have in common with its beginning: the optimizer's settings and
    all that the trainer itself brings.

    Not so its length, and what a machine with more or fewer GPUs needs otherwise: batches, accumulation (of PPO with the number of
    minibatches, so that an iteration keeps its updates), precision.

    Example: of a [`StagePPOConfig`] `learning_rate` and `shaping_weight` are among them, `num_train_epochs` and `logging_steps` not.
    """
    own = {field.name for field in fields(config)} - {field.name for field in fields(TrainingArguments)}
    values = config.to_dict()
    if hasattr(config, "updates_per_iteration"):
        # PPO counts its iterations in updates: minibatches may be halved if fewer are accumulated, but neither alone
        values["updates_per_iteration"] = config.updates_per_iteration
        own = own - {"num_minibatches"} | {"updates_per_iteration"}
    return {name: values[name] for name in sorted({*own, *OPTIMISER} - {*INCIDENTAL}) if name in values}


class Stopwatch:
    """Adds up seconds by name, in a file, so that a continued run counts all of them."""

    def __init__(self, path: Path):
        self.path = path
        self.seconds: dict[str, float] = {}
        if path.exists():
            try:
                self.seconds |= json.loads(path.read_text())
            except (TypeError, ValueError) as error:  # no results hang on it
                logger.warning("%s cannot be read (%s): seconds are counted anew", path, error)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began
            write_atomically(self.path, json.dumps(self.seconds, indent=2))


def as_number(value: Any) -> Any:
    """`value`, or the number that a text from a YAML file or a flag is: YAML takes `1e-3`, which has no dot, for a text.

    Example: `as_number("1e-3")` is 0.001, `as_number("linear")` is "linear".
    """
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def set_entries(settings: Settings, flags: Sequence[str]) -> Settings:
    """Set entries of the fields that are dictionaries by flags `--field.entry value` or `--field.entry=value`, and return `settings`.

    Args:
        settings (dataclass instance): as [`~trl.TrlParser`] made it.
        flags (`Sequence[str]`): what that parser did not know (`return_remaining_strings=True`).

    Raises:
        ValueError: a flag that names no entry of such a field, or has no value.

    Example: `["--interaction.learning_rate", "3e-4"]` sets `settings.interaction["learning_rate"]`.
    """
    sections = {
        field.name: getattr(settings, field.name) for field in fields(settings) if field.default_factory is dict
    }
    parts = [part for flag in flags for part in (flag.split("=", 1) if flag.startswith("--") else [flag])]
    if len(parts) % 2:
        raise ValueError(f"every flag must have a value, got {' '.join(flags)!r}.")
    for flag, value in zip(parts[::2], parts[1::2], strict=True):
        section, _, name = flag.removeprefix("--").partition(".")
        if section not in sections or not name:
            raise ValueError(
                f"unknown flag {flag!r}. Entries of {', '.join(sections)} are given as --{next(iter(sections))}.name value."
            )
        sections[section][name] = yaml.safe_load(value)
    return settings


def make_config(cls: type[Settings], section: str, **given: Any) -> Settings:
    """`cls(**given)`, whose unknown names are refused as the user gave them.

    Args:
        cls (dataclass): a trainer's configuration. section (`str`): of the settings that `given` come from.

    Raises:
        ValueError: for a name that is no field; tells the nearest one.

    Example: `learningrate: 1e-4` in the section `interaction` is answered by "Did you mean 'learning_rate'?".
    """
    known = [field.name for field in fields(cls) if field.init]
    for name in given:
        if name not in known:
            raise ValueError(
                f"`{section}` must hold fields of {cls.__name__}, got {name!r}.{nearest_hint(name, known)}"
            )
    return cls(**given)


def last_checkpoint(folder: str | Path) -> str | None:
    """The newest whole checkpoint in a trainer's output folder; `None` where there is none, or no folder yet.

    Its state is written last: a run that was killed while saving leaves one without.

    Example: `last_checkpoint("new")` is `None`, where [`~transformers.trainer_utils.get_last_checkpoint`] raises.
    """
    whole = [file.parent for file in Path(folder).glob(f"checkpoint-*/{TRAINER_STATE_NAME}")]
    return str(max(whole, key=lambda path: int(path.name.split("-")[1]))) if whole else None


def claim_checkpoint(folder: str | Path, settings: Mapping[str, Any], *, free: Collection[str] = ()) -> str | None:
    """The newest whole checkpoint in a trainer's output folder, if it is of a run with these settings; `None` for a new run.

    Only a checkpoint makes a folder somebody's: a run that died without one, or was refused, may be begun with other settings.

    Args:
        folder (`str` or `Path`), settings (`Mapping`), free (`Collection[str]`): as in [`claim_folder`], which notes the settings.

    Raises:
        ValueError: if the checkpoint is of other settings; names them.
    """
    checkpoint = last_checkpoint(folder)
    if checkpoint is None:
        _write_settings(Path(folder) / "config.yaml", settings)
    else:
        claim_folder(folder, settings, free=free)
    return checkpoint
