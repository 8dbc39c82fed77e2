"""How trajectories and pairs lie on disk: folders of parquet files that plain `load_dataset(folder)` reads.

A row of trajectories is an episode, with the stages' verdict beside it; a row of preferences refers to two of them by
`id`, so images are stored once. Numbers keep their exact values, images are PNG (lossless).
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Features, Image, List, Value
from PIL import Image as PILImage
from torch import Tensor

from trl_stare.data.pairs import StagePair
from trl_stare.data.parquet import (
    ROWS_PER_GROUP,
    check_columns,
    open_file,
    parquet_files,
    read_groups,
    to_table,
    write_folder,
)
from trl_stare.data.trajectory import Trajectory
from trl_stare.interfaces import Signals
from trl_stare.stages import StagePlan, segment

SIGNAL_PREFIX = "signal."
# Pillow raises `SyntaxError` for a damaged PNG, `torch.stack` a `RuntimeError` for images of unequal sizes
UNREADABLE = (ValueError, OSError, TypeError, RuntimeError, SyntaxError)
"""What a cell that cannot be read raises."""
PICTURES = ("images", "final_image")
"""Columns that take most of the space."""
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

SIGNAL_FEATURES = {
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
        ValueError: if there is no episode, one has a `prefix`, signals differ or cannot be stored, or `folder` holds anything
            but trajectories.
    """
    if not trajectories:
        raise ValueError("`trajectories` must hold at least one episode, got none. Collect some first.")
    features = _features_of(trajectories)
    note = json.dumps(dict(metadata or {}), default=str)
    starts = range(0, len(trajectories), EPISODES_PER_SHARD)
    shards = (
        to_table(
            [
                _to_row(index, trajectory, plan, note)
                for index, trajectory in enumerate(trajectories[start : start + EPISODES_PER_SHARD], start)
            ],
            features,
        )
        for start in starts
    )
    write_folder(Path(folder), shards, len(starts), TRAJECTORY_FEATURES, row_group_size=ROWS_PER_GROUP)


def merge_trajectories(sources: Sequence[str | Path], folder: str | Path, *, episodes: int) -> None:
    """Write the first `episodes` rows of several datasets, in their order, as one; `id`s are counted anew.

    `folder` may be one of `sources`: it is replaced when the new one is complete. A shard is in memory at a time.

    Raises:
        ValueError: if the sources hold fewer rows, or other columns than the first.
    """
    files = [file for source in sources for file in sorted(Path(source).glob("*.parquet"))]
    found = sum(open_file(file).metadata.num_rows for file in files)
    if found < episodes:
        raise ValueError(f"`sources` must hold at least {episodes} episodes, got {found}.")
    num_shards = -(-episodes // EPISODES_PER_SHARD)
    shards = _merged_shards(files, episodes)
    write_folder(Path(folder), shards, num_shards, TRAJECTORY_FEATURES, row_group_size=ROWS_PER_GROUP)


def _merged_shards(files: Sequence[Path], episodes: int) -> Iterator[pa.Table]:
    """Rows of `files` as tables of `EPISODES_PER_SHARD` rows, the last one shorter, `episodes` in all."""
    waiting: list[pa.Table] = []
    written = 0
    for part in (group for file in files for group in read_groups(file)):
        waiting.append(part)
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
    files = sorted(Path(folder).glob("*.parquet"))
    tables = [table for file in files for table in read_groups(file, ["seed", "metadata"])]
    seeds = [seed for table in tables for seed in table["seed"].to_pylist()]
    notes = {note for table in tables for note in table["metadata"].to_pylist()}
    return seeds, [json.loads(note) for note in sorted(notes)]


def load_trajectories(folder: str | Path) -> list[Trajectory]:
    """Read what [`save_trajectories`] wrote: equal tensors, same order; `features`, which is not stored, is `None`.

    Raises:
        FileNotFoundError: if `folder` holds no parquet files.
        ValueError: if a file is not a trajectories file; names file, row and column.
    """
    trajectories: list[Trajectory] = []
    for file, first_row, table in _read_folder(Path(folder), TRAJECTORY_FEATURES):
        trajectories.extend(to_trajectory(table, row, f"`{file}`, row {first_row + row}") for row in range(len(table)))
    return trajectories


def save_pairs(pairs: Sequence[StagePair], folder: str | Path) -> None:
    """Write pairs to `folder`, all or nothing. `chosen` and `rejected` are rows of the trajectories they came from.

    Raises:
        ValueError: if `folder` holds anything but pairs.
    """
    starts = range(0, max(len(pairs), 1), PAIRS_PER_SHARD)
    shards = (
        to_table([asdict(pair) for pair in pairs[start : start + PAIRS_PER_SHARD]], PREFERENCE_FEATURES)
        for start in starts
    )
    write_folder(Path(folder), shards, len(starts), PREFERENCE_FEATURES, row_group_size=PAIRS_PER_SHARD)


def load_pairs(folder: str | Path) -> tuple[StagePair, ...]:
    """Read what [`save_pairs`] wrote.

    Raises:
        FileNotFoundError: if `folder` holds no parquet files.
        ValueError: if a file is not a preferences file; names file and column.
    """
    tables = _read_folder(Path(folder), PREFERENCE_FEATURES)
    return tuple(StagePair(**row) for _, _, table in tables for row in table.to_pylist())


def encode_png(image: Tensor) -> bytes:
    """`[H, W, 3]` uint8 -> PNG. Level 1: five times as fast as the default, and rendered frames get hardly larger."""
    buffer = io.BytesIO()
    PILImage.fromarray(image.numpy()).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def image_cell(image: Tensor) -> dict[str, Any]:
    """`[H, W, 3]` uint8 -> a cell of datasets' `Image`, as PNG."""
    return {"bytes": encode_png(image), "path": None}


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
    unknown = {name: kind for name, kind in kinds.items() if kind not in SIGNAL_FEATURES}
    if unknown:
        raise ValueError(
            f"`signals` must be bool [T + 1] or float32 [T + 1] or [T + 1, D], got {unknown}. Convert them."
        )
    return Features(
        TRAJECTORY_FEATURES | {SIGNAL_PREFIX + name: SIGNAL_FEATURES[kind] for name, kind in kinds.items()}
    )


def _to_row(index: int, trajectory: Trajectory, plan: StagePlan, note: str) -> dict[str, Any]:
    if trajectory.task != plan.task:
        raise ValueError(
            f"`trajectories` must be of the plan's task {plan.task!r}, got {trajectory.task!r} at {index}."
        )
    if trajectory.prefix is not None:
        raise ValueError(
            f"`trajectories` must begin where their seeds do, got one at {index} whose `prefix` of "
            f"{len(trajectory.prefix)} actions came first. Collect from seeds alone: there is no column for a prefix."
        )
    row: dict[str, Any] = {
        "id": index,
        "success_once": trajectory.success_once,
        "success_at_end": trajectory.success_at_end,
        "images": [image_cell(image) for image in trajectory.images],
        "final_image": image_cell(trajectory.final_image),
        "metadata": note,
    }
    for field in fields(Trajectory):
        if field.name in TRAJECTORY_FEATURES and field.name not in row:
            value = getattr(trajectory, field.name)
            row[field.name] = value.numpy() if isinstance(value, Tensor) else value
    row |= label_episode(plan, trajectory.signals)
    return row | {SIGNAL_PREFIX + name: signal.numpy() for name, signal in trajectory.signals.items()}


def label_episode(plan: StagePlan, signals: Signals) -> dict[str, Any]:
    """What `plan` says of an episode with these signals: the columns `stage_names`, `stage` and `segments`."""
    return {
        "stage_names": list(plan.names),
        "stage": plan.current_stage(signals)[:-1].tolist(),
        "segments": [part._asdict() for part in segment(plan, signals)],
    }


def to_trajectory(table: pa.Table, row: int, where: str) -> Trajectory:
    """One row of a trajectories table. Without the columns of [`PICTURES`] these are empty, `[M, 0, 0, 3]` and `[0, 0, 3]`.

    Raises:
        ValueError: if a cell cannot be read; begins with `where` and names the column.
    """
    values: dict[str, Any] = {"signals": {}, "features": None}
    for name in table.column_names:
        if name.startswith(SIGNAL_PREFIX):
            values["signals"][name.removeprefix(SIGNAL_PREFIX)] = read_cell(table, name, row, where)
        elif name in Trajectory.__dataclass_fields__:
            values[name] = read_cell(table, name, row, where)
    if "images" not in values:
        values["images"] = torch.zeros(len(values["starts"]), 0, 0, 3, dtype=torch.uint8)
        values["final_image"] = torch.zeros(0, 0, 3, dtype=torch.uint8)
    return Trajectory(**values)


def read_cell(table: pa.Table, name: str, row: int, where: str) -> Any:
    """A cell as it stands in a [`Trajectory`]: lists and images as tensors, the rest as Python values.

    Raises:
        ValueError: if a list is ragged or holds nulls, or an image cannot be decoded; begins with `where`.
    """
    cell = table[name][row]
    try:
        if name == "images":
            return torch.stack([decode_png(image["bytes"]) for image in cell.as_py()])
        if name == "final_image":
            return decode_png(cell.as_py()["bytes"])
        return _to_tensor(cell) if isinstance(cell, pa.ListScalar) and cell.is_valid else cell.as_py()
    except UNREADABLE as error:
        raise ValueError(f"{where}, column {name!r} cannot be read: {error}") from error


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


def _read_folder(folder: Path, features: Features) -> Iterator[tuple[Path, int, pa.Table]]:
    """Yield each row group with its file and first row in it, after the file's columns were checked."""
    for file in parquet_files(folder):
        with open_file(file) as source:
            check_columns(file, source, features)
        first_row = 0
        for table in read_groups(file):
            yield file, first_row, table
            first_row += len(table)
