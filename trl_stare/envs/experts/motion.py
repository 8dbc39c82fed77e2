"""What demonstrators share: the units of the Panda's controller and angles read off quaternions."""

from __future__ import annotations

import torch
from torch import Tensor

METRES_PER_UNIT = 0.1
"""`pd_ee_delta_pose` moves the Panda's TCP by at most 0.1 m per step (`pos_upper` in ManiSkill's `panda.py`)."""
RADIANS_PER_UNIT = -0.1
"""Rotations are scaled by `rot_lower` = -0.1 (ManiSkill's `pd_ee_pose.py`), so a positive action turns negatively."""


def yaw(quaternion: Tensor) -> Tensor:
    """Angle of the body's x axis about the world's vertical, radians, from `[N, 4]` wxyz quaternions."""
    w, x, y, z = quaternion.unbind(dim=-1)
    return torch.atan2(2 * (w * z + x * y), 1 - 2 * (y * y + z * z))


def quaternion_product(a: Tensor, b: Tensor) -> Tensor:
    """Rotation `b`, then `a`: the Hamilton product of `[N, 4]` wxyz quaternions."""
    (aw, ax, ay, az), (bw, bx, by, bz) = a.unbind(dim=-1), b.unbind(dim=-1)
    return torch.stack(
        [
            aw * bw - ax * bx - ay * by - az * bz,
            aw * bx + ax * bw + ay * bz - az * by,
            aw * by - ax * bz + ay * bw + az * bx,
            aw * bz + ax * by - ay * bx + az * bw,
        ],
        dim=-1,
    )


def inverse(quaternion: Tensor) -> Tensor:
    """Of unit quaternions, `[..., 4]` wxyz: the rotation back."""
    return quaternion * quaternion.new_tensor([1.0, -1.0, -1.0, -1.0])


def rotate(quaternion: Tensor, vector: Tensor | tuple[float, float, float]) -> Tensor:
    """The body's `vector` in the world frame, `[..., 3]`, from `[..., 4]` wxyz quaternions.

    Example: a quarter turn about z, `[0.7071, 0, 0, 0.7071]`, takes `(1, 0, 0)` to `[0, 1, 0]`.
    """
    v = torch.as_tensor(vector, dtype=quaternion.dtype, device=quaternion.device).expand(*quaternion.shape[:-1], 3)
    t = 2 * torch.cross(quaternion[..., 1:], v, dim=-1)
    return v + quaternion[..., :1] * t + torch.cross(quaternion[..., 1:], t, dim=-1)


def rotation_between(start: Tensor, end: Tensor) -> Tensor:
    """World-frame rotation vector (axis times angle, radians, `[N, 3]`) from one `[N, 4]` wxyz quaternion to another."""
    turn = quaternion_product(end, inverse(start))
    turn = turn * torch.where(turn[..., :1] < 0, -1.0, 1.0)  # the shorter way round
    sine = turn[..., 1:].norm(dim=-1, keepdim=True)
    angle = 2 * torch.atan2(sine, turn[..., :1])
    return turn[..., 1:] / sine.clamp(min=1e-9) * angle


def rotation_onto(start: Tensor, end: Tensor) -> Tensor:
    """The shortest rotation vector (radians, `[N, 3]`) that takes unit vector `start` to unit vector `end`, both `[N, 3]`.

    Example: `[1, 0, 0]` onto `[0, 1, 0]` is `[0, 0, 1.5708]`. Opposite vectors give zero: every axis would do.
    """
    axis = torch.cross(start, end, dim=-1)
    sine, cosine = axis.norm(dim=-1, keepdim=True), (start * end).sum(dim=-1, keepdim=True)
    return axis / sine.clamp(min=1e-9) * torch.atan2(sine, cosine)
