"""LeRobotDataset v3.0 without LeRobot: parquet for the numbers, mp4 for the images, stages as one more integer feature.

LeRobot's own package cannot be installed beside current versions of TRL; its files are all that is needed. The layout is described at
https://huggingface.co/docs/lerobot/lerobot-dataset-v3; lerobot 0.4.4, in an environment of its own, has read an export.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import imageio.v2 as imageio
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets import Dataset
from torch import Tensor

from trl_stare.data.interop.lerobot_format import (
    DATA_PATH,
    EPISODES_PATH,
    INFO_PATH,
    OURS_PATH,
    STAGE,
    STATS_PATH,
    TASKS_PATH,
    VERSION,
    VIDEO_PATH,
    columns_of,
    features_of,
    file_path,
    merge_statistics,
    statistics,
)
from trl_stare.data.trajectory import Trajectory
from trl_stare.stages import StagePlan

ENCODER = ["-g", "2", "-crf", "18"]
"""Every second frame can be jumped to, as LeRobot encodes; 18 is what x264 calls visually lossless."""
COLUMNS = ("observation.state", "action", "label", "next.reward", "next.success", STAGE)
"""What is read of an episode's table. Others need not be numbers."""


class LeRobotEpisode(NamedTuple):
    """An imported episode.

    Attributes:
        trajectory ([`Trajectory`]): one decision a step.
        stage (`Tensor` or `None`): `[T]` int64, the current stage at each step, where the dataset has it.
    """

    trajectory: Trajectory
    stage: Tensor | None


def export_lerobot(
    trajectories: Iterable[Trajectory],
    folder: str | Path,
    plan: StagePlan,
    *,
    fps: int,
    camera: str = "front",
    robot_type: str | None = None,
) -> None:
    """Write episodes as a LeRobotDataset v3.0, all or nothing, one of them in memory at a time.

    A step is a frame: `observation.images.{camera}` (H.264, lossy), `observation.state`, `action`, `label` (differs from
    `action` where a mistake was injected), `next.reward`, `next.success`, `next.done`, `stage_index` (the plan's
    current stage, `K` is success) and, as LeRobot's task, the instruction. Signals, traces and what was seen after the last
    step are not written. `stats.json` has no quantiles; LeRobot's `augment_dataset_quantile_stats` adds them.

    Args:
        trajectories (`Iterable[Trajectory]`): episodes of the plan's task with a decision at every step.
        folder (`str` or `Path`): must not exist.
        plan ([`StagePlan`]): labels the stages.
        fps (`int`): control frequency in Hz.
        camera (`str`): the camera's name. robot_type (`str`, *optional*): the robot's, e.g. "panda".

    Raises:
        FileExistsError: if `folder` exists.
        ValueError: if there is no episode, one is of another task or size or has decisions of several steps, or the
            images' sides are odd.
    """
    folder = Path(folder)
    if folder.exists():
        raise FileExistsError(f"`folder` must be new, got {folder}. Give another.")
    episodes = iter(trajectories)
    first = next(episodes, None)
    if first is None:
        raise ValueError("`trajectories` must hold at least one episode, got none. Collect some first.")
    features = features_of(first, f"observation.images.{camera}", fps)
    new = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    export = _Export(new, plan, features, fps)
    export.write_episodes(chain([first], episodes))
    export.write_meta(robot_type)
    os.replace(new, folder)


class _Export:
    """A dataset that is being written.

    Args:
        folder (`Path`), plan ([`StagePlan`]), fps (`int`): see [`export_lerobot`].
        features (`dict`): of `info.json`; the first is the camera.
    """

    def __init__(self, folder: Path, plan: StagePlan, features: dict[str, dict[str, Any]], fps: int):
        self.folder, self.plan, self.features, self.fps = folder, plan, features, fps
        self.camera = next(iter(features))
        self.tasks: dict[str, int] = {}
        self.rows: list[dict[str, Any]] = []
        self.stats: list[dict[str, dict[str, np.ndarray]]] = []
        self.ours: list[dict[str, Any]] = []
        self.num_frames = 0

    def write_episodes(self, trajectories: Iterable[Trajectory]) -> None:
        """Numbers to one parquet file, a row group an episode; images to one video."""
        data, video = self._path(DATA_PATH), self._path(VIDEO_PATH, video_key=self.camera)
        columns = columns_of(self.features)
        with (
            pq.ParquetWriter(data, columns.arrow_schema, write_page_checksum=True) as table,
            imageio.get_writer(
                video,
                format="FFMPEG",
                fps=self.fps,
                codec="libx264",
                quality=None,
                macro_block_size=2,
                pixelformat="yuv420p",
                output_params=ENCODER,
            ) as frames,
        ):
            for index, trajectory in enumerate(trajectories):
                self._check(index, trajectory)
                values = self._values(index, trajectory)
                table.write_table(Dataset.from_dict(values, features=columns).data.table.cast(columns.arrow_schema))
                images = trajectory.images.numpy()
                for image in images:
                    frames.append_data(image)
                self._note(index, trajectory, statistics(values, self.camera, images))

    def write_meta(self, robot_type: str | None) -> None:
        """Everything under `meta/`."""
        info = {
            "codebase_version": VERSION,
            "robot_type": robot_type,
            "total_episodes": len(self.rows),
            "total_frames": self.num_frames,
            "total_tasks": len(self.tasks),
            "chunks_size": 1000,
            "data_files_size_in_mb": 100,
            "video_files_size_in_mb": 200,
            "fps": self.fps,
            "splits": {"train": f"0:{len(self.rows)}"},
            "data_path": DATA_PATH,
            "video_path": VIDEO_PATH,
            "features": self.features,
        }
        ours = {"task": self.plan.task, "stage_names": list(self.plan.names), "episodes": self.ours}
        stats = {
            name: {key: value.tolist() for key, value in part.items()}
            for name, part in merge_statistics(self.stats).items()
        }
        for path, content in ((INFO_PATH, info), (STATS_PATH, stats), (OURS_PATH, ours)):
            self._path(path).write_text(json.dumps(content, indent=4))
        pq.write_table(pa.Table.from_pylist(self.rows), self._path(EPISODES_PATH))
        tasks = pd.DataFrame({"task_index": [*self.tasks.values()]}, index=pd.Index([*self.tasks], name="task"))
        tasks.to_parquet(self._path(TASKS_PATH))

    def _path(self, template: str, **values: Any) -> Path:
        path = file_path(self.folder, template, **values)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def _check(self, index: int, trajectory: Trajectory) -> None:
        if trajectory.task != self.plan.task:
            raise ValueError(
                f"`trajectories` must be of the plan's task {self.plan.task!r}, got {trajectory.task!r} at {index}."
            )
        if len(trajectory.starts) != trajectory.num_steps:
            raise ValueError(
                f"`trajectories` must have an image at every step, got {len(trajectory.starts)} for "
                f"{trajectory.num_steps} steps at {index}. Replay them with `chunk_size=1` (`replay`) first."
            )
        found = features_of(trajectory, self.camera, self.fps)
        other = {name: feature["shape"] for name, feature in found.items() if feature != self.features[name]}
        if other:
            raise ValueError(f"`trajectories` must have the sizes of the first, got {other} at {index}.")

    def _values(self, index: int, trajectory: Trajectory) -> dict[str, np.ndarray]:
        """The episode's columns, `[T]` or `[T, D]`."""
        frames = np.arange(trajectory.num_steps)
        task = self.tasks.setdefault(trajectory.instruction, len(self.tasks))
        return {
            "observation.state": trajectory.state.numpy(),
            "action": trajectory.actions.numpy(),
            "label": trajectory.labels.numpy(),
            "next.reward": trajectory.reward.numpy(),
            "next.success": trajectory.signals["success"][1:].numpy(),
            "next.done": frames == trajectory.num_steps - 1,
            STAGE: self.plan.current_stage(trajectory.signals)[:-1].numpy(),
            "timestamp": (frames / self.fps).astype(np.float32),
            "frame_index": frames,
            "episode_index": np.full_like(frames, index),
            "index": frames + self.num_frames,
            "task_index": np.full_like(frames, task),
        }

    def _note(self, index: int, trajectory: Trajectory, stats: dict[str, dict[str, np.ndarray]]) -> None:
        """The episode's row of `meta/episodes`, and what LeRobot does not know."""
        start, self.num_frames = self.num_frames, self.num_frames + trajectory.num_steps
        video = f"videos/{self.camera}"
        row: dict[str, Any] = {
            "episode_index": index,
            "tasks": [trajectory.instruction],
            "length": trajectory.num_steps,
            "dataset_from_index": start,
            "dataset_to_index": self.num_frames,
            f"{video}/from_timestamp": start / self.fps,
            f"{video}/to_timestamp": self.num_frames / self.fps,
        }
        for place in ("data", video, "meta/episodes"):
            row |= {f"{place}/chunk_index": 0, f"{place}/file_index": 0}
        for name, part in stats.items():
            row |= {f"stats/{name}/{key}": value.tolist() for key, value in part.items()}
        self.rows.append(row)
        self.stats.append(stats)
        names = ("seed", "policy", "terminated", "truncated")
        prefix = None if trajectory.prefix is None else trajectory.prefix.tolist()
        self.ours.append({name: getattr(trajectory, name) for name in names} | {"prefix": prefix})


def import_lerobot(
    folder: str | Path, *, task: str | None = None, camera: str | None = None
) -> Iterator[LeRobotEpisode]:
    """Read a LeRobotDataset v3.0, an episode at a time.

    Actions, state, stages and instruction come back exactly, images as the codec left them. What is not in the
    dataset is filled in: `final_image` and `final_state` repeat the last ones seen, the only signal is `success` (from
    `next.success`; without it no episode counts as a success), and where the dataset is not one of ours, `seed` is the
    episode's number. To have the simulator's signals and images again, [`replay`] the trajectories.

    Args:
        folder (`str` or `Path`): the dataset.
        task (`str`, *optional*): name of the registered task; needed unless [`export_lerobot`] wrote the dataset.
        camera (`str`, *optional*): key of the video, e.g. `"observation.images.front"`; needed where there are several.

    Raises:
        FileNotFoundError: if files are missing.
        ValueError: if it is of another version, `task` or `camera` is needed, or an episode is incomplete.
    """
    folder = Path(folder)
    info = json.loads((folder / INFO_PATH).read_text())
    if not str(info["codebase_version"]).startswith("v3."):
        raise ValueError(
            f"`folder` must be a LeRobotDataset v3.0, got {info['codebase_version']}. Convert it with LeRobot first."
        )
    ours = json.loads((folder / OURS_PATH).read_text()) if (folder / OURS_PATH).exists() else {}
    task = task or ours.get("task")
    if task is None:
        raise ValueError(
            "`task` must be given for a dataset that `export_lerobot` did not write. Name a registered one."
        )
    cameras = [name for name, feature in info["features"].items() if feature["dtype"] == "video"]
    if camera not in cameras and (camera is not None or len(cameras) != 1):
        raise ValueError(f"`camera` must be one of the videos {cameras}, got {camera}.")
    return _episodes(folder, info, task, camera or cameras[0], ours.get("episodes", []))


def _episodes(
    folder: Path, info: Mapping[str, Any], task: str, camera: str, ours: list[dict[str, Any]]
) -> Iterator[LeRobotEpisode]:
    tasks = pd.read_parquet(folder / TASKS_PATH)
    instructions = dict(zip(tasks["task_index"], tasks.index, strict=True))
    files = sorted((folder / "meta" / "episodes").glob("*/*.parquet"))
    names = [name for name in pq.read_schema(files[0]).names if not name.startswith("stats/")]
    rows = [row for file in files for row in pq.read_table(file, columns=names).to_pylist()]
    frames: _Video | None = None
    for row in sorted(rows, key=lambda row: row["episode_index"]):
        number, length = row["episode_index"], row["length"]
        place = {name: row[f"videos/{camera}/{name}"] for name in ("chunk_index", "file_index")}
        path = file_path(folder, info["video_path"], video_key=camera, **place)
        first = round(row[f"videos/{camera}/from_timestamp"] * info["fps"])
        if frames is None or frames.path != path or frames.position > first:
            frames = _Video(path)
        images = frames.read(first, length)
        place = {name: row[f"data/{name}"] for name in ("chunk_index", "file_index")}
        data = file_path(folder, info["data_path"], **place)
        table = pq.read_table(data, filters=[("episode_index", "==", number)], page_checksum_verification=True)
        if not len(images) == len(table) == length or table["frame_index"].to_pylist() != [*range(length)]:
            raise ValueError(
                f"episode {number} must have {length} frames, got {len(images)} images in `{path}` and {len(table)} rows "
                f"in `{data}`. Download the dataset again."
            )
        note = {"seed": number, "policy": "lerobot"} | (ours[number] if number < len(ours) else {})
        yield _episode(table, images, task, instructions[table["task_index"][0].as_py()], note)


def _episode(
    table: pa.Table, images: np.ndarray, task: str, instruction: str, note: Mapping[str, Any]
) -> LeRobotEpisode:
    used = [name for name in COLUMNS if name in table.column_names]
    columns = {name: torch.tensor(np.stack(table[name].to_numpy())) for name in used}
    length = len(table)
    success = torch.zeros(length + 1, dtype=torch.bool)
    if "next.success" in columns:
        success[1:] = columns["next.success"].flatten()
    actions, state = columns["action"], columns["observation.state"]
    pixels = torch.from_numpy(images)
    trajectory = Trajectory(
        task=task,
        instruction=instruction,
        seed=note["seed"],
        policy=note["policy"],
        images=pixels,
        state=state,
        starts=torch.arange(length),
        actions=actions,
        labels=columns.get("label", actions),
        trace=None,
        logps=None,
        features=None,
        final_image=pixels[-1],
        final_state=state[-1],
        signals={"success": success},
        reward=columns["next.reward"] if "next.reward" in columns else success[1:].float(),
        terminated=note.get("terminated", bool(success[-1])),
        truncated=note.get("truncated", not success[-1]),
        prefix=None if note.get("prefix") is None else torch.tensor(note["prefix"]),
    )
    return LeRobotEpisode(trajectory, columns.get(STAGE))


class _Video:
    """A video that is read forwards.

    Args:
        path (`Path`): the file.
    """

    def __init__(self, path: Path):
        self.path, self.position = path, 0
        self._frames = iter(imageio.get_reader(path, format="FFMPEG"))

    def read(self, first: int, count: int) -> np.ndarray:
        """Frames `first .. first + count - 1`, fewer where the video ends: `[count, H, W, 3]` uint8."""
        wanted = [
            np.asarray(frame) for frame in islice(self._frames, first - self.position, first - self.position + count)
        ]
        self.position = first + len(wanted)
        return np.stack(wanted) if wanted else np.zeros((0, 0, 0, 3), dtype=np.uint8)
