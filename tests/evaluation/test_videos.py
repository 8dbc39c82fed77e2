"""Videos are written and read back frame by frame."""

from types import SimpleNamespace

import imageio.v3 as imageio
import numpy as np
import pytest
import torch

from trl_stare.evaluation import (
    Replay,
    can_film,
    film_policy,
    record_episode,
    save_success_and_failure,
    stage_labels,
    videos,
)
from trl_stare.stages import get_plan


def make_frames(count: int, height: int = 32, width: int = 32) -> np.ndarray:
    """Grey frames that get brighter."""
    levels = np.linspace(40, 200, count).astype(np.uint8)
    return np.broadcast_to(levels[:, None, None, None], (count, height, width, 3)).copy()


@pytest.mark.parametrize(
    ("height", "width", "shape"), [(32, 32, (384, 384)), (64, 48, (384, 288)), (30, 77, (150, 384))]
)
def test_every_frame_is_there_scaled_and_captioned(tmp_path, height, width, shape):
    frames = make_frames(7, height, width)
    record_episode(frames, ["Reach"] * 7, tmp_path / "videos" / "x.mp4")
    seen = imageio.imread(tmp_path / "videos" / "x.mp4")
    assert seen.shape == (7, *shape, 3)
    below, strip = seen[:, shape[0] // 2 :].mean(axis=(1, 2, 3)), seen[:, : shape[0] // 12]
    assert np.abs(below - frames[:, 0, 0, 0]).max() < 6
    assert (strip.max(axis=(1, 2, 3)) > 220).all(), "white letters"
    assert [file.name for file in (tmp_path / "videos").iterdir()] == ["x.mp4"]


def test_another_label_is_another_picture(tmp_path):
    frames = make_frames(1).repeat(2, axis=0)
    record_episode(frames, ["Reach", "Transport"], tmp_path / "x.mp4")
    first, second = imageio.imread(tmp_path / "x.mp4").astype(int)
    assert np.abs(first - second)[:40].max() > 100 and np.abs(first - second)[60:].max() < 10


@pytest.mark.parametrize(
    ("frames", "labels", "name", "message"),
    [
        (make_frames(3), ["a"] * 2, "x.mp4", "got 2 for 3 frames"),
        (make_frames(3)[..., :1], ["a"] * 3, "x.mp4", r"must be \[T, H, W, 3\] uint8"),
        (make_frames(3).astype(np.float32), ["a"] * 3, "x.mp4", "float32"),
        (make_frames(3)[:0], [], "x.mp4", "T >= 1"),
        (make_frames(3), ["a"] * 3, "x.gif", "must end in .mp4"),
    ],
)
def test_what_is_no_video_is_refused(tmp_path, frames, labels, name, message):
    with pytest.raises(ValueError, match=message):
        record_episode(frames, labels, tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_the_first_success_and_the_first_failure_are_kept(tmp_path):
    replays = [Replay(seed, make_frames(3), ["Reach"] * 3, seed in (12, 13)) for seed in (10, 11, 12, 13)]
    written = save_success_and_failure(tmp_path, "imitation", replays)
    assert written == {
        "failure": tmp_path / "imitation_failure_seed10.mp4",
        "success": tmp_path / "imitation_success_seed12.mp4",
    }
    assert sorted(tmp_path.iterdir()) == sorted(written.values())


@pytest.mark.parametrize(
    ("succeed", "shown", "played"), [({5, 6}, [5, 0], 6), ({0}, [0, 1], 2), ({}, [0], 9), (range(9), [0], 9)]
)
def test_a_policy_plays_until_one_succeeded_and_one_failed(monkeypatch, succeed, shown, played):
    seen = []

    def play(env, policy, seeds, **_):
        seen.extend(seeds)
        return [SimpleNamespace(seed=seed, success_once=seed in succeed) for seed in seeds]

    monkeypatch.setattr(videos, "play", play)
    monkeypatch.setattr(videos, "_render", lambda camera, trajectory, plan: trajectory.seed)
    env = SimpleNamespace(num_envs=2)
    assert film_policy(None, env, None, None, range(9), temperature=1.0, seed=0) == shown
    assert seen == list(range(played))


def test_a_missing_outcome_is_said(tmp_path, caplog):
    written = save_success_and_failure(tmp_path, "interaction", [Replay(1, make_frames(2), ["Reach"] * 2, True)])
    assert list(written) == ["success"]
    assert "no failure among the replayed episodes of interaction" in caplog.text


@pytest.mark.parametrize(
    ("metadata", "found"), [({"sim_backend": "physx_cuda"}, False), ({"sim_backend": "physx_cpu"}, True), ({}, True)]
)
def test_only_what_repeats_itself_is_filmed(caplog, metadata, found):
    assert can_film(SimpleNamespace(task="StackCube-v1", metadata=metadata)) is found
    assert ("no videos of StackCube-v1: on CUDA" in caplog.text) is not found


def test_labels_follow_the_current_stage():
    plan, rows = get_plan("StackCube-v1"), 4
    goal = torch.tensor([0.2, 0.0, 0.06])
    signals = {
        "tcp_position": torch.zeros(rows, 3),
        "object_position": torch.zeros(rows, 3),
        "goal_position": goal.expand(rows, 3),
        "object_lift": torch.tensor([[0.0], [0.0], [0.1], [0.1]]),
        "gripper_width": torch.zeros(rows, 1),
        "is_contact": torch.tensor([False, True, True, True]),
        "is_grasped": torch.tensor([False, False, True, True]),
        "success": torch.tensor([False, False, False, True]),
    }
    assert stage_labels(plan, signals) == ["Reach", "Grasp", "Transport", "Success"]
