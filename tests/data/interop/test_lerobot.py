"""What is exported has LeRobot's layout, and comes back: numbers exactly, images within the codec's loss."""

import json
import shutil
from dataclasses import fields, replace

import imageio.v2 as imageio
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch

from trl_stare.data.interop import export_lerobot, import_lerobot
from trl_stare.data.interop.lerobot_format import merge_statistics, statistics
from trl_stare.stages import get_plan

PLAN = get_plan("StackCube-v1")
LENGTHS = (5, 9, 7)
CAMERA = "observation.images.front"


def smooth(count: int, shift: int) -> torch.Tensor:
    """`[count, 32, 48, 3]`: gradients that move, which a codec keeps, unlike noise."""
    y, x = torch.meshgrid(torch.linspace(0, 120, 32), torch.linspace(0, 120, 48), indexing="ij")
    frames = [torch.stack([x + 3 * t, y + shift, 120 - x + y], dim=-1) for t in range(count)]
    return torch.stack(frames).clamp(0, 255).to(torch.uint8)


@pytest.fixture(scope="module")
def episodes(episode):
    made = [
        episode(10 + i, num_steps=steps, chunk_size=1, traced=False, success_at=steps - 1 if i else None)
        for i, steps in enumerate(LENGTHS)
    ]
    made[2] = replace(made[2], instruction="put red on green", policy="expert", prefix=torch.rand(3, 7) - 0.5)
    return [replace(one, images=smooth(one.num_steps, 40 * i)) for i, one in enumerate(made)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, episodes):
    folder = tmp_path_factory.mktemp("lerobot") / "dataset"
    export_lerobot(iter(episodes), folder, PLAN, fps=20, robot_type="panda")
    return folder


def test_the_round_trip(folder, episodes):
    imported = [*import_lerobot(folder)]
    assert len(imported) == len(episodes)
    exact = {"task", "instruction", "seed", "policy", "state", "starts", "actions", "labels", "reward"}
    for before, (after, stage) in zip(episodes, imported, strict=True):
        for field in fields(before):
            one, other = getattr(before, field.name), getattr(after, field.name)
            if field.name in exact | {"terminated", "truncated"}:
                same = (
                    torch.equal(one, other) and one.dtype == other.dtype
                    if isinstance(one, torch.Tensor)
                    else one == other
                )
                assert same, field.name
        assert (before.prefix is None) == (after.prefix is None)
        assert before.prefix is None or torch.equal(before.prefix, after.prefix), "which the episode begins after"
        assert torch.equal(stage, PLAN.current_stage(before.signals)[:-1])
        assert torch.equal(after.signals["success"][1:], before.signals["success"][1:])
        assert after.images.shape == before.images.shape and after.images.dtype == torch.uint8
        assert (after.images.float() - before.images.float()).abs().mean() < 2.5
        assert torch.equal(after.final_state, before.state[-1]) and torch.equal(after.final_image, after.images[-1])


def test_the_layout_is_lerobots(folder):
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert files == {
        "meta/info.json",
        "meta/stats.json",
        "meta/tasks.parquet",
        "meta/episodes/chunk-000/file-000.parquet",
        "meta/trl_stare.json",
        "data/chunk-000/file-000.parquet",
        f"videos/{CAMERA}/chunk-000/file-000.mp4",
    }
    info = json.loads((folder / "meta/info.json").read_text())
    assert (info["codebase_version"], info["fps"], info["robot_type"]) == ("v3.0", 20, "panda")
    assert (info["total_episodes"], info["total_frames"], info["total_tasks"]) == (3, 21, 2)
    assert info["splits"] == {"train": "0:3"}
    assert info["features"]["stage_index"] == {"dtype": "int64", "shape": [1], "names": None}
    assert info["features"][CAMERA]["shape"] == [32, 48, 3]

    tasks = pd.read_parquet(folder / "meta/tasks.parquet")
    assert tasks.loc["put red on green"].task_index == 1
    rows = pq.read_table(folder / "meta/episodes/chunk-000/file-000.parquet").to_pylist()
    assert [(row["dataset_from_index"], row["dataset_to_index"]) for row in rows] == [(0, 5), (5, 14), (14, 21)]
    assert [row[f"videos/{CAMERA}/from_timestamp"] for row in rows] == [0.0, 0.25, 0.7]
    assert rows[2]["tasks"] == ["put red on green"] and rows[2]["stats/action/count"] == [7]

    data = pq.read_table(folder / "data/chunk-000/file-000.parquet").to_pandas()
    assert set(data.columns) == set(info["features"]) - {CAMERA}
    assert data["index"].tolist() == [*range(21)]
    assert data["frame_index"].tolist() == [frame for length in LENGTHS for frame in range(length)]
    assert data["next.done"].tolist() == [frame == length - 1 for length in LENGTHS for frame in range(length)]
    assert len(data["action"][0]) == 7 and np.isclose(data["timestamp"][3], 3 / 20)
    assert sum(1 for _ in imageio.get_reader(folder / f"videos/{CAMERA}/chunk-000/file-000.mp4")) == 21


def test_statistics_of_parts_are_those_of_the_whole(folder, episodes):
    stats = json.loads((folder / "meta/stats.json").read_text())
    actions = torch.cat([one.actions for one in episodes]).double().numpy()
    for name, value in {
        "mean": actions.mean(0),
        "std": actions.std(0),
        "min": actions.min(0),
        "max": actions.max(0),
    }.items():
        assert np.allclose(stats["action"][name], value, atol=1e-12)
    pixels = torch.cat([one.images for one in episodes]).double().numpy().reshape(-1, 3) / 255
    assert np.array(stats[CAMERA]["mean"]).shape == (3, 1, 1)
    assert np.allclose(np.array(stats[CAMERA]["std"]).ravel(), pixels.std(0), atol=1e-12)
    two = [statistics({"x": np.array([value])}, "c", np.zeros((1, 2, 2, 3))) for value in (0.0, 2.0)]
    merged = merge_statistics(two)["x"]
    assert {name: value.item() for name, value in merged.items()} == {
        "min": 0,
        "max": 2,
        "mean": 1,
        "std": 1,
        "count": 2,
    }


def test_strange_datasets(folder, tmp_path):
    """A dataset that LeRobot itself wrote has no `meta/trl_stare.json` and may lack our features."""
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (copy / "meta/trl_stare.json").unlink()
    data = copy / "data/chunk-000/file-000.parquet"
    pq.write_table(pq.read_table(data).drop_columns(["stage_index", "next.success", "next.reward", "label"]), data)
    with pytest.raises(ValueError, match="`task` must be given"):
        import_lerobot(copy)
    imported = [*import_lerobot(copy, task="StackCube-v1", camera=CAMERA)]
    assert [one.trajectory.seed for one in imported] == [0, 1, 2]
    assert all(one.stage is None and not one.trajectory.success_once for one in imported)
    with pytest.raises(ValueError, match=r"must be one of the videos \['observation.images.front'\], got wrist"):
        import_lerobot(folder, camera="wrist")

    path = copy / "meta/info.json"
    info = json.loads(path.read_text())
    for change, message in [
        ({"codebase_version": "v2.1"}, "must be a LeRobotDataset v3.0, got v2.1"),
        ({"data_path": "../../{chunk_index}{file_index}.parquet"}, "must name files inside"),
    ]:
        path.write_text(json.dumps(info | change))
        with pytest.raises(ValueError, match=message):
            [*import_lerobot(copy, task="StackCube-v1")]
    path.write_text(json.dumps(info))
    table = pq.read_table(data)
    pq.write_table(table.slice(0, 12), data)
    with pytest.raises(ValueError, match="episode 1 must have 9 frames, got 9 images .* and 7 rows"):
        [*import_lerobot(copy, task="StackCube-v1")]


def test_columns_that_are_not_read_may_be_text(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    data = tmp_path / "copy/data/chunk-000/file-000.parquet"
    table = pq.read_table(data)
    pq.write_table(table.append_column("annotation", [["a word"] * len(table)]), data)
    imported = [one.trajectory.actions for one in import_lerobot(tmp_path / "copy")]
    assert all(map(torch.equal, imported, [one.trajectory.actions for one in import_lerobot(folder)]))


def test_what_has_no_place_in_lerobot_is_refused(tmp_path, folder, episodes, episode):
    chunked, odd = episode(1), replace(episodes[0], images=episodes[0].images[:, :31])
    wider = replace(episodes[1], state=torch.zeros(9, 6))
    cases = [
        ([], "at least one episode, got none"),
        ([chunked], r"an image at every step, got 2 for 6 steps at 0. Replay them with `chunk_size=1`"),
        ([odd], "even sides for H.264, got 31 x 48"),
        ([episodes[0], wider], r"sizes of the first, got \{'observation.state': \[6\]\} at 1"),
        ([replace(episodes[0], task="PickCube-v1")], "plan's task 'StackCube-v1', got 'PickCube-v1' at 0"),
    ]
    for given, message in cases:
        with pytest.raises(ValueError, match=message):
            export_lerobot(given, tmp_path / "new", PLAN, fps=20)
        assert not (tmp_path / "new").exists()
    with pytest.raises(FileExistsError, match="must be new"):
        export_lerobot(episodes, folder, PLAN, fps=20)
