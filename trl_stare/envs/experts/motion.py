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
