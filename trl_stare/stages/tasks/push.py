"""Plans of the tasks in which an object is slid over the table with closed fingers."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from trl_stare.interfaces import Signals
from trl_stare.stages.measures import reach_distance, succeeded
from trl_stare.stages.registry import register_plan
from trl_stare.stages.spec import Stage, StagePlan

LENGTH = 0.3
"""`L_k` of distances in metres: about how far apart things on the table are at first."""
TOOL_RADIUS = 0.02
"""Metres from the push (pull) pose that count as there."""
GOAL_RADIUS = 0.1
"""PushCube-v1's and PullCube-v1's own test (`goal_radius` in ManiSkill's `push_cube.py` and `pull_cube.py`)."""
PUSH_POSE = (-0.025, 0.0, 0.0)
"""From the cube's centre to where it is pushed from, metres (`tcp_push_pose` in ManiSkill's `push_cube.py`)."""
PULL_POSE = (0.03, 0.0, 0.0)
"""From the cube's centre to where it is pulled from, metres (`tcp_pull_pos` in ManiSkill's `pull_cube.py`)."""


def is_tool_ready(signals: Signals, *, pose: tuple[float, float, float], radius: float) -> Tensor:
    """The TCP is within `radius` metres of `pose`, or a finger touches the object. `[...]` bool.

    Args:
        signals (`Signals`): name -> `[...]` or `[..., D]`.
        pose (`tuple[float, float, float]`): where the TCP belongs, metres from the object's centre, world axes.
        radius (`float`): metres.
    """
    spot = signals["object_position"] + signals["object_position"].new_tensor(pose)
    return ((signals["tcp_position"] - spot).norm(dim=-1) <= radius) | signals["is_contact"]


def slide_distance(signals: Signals, *, radius: float) -> Tensor:
    """How far the object is sideways from a disc of `radius` metres around the goal, metres, `[...]`; 0 inside it."""
    offset = signals["object_position"] - signals["goal_position"]
    return (offset[..., :2].norm(dim=-1) - radius).clamp(min=0.0)


def push_plan(task: str, *, pose: tuple[float, float, float], last: str) -> StagePlan:
    """Reach and a last stage for a task in which an object is slid into a disc on the table.

    Args:
        task (`str`): registered task name.
        pose (`tuple[float, float, float]`): from the object's centre to where it is pushed from, metres, world axes.
        last (`str`): name of the last stage.
    """
    return StagePlan(
        task=task,
        stages=(
            Stage(
                name="Reach",
                done=partial(is_tool_ready, pose=pose, radius=TOOL_RADIUS),
                distance=reach_distance,
                scale=LENGTH,
                # the one cost the paper states, in plain metres
                cost_scale=1.0,
                reads=("tcp_position", "object_position", "is_contact"),
            ),
            Stage(
                name=last,
                done=succeeded,
                distance=partial(slide_distance, radius=GOAL_RADIUS),
                scale=LENGTH,
                reads=("object_position", "goal_position", "success"),
            ),
        ),
    )


register_plan(push_plan("PushCube-v1", pose=PUSH_POSE, last="Push"))
register_plan(push_plan("PullCube-v1", pose=PULL_POSE, last="Pull"))
