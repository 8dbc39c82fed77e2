"""Plans of the tasks in which a peg is stood up, or inserted into a hole."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from trl_stare.interfaces import Signals
from trl_stare.stages.measures import is_picked, pick_distance, reach_distance, succeeded, touched
from trl_stare.stages.registry import register_plan
from trl_stare.stages.spec import Stage, StagePlan

LENGTH = 0.3
"""`L_k` of distances in metres: about how far apart things on the table are at first (method.md 2)."""
HOLD_OFFSET = 0.05
"""Metres added until a grasp has happened, which distances alone cannot see."""
LIFT_HEIGHT = 0.02
"""Metres above rest that count as lifted: about half the thickness of the peg, more than a push or a tilt lifts it by."""
UPRIGHT_ANGLE = 0.2
"""Radians from the vertical at which Settle begins (method.md 1). From there the peg falls onto its foot by itself."""
HALF_LENGTH = 0.12
"""Height of LiftPegUpright-v1's peg centre when it stands, metres (`peg_half_length` in ManiSkill's `lift_peg_upright.py`)."""
ALIGN_RADIUS = 0.01
"""Metres from the hole's axis that count as aligned, of the peg's head and of its centre: `pre_inserted` in the dense reward of
ManiSkill's `peg_insertion_side.py`."""


def upright_cosine(signals: Signals) -> Tensor:
    """`|cos|` of the angle between the peg's axis and the vertical, `[...]`: 0 for a lying peg, 1 for a standing one.

    Which end is up does not matter, as in the task's own test.
    """
    w, x, y, z = signals["object_quaternion"].unbind(dim=-1)
    return (2 * (x * z - w * y)).abs().clamp(max=1.0)


def is_upright(signals: Signals, *, angle: float) -> Tensor:
    """The peg's axis is within `angle` radians of the vertical. `[...]` bool."""
    return upright_cosine(signals) >= math.cos(angle)


def upright_distance(signals: Signals) -> Tensor:
    """`1 - |cos(peg axis, vertical)|`, no unit, `[...]`."""
    return 1 - upright_cosine(signals)


def settle_distance(signals: Signals, *, half_length: float) -> Tensor:
    """How far an upright peg is from standing, metres, `[...]`: its height plus the arc that its ends still have to go.

    Example: 0.1 rad from the vertical and its centre 1 cm too high, with `half_length` 0.12: 0.022.
    """
    height = (signals["object_position"][..., 2] - half_length).abs()
    return height + half_length * torch.acos(upright_cosine(signals))


def axis_distance(signals: Signals) -> Tensor:
    """How far the peg is from the hole's axis, metres, `[...]`: its head or its centre, whichever is farther."""
    head, center = signals["peg_head_at_hole"], signals["peg_center_at_hole"]
    return torch.maximum(head[..., 1:].norm(dim=-1), center[..., 1:].norm(dim=-1))


def is_aligned(signals: Signals, *, radius: float) -> Tensor:
    """The peg's head and its centre are closer than `radius` metres to the hole's axis. `[...]` bool."""
    return axis_distance(signals) < radius


def insert_distance(signals: Signals) -> Tensor:
    """How far the peg's head is from the middle of the box, metres, `[...]`; a head that is deeper counts as there.

    Example: 5 cm before the middle of the box and on the hole's axis: 0.05. 1 cm behind it: 0.
    """
    head = signals["peg_head_at_hole"]
    missing = (-head[..., :1]).clamp(min=0.0)
    return torch.cat([missing, head[..., 1:]], dim=-1).norm(dim=-1)


def is_held(signals: Signals) -> Tensor:
    """The gripper holds the peg now. `[...]` bool."""
    return signals["is_grasped"]


REACH = Stage(
    name="Reach",
    done=touched,
    distance=reach_distance,
    scale=LENGTH,
    # the one cost the paper states, in plain metres
    cost_scale=1.0,
    reads=("tcp_position", "object_position", "is_contact", "is_grasped"),
)

register_plan(
    StagePlan(
        task="LiftPegUpright-v1",
        stages=(
            REACH,
            Stage(
                name="Grasp",
                done=is_held,
                # no lift is asked for: the peg may turn with its foot on the table
                distance=partial(pick_distance, height=0.0, offset=HOLD_OFFSET),
                scale=LENGTH,
                reads=("tcp_position", "object_position", "object_lift", "is_grasped"),
            ),
            Stage(
                name="Upright",
                done=partial(is_upright, angle=UPRIGHT_ANGLE),
                distance=upright_distance,
                scale=1.0,
                reads=("object_quaternion",),
            ),
            Stage(
                name="Settle",
                done=succeeded,
                distance=partial(settle_distance, half_length=HALF_LENGTH),
                scale=LENGTH,
                reads=("object_position", "object_quaternion", "success"),
            ),
        ),
    )
)
register_plan(
    StagePlan(
        task="PegInsertionSide-v1",
        stages=(
            REACH,
            Stage(
                name="Grasp",
                done=partial(is_picked, height=LIFT_HEIGHT),
                distance=partial(pick_distance, height=LIFT_HEIGHT, offset=HOLD_OFFSET),
                scale=LENGTH,
                reads=("tcp_position", "object_position", "object_lift", "is_grasped"),
            ),
            Stage(
                name="Align",
                done=partial(is_aligned, radius=ALIGN_RADIUS),
                distance=axis_distance,
                scale=LENGTH,
                reads=("peg_head_at_hole", "peg_center_at_hole"),
            ),
            Stage(
                name="Insert",
                done=succeeded,
                distance=insert_distance,
                scale=LENGTH,
                reads=("peg_head_at_hole", "success"),
            ),
        ),
    )
)
