"""Scores of the reference policy, kept between runs and found again by the content of all they depend on."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from datasets import Dataset
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from trl_stare.data.collators import PAIR_FEATURES
from trl_stare.trainers._compat import whole

logger = logging.getLogger(__name__)

REFERENCE_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")
"""`[P]` float32: the reference's score of either side, as columns of the dataset and as tensors of a cache file."""

_ROWS_AT_ONCE = 64


def cache_folder(dataset: Dataset, ref_cache_dir: str | None, output_dir: str) -> Path:
    """Where scores of `dataset` are kept: `ref_cache_dir`, else beside its files, else under `output_dir`."""
    if ref_cache_dir is not None:
        return Path(ref_cache_dir)
    files = dataset.cache_files
    return Path(files[0]["filename"]).parent if files else Path(output_dir) / "reference_scores"


def reference_key(
    model: nn.Module,
    processor: Any,
    dataset: Dataset,
    collator: Callable[[Sequence[Mapping[str, Any]]], dict[str, Any]],
    *,
    objective: str,
    temperature: float,
    precision: str,
    adapter: str,
) -> str:
    """Name of the scores that `model` gives to the rows of `dataset`: another content, another name.

    It covers the weights, the configurations of the model and its adapters, the files of the processor, the rows, what
    the collator makes of the first row (a policy may keep settings of its own), the objective, the temperature, the precision
    and the versions of the libraries that compute. The micro-batch size and the number of processes do not change scores and are left out.

    Args:
        model (`nn.Module`): the reference. Under ZeRO-3 every process must call: each holds a part of the weights.
        processor (`ProcessorMixin`): saved beside the model. collator (`Callable`): rows -> batch with `inputs`.
        objective (`str`): how a side's decisions are added up. temperature (`float`): of the log-likelihoods.
        precision (`str`): accelerate's `mixed_precision`.
        adapter (`str`): which of PEFT's adapters is on while the reference is scored.

    Returns:
        `str`: 64 hexadecimal digits.
    """
    parts = [
        _weights_digest(model),
        model.config.to_json_string(),
        _adapters(model),
        adapter,
        _processor_digest(processor),
        _rows_digest(dataset),
        _tensors_digest(collator([dataset[0]])["inputs"]),
        objective,
        str(temperature),
        precision,
        *(f"{package} {version(package)}" for package in ("trl-stare", "transformers", "torch")),
    ]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def read_scores(path: Path, num_rows: int) -> dict[str, Tensor] | None:
    """The scores in `path`, or `None` where there are none. A file that does not hold what was written is none."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            scores = {column: file.get_tensor(column) for column in REFERENCE_COLUMNS}
            recorded = (file.metadata() or {}).get("sha256")
    except (SafetensorError, OSError) as error:
        logger.warning("`%s` cannot be read (%s): reference scores are computed anew.", path, error)
        return None
    # safetensors has no checksum of its own
    if recorded != _tensors_digest(scores) or any(value.shape != (num_rows,) for value in scores.values()):
        logger.warning("`%s` is corrupt: reference scores are computed anew.", path)
        return None
    return scores


def write_scores(path: Path, scores: dict[str, Tensor]) -> None:
    """Keep `scores` for [`read_scores`]: all or nothing. A folder that cannot be written to is no reason to stop."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(scores, part, metadata={"sha256": _tensors_digest(scores)})
        os.replace(part, path)
    except (SafetensorError, OSError) as error:
        if part.exists():
            part.unlink()
        logger.warning("reference scores are not kept for the next run: %s. Set `ref_cache_dir`.", error)


def _weights_digest(model: nn.Module) -> str:
    digest = hashlib.sha256()
    # `keep_vars`: under ZeRO-3 only the parameters themselves know where their other parts are
    for name, tensor in sorted(model.state_dict(keep_vars=True).items()):
        with whole(tensor) as values:
            _update(digest, name, values)
    return digest.hexdigest()


def _adapters(model: nn.Module) -> str:
    """PEFT's configurations: the same weights score otherwise with another `lora_alpha`."""
    configs = {name: config.to_dict() for name, config in getattr(model, "peft_config", {}).items()}
    return json.dumps(
        configs, sort_keys=True, default=lambda value: sorted(value) if isinstance(value, set) else str(value)
    )


def _tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        _update(digest, name, tensor)
    return digest.hexdigest()


def _update(digest: Any, name: str, tensor: Tensor) -> None:
    digest.update(f"{name} {tensor.dtype} {[*tensor.shape]}".encode())
    digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())


def _rows_digest(dataset: Dataset) -> str:
    """Of the stored bytes of the columns that are trained on; images stay encoded."""
    digest = hashlib.sha256()
    columns = dataset.select_columns([*PAIR_FEATURES]).with_format("arrow")
    for table in columns.iter(batch_size=_ROWS_AT_ONCE):
        digest.update(str(table.schema.remove_metadata()).encode())
        for batch in table.combine_chunks().to_batches():
            digest.update(batch.serialize())
    return digest.hexdigest()


def _processor_digest(processor: Any) -> str:
    """Of the files that the processor saves, which is all that can be known of any processor."""
    digest = hashlib.sha256()
    with TemporaryDirectory() as folder:
        processor.save_pretrained(folder)
        for file in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
            digest.update(str(file.relative_to(folder)).encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()
