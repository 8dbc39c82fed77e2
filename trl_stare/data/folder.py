"""Trajectories that stay on disk: a folder as a sequence, of which only what is asked for is in memory."""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from operator import index
from pathlib import Path
from typing import NamedTuple, overload

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset
from torch import Tensor

from trl_stare.data.parquet import check_columns, open_file, parquet_files, read_group
from trl_stare.data.schema import PICTURES, TRAJECTORY_FEATURES, UNREADABLE, decode_png, to_trajectory
from trl_stare.data.trajectory import Trajectory

LIGHT_EPISODES = 4096
"""Episodes without pictures that are kept for reading at random; some 20 kB each."""
CACHED_FOOTERS = 8
"""Files whose footers are kept: some 0.1 MB for 100 episodes, and a good part of the time of a random access."""


class _Place(NamedTuple):
    """Where a row group lies: file, number in it, the dataset's row and the file's row that it begins with."""

    file: Path
    group: int
    first_index: int
    first_row: int


class TrajectoryFolder(Sequence[Trajectory]):
    """The episodes that [`save_trajectories`] or [`collect_dataset`] wrote, read when they are asked for.

    Whatever takes a sequence of trajectories takes this one ([`build_pairs`], [`pairs_dataset`],
    [`demonstration_dataset`], [`DemonstrationCollator`]). It may be pickled and used by forked workers: no file stays open.

    Args:
        folder (`str` or `Path`): parquet files.
        images (`bool`): without them, `images` is `[M, 0, 0, 3]`, `final_image` `[0, 0, 3]`, and reading is many times as fast:
            enough for whatever looks at signals and actions only, as [`build_pairs`] does.
        cache_size (`int`): episodes that are kept as they were read, at least 1.
        cache_dir (`str` or `Path`, *optional*): where [`TrajectoryFolder.image`] maps pictures from; by default, the cache of
            `datasets` (`HF_DATASETS_CACHE`).

    Raises:
        FileNotFoundError: if `folder` holds no parquet files.
        ValueError: if a file is not a trajectories file, or `cache_size` is not positive. Rows are checked when they are
            read; [`validate_dataset`] checks all.

    Example:
        `len(TrajectoryFolder("data/rollouts"))` reads footers only; `TrajectoryFolder("data/rollouts")[7]` one row group.
    """

    def __init__(
        self, folder: str | Path, *, images: bool = True, cache_size: int = 16, cache_dir: str | Path | None = None
    ):
        if cache_size < 1:
            raise ValueError(f"`cache_size` must be at least 1, got {cache_size}.")
        self.folder, self.images, self.cache_size = Path(folder), images, cache_size
        self.cache_dir = None if cache_dir is None else str(cache_dir)
        self._places: list[_Place] = []
        self._columns: list[str] | None = None
        self._length = 0
        for file in parquet_files(self.folder):
            self._add(file)
        self._first_indices = [place.first_index for place in self._places]
        self._episodes: OrderedDict[int, Trajectory] = OrderedDict()
        self._group: tuple[_Place, pa.Table] | None = None
        self._pictures: pa.ChunkedArray | None = None

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, position: int) -> Trajectory: ...

    @overload
    def __getitem__(self, position: slice) -> list[Trajectory]: ...

    def __getitem__(self, position: int | slice) -> Trajectory | list[Trajectory]:
        """An episode, or a list of those in a slice."""
        if isinstance(position, slice):
            return [self[row] for row in range(*position.indices(len(self)))]
        row = self._row(position)
        if row not in self._episodes:
            self._episodes[row] = self._read(row)
            if len(self._episodes) > self.cache_size:
                self._episodes.popitem(last=False)
        self._episodes.move_to_end(row)
        return self._episodes[row]

    def image(self, position: int, decision: int) -> Tensor:
        """`[H, W, 3]` uint8: what was seen at one decision of an episode, of whose pictures only this one is decoded.

        For reading at random: parquet is decompressed by whole row groups. The first call has `datasets` write the encoded
        pictures to `cache_dir`, where they are mapped into memory, also by the next process.

        Raises:
            IndexError: if there is no such episode, or no such decision of it.
            ValueError: if the picture cannot be decoded; names file, row and decision.
        """
        row = self._row(position)
        if self._pictures is None:
            files = [str(file) for file in parquet_files(self.folder)]
            self._pictures = Dataset.from_parquet(files, columns=["images"], cache_dir=self.cache_dir).data["images"]
        try:
            cells = self._pictures[row].values
            if not 0 <= decision < len(cells):
                raise IndexError(f"`decision` must be in [0, {len(cells)}), got {decision}.")
            return decode_png(cells[decision]["bytes"].as_py())
        except UNREADABLE as error:
            raise ValueError(
                f"{self._where(row)}, the picture of decision {decision} cannot be read: {error}"
            ) from error

    def light(self) -> TrajectoryFolder:
        """The same episodes without their pictures, which [`TrajectoryFolder.image`] still finds, and many of them kept.

        Example: `folder.light().light()` is one object, so that what one has read the other need not read again.
        """
        if not self.images and self.cache_size >= LIGHT_EPISODES:
            return self
        return TrajectoryFolder(
            self.folder, images=False, cache_size=max(self.cache_size, LIGHT_EPISODES), cache_dir=self.cache_dir
        )

    def __reduce__(self):
        return _make_folder, (self.folder, self.images, self.cache_size, self.cache_dir)

    def _row(self, position: int) -> int:
        row = index(position) + (len(self) if position < 0 else 0)
        if not 0 <= row < len(self):
            raise IndexError(f"`position` must be in [{-len(self)}, {len(self)}), got {position}.")
        return row

    def _place_of(self, row: int) -> _Place:
        return self._places[bisect_right(self._first_indices, row) - 1]

    def _where(self, row: int) -> str:
        place = self._place_of(row)
        return f"`{place.file}`, row {place.first_row + row - place.first_index}"

    def _add(self, file: Path) -> None:
        """Note the row groups of a file."""
        with open_file(file) as source:
            check_columns(file, source, TRAJECTORY_FEATURES)
            if not self.images:
                self._columns = [name for name in source.schema_arrow.names if name not in PICTURES]
            sizes = [source.metadata.row_group(group).num_rows for group in range(source.num_row_groups)]
        starts = accumulate(sizes, initial=0)
        for group, (first_row, _) in enumerate(zip(starts, sizes, strict=False)):
            self._places.append(_Place(file, group, self._length + first_row, first_row))
        self._length += sum(sizes)

    def _read(self, row: int) -> Trajectory:
        place = self._place_of(row)
        if self._group is None or self._group[0] != place:
            with open_file(place.file, _footer(place.file, place.file.stat().st_mtime_ns)) as source:
                self._group = place, read_group(place.file, source, place.group, self._columns)
        return to_trajectory(self._group[1], row - place.first_index, self._where(row))


def _make_folder(folder: Path, images: bool, cache_size: int, cache_dir: str | None) -> TrajectoryFolder:
    return TrajectoryFolder(folder, images=images, cache_size=cache_size, cache_dir=cache_dir)


@lru_cache(CACHED_FOOTERS)
def _footer(file: Path, modified: int) -> pq.FileMetaData:
    """The footer of `file` as it was `modified`, nanoseconds since the epoch: a file written anew is read anew."""
    with open_file(file) as source:
        return source.metadata
