"""Plans of the tasks in which an object is picked up and put down."""

from __future__ import annotations

import math
from functools import partial

from trl_stare.stages.measures import (
    is_over_goal,
    is_picked,
    pick_distance,
    place_distance,
    reach_distance,
    succeeded,
    touched,
    transport_distance,
)
from trl_stare.stages.registry import register_plan
from trl_stare.stages.spec import Stage, StagePlan

LENGTH = 0.3
"""`L_k` of distances in metres: about how far apart things on the table are at first (method.md 2)."""
LIFT_HEIGHT = 0.02
"""Metres above rest that count as lifted: half a cube, more than a push or a tilt lifts an object by."""
HOLD_OFFSET = 0.05
"""Metres added until a grasp (Grasp) or a release (Place, Stack) has happened, which distances alone cannot see."""
TRANSPORT_MARGIN = 0.02
"""Metres by which Transport's exit is wider than the task's own sideways test: Stack begins before it holds."""
TRANSPORT_CLEARANCE = 0.03
"""Metres above the goal that Transport heads for: the carried cube passes over the lower one with room to spare."""
STACK_CUBE_RADIUS = math.hypot(0.02, 0.02) + 0.005
"""StackCube-v1's own sideways test, 0.0333 m (ManiSkill's `stack_cube.py`, `evaluate`)."""


def pick_and_place_plan(
    task: str, *, radius: float, last: str = "Place", clearance: float = TRANSPORT_CLEARANCE
) -> StagePlan:
    """Reach, Grasp, Transport and a last stage for a task in which an object is picked up and put down at a goal.

    Args:
        task (`str`): registered task name.
        radius (`float`): the task's own sideways test, metres; Transport ends `TRANSPORT_MARGIN` outside it.
        last (`str`): name of the last stage.
        clearance (`float`): metres above the goal that Transport heads for.
    """
    return StagePlan(
        task=task,
        stages=(
            Stage(
                name="Reach",
                done=touched,
                distance=reach_distance,
                scale=LENGTH,
                # the one cost the paper states, in plain metres
                cost_scale=1.0,
                reads=("tcp_position", "object_position", "is_contact", "is_grasped"),
            ),
            Stage(
                name="Grasp",
                done=partial(is_picked, height=LIFT_HEIGHT),
                distance=partial(pick_distance, height=LIFT_HEIGHT, offset=HOLD_OFFSET),
                scale=LENGTH,
                reads=("tcp_position", "object_position", "object_lift", "is_grasped"),
            ),
            Stage(
                name="Transport",
                done=partial(is_over_goal, radius=radius + TRANSPORT_MARGIN, height=LIFT_HEIGHT),
                distance=partial(transport_distance, clearance=clearance),
                scale=LENGTH,
                reads=("object_position", "goal_position", "object_lift"),
            ),
            Stage(
                name=last,
                done=succeeded,
                distance=partial(place_distance, offset=HOLD_OFFSET),
                scale=LENGTH,
                reads=("object_position", "goal_position", "is_grasped", "success"),
            ),
        ),
    )


register_plan(pick_and_place_plan("StackCube-v1", radius=STACK_CUBE_RADIUS, last="Stack"))
