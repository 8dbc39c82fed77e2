"""Signals of every task in which a hand with two fingers moves one object to a goal."""

from __future__ import annotations

from typing import Any

from torch import Tensor

_SHAPES = {
    "tcp_position": 3,
    "tcp_quaternion": 4,
    "gripper_width": 1,
    "object_position": 3,
    "object_quaternion": 4,
    "object_lift": 1,
    "goal_position": 3,
    "is_contact": 0,
}
SLIDE_SHAPES = _SHAPES | {"success": 0}
"""Names and sizes where the object is slid (0: a bool)."""
PICK_SHAPES = _SHAPES | {"is_grasped": 0, "success": 0}
"""Names and sizes where the object is picked up."""
CONTACT_SIGNALS = ("is_contact", "is_grasped")


def hand_and_object_signals(
    env: Any, obj: Any, *, rest_height: float | Tensor, tcp: Any | None = None
) -> dict[str, Tensor]:
    """What these tasks have in common: all of `SLIDE_SHAPES` but the goal and success.

    Positions are `[B, 3]` in metres in the world frame, quaternions `[B, 4]` wxyz. `is_contact` is any force between a finger
    and the object.

    Args:
        env (`BaseEnv`): unwrapped ManiSkill environment.
        obj (`Actor`): the object to move.
        rest_height (`float` or `Tensor`): height of its centre where it rests at first, metres; `[B, 1]` if it differs.
        tcp (`Link`, *optional*): the link that the controller moves; default `env.agent.tcp`.
    """
    agent = env.agent
    hand = (tcp or agent.tcp).pose
    forces = [
        env.scene.get_pairwise_contact_forces(finger, obj).norm(dim=-1)
        for finger in (agent.finger1_link, agent.finger2_link)
    ]
    return {
        "tcp_position": hand.p,
        "tcp_quaternion": hand.q,
        "gripper_width": agent.robot.qpos[:, -2:].sum(dim=-1, keepdim=True),
        "object_position": obj.pose.p,
        "object_quaternion": obj.pose.q,
        "object_lift": obj.pose.p[:, 2:] - rest_height,
        "is_contact": (forces[0] > 0) | (forces[1] > 0),
    }
