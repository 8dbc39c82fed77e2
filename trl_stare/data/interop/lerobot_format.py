"""What a LeRobotDataset v3.0 consists of: paths, features, statistics (`lerobot/src/lerobot/datasets`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Features, List, Value

from trl_stare.data.trajectory import Trajectory

VERSION = "v3.0"
DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
EPISODES_PATH = "meta/episodes/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
INFO_PATH, STATS_PATH, TASKS_PATH = "meta/info.json", "meta/stats.json", "meta/tasks.parquet"
OURS_PATH = "meta/trl_stare.json"
"""Seeds, policies and the stages' names, for which LeRobot has no place; it does not look at this file."""

STAGE = "stage_index"

Stats = dict[str, dict[str, np.ndarray]]
"""Feature -> `min`, `max`, `mean`, `std`, `count` -> array of the feature's shape; `[3, 1, 1]` in [0, 1] for images."""


def file_path(folder: Path, template: str, **values: Any) -> Path:
    """A file of the dataset; `template` may come from a stranger's `info.json`.

    Raises:
        ValueError: if it leads out of `folder`.
    """
    path = folder / template.format(**{"chunk_index": 0, "file_index": 0} | values)
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"`info.json` must name files inside {folder}, got {template!r}. Do not trust this dataset.")
    return path


def features_of(trajectory: Trajectory, camera: str, fps: int) -> dict[str, dict[str, Any]]:
    """`features` of `info.json`, in the sizes of `trajectory`.

    Raises:
        ValueError: if the images' sides are odd, which H.264 does not take.
    """
    height, width = trajectory.images.shape[1:3]
    if height % 2 or width % 2:
        raise ValueError(f"`images` must have even sides for H.264, got {height} x {width}. Replay with another size.")
    video = {
        "video.height": height,
        "video.width": width,
        "video.codec": "h264",
        "video.pix_fmt": "yuv420p",
        "video.is_depth_map": False,
        "video.fps": fps,
        "video.channels": 3,
        "has_audio": False,
    }
    actions, state = trajectory.actions.shape[1], trajectory.state.shape[1]
    return {
        camera: {
            "dtype": "video",
            "shape": [height, width, 3],
            "names": ["height", "width", "channels"],
            "info": video,
        },
        "observation.state": _vector(state),
        "action": _vector(actions),
        "label": _vector(actions),
        "next.reward": _scalar("float32"),
        "next.success": _scalar("bool"),
        "next.done": _scalar("bool"),
        STAGE: _scalar("int64"),
        "timestamp": _scalar("float32"),
        **{name: _scalar("int64") for name in ("frame_index", "episode_index", "index", "task_index")},
    }


def columns_of(features: Mapping[str, Mapping[str, Any]]) -> Features:
    """The parquet columns: a feature of shape `[1]` is a plain value, images are not in there."""
    return Features(
        {
            name: Value(feature["dtype"])
            if feature["shape"] == [1]
            else List(Value(feature["dtype"]), length=feature["shape"][0])
            for name, feature in features.items()
            if feature["dtype"] != "video"
        }
    )


def statistics(columns: Mapping[str, np.ndarray], camera: str, images: np.ndarray) -> Stats:
    """Of one episode: `columns` are `[T]` or `[T, D]`, `images` `[T, H, W, 3]` uint8."""
    stats = {name: _moments(np.asarray(values, dtype=np.float64)) for name, values in columns.items()}
    pixels = _moments(images.reshape(-1, 3) / 255.0)
    stats[camera] = {name: value.reshape(3, 1, 1) for name, value in pixels.items() if name != "count"}
    stats[camera]["count"] = np.array([len(images)])
    return stats


def merge_statistics(parts: Sequence[Stats]) -> Stats:
    """Of all episodes from those of each: `var = sum n_i (var_i + (mean_i - mean)^2) / sum n_i`.

    Example: 1 frame of value 0 and 1 of value 2 have mean 1 and std 1.
    """
    merged: Stats = {}
    for name in parts[0]:
        low, high, mean, std, count = (
            np.stack([part[name][key] for part in parts]) for key in ("min", "max", "mean", "std", "count")
        )
        weight = (count / count.sum()).reshape(-1, *[1] * (mean.ndim - 1))
        middle = (weight * mean).sum(axis=0)
        spread = np.sqrt((weight * (std**2 + (mean - middle) ** 2)).sum(axis=0))
        merged[name] = {
            "min": low.min(axis=0),
            "max": high.max(axis=0),
            "mean": middle,
            "std": spread,
            "count": count.sum(axis=0),
        }
    return merged


def _vector(size: int) -> dict[str, Any]:
    return {"dtype": "float32", "shape": [size], "names": None}


def _scalar(dtype: str) -> dict[str, Any]:
    return {"dtype": dtype, "shape": [1], "names": None}


def _moments(values: np.ndarray) -> dict[str, np.ndarray]:
    values = values.reshape(len(values), -1)
    return {
        "min": values.min(axis=0),
        "max": values.max(axis=0),
        "mean": values.mean(axis=0),
        "std": values.std(axis=0),
        "count": np.array([len(values)]),
    }
