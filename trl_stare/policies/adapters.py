"""What to do with a trained adapter."""

from __future__ import annotations

import copy
import json
import os
import shutil
from pathlib import Path
from typing import Any

from accelerate import PartialState
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, AuxiliaryTrainingWrapper
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import find_adapter_config_file

from trl_stare.checkpoints import checkpoint_folder
from trl_stare.files import file_digest
from trl_stare.interfaces import ADAPTER_CONFIG_NAME
from trl_stare.policies.pretrained import WHERE, PretrainedPolicy

MERGED_FROM = "merged_from.json"
"""What a folder of [`whole_checkpoint`] was merged from: the adapter's settings, SHA-256 of its files, how it was loaded."""
_NOT_OF_THE_WEIGHTS = (*WHERE, "attn_implementation", "device_map")
"""Loading options that leave the weights as they are."""
_OF_WHOLE_WEIGHTS = ("config.json", "model", "pytorch_model")
"""What the names of files begin with that a model without an adapter is saved as."""


def merge_adapter(model: Any) -> Any:
    """A plain model with the adapter's weights added in; `model` and its base stay as they are.

    Takes the memory of a second copy of the weights. (PEFT's `merge_and_unload` alone changes the base in place, and merging
    back does not restore it exactly in bfloat16.)

    Args:
        model (`PeftModel`, or a `PreTrainedModel` that `from_pretrained` loaded with an adapter): e.g. a LoRA over
            [`OpenVLAForActionPrediction`].
    """
    model = copy.deepcopy(model)
    if isinstance(model, PeftModel):
        return model.merge_and_unload()
    # transformers puts the layers of an adapter into the model itself, and has no way to take them out again
    for name, layer in list(model.named_modules()):
        if isinstance(layer, AuxiliaryTrainingWrapper):  # `modules_to_save`, trained as a whole
            whole = layer.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
            model.set_submodule(name, whole)
        elif isinstance(layer, BaseTunerLayer):
            layer.merge()
            model.set_submodule(name, layer.get_base_layer())
    del model.peft_config
    # what it renames when it saves, it noted while it loaded the adapter
    model._hf_peft_config_loaded, model._weight_conversions = False, None
    return model


def merge_checkpoint(folder: str | Path, unnorm_key: str | None = None) -> None:
    """Put whole weights in the place of the adapter in `folder`, which needs its base no more; what else is there stays.

    Interrupted at any moment, it leaves the adapter, or all of the whole weights: until the adapter is gone, the same call does it again.

    Args:
        folder (`str` or `Path`): a checkpoint with a PEFT adapter.
        unnorm_key (`str`, *optional*): any of its statistics, where it has several; all of them stay.

    Raises:
        ValueError: if there is no adapter.

    Example: before an adapter on a base that is a folder of yours is uploaded: nobody else has that base.
    """
    folder = Path(folder)
    if not (folder / CONFIG_NAME).exists():
        raise ValueError(f"`folder` must hold an adapter, got {folder} without {CONFIG_NAME}.")
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    # beside whole weights, which an interrupted or an earlier merge has left, transformers would take those for its base
    for file in folder.iterdir():
        if file.is_file() and not file.name.startswith(_OF_WHOLE_WEIGHTS):
            shutil.copy2(file, part)
    policy = _save_merged(part, part / "whole", unnorm_key)
    for file in (part / "whole").iterdir():
        os.replace(file, folder / file.name)
    # a file of statistics would take the place of those in use, which the new config has
    statistics = filter(None, [policy.statistics_file])
    for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, ADAPTER_CONFIG_NAME, *statistics):
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(part)


def whole_checkpoint(
    checkpoint: str | Path,
    folder: str | Path,
    unnorm_key: str | None = None,
    *,
    revision: str | None = None,
    **loading: Any,
) -> Path:
    """Where a checkpoint is whose weights can be trained: an adapter is first merged with its base.

    transformers loads an adapter into the model, with all weights frozen: training would change nothing, and a new adapter
    would take the place of the old.

    Args:
        checkpoint (`str` or `Path`): a folder or a Hub id. folder (`str` or `Path`): where what is merged is kept, written once, with
            a note of what it was merged from.
        unnorm_key (`str`, *optional*), loading: for [`PretrainedPolicy.from_pretrained`]. revision (`str`, *optional*): on the Hub.

    All processes must call, unless `checkpoint` is a folder of whole weights.

    Returns:
        `Path`: the checkpoint's own folder, its download, or `folder`.

    Raises:
        ValueError: of an adapter under ZeRO-3, where no process has all weights; or if `folder` was merged from another adapter, or
            with other `loading`: names what differs.
    """
    folder = Path(folder)
    if Path(checkpoint).is_dir() and find_adapter_config_file(checkpoint) is None:
        return Path(checkpoint)  # without waiting: one process may ask alone
    with PartialState().local_main_process_first():
        checkpoint = checkpoint_folder(checkpoint, revision)
        if find_adapter_config_file(checkpoint) is None:
            return checkpoint
        if is_deepspeed_zero3_enabled():
            raise ValueError(
                f"`{checkpoint}` must hold whole weights under ZeRO-3, got an adapter. Merge it by `merge_checkpoint` first."
            )
        sources = _sources(checkpoint, loading)
        if folder.exists():
            _require_sources(folder, sources, checkpoint)
            return folder
        part = folder.with_suffix(".part")
        shutil.rmtree(part, ignore_errors=True)  # of an interrupted merge, perhaps of another adapter
        _save_merged(checkpoint, part, unnorm_key, **loading)
        (part / MERGED_FROM).write_text(json.dumps(sources, indent=2, sort_keys=True))
        part.rename(folder)
    return folder


def _save_merged(checkpoint: str | Path, folder: Path, unnorm_key: str | None, **loading: Any) -> PretrainedPolicy:
    """Write the whole weights of a checkpoint with an adapter to `folder`; returns their policy."""
    policy = PretrainedPolicy.from_pretrained(checkpoint, unnorm_key, **loading)
    policy.model = merge_adapter(policy.model)
    policy.save_pretrained(folder)
    return policy


def _sources(checkpoint: Path, loading: dict[str, Any]) -> dict[str, Any]:
    """What decides about the merged weights, in plain values: settings of the adapter (its base is one), file digests, options.

    The weights of the base are not read: an adapter is of those that it was trained on.
    """
    settings = json.loads((checkpoint / CONFIG_NAME).read_text())
    # PEFT keeps names in sets: saved again, they stand in another order
    sources = {name: sorted(value, key=str) if isinstance(value, list) else value for name, value in settings.items()}
    for name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, ADAPTER_CONFIG_NAME):
        if (checkpoint / name).exists():
            sources[name] = file_digest(checkpoint / name)
    given = {name: value for name, value in loading.items() if value is not None}
    sources |= {name: value for name, value in given.items() if name not in _NOT_OF_THE_WEIGHTS}
    return json.loads(json.dumps(sources, default=str))  # as it is read back: a dtype is its name


def _require_sources(folder: Path, sources: dict[str, Any], checkpoint: str | Path) -> None:
    file = folder / MERGED_FROM
    if not file.exists():
        raise ValueError(
            f"`{folder}` must be new or say what it was merged from, got one without {MERGED_FROM}. Use another `output_dir`; "
            f"if you know that it was `{checkpoint}`, delete the folder and continue: it is merged again."
        )
    before = json.loads(file.read_text())
    changed = sorted(name for name in before.keys() | sources.keys() if before.get(name) != sources.get(name))
    if changed:
        raise ValueError(
            f"`{folder}` must be new or merged from `{checkpoint}`, got one with other {changed}. Use another `output_dir`, or "
            "the same checkpoint and settings to continue."
        )
