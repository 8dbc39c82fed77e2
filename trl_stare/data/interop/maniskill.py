"""ManiSkill's recordings (`trajectory.h5` beside `trajectory.json`): who acted how from which seed, to be played again.

The files hold simulator states rather than the images and signals that a [`Trajectory`] has; and a stored state does not
restore contacts exactly, while the same seed and actions do. So a recording is imported by replaying it:

```python
recording = load_maniskill("StackCube-v1/motionplanning/trajectory.h5")
env = make_env(recording.env_id, num_envs=1, chunk_size=1)
trajectories = [replay_maniskill(env, episode) for episode in recording.episodes]
save_trajectories(trajectories, "data/demonstrations", get_plan(recording.env_id), metadata=env.metadata)
```

Both must have the same control mode: `mani_skill.trajectory.replay_trajectory -c pd_ee_delta_pose` converts a recording.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from trl_stare.data.actors import Decision
from trl_stare.data.rollout import collect
from trl_stare.data.trajectory import Trajectory
from trl_stare.interfaces import Observation, Signals, VectorEnv


class ManiSkillEpisode(NamedTuple):
    """One recorded episode of `T` steps.

    Attributes:
        number (`int`): its `episode_id`.
        seed (`int`): what the environment was reset with.
        actions (`Tensor`): `[T, A]` float32, in the controller's units.
        control_mode (`str`): ManiSkill's name of the controller.
        success (`bool` or `None`): at the last step, as recorded; `None` where the task has no success.
    """

    number: int
    seed: int
    actions: Tensor
    control_mode: str
    success: bool | None


class ManiSkillRecording(NamedTuple):
    """A recording: what its environment was, and its episodes.

    Attributes:
        env_id (`str`): the task. env_kwargs (`dict`): of `gym.make`. max_episode_steps (`int` or `None`): the time limit.
        source (`str` or `None`): "human", "motionplanning", "rl", where it is told.
        episodes (`tuple[ManiSkillEpisode, ...]`): in the order of the json file.
    """

    env_id: str
    env_kwargs: dict[str, Any]
    max_episode_steps: int | None
    source: str | None
    episodes: tuple[ManiSkillEpisode, ...]


def load_maniskill(path: str | Path) -> ManiSkillRecording:
    """Read a recording of ManiSkill's `RecordEpisode`.

    Args:
        path (`str` or `Path`): the `.h5` file; the `.json` of the same name lies beside it.

    Raises:
        FileNotFoundError: if one of the two is missing.
        ImportError: if h5py, which comes with ManiSkill, is not installed.
        ValueError: if an episode has no actions in the `.h5` file, no seed, or numbers that do not fit; names all of them.
    """
    try:
        import h5py
    except ImportError as error:
        raise ImportError("reading `.h5` needs h5py. Install it by `pip install trl-stare[maniskill]`.") from error
    path = Path(path)
    notes = json.loads(path.with_suffix(".json").read_text())
    if not path.exists():
        raise FileNotFoundError(f"`path` must be a recording's .h5 file, got {path}.")
    episodes, problems = [], []
    with h5py.File(path, "r") as file:
        for note in notes["episodes"]:
            name = f"traj_{note['episode_id']}"
            actions = file[name].get("actions") if name in file else None
            if not isinstance(actions, h5py.Dataset) or actions.ndim != 2:
                problems.append(f"`{name}` must have actions [T, A] in {path.name}")
                continue
            episode = _episode(note, np.asarray(actions, dtype=np.float32))
            if isinstance(episode, str):
                problems.append(f"`{name}` {episode}")
            else:
                episodes.append(episode)
    if problems:
        raise ValueError(f"`path` must be a complete recording, got {path}: {'; '.join(problems)}.")
    info = notes["env_info"]
    return ManiSkillRecording(
        env_id=info["env_id"],
        env_kwargs=info.get("env_kwargs", {}),
        max_episode_steps=info.get("max_episode_steps"),
        source=notes.get("source_type"),
        episodes=tuple(episodes),
    )


def _episode(note: dict[str, Any], actions: np.ndarray) -> ManiSkillEpisode | str:
    """The episode, or what is wrong with it."""
    # `reset_kwargs` is what was used; recordings of several environments at once leave it empty
    seed = (note.get("reset_kwargs") or {}).get("seed", note.get("episode_seed"))
    seed = seed[0] if isinstance(seed, list) else seed
    if seed is None:
        return "must have a seed in the json file"
    if len(actions) != note["elapsed_steps"]:
        return f"must have {note['elapsed_steps']} actions, got {len(actions)}"
    if not np.isfinite(actions).all():
        return "must have finite actions"
    success = note.get("success")
    return ManiSkillEpisode(
        number=note["episode_id"],
        seed=int(seed),
        actions=torch.from_numpy(actions),
        control_mode=note["control_mode"],
        success=None if success is None else bool(success),
    )


def replay_maniskill(env: VectorEnv, episode: ManiSkillEpisode, *, name: str = "maniskill") -> Trajectory:
    """Play a recorded episode in our environment, which sees, measures and ends it by its own rules.

    The trajectory ends with the first success, even if the recording goes on.

    Args:
        env ([`VectorEnv`]): of the same task, control mode and simulator backend, with `chunk_size` 1; one environment of
            it is used.
        name (`str`): who acted, as stored.

    Raises:
        ValueError: if the control mode is another one, the recorded actions are over before the episode is, or a recorded success
            does not succeed here.
    """
    mode = env.metadata["control_mode"]
    if mode != episode.control_mode:
        raise ValueError(
            f"`episode` must be recorded with the control mode {mode!r}, got {episode.control_mode!r}. "
            f"Convert it with `mani_skill.trajectory.replay_trajectory -c {mode}`."
        )
    actions = iter(episode.actions)

    def act(obs: Observation, signals: Signals) -> Decision:
        action = next(actions, None)
        if action is None:
            raise ValueError(
                f"`episode` must solve the task or last until the time limit, got {len(episode.actions)} steps of seed "
                f"{episode.seed}. Is it another backend or version of the simulator, or a recorded failure?"
            )
        return Decision(action[None, None], action[None, None])

    trajectory = collect(env, act, [episode.seed], name=name)[0]
    if episode.success and not trajectory.success_once:
        raise ValueError(
            f"`episode` of seed {episode.seed} must succeed here as it was recorded, got a failure after {trajectory.num_steps} of "
            f"{len(episode.actions)} steps. If it is longer than the time limit, raise that before `make_env`: "
            f"`register_simulated_task(dataclasses.replace(get_simulated_task({env.task!r}), env_kwargs={{'max_episode_steps': ...}}))` "
            "of `trl_stare.envs`; or is it another backend or version of the simulator?"
        )
    return trajectory
