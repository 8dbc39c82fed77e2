"""One row per played episode: what `episodes/{task}.parquet` holds, and what comparisons and reports are made from."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from torch import Tensor

from trl_stare.data.trajectory import Trajectory
from trl_stare.evaluation.records import EpisodeResult
from trl_stare.interfaces import NOMINAL
from trl_stare.stages import StagePlan

SCHEMA = pa.schema(
    {
        "task": pa.string(),
        "seed": pa.int64(),
        "eval_seed": pa.int64(),
        "success_once": pa.bool_(),
        "success_at_end": pa.bool_(),
        "num_steps": pa.int64(),
        "terminated": pa.bool_(),
        "truncated": pa.bool_(),
        "segments": pa.list_(
            pa.struct(
                {
                    "stage": pa.int64(),
                    "start": pa.int64(),
                    "stop": pa.int64(),
                    "passed": pa.bool_(),
                    "cost": pa.float64(),
                }
            )
        ),
        "void": pa.string(),
        "variation": pa.string(),
        "final_image": pa.struct({"bytes": pa.binary(), "path": pa.string()}),
    }
)
"""Columns of the file; `final_image` as `datasets.Image` has it."""


@dataclass(frozen=True)
class PlayedEpisode:
    """An episode of an evaluation.

    Args:
        task (`str`): registered task name.
        eval_seed (`int`): the evaluation's seed that it belongs to.
        result ([`EpisodeResult`]): how it went; `result.seed` is its start.
        void (`str`): what the simulator spoiled it with; empty for an episode that counts.
        final_image (`bytes`): PNG of the last moment; empty where it is void.
        variation (`str`): what was changed of the task, `"nominal"` if nothing.
    """

    task: str
    eval_seed: int
    result: EpisodeResult
    void: str = ""
    final_image: bytes = b""
    variation: str = NOMINAL

    @classmethod
    def of(cls, trajectory: Trajectory, plan: StagePlan, eval_seed: int, *, variation: str = NOMINAL) -> PlayedEpisode:
        """The row of an episode that was played to its end."""
        result = EpisodeResult.from_trajectory(trajectory, plan)
        return cls(trajectory.task, eval_seed, result, final_image=_png(trajectory.final_image), variation=variation)

    @classmethod
    def voided(
        cls, task: str, seed: int, eval_seed: int, *, step: int, what: str, variation: str = NOMINAL
    ) -> PlayedEpisode:
        """The row of an episode that the simulator spoiled: it is listed, and counts neither as success nor as failure."""
        return cls(
            task, eval_seed, EpisodeResult(seed, False, False, step, False, False, ()), void=what, variation=variation
        )


def counted(episodes: Sequence[PlayedEpisode]) -> list[EpisodeResult]:
    """The results that count."""
    return [episode.result for episode in episodes if not episode.void]


def write_played(path: str | os.PathLike, episodes: Sequence[PlayedEpisode]) -> None:
    """Write the rows to a parquet file, all of them or none; equal rows give equal bytes."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            **episode.result.to_row(),
            "task": episode.task,
            "eval_seed": episode.eval_seed,
            "void": episode.void,
            "variation": episode.variation,
            "final_image": {"bytes": episode.final_image, "path": None},
        }
        for episode in episodes
    ]
    partial = path.with_name(f".{path.name}.partial")
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), partial, write_page_checksum=True)
    os.replace(partial, path)


def read_played(path: str | os.PathLike) -> list[PlayedEpisode]:
    """The inverse of [`write_played`].

    Raises:
        ValueError: if `path` is no such file.
    """
    try:
        rows = pq.read_table(path, schema=SCHEMA, page_checksum_verification=True).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"`{path}` must hold the episodes of an evaluation: {error}. Evaluate again.") from error
    episodes = []
    for row in rows:
        names = ("task", "eval_seed", "void", "final_image", "variation")
        task, eval_seed, void, image, variation = (row.pop(name) for name in names)
        result = EpisodeResult.from_row(row)
        # files of evaluations that knew no variations have no such column
        episodes.append(PlayedEpisode(task, eval_seed, result, void, image["bytes"], variation or NOMINAL))
    return episodes


def _png(image: Tensor) -> bytes:
    """`[H, W, 3]` uint8 as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(image.numpy()).save(buffer, format="PNG")
    return buffer.getvalue()
