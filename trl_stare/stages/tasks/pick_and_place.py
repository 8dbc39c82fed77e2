"""Plans of the tasks in which an object is picked up and put down, or picked up and held."""

from __future__ import annotations

import math
from functools import partial

from torch import Tensor

from trl_stare.interfaces import Signals
from trl_stare.stages.measures import (
    is_over_goal,
    is_picked,
    pick_distance,
    place_distance,
    reach_distance,
    succeeded,
    touched_near,
    transport_distance,
)
from trl_stare.stages.registry import register_plan
from trl_stare.stages.spec import Stage, StagePlan

LENGTH = 0.3
"""`L_k` of distances in metres: about how far apart things on the table are at first."""
REACH_RADIUS = 0.02
"""Metres from the centre of a cube of 4 cm, or a sphere, within which a touch ends Reach: half its width, as with the push pose of
PushCube-v1 (STARE, which has any contact end Reach here). Which touches become grasps is measured in docs/tasks.md."""
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
PLACE_SPHERE_RADIUS = 0.005
"""PlaceSphere-v1's own sideways test, metres (ManiSkill's `place_sphere.py`, `evaluate`)."""
PICK_CUBE_RADIUS = 0.025
"""PickCube-v1's own test, metres in space (`goal_thresh` in ManiSkill's `pick_cube_cfgs.py`)."""


def is_held_near_goal(signals: Signals, *, radius: float) -> Tensor:
    """The object is grasped and within `radius` metres of the goal in space. `[...]` bool."""
    return signals["is_grasped"] & (transport_distance(signals, clearance=0.0) <= radius)


def _pick_stages(radius: float) -> tuple[Stage, Stage]:
    """Reach and Grasp: the same wherever the object then goes."""
    return (
        Stage(
            name="Reach",
            done=partial(touched_near, radius=radius),
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
    )


def pick_and_place_plan(
    task: str,
    *,
    radius: float,
    last: str = "Place",
    clearance: float = TRANSPORT_CLEARANCE,
    over_height: float = LIFT_HEIGHT,
    reach_radius: float = math.inf,
) -> StagePlan:
    """Reach, Grasp, Transport and a last stage for a task in which an object is picked up and put down at a goal.

    Args:
        task (`str`): registered task name.
        radius (`float`): the task's own sideways test, metres; Transport ends `TRANSPORT_MARGIN` outside it.
        last (`str`): name of the last stage.
        clearance (`float`): metres above the goal that Transport heads for.
        over_height (`float`): metres above rest from which an object near the goal counts as over it. Must be less
            than it is lifted at the goal itself: else putting it down would be a step back.
        reach_radius (`float`): metres from the object's centre within which a touch ends Reach; any touch if infinite.
    """
    return StagePlan(
        task=task,
        stages=(
            *_pick_stages(reach_radius),
            Stage(
                name="Transport",
                done=partial(is_over_goal, radius=radius + TRANSPORT_MARGIN, height=over_height),
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


def pick_and_hold_plan(task: str, *, radius: float, last: str = "Place", reach_radius: float = math.inf) -> StagePlan:
    """Reach, Grasp, Transport and a last stage for a task in which an object is picked up and held at a goal in space.

    Nothing is let go of: Transport ends with the object in the gripper near the goal, and the last stage's distance is
    the plain way to the goal.

    Args:
        task (`str`): registered task name.
        radius (`float`): the task's own test, metres in space; Transport ends `TRANSPORT_MARGIN` outside it.
        last (`str`): name of the last stage.
        reach_radius (`float`): as in [`pick_and_place_plan`].
    """
    to_goal = partial(transport_distance, clearance=0.0)
    return StagePlan(
        task=task,
        stages=(
            *_pick_stages(reach_radius),
            Stage(
                name="Transport",
                done=partial(is_held_near_goal, radius=radius + TRANSPORT_MARGIN),
                distance=to_goal,
                scale=LENGTH,
                reads=("object_position", "goal_position", "is_grasped"),
            ),
            Stage(
                name=last,
                done=succeeded,
                distance=to_goal,
                scale=LENGTH,
                reads=("object_position", "goal_position", "success"),
            ),
        ),
    )


register_plan(pick_and_place_plan("StackCube-v1", radius=STACK_CUBE_RADIUS, last="Stack", reach_radius=REACH_RADIUS))
# a sphere in the bin lies 5 mm above its rest on the table; beside the bin it cannot come as near
register_plan(
    pick_and_place_plan("PlaceSphere-v1", radius=PLACE_SPHERE_RADIUS, over_height=0.0, reach_radius=REACH_RADIUS)
)
register_plan(pick_and_hold_plan("PickCube-v1", radius=PICK_CUBE_RADIUS, reach_radius=REACH_RADIUS))
