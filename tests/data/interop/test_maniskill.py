"""A recording made by ManiSkill's own `RecordEpisode` is read, and played again in our environment."""

import json
import shutil

import gymnasium
import h5py
import numpy as np
import pytest
import torch

from trl_stare.data.interop import load_maniskill, replay_maniskill
from trl_stare.envs import make_env
from trl_stare.envs.maniskill import time_limit
from trl_stare.envs.registry import get_simulated_task

TASK, SEEDS = "StackCube-v1", (5, 8)


def actions_of(episode: int, steps: int) -> np.ndarray:
    """`[steps, 7]`: small random motions, mostly upwards, so that nothing is touched."""
    rng = np.random.default_rng(episode)
    return (rng.uniform(-0.2, 0.2, (steps, 7)) + [0, 0, 0.05, 0, 0, 0, 0]).astype(np.float32)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """Folder of a recording of two episodes of random actions, and where ManiSkill had the gripper after each step."""
    import mani_skill.envs  # noqa: F401
    from mani_skill.utils.wrappers import RecordEpisode

    folder = tmp_path_factory.mktemp("maniskill")
    options = {"obs_mode": "none", "control_mode": "pd_ee_delta_pose", "sim_backend": "physx_cpu"}
    steps = time_limit(get_simulated_task(TASK))
    source = gymnasium.make(TASK, render_backend="none", max_episode_steps=steps, **options)
    source = RecordEpisode(source, folder, save_video=False, source_type="rl")
    reached = torch.zeros(len(SEEDS), steps, 3)
    for episode, seed in enumerate(SEEDS):
        source.reset(seed=seed)
        for step, action in enumerate(actions_of(episode, steps)):
            source.step(action)
            reached[episode, step] = source.unwrapped.agent.tcp.pose.p[0]
    source.close()
    return next(folder.glob("*.h5")), reached


def test_what_is_read(recorded):
    recording = load_maniskill(recorded[0])
    steps = time_limit(get_simulated_task(TASK))
    assert (recording.env_id, recording.max_episode_steps, recording.source) == (TASK, steps, "rl")
    assert recording.env_kwargs["control_mode"] == "pd_ee_delta_pose"
    assert [(one.number, one.seed, one.success) for one in recording.episodes] == [(0, 5, False), (1, 8, False)]
    for number, episode in enumerate(recording.episodes):
        assert episode.control_mode == "pd_ee_delta_pose"
        assert torch.equal(episode.actions, torch.from_numpy(actions_of(number, steps)))


@pytest.mark.slow
def test_it_is_played_again(recorded):
    env = make_env(TASK, num_envs=1, num_workers=0, image_size=16)
    try:
        for episode, reached in zip(load_maniskill(recorded[0]).episodes, recorded[1], strict=True):
            trajectory = replay_maniskill(env, episode)
            assert torch.equal(trajectory.actions, episode.actions)
            assert (trajectory.seed, trajectory.policy) == (episode.seed, "maniskill")
            # ours computes joint targets the short way: the same path to fractions of a millimetre, over 30 cm
            assert torch.allclose(trajectory.signals["tcp_position"][1:], reached, atol=1e-3)
        with pytest.raises(ValueError, match="until the time limit, got 3 steps of seed 8"):
            replay_maniskill(env, episode._replace(actions=episode.actions[:3]))
        with pytest.raises(
            ValueError, match=r"must succeed here as .* got a failure after \d+ of.*`register_simulated_task\("
        ):
            replay_maniskill(env, episode._replace(success=True))
        with pytest.raises(ValueError, match="'pd_ee_delta_pose', got 'pd_joint_pos'. Convert it"):
            replay_maniskill(env, episode._replace(control_mode="pd_joint_pos"))
    finally:
        env.close()


def test_incomplete_recordings_are_told(recorded, tmp_path):
    path = tmp_path / "trajectory.h5"
    with pytest.raises(FileNotFoundError, match=r"trajectory\.json"):
        load_maniskill(path)
    notes = json.loads(recorded[0].with_suffix(".json").read_text())
    num_steps = notes["episodes"][1]["elapsed_steps"]
    notes["episodes"][1]["elapsed_steps"] += 1
    notes["episodes"].append(notes["episodes"][0] | {"episode_id": 4})
    path.with_suffix(".json").write_text(json.dumps(notes))
    with pytest.raises(FileNotFoundError, match=r"trajectory\.h5"):
        load_maniskill(path)
    shutil.copy(recorded[0], path)
    with h5py.File(path, "r+") as file:
        file["traj_0/actions"][2] = np.nan
    with pytest.raises(ValueError) as caught:
        load_maniskill(path)
    for part in (
        "`traj_0` must have finite",
        f"`traj_1` must have {num_steps + 1} actions, got {num_steps}",
        "`traj_4` must have actions [T, A]",
    ):
        assert part in str(caught.value)
    notes["episodes"] = [notes["episodes"][0] | {"reset_kwargs": {}, "episode_seed": None}]
    path.with_suffix(".json").write_text(json.dumps(notes))
    with pytest.raises(ValueError, match="`traj_0` must have a seed"):
        load_maniskill(path)
