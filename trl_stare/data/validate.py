"""Looks at all of a dataset before anything is trained on it, and tells everything that is wrong with it at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets import Features

from trl_stare.data.parquet import column_problems, features_in, open_file, parquet_files, read_group, written_columns
from trl_stare.data.row_checks import Episode, episode_of, episode_problems, layout_of, pair_problems
from trl_stare.data.schema import PREFERENCE_FEATURES, SIGNAL_FEATURES, SIGNAL_PREFIX, TRAJECTORY_FEATURES, read_cell

MOST_SHOWN = 50
"""Problems that an error's text lists; `problems` holds them all."""


class InvalidDatasetError(ValueError):
    """A dataset that must not be trained on.

    Attributes:
        problems (`tuple[str, ...]`): each with its file and row, or file and row group where that cannot be read.
    """

    def __init__(self, problems: Iterable[str]):
        self.problems = tuple(problems)
        lines = [f"- {problem}" for problem in self.problems[:MOST_SHOWN]]
        if len(self.problems) > MOST_SHOWN:
            lines.append(f"- and {len(self.problems) - MOST_SHOWN} more, see `problems`")
        super().__init__("\n".join([f"the dataset must be without problems, got {len(self.problems)}:", *lines]))

    def __reduce__(self) -> tuple[type, tuple[tuple[str, ...]]]:
        """From another process it comes with its problems: an exception is otherwise made anew from its text."""
        return type(self), (self.problems,)


def validate_dataset(trajectories_folder: str | Path, preferences_folder: str | Path | None = None) -> None:
    """Read every row and image of a dataset and raise one error with all that is wrong.

    Looked for are damaged files and row groups (checksums), columns that are missing, surplus or of another type, nulls,
    numbers that are not finite, lengths and shapes that do not fit, `id`s that are not the row's number, decisions and stages
    out of range, gaps and overlaps between segments, flags that contradict the signals; in pairs: unknown trajectories,
    chosen = rejected, another task, instruction or seed, slices that are empty, outside, or not the trajectory's segment
    of that stage, costs and reasons that are not the segments', and pairs given twice or both ways round.

    Args:
        trajectories_folder (`str` or `Path`): what [`save_trajectories`] wrote. A row group is in memory at a time.
        preferences_folder (`str` or `Path`, *optional*): what [`save_pairs`] wrote.

    Raises:
        FileNotFoundError: if a folder holds no parquet files.
        InvalidDatasetError: if there are problems; a `ValueError`, its `problems` is the whole list.

    Example:
        `train-00000-of-00001.parquet, row 3: segment 1 must begin at step 4, got a gap at 6`
    """
    trajectories = _Reader(Path(trajectories_folder))
    episodes = _check_trajectories(trajectories)
    problems = trajectories.problems
    if preferences_folder is not None:
        preferences = _Reader(Path(preferences_folder))
        _check_pairs(preferences, episodes if trajectories.is_complete else None)
        problems += preferences.problems
    if problems:
        raise InvalidDatasetError(problems)


class _Reader:
    """The rows of a folder, and everything that is wrong with them.

    Args:
        folder (`Path`): parquet files.

    `is_complete` tells whether all files could be read so far as to count their rows.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.problems: list[str] = []
        self.is_complete = True

    def rows(self, wanted: Callable[[Features], Features]) -> Iterator[tuple[str, pa.Table | None, int]]:
        """Where each row is, its row group (`None` if damaged), and the row in it; `wanted` says what a file's columns must be."""
        for file in parquet_files(self.folder):
            try:
                source = open_file(file)
                found = features_in(file, source)
            except ValueError as error:
                self.problems.append(str(error))
                self.is_complete = False
                continue
            with source:
                known = wanted(found)
                surplus = [f"column {name!r} is unknown" for name in found if name not in known]
                lost = [
                    f"column {name!r} was written, but is not there"
                    for name in written_columns(source) - {*found, *known}
                ]
                columns = [*column_problems(found, known), *surplus, *sorted(lost)]
                self.problems += [f"`{file}`: {problem}" for problem in columns]
                if columns:
                    self.is_complete = False
                else:
                    yield from self._rows_of(file, source)

    def _rows_of(self, file: Path, source: pq.ParquetFile) -> Iterator[tuple[str, pa.Table | None, int]]:
        first_row = 0
        for group in range(source.num_row_groups):
            size, table = source.metadata.row_group(group).num_rows, None
            try:
                table = read_group(file, source, group)
            except ValueError as error:
                self.problems.append(f"{error} (rows {first_row} to {first_row + size - 1})")
            for row in range(size):
                yield f"`{file}`, row {first_row + row}", table, row
            first_row += size


def _check_trajectories(reader: _Reader) -> dict[int, Episode | None]:
    """The episodes by row; `None` for those that are invalid."""
    episodes: dict[int, Episode | None] = {}
    layouts: dict[str, dict[str, tuple[int | str, ...]]] = {}
    signals: dict[str, Any] = {}

    def wanted(found: Features) -> Features:
        # the first file says which signals there are
        if not signals:
            possible = {name: feature for name, feature in found.items() if feature in SIGNAL_FEATURES.values()}
            signals.update({name: possible[name] for name in possible if name.startswith(SIGNAL_PREFIX)})
            signals[SIGNAL_PREFIX + "success"] = SIGNAL_FEATURES[torch.bool, 1]
        return Features(TRAJECTORY_FEATURES | signals)

    for where, table, row in reader.rows(wanted):
        number = len(episodes)
        episodes[number] = None
        if table is None:
            continue
        cells, found = _read_cells(table, row, where)
        if not found:
            found = [
                f"{where}: {problem}" for problem in _episode_problems(cells, number, layouts, reader.is_complete)
            ]
        reader.problems += found
        if not found:
            episodes[number] = episode_of(cells)
    return episodes


def _read_cells(table: pa.Table, row: int, where: str) -> tuple[dict[str, Any], list[str]]:
    """The row's cells by column, and what could not be read of them."""
    cells, problems = {}, []
    for name in table.column_names:
        try:
            plain = name in ("segments", "stage_names")
            cells[name] = table[name][row].as_py() if plain else read_cell(table, name, row, where)
        except ValueError as error:
            problems.append(str(error))
    return cells, problems


def _episode_problems(
    cells: Mapping[str, Any], number: int, layouts: dict[str, dict[str, tuple[int | str, ...]]], is_complete: bool
) -> Iterator[str]:
    """What is wrong with an episode by itself, or beside the others of its task, whose shapes are in `layouts`."""
    problems = [*episode_problems(cells)]
    yield from problems
    # after a file whose rows could not be counted nobody knows the number
    if is_complete and cells["id"] != number:
        yield f"`id` must be the row's number in the dataset, {number}, got {cells['id']}"
    if not problems:
        # names have no shape, but are compared likewise
        layout = layout_of(cells) | {"stage_names": tuple(cells["stage_names"])}
        first = layouts.setdefault(cells["task"], layout)
        for name, shape in layout.items():
            if first.setdefault(name, shape) != shape:
                yield f"`{name}` must be shaped as in the task's first episode, {first[name]}, got {shape}"


def _check_pairs(reader: _Reader, episodes: Mapping[int, Episode | None] | None) -> None:
    """Check all pairs, against the episodes if these are known."""
    if episodes is None:
        reader.problems.append(
            f"`{reader.folder}`: what its pairs refer to could not be read, so they were looked at alone"
        )
    seen: dict[tuple[Any, ...], str] = {}
    for where, table, row in reader.rows(lambda found: PREFERENCE_FEATURES):
        if table is None:
            continue
        pair = {name: table[name][row].as_py() for name in table.column_names}
        reader.problems += [f"{where}: {problem}" for problem in pair_problems(pair, episodes)]
        key = (pair["stage"], pair["stage_name"], *sorted((pair["chosen"] or 0, pair["rejected"] or 0)))
        if seen.setdefault(key, where) != where:
            reader.problems.append(f"{where}: these two were compared in this stage before, see {seen[key]}")
