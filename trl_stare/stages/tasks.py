"""Which plan a task has. Plans are data: names, thresholds and shared measures, no logic of their own."""

from __future__ import annotations

import difflib
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

_PLANS: dict[str, StagePlan] = {}


def register_plan(plan: StagePlan) -> None:
    """Make `plan` known to [`get_plan`] under its task's name. A second registration of a name replaces the first."""
    _PLANS[plan.task] = plan


def get_plan(task: str) -> StagePlan:
    """Look up the plan of a task.

    Raises:
        ValueError: if the task has none; lists the tasks that have one and the nearest name.

    Example: `get_plan("StackCube-v1").names` is `("Reach", "Grasp", "Transport", "Stack")`.
    """
    if task not in _PLANS:
        nearest = difflib.get_close_matches(task, _PLANS, n=1)
        hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
        raise ValueError(
            f"`task` must be one with a stage plan, {sorted(_PLANS)}, got {task!r}.{hint} "
            f"Use `register_plan` for a plan of your own."
        )
    return _PLANS[task]


register_plan(
    StagePlan(
        task="StackCube-v1",
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
                done=partial(is_over_goal, radius=STACK_CUBE_RADIUS + TRANSPORT_MARGIN, height=LIFT_HEIGHT),
                distance=partial(transport_distance, clearance=TRANSPORT_CLEARANCE),
                scale=LENGTH,
                reads=("object_position", "goal_position", "object_lift"),
            ),
            Stage(
                name="Stack",
                done=succeeded,
                distance=partial(place_distance, offset=HOLD_OFFSET),
                scale=LENGTH,
                reads=("object_position", "goal_position", "is_grasped", "success"),
            ),
        ),
    )
)
