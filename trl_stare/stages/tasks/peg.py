"""Plans of the tasks in which a peg is stood up, or inserted into a hole."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from trl_stare.interfaces import Signals
from trl_stare.stages.measures import is_picked, pick_distance, reach_distance, succeeded, touched
from trl_stare.stages.registry import register_plan
from trl_stare.stages.spec import Stage, StagePlan

LENGTH = 0.3
"""`L_k` of distances in metres: about how far apart things on the table are at first."""
HOLD_OFFSET = 0.05
"""Metres added until a grasp has happened, which distances alone cannot see."""
LIFT_HEIGHT = 0.02
"""Metres above rest that count as lifted: about half the thickness of the peg, more than a push or a tilt lifts it by."""
UPRIGHT_ANGLE = 0.2
"""Radians from the vertical at which Settle begins. From there the peg falls onto its foot by itself."""
GRIP = 0.1
"""Metres from LiftPegUpright-v1's peg centre to where it can be stood up by, near either end: there the demonstrator holds it
(`trl_stare.envs.experts.LiftPegUprightExpert`). A peg held by its middle gets stuck under the palm."""
GRIP_RADIUS = 0.02
"""Metres from a grip within which the hand has reached it, as with the push pose of PushCube-v1."""
END = 0.075
"""Metres from the centre beyond which a peg counts as held by its end; why is measured in docs/tasks.md."""
HALF_LENGTH = 0.12
"""Height of LiftPegUpright-v1's peg centre when it stands, metres (`peg_half_length` in ManiSkill's `lift_peg_upright.py`)."""
ALIGN_RADIUS = 0.01
"""Metres from the hole's axis that count as aligned, of the peg's head and of its centre: `pre_inserted` in the dense reward of
ManiSkill's `peg_insertion_side.py`."""


def peg_axis(signals: Signals) -> Tensor:
    """Unit vector along the peg, x of its own frame, in the world frame, `[..., 3]`.

    Example: a peg that rises by 0.1 rad above the world's x axis: (0.995, 0, 0.0998).
    """
    w, x, y, z = signals["object_quaternion"].unbind(dim=-1)
    return torch.stack([1 - 2 * (y * y + z * z), 2 * (x * y + w * z), 2 * (x * z - w * y)], dim=-1)


def upright_cosine(signals: Signals) -> Tensor:
    """`|cos|` of the angle between the peg's axis and the vertical, `[...]`: 0 for a lying peg, 1 for a standing one.

    Which end is up does not matter, as in the task's own test.
    """
    return peg_axis(signals)[..., 2].abs().clamp(max=1.0)


def grip_distance(signals: Signals, *, grip: float) -> Tensor:
    """`|tcp - grip|`, metres, `[...]`, to the nearer of the two points on the peg's axis that are `grip` metres from its centre.

    Example: a hand at the centre of the peg, with `grip` 0.1: 0.1. Over one end, 2 cm up: 0.02.
    """
    offset, along = signals["tcp_position"] - signals["object_position"], grip * peg_axis(signals)
    return torch.minimum((offset - along).norm(dim=-1), (offset + along).norm(dim=-1))


def is_held_by_end(signals: Signals, *, end: float) -> Tensor:
    """The gripper holds the peg more than `end` metres from its centre, along its axis. `[...]` bool."""
    offset = signals["tcp_position"] - signals["object_position"]
    return signals["is_grasped"] & ((offset * peg_axis(signals)).sum(dim=-1).abs() > end)


def is_at_grip(signals: Signals, *, grip: float, radius: float, end: float) -> Tensor:
    """A finger touches the peg with the TCP within `radius` metres of one of its two grips, or it is held by an end. `[...]` bool.

    Not any touch will do: where the hand comes down decides where the peg is held.
    """
    near = grip_distance(signals, grip=grip) <= radius
    return (touched(signals) & near) | is_held_by_end(signals, end=end)


def end_distance(signals: Signals, *, grip: float, end: float, offset: float) -> Tensor:
    """What is left of holding the peg by an end, metres, `[...]`: `|tcp - grip|`, plus `offset` until it is held there.

    Example: held by its centre, with `grip` 0.1 and `offset` 0.05: 0.15. Held 0.08 from it: 0.02.
    """
    return grip_distance(signals, grip=grip) + offset * ~is_held_by_end(signals, end=end)


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
            # where a peg is held decides whether it can be stood up: the hand's way leads to an end, not to the nearest touch
            replace(
                REACH,
                done=partial(is_at_grip, grip=GRIP, radius=GRIP_RADIUS, end=END),
                distance=partial(grip_distance, grip=GRIP),
                reads=(*REACH.reads, "object_quaternion"),
            ),
            Stage(
                name="Grasp",
                # no lift is asked for: the peg may turn with its foot on the table
                done=partial(is_held_by_end, end=END),
                distance=partial(end_distance, grip=GRIP, end=END, offset=HOLD_OFFSET),
                scale=LENGTH,
                reads=("tcp_position", "object_position", "object_quaternion", "is_grasped"),
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
