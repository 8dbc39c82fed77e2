"""ManiSkill's end-effector pose control without its overhead on a CPU.

With one scene, four fifths of an environment step go into batched torch arithmetic on single poses, most of it in
`PDEEPoseController.set_action`. Here the same equations are evaluated with SAPIEN's own poses; joint targets agree with
ManiSkill's to rounding (tested), inverse kinematics and simulation are untouched.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor

SUPPORTED_FRAME = "root_translation:root_aligned_body_rotation"


def speed_up_control(env: Any) -> bool:
    """Let the arm of a single-scene CPU environment compute its targets the short way.

    Args:
        env (`BaseEnv`): unwrapped ManiSkill environment.

    Returns:
        `bool`: whether its controller is one that this module knows; others stay as they are.
    """
    from mani_skill.agents.controllers import PDEEPoseController

    controllers = getattr(env.agent.controller, "controllers", {})
    arm = controllers.get("arm")
    if type(arm) is not PDEEPoseController or env.gpu_sim_enabled or env.num_envs != 1:
        return False
    config = arm.config
    if config.frame != SUPPORTED_FRAME or not config.use_delta or config.interpolate:
        return False
    arm.set_action = MethodType(_set_action, arm)
    return True


def _set_action(self: Any, action: Tensor) -> None:
    """`PDEEPoseController.set_action` for one scene: `[1, 6]` delta pose, normalised or in metres and radians -> joint targets."""
    import sapien
    from mani_skill.utils.structs.pose import Pose

    values = np.asarray(action[0], dtype=np.float64)
    translation, rotation = _scaled(values, self.config) if self.config.normalize_action else (values[:3], values[3:])
    self._step = 0
    self._start_qpos = self.qpos
    if self.config.use_target:  # from where it was sent last, not from where it came
        raw = self._target_pose.raw_pose[0].numpy()
        hand = sapien.Pose(p=raw[:3], q=raw[3:])
    else:
        hand = self.root_link._objs[0].pose.inv() * self.ee_link._objs[0].pose
    turned = sapien.Pose(q=euler_to_quaternion(rotation)) * sapien.Pose(q=hand.q)
    target = sapien.Pose(p=hand.p + translation.astype(np.float32), q=turned.q)
    if self.config.use_target:
        self._target_pose = Pose.create(torch.from_numpy(np.concatenate([target.p, target.q]))[None])
    kinematics = self.kinematics
    joints = self.articulation._objs[0].qpos[_indices(kinematics.pmodel_active_joint_indices)]
    result, success, _ = kinematics.pmodel.compute_inverse_kinematics(
        kinematics.end_link_idx,
        target,
        initial_qpos=joints,
        active_qmask=_indices(kinematics.qmask),
        max_iterations=100,
    )
    if success:
        found = result[_indices(kinematics.pmodel_controlled_joint_indices)]
        self._target_qpos = torch.from_numpy(found.astype(np.float32))[None]
    else:
        self._target_qpos = self._start_qpos
    for joint, value in zip(self.joints, self._target_qpos[0].numpy(), strict=True):
        joint._objs[0].set_drive_target(value)


def _scaled(values: np.ndarray, config: Any) -> tuple[np.ndarray, np.ndarray]:
    """`[6]` in [-1, 1] -> translation, metres, and rotation, radians, `[3]` each."""
    low, high = np.float64(config.pos_lower), np.float64(config.pos_upper)
    translation = 0.5 * (high + low) + 0.5 * (high - low) * values[:3].clip(-1, 1)
    # scaled by `rot_lower`, as ManiSkill does: a positive action turns negatively
    return translation, values[3:] / max(np.linalg.norm(values[3:]), 1.0) * config.rot_lower


def euler_to_quaternion(angles: np.ndarray) -> np.ndarray:
    """Rotation about x, then y, then z of the turned frame ("XYZ", radians) -> wxyz: `q_x * q_y * q_z`.

    Example: `[pi, 0, 0]` -> `[0, 1, 0, 0]`.
    """
    (cx, cy, cz), (sx, sy, sz) = np.cos(angles / 2), np.sin(angles / 2)
    return np.array(
        [
            cx * cy * cz - sx * sy * sz,
            sx * cy * cz + cx * sy * sz,
            cx * sy * cz - sx * cy * sz,
            cx * cy * sz + sx * sy * cz,
        ]
    )


def _indices(tensor: Tensor) -> np.ndarray:
    return tensor.numpy()
