"""What the environment pays for a trajectory, before any shaping."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from trl_stare.data.trajectory import Trajectory
from trl_stare.interfaces import Signals

REWARDS = ("success", "rl4vla")
"""`success` is the task's own sparse reward, `rl4vla` the difference reward of [`rl4vla_reward`]."""

GRASP_REWARD = HOLD_REWARD = 0.1
SUCCESS_REWARD = 1.0
HOLD_STEPS = 5
"""What a grasp, a grasp held for `HOLD_STEPS` environment steps, and success are worth: RL4VLA's `simpler_wrapper.py`
(`get_reward`, github.com/gen-robot/RL4VLA) and ManiSkill's `bridge_dataset_eval/base_env.py` (`consecutive_grasp >= 5`)."""


def check_reward(reward: str, signal_names: Collection[str], task: str) -> None:
    """Raise unless the environment gives the signals that `reward` reads.

    Raises:
        ValueError: names the task, the missing signal and the reward to take instead.
    """
    if reward == "rl4vla" and "is_grasped" not in signal_names:
        raise ValueError(
            f"`reward` must be 'success' for {task!r}, got 'rl4vla', which pays for a grasp: the task has no signal "
            f"'is_grasped' but {sorted(signal_names)}."
        )


def task_reward(trajectory: Trajectory, reward: str) -> Tensor:
    """The reward of each environment step, `[T]` float32; `reward` is one of [`REWARDS`]."""
    return rl4vla_reward(trajectory.signals) if reward == "rl4vla" else trajectory.reward


def rl4vla_reward(signals: Signals) -> Tensor:
    """RL4VLA's difference reward (arXiv 2505.19789), `r_t = R_{t+1} - R_t`.

    `R_t = 0.1 * grasped + 0.1 * held + 1.0 * (solved and grasped)` at row `t` of the signals. `grasped` and `held` (5 rows in a row)
    are latched, as the Bridge tasks of ManiSkill report them; solved is not: what success brought is paid back when it is lost.
    The rewards of an episode add up to what its last row is worth over its first.

    Args:
        signals (`Signals`): one trajectory; `is_grasped` and `success`, `[T + 1]` bool.

    Returns:
        `Tensor`: `[T]` float32.

    Example: grasped at rows 1-5 and released into the goal at row 6: rewards 0.1, 0, 0, 0, 0.1, 1.0.
    """
    grasped = signals["is_grasped"]
    rows = torch.arange(len(grasped))
    last_free = torch.where(grasped, -1, rows).cummax(dim=0).values
    held = (rows - last_free >= HOLD_STEPS).cummax(dim=0).values
    grasped = grasped.cummax(dim=0).values
    worth = GRASP_REWARD * grasped + HOLD_REWARD * held + SUCCESS_REWARD * (signals["success"] & grasped)
    return worth.diff()
