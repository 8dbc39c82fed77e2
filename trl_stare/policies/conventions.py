"""What an action means on which robot: rotations and grippers, each convention written down once.

Quaternions are wxyz (SAPIEN), angles radians, all functions take any leading dimensions. Actions are `[..., 7]`:
translation, rotation, gripper.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from trl_stare.interfaces import ACTION_DIM


def wxyz_to_xyzw(quaternions: Tensor) -> Tensor:
    """`[..., 4]`: SAPIEN's and ManiSkill's order -> SciPy's and PyBullet's. Example: `[1, 0, 0, 0]` -> `[0, 0, 0, 1]`."""
    return quaternions.roll(-1, dims=-1)


def xyzw_to_wxyz(quaternions: Tensor) -> Tensor:
    """`[..., 4]`: SciPy's order -> SAPIEN's. Example: `[0, 0, 0, 1]` -> `[1, 0, 0, 0]`."""
    return quaternions.roll(1, dims=-1)


def quaternion_multiply(a: Tensor, b: Tensor) -> Tensor:
    """Hamilton product `[..., 4]`: first turn by `b`, then by `a`."""
    w, x, y, z = a.unbind(-1)
    matrix = torch.stack([w, -x, -y, -z, x, w, -z, y, y, z, w, -x, z, -y, x, w], dim=-1).unflatten(-1, (4, 4))
    return (matrix @ b[..., None]).squeeze(-1)


def axis_angle_to_quaternion(rotations: Tensor) -> Tensor:
    """`[..., 3]` axis times angle -> `[..., 4]` wxyz. Example: `[0, 0, pi]` -> `[0, 0, 0, 1]`."""
    half = rotations.norm(dim=-1, keepdim=True) / 2
    # sinc is smooth where the angle is 0: sin(half) * rotation / angle
    return torch.cat([half.cos(), torch.sinc(half / torch.pi) / 2 * rotations], dim=-1)


def quaternion_to_axis_angle(quaternions: Tensor) -> Tensor:
    """`[..., 4]` wxyz -> `[..., 3]` axis times angle, the angle in [0, pi]."""
    quaternions = torch.where(quaternions[..., :1] < 0, -quaternions, quaternions)
    sine = quaternions[..., 1:].norm(dim=-1, keepdim=True)
    half = torch.atan2(sine, quaternions[..., :1])
    return 2 * quaternions[..., 1:] / torch.sinc(half / torch.pi)


def euler_to_quaternion(angles: Tensor) -> Tensor:
    """`[..., 3]` roll, pitch, yaw about the *fixed* x, then y, then z axis ("sxyz" of transforms3d) -> `[..., 4]` wxyz.

    This is Bridge's and OpenVLA's rotation. ManiSkill's own "XYZ" turns about the moving axes and differs at second order.
    """
    x, y, z = (axis_angle_to_quaternion(angles * axis) for axis in torch.eye(3).to(angles))
    return quaternion_multiply(z, quaternion_multiply(y, x))


def quaternion_to_euler(quaternions: Tensor) -> Tensor:
    """Inverse of [`euler_to_quaternion`], the pitch in [-pi / 2, pi / 2]."""
    w, x, y, z = quaternions.unbind(-1)
    roll = torch.atan2(2 * (w * x + y * z), 1 - 2 * (x * x + y * y))
    pitch = torch.asin((2 * (w * y - z * x)).clamp(-1, 1))
    yaw = torch.atan2(2 * (w * z + x * y), 1 - 2 * (y * y + z * z))
    return torch.stack([roll, pitch, yaw], dim=-1)


def euler_to_axis_angle(angles: Tensor) -> Tensor:
    """`[..., 3]`: what SimplerEnv does to OpenVLA's rotation (`transforms3d.euler.euler2axangle`)."""
    return quaternion_to_axis_angle(euler_to_quaternion(angles))


def axis_angle_to_euler(rotations: Tensor) -> Tensor:
    """`[..., 3]`: inverse of [`euler_to_axis_angle`]."""
    return quaternion_to_euler(axis_angle_to_quaternion(rotations))


def unit_to_signed_gripper(values: Tensor) -> Tensor:
    """1 opens, 0 closes -> +1 opens, -1 closes, decided at 0.5 (SimplerEnv's WidowX, RL4VLA, ManiSkill)."""
    return torch.where(values > 0.5, 1.0, -1.0).to(values)


def signed_to_unit_gripper(values: Tensor) -> Tensor:
    """+1 opens, -1 closes -> 1 opens, 0 closes."""
    return (values > 0).to(values)


class ActionConvention(NamedTuple):
    """Between what a checkpoint was trained on and what a controller takes.

    Attributes:
        rotation (`tuple` of two functions), gripper (`tuple` of two functions): checkpoint -> robot, robot -> checkpoint.
    """

    rotation: tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]
    gripper: tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]

    def to_robot(self, actions: Tensor) -> Tensor:
        """`[..., 7]` the checkpoint's actions -> `[..., 7]` robot units."""
        return self._apply(actions, 0)

    def from_robot(self, actions: Tensor) -> Tensor:
        """`[..., 7]` robot units -> `[..., 7]` the checkpoint's actions."""
        return self._apply(actions, 1)

    def _apply(self, actions: Tensor, direction: int) -> Tensor:
        if actions.shape[-1] != ACTION_DIM:
            raise ValueError(
                f"`actions` must be `[..., {ACTION_DIM}]`: translation, rotation, gripper, got {[*actions.shape]}. Use "
                '`action_convention="identity"` for other robots.'
            )
        rotation, gripper = self.rotation[direction], self.gripper[direction]
        return torch.cat([actions[..., :3], rotation(actions[..., 3:6]), gripper(actions[..., 6:])], dim=-1)


def _same(values: Tensor) -> Tensor:
    return values


def _negated(function: Callable[[Tensor], Tensor], first: bool) -> Callable[[Tensor], Tensor]:
    """`function` of the negative, or the negative of `function`."""
    return (lambda values: function(-values)) if first else (lambda values: -function(values))


_SIGNED = (unit_to_signed_gripper, signed_to_unit_gripper)
CONVENTIONS = {
    # RL4VLA hands euler angles straight to the WidowX controller of ManiSkill's Bridge tasks
    "bridge": ActionConvention((_same, _same), _SIGNED),
    "simpler_env": ActionConvention((euler_to_axis_angle, axis_angle_to_euler), _SIGNED),
    # LIBERO's gripper closes at +1 (openvla `experiments/robot/robot_utils.py`, invert_gripper_action)
    "libero": ActionConvention(
        (_same, _same), (_negated(unit_to_signed_gripper, first=False), _negated(signed_to_unit_gripper, first=True))
    ),
}
"""Conventions by name; `"identity"` (any action size, nothing changes) is the one without an entry."""


def get_convention(name: str) -> ActionConvention | None:
    """The convention called `name`, `None` for `"identity"`.

    Args:
        name (`str`): `"identity"`; `"bridge"`: gripper 0..1 becomes -1..1; `"simpler_env"`: also euler angles become axis-angle;
            `"libero"`: the gripper's sign is turned round.

    Raises:
        ValueError: an unknown name.
    """
    if name != "identity" and name not in CONVENTIONS:
        raise ValueError(f"`action_convention` must be one of {['identity', *sorted(CONVENTIONS)]}, got {name!r}.")
    return CONVENTIONS.get(name)
