"""Folders of parquet files: written all or nothing, read a row group at a time, with page checksums on both ways.

A flipped bit in a page without a checksum is read as another number without a word; with it, reading raises. (The few bytes
of a page's header are not covered: of 6000 single flips in a file of 52 kB, one changed numbers unnoticed.)
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Features

ROWS_PER_GROUP = 4
"""Rows that are read at once. Small, as one episode is asked for at a time; a footer grows with the number of groups."""


def write_folder(
    folder: Path, shards: Iterable[pa.Table], num_shards: int, features: Features, *, row_group_size: int
) -> None:
    """Write a parquet file per shard beside `folder`, then put the new folder in the old one's place.

    Raises:
        ValueError: as [`check_replaceable`].
    """
    finish_folder(folder)
    check_replaceable(folder, features)
    new, old = _beside(folder)
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)
    new.mkdir(parents=True)
    for index, table in enumerate(shards):
        # not `Dataset.to_parquet`, which draws a progress bar per file
        file = new / f"train-{index:05d}-of-{num_shards:05d}.parquet"
        pq.write_table(table, file, row_group_size=row_group_size, write_page_checksum=True)
    if folder.exists():
        os.replace(folder, old)
    os.replace(new, folder)
    shutil.rmtree(old, ignore_errors=True)


def check_replaceable(folder: Path, features: Features) -> None:
    """See that `folder`, if there is one, holds data of the kind that is to take its place, and nothing else: it will be gone.

    Raises:
        ValueError: if it holds other files, or parquet files without the columns of `features`.
    """
    files = sorted(folder.iterdir()) if folder.exists() else []
    strangers = [path.name for path in files if path.suffix != ".parquet"]
    if strangers:
        raise ValueError(
            f"`folder` must hold nothing but parquet files, got {folder} with {strangers[:3]}. Move them away, or give another."
        )
    for file in files:
        with open_file(file) as source:
            missing = [name for name in features if name not in source.schema_arrow.names]
        if missing:
            raise ValueError(
                f"`folder` must be new or hold what is to be replaced, got {folder} with other data: {file.name} has no column "
                f"{missing[0]!r}. Give another."
            )


def finish_folder(folder: Path) -> None:
    """Put the new folder in its place where [`write_folder`] was killed between taking the old one away and doing so."""
    new, old = _beside(folder)
    if old.exists() and new.exists() and not folder.exists():  # so the new one is whole
        os.replace(new, folder)


def _beside(folder: Path) -> tuple[Path, Path]:
    """Where the new folder is written, and where the old one waits to be deleted."""
    return folder.with_name(f".{folder.name}.new"), folder.with_name(f".{folder.name}.old")


def to_table(rows: Sequence[Mapping[str, Any]], features: Features) -> pa.Table:
    """Rows as a table whose schema carries the features, as `load_dataset` wants it; arrays are `[T]` or `[T, D]`.

    The same table as `datasets.Dataset.from_dict`'s, which takes ten times as long over one episode.
    """
    schema = features.arrow_schema
    columns = [pa.array([_to_lists(row[field.name]) for row in rows], field.type) for field in schema]
    return pa.Table.from_arrays(columns, schema=schema)


def _to_lists(cell: Any) -> Any:
    """What Arrow makes a list of lists of: it takes arrays of one dimension only."""
    return list(cell) if isinstance(cell, np.ndarray) and cell.ndim > 1 else cell


def parquet_files(folder: Path) -> list[Path]:
    """The parquet files of `folder` in the order of their names.

    Raises:
        FileNotFoundError: if there is none.
    """
    files = sorted(folder.glob("*.parquet"))
    if not files:
        raise FileNotFoundError(f"`folder` must hold parquet files, got none in {folder}.")
    return files


def open_file(file: Path, metadata: pq.FileMetaData | None = None) -> pq.ParquetFile:
    """Open a file for reading with its page checksums; `metadata`, if known, spares reading the footer.

    Raises:
        ValueError: if it is no parquet file, or is truncated; names it.
    """
    try:
        return pq.ParquetFile(file, metadata=metadata, page_checksum_verification=True)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ValueError(f"`{file}` must be a parquet file: {error}") from error


def read_group(file: Path, source: pq.ParquetFile, group: int, columns: list[str] | None = None) -> pa.Table:
    """Row group `group` of an open file, all columns or some.

    Raises:
        ValueError: if it is damaged; names file and row group.
    """
    try:
        table = source.read_row_group(group, columns=columns, use_threads=False)
        table.validate(full=True)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ValueError(f"`{file}`, row group {group} is damaged: {error}") from error
    return table


def read_groups(file: Path, columns: list[str] | None = None) -> Iterator[pa.Table]:
    """The row groups of a file, one in memory at a time; see [`open_file`] and [`read_group`] for what is raised."""
    with open_file(file) as source:
        for group in range(source.num_row_groups):
            yield read_group(file, source, group, columns)


def features_in(file: Path, source: pq.ParquetFile) -> Features:
    """What `datasets` takes the columns of an open file for.

    Raises:
        ValueError: if its schema cannot be read; names the file.
    """
    try:
        return Features.from_arrow_schema(source.schema_arrow)
    except (pa.ArrowException, OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"`{file}`: its schema cannot be read: {error}") from error


def written_columns(source: pq.ParquetFile) -> set[str]:
    """The columns that `datasets` noted in an open file's metadata when it was written; none for files of other origin."""
    notes = (source.schema_arrow.metadata or {}).get(b"huggingface", b"{}")
    return set(json.loads(notes).get("info", {}).get("features", {}))


def column_problems(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """What is missing or of another type in `found`, a sentence each.

    Example: `found` without `seed` gives `["column 'seed' must be Value('int64'), got no such column"]`.
    """
    return [
        f"column {name!r} must be {feature}, got {found.get(name, 'no such column')}"
        for name, feature in wanted.items()
        if found.get(name) != feature
    ]


def check_columns(file: Path, source: pq.ParquetFile, wanted: Mapping[str, Any]) -> None:
    """Raise `ValueError` that names the file and all columns of an open file that are missing or of another type."""
    problems = column_problems(features_in(file, source), wanted)
    if problems:
        raise ValueError(f"`{file}`: {'; '.join(problems)}.")
