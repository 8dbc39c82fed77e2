"""How trajectories and pairs lie on disk: folders of parquet files that plain `load_dataset(folder)` reads.

A row of trajectories is an episode, with the stages' verdict beside it; a row of preferences refers to two of them by
`id`, so images are stored once. Numbers keep their exact values, images are PNG (lossless).
"""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as PILImage
from torch import Tensor

from trl_stare.data.pairs import StagePair
from trl_stare.data.trajectory import Trajectory
from trl_stare.stages import StagePlan, segment

SIGNAL_PREFIX = "signal."
EPISODES_PER_SHARD = 100
PAIRS_PER_SHARD = 100_000

TRAJECTORY_FEATURES = Features(
    {
        "id": Value("int64"),
        "task": Value("string"),
        "instruction": Value("string"),
        "seed": Value("int64"),
        "policy": Value("string"),
        "success_once": Value("bool"),
        "success_at_end": Value("bool"),
        "stage_names": List(Value("string")),
        "stage": List(Value("int64")),
        "segments": List(
            {
                "stage": Value("int64"),
                "start": Value("int64"),
                "stop": Value("int64"),
                "passed": Value("bool"),
                "cost": Value("float64"),
            }
        ),
        "images": List(Image()),
        "final_image": Image(),
        "state": List(List(Value("float32"))),
        "final_state": List(Value("float32")),
        "starts": List(Value("int64")),
        "actions": List(List(Value("float32"))),
        "labels": List(List(Value("float32"))),
        "trace": List(List(Value("int64"))),
        "logps": List(List(Value("float32"))),
        "reward": List(Value("float32")),
        "terminated": Value("bool"),
        "truncated": Value("bool"),
        "metadata": Value("string"),
    }
)
"""Columns of every trajectories file, in [`Trajectory`]'s shapes; `trace` and `logps` are null where the policy left
none. Besides: `id`, the row's number; `stage`, the current stage at each of the `T` steps (not latched, `K` is
success); `segments`, the latched ones; `metadata`, JSON of what the simulator was; and a column `signal.{name}` each,
of `[T + 1]` or `[T + 1, D]`."""

PREFERENCE_FEATURES = Features(
    {
        field.name: Value({"int": "int64", "float": "float64", "str": "string"}[str(field.type)])
        for field in fields(StagePair)
    }
)
"""The fields of [`StagePair`]; `chosen` and `rejected` are `id`s of the trajectories."""

_SIGNAL_FEATURES = {
    (torch.bool, 1): List(Value("bool")),
    (torch.float32, 1): List(Value("float32")),
    (torch.float32, 2): List(List(Value("float32"))),
}


def save_trajectories(
    trajectories: Sequence[Trajectory],
    folder: str | Path,
    plan: StagePlan,
    *,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Write episodes to `folder`, all or nothing. What was saved there before is replaced.

    Args:
        trajectories (`Sequence[Trajectory]`): episodes of the plan's task, all with the same signals.
        folder (`str` or `Path`): of its own: it may hold nothing but parquet files.
        plan ([`StagePlan`]): labels the stages.
        metadata (`Mapping[str, Any]`, *optional*): what the simulator was ([`VectorEnv`]'s `metadata`), kept as JSON.

    Raises:
        ValueError: if there is no episode, signals differ or cannot be stored, or `folder` holds other files.
    """
    if not trajectories:
        raise ValueError("`trajectories` must hold at least one episode, got none. Collect some first.")
    features = _features_of(trajectories)
    note = json.dumps(dict(metadata or {}), default=str)
    starts = range(0, len(trajectories), EPISODES_PER_SHARD)
    shards = (
        _to_table(
            [
                _to_row(index, trajectory, plan, note)
                for index, trajectory in enumerate(trajectories[start : start + EPISODES_PER_SHARD], start)
            ],
            features,
        )
        for start in starts
    )
    _write_folder(Path(folder), shards, len(starts))


def merge_trajectories(sources: Sequence[str | Path], folder: str | Path, *, episodes: int) -> None:
    """Write the first `episodes` rows of several datasets, in their order, as one; `id`s are counted anew.

    `folder` may be one of `sources`: it is replaced when the new one is complete. A shard is in memory at a time.

    Raises:
        ValueError: if the sources hold fewer rows, or other columns than the first.
    """
    files = [file for source in sources for file in sorted(Path(source).glob("*.parquet"))]
    found = sum(pq.read_metadata(file).num_rows for file in files)
    if found < episodes:
        raise ValueError(f"`sources` must hold at least {episodes} episodes, got {found}.")
    num_shards = -(-episodes // EPISODES_PER_SHARD)
    _write_folder(Path(folder), _merged_shards(files, episodes), num_shards)


def _merged_shards(files: Sequence[Path], episodes: int) -> Iterator[pa.Table]:
    """Rows of `files` as tables of `EPISODES_PER_SHARD` rows, the last one shorter, `episodes` in all."""
    waiting: list[pa.Table] = []
    written = 0
    for file in files:
        waiting.append(pq.read_table(file))
        while (ready := sum(map(len, waiting))) and (ready >= EPISODES_PER_SHARD or written + ready >= episodes):
            table = pa.concat_tables(waiting)
            size = min(EPISODES_PER_SHARD, episodes - written)
            shard, waiting = table.slice(0, size), [table.slice(size)]
            yield shard.set_column(shard.schema.get_field_index("id"), "id", pa.array(range(written, written + size)))
            written += size
            if written == episodes:
                return


def stored_settings(folder: str | Path) -> tuple[list[int], list[dict[str, Any]]]:
    """Seeds of all episodes in `folder`, and the different `metadata` they were stored with, without reading images."""
    tables = [pq.read_table(file, columns=["seed", "metadata"]) for file in sorted(Path(folder).glob("*.parquet"))]
    seeds = [seed for table in tables for seed in table["seed"].to_pylist()]
    notes = {note for table in tables for note in table["metadata"].to_pylist()}
    return seeds, [json.loads(note) for note in sorted(notes)]


def load_trajectories(folder: str | Path) -> list[Trajectory]:
    """Read what [`save_trajectories`] wrote: equal tensors, same order; `features`, which is not stored, is `None`.

    Raises:
        FileNotFoundError: if `folder` holds no parquet files.
        ValueError: if a file is not a trajectories file; names file, row and column.
    """
    trajectories = []
    for file, table in _read_folder(Path(folder), TRAJECTORY_FEATURES):
        columns = {name: table[name].combine_chunks() for name in table.column_names}
        trajectories.extend(_from_row(file, columns, row) for row in range(len(table)))
    return trajectories


def save_pairs(pairs: Sequence[StagePair], folder: str | Path) -> None:
    """Write pairs to `folder`, all or nothing. `chosen` and `rejected` are rows of the trajectories they came from.

    Raises:
        ValueError: if `folder` holds other files.
    """
    starts = range(0, max(len(pairs), 1), PAIRS_PER_SHARD)
    shards = (
        _to_table([asdict(pair) for pair in pairs[start : start + PAIRS_PER_SHARD]], PREFERENCE_FEATURES)
        for start in starts
    )
    _write_folder(Path(folder), shards, len(starts))


def load_pairs(folder: str | Path) -> tuple[StagePair, ...]:
    """Read what [`save_pairs`] wrote.

    Raises:
        FileNotFoundError: if `folder` holds no parquet files.
        ValueError: if a file is not a preferences file; names file and column.
    """
    tables = _read_folder(Path(folder), PREFERENCE_FEATURES)
    return tuple(StagePair(**row) for _, table in tables for row in table.to_pylist())


def encode_png(image: Tensor) -> bytes:
    """`[H, W, 3]` uint8 -> PNG. Level 1: five times as fast as the default, and rendered frames get hardly larger."""
    buffer = io.BytesIO()
    PILImage.fromarray(image.numpy()).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def decode_png(data: bytes) -> Tensor:
    """PNG -> `[H, W, 3]` uint8."""
    return torch.from_numpy(np.array(PILImage.open(io.BytesIO(data)).convert("RGB")))


def _features_of(trajectories: Sequence[Trajectory]) -> Features:
    """The common columns and one for each signal, which all episodes must share."""
    kinds = {name: (signal.dtype, signal.ndim) for name, signal in trajectories[0].signals.items()}
    for index, trajectory in enumerate(trajectories):
        found = {name: (signal.dtype, signal.ndim) for name, signal in trajectory.signals.items()}
        if found != kinds:
            raise ValueError(f"`trajectories` must have the same signals, got {found} at {index} and {kinds} at 0.")
    unknown = {name: kind for name, kind in kinds.items() if kind not in _SIGNAL_FEATURES}
    if unknown:
        raise ValueError(
            f"`signals` must be bool [T + 1] or float32 [T + 1] or [T + 1, D], got {unknown}. Convert them."
        )
    return Features(
        TRAJECTORY_FEATURES | {SIGNAL_PREFIX + name: _SIGNAL_FEATURES[kind] for name, kind in kinds.items()}
    )


def _to_row(index: int, trajectory: Trajectory, plan: StagePlan, note: str) -> dict[str, Any]:
    if trajectory.task != plan.task:
        raise ValueError(
            f"`trajectories` must be of the plan's task {plan.task!r}, got {trajectory.task!r} at {index}."
        )
    row: dict[str, Any] = {
        "id": index,
        "success_once": trajectory.success_once,
        "success_at_end": trajectory.success_at_end,
        "stage_names": list(plan.names),
        "stage": plan.current_stage(trajectory.signals)[:-1].numpy(),
        "segments": [part._asdict() for part in segment(plan, trajectory.signals)],
        "images": [{"bytes": encode_png(image), "path": None} for image in trajectory.images],
        "final_image": {"bytes": encode_png(trajectory.final_image), "path": None},
        "metadata": note,
    }
    for field in fields(Trajectory):
        if field.name in TRAJECTORY_FEATURES and field.name not in row:
            value = getattr(trajectory, field.name)
            row[field.name] = value.numpy() if isinstance(value, Tensor) else value
    return row | {SIGNAL_PREFIX + name: signal.numpy() for name, signal in trajectory.signals.items()}


def _from_row(file: Path, columns: Mapping[str, pa.Array], row: int) -> Trajectory:
    values: dict[str, Any] = {"signals": {}, "features": None}
    for name, column in columns.items():
        try:
            if name.startswith(SIGNAL_PREFIX):
                values["signals"][name.removeprefix(SIGNAL_PREFIX)] = _to_tensor(column[row])
            elif name == "images":
                values[name] = torch.stack([decode_png(image["bytes"]) for image in column[row].as_py()])
            elif name == "final_image":
                values[name] = decode_png(column[row].as_py()["bytes"])
            elif name in Trajectory.__dataclass_fields__:
                cell = column[row]
                values[name] = _to_tensor(cell) if isinstance(cell, pa.ListScalar) and cell.is_valid else cell.as_py()
        except (ValueError, OSError, TypeError) as error:
            raise ValueError(f"`{file}`, row {row}, column {name!r} cannot be read: {error}") from error
    return Trajectory(**values)


def _to_tensor(cell: pa.ListScalar) -> Tensor:
    """A list `[T]`, or a list `[T, D]` of lists of equal length, without a detour through Python objects."""
    values = cell.values
    shape = [len(values)]
    if pa.types.is_list(values.type):
        widths = values.value_lengths().unique().to_pylist()
        if len(widths) > 1:
            raise ValueError(f"rows must have one length, got {widths}.")
        shape += widths
        values = values.flatten()
    if values.null_count:
        raise ValueError(f"must have no nulls, got {values.null_count}.")
    return torch.from_numpy(np.array(values.to_numpy(zero_copy_only=False))).reshape(shape)


def _to_table(rows: Sequence[Mapping[str, Any]], features: Features) -> pa.Table:
    """Rows as a table whose schema carries the features, as `load_dataset` wants it."""
    return Dataset.from_dict({name: [row[name] for row in rows] for name in features}, features=features).data.table


def _write_folder(folder: Path, shards: Iterable[pa.Table], num_shards: int) -> None:
    """Write a parquet file per shard beside `folder`, then put the new folder in the old one's place."""
    strangers = [path.name for path in folder.iterdir() if path.suffix != ".parquet"] if folder.exists() else []
    if strangers:
        raise ValueError(
            f"`folder` must hold nothing but parquet files, got {folder} with {strangers[:3]}. Give another."
        )
    new, old = (folder.with_name(f".{folder.name}.{name}") for name in ("new", "old"))
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)
    new.mkdir(parents=True)
    for index, table in enumerate(shards):
        # not `Dataset.to_parquet`, which draws a progress bar per file
        pq.write_table(table, new / f"train-{index:05d}-of-{num_shards:05d}.parquet")
    if folder.exists():
        os.replace(folder, old)
    os.replace(new, folder)
    shutil.rmtree(old, ignore_errors=True)


def _read_folder(folder: Path, features: Features) -> Iterable[tuple[Path, pa.Table]]:
    """Yield each parquet file with its table, checked against `features`."""
    files = sorted(folder.glob("*.parquet"))
    if not files:
        raise FileNotFoundError(f"`folder` must hold parquet files, got none in {folder}.")
    for file in files:
        try:
            table = pq.read_table(file)
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"`{file}` must be a parquet file: {error}") from error
        found = Features.from_arrow_schema(table.schema)
        for name, feature in features.items():
            if found.get(name) != feature:
                raise ValueError(
                    f"`{file}`: column {name!r} must be {feature}, got {found.get(name, 'no such column')}."
                )
        yield file, table
