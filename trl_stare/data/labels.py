"""The stages of stored episodes: whether they are those of a plan as it is now, and writing them anew where it has changed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from trl_stare.data.parquet import ROWS_PER_GROUP, check_columns, open_file, parquet_files, read_groups, write_folder
from trl_stare.data.row_checks import same_cost
from trl_stare.data.schema import SIGNAL_PREFIX, TRAJECTORY_FEATURES, label_episode, read_cell
from trl_stare.stages import Segment, StagePlan


def check_labels(folder: str | Path, plan: StagePlan) -> None:
    """See that the stored stages are what `plan` makes of the stored signals.

    A plan is code. An event or a distance that was changed since makes other stages of the same episodes, and pairs that are cut
    by one plan do not fit episodes labelled by another.

    Args:
        folder (`str` or `Path`): what [`save_trajectories`] wrote; pictures are not read.
        plan ([`StagePlan`]): of the episodes' task.

    Raises:
        FileNotFoundError: if `folder` holds no parquet files.
        ValueError: if an episode is labelled otherwise; names file, row and what differs first.
    """
    for file in parquet_files(Path(folder)):
        for row, (stored, now) in enumerate(_stored_and_now(file, plan)):
            differing = _differing(stored, now)
            if differing is not None:
                raise ValueError(
                    f"`{file}`, row {row} must be labelled by the plan of {plan.task!r} as it is now, got `{differing}` "
                    f"{stored[differing]} where the plan says {now[differing]}. Restore the plan, or label the episodes anew: "
                    "`trl_stare.data.relabel_dataset(folder, plan)`, or of a finished collection recipes/pairs.py --relabel true."
                )


def relabel_folder(folder: Path, plan: StagePlan) -> None:
    """Write `folder` anew, all or nothing, with the stages that `plan` makes of the stored signals. A file is in memory at a time."""
    files = parquet_files(folder)
    shards = map(partial(_relabelled, plan=plan), files)
    write_folder(folder, shards, len(files), TRAJECTORY_FEATURES, row_group_size=ROWS_PER_GROUP)


def _relabelled(file: Path, plan: StagePlan) -> pa.Table:
    table = pa.concat_tables(read_groups(file))
    labels = [now for _, now in _stored_and_now(file, plan)]
    for name in labels[0] if labels else ():
        index = table.schema.get_field_index(name)
        cells = pa.array([now[name] for now in labels], table.schema.field(index).type)
        table = table.set_column(index, table.schema.field(index), cells)
    return table


def _stored_and_now(file: Path, plan: StagePlan) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """The labels of each episode of `file` as they are stored, and as `plan` makes them, both by column."""
    with open_file(file) as source:
        check_columns(file, source, TRAJECTORY_FEATURES)
        signals = [name for name in source.schema_arrow.names if name.startswith(SIGNAL_PREFIX)]
    first_row = 0
    for table in read_groups(file, ["stage_names", "stage", "segments", *signals]):
        for row in range(len(table)):
            where = f"`{file}`, row {first_row + row}"
            now = label_episode(
                plan, {name.removeprefix(SIGNAL_PREFIX): read_cell(table, name, row, where) for name in signals}
            )
            yield {name: table[name][row].as_py() for name in now}, now
        first_row += len(table)


def _differing(stored: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """The first column that differs, costs by more than rounding."""

    def is_same(name: str) -> bool:
        if name != "segments":
            return stored[name] == now[name]
        first, second = ([Segment(**part) for part in labels[name]] for labels in (stored, now))
        return len(first) == len(second) and all(
            a[:-1] == b[:-1] and same_cost(a.cost, b.cost) for a, b in zip(first, second, strict=True)
        )

    return next((name for name in now if not is_same(name)), None)
