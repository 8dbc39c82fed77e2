"""The grasp test of the Panda and the WidowX without its overhead on a CPU.

With one scene a quarter of an environment step goes into `is_grasping`: torch arithmetic on single vectors. Here the same test is
evaluated with numpy on the scene's contacts, read once (tested against ManiSkill's own).
"""

from __future__ import annotations

import math
from types import MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor

OPENING_AXIS = 1
"""Fingers move along their own y axis (ManiSkill's `panda.py` and `widowx.py`, whose `is_grasping` are the same)."""


def speed_up_grasping(env: Any) -> bool:
    """Let the agent of a single-scene CPU environment test grasps the short way.

    Args:
        env (`BaseEnv`): unwrapped ManiSkill environment.

    Returns:
        `bool`: whether its grasp test is the one that this module knows; others stay as they are.
    """
    from mani_skill.agents.robots import Panda, WidowX250S

    known = (Panda.is_grasping, WidowX250S.is_grasping)
    if env.gpu_sim_enabled or env.num_envs != 1 or getattr(type(env.agent), "is_grasping", None) not in known:
        return False
    env.agent.is_grasping = MethodType(_is_grasping, env.agent)
    return True


def _is_grasping(self: Any, object: Any, min_force: float = 0.5, max_angle: float = 85) -> Tensor:
    """ManiSkill's `is_grasping` for one scene, `[1]` bool: both fingers press with `min_force` N, within `max_angle` degrees of the
    direction in which they open."""
    px, held = self.scene.px, object._bodies[0].entity
    contacts = [contact for contact in px.get_contacts() if held in (body.entity for body in contact.bodies)]
    presses = []
    for link, sign in ((self.finger1_link, 1.0), (self.finger2_link, -1.0)):
        entity = link._bodies[0].entity
        impulse = np.zeros(3)
        for contact in contacts:
            first, second = (body.entity for body in contact.bodies)
            if entity in (first, second):
                # impulses act on the first body
                impulse += sum((1 if first == entity else -1) * point.impulse for point in contact.points)
        force = float(np.linalg.norm(impulse)) / px.timestep
        if force < min_force:
            return torch.tensor([False])
        opening = sign * entity.pose.to_transformation_matrix()[:3, OPENING_AXIS]
        cosine = float(impulse @ opening) / (force * px.timestep)
        presses.append(math.degrees(math.acos(min(max(cosine, -1.0), 1.0))) <= max_angle)
    return torch.tensor([all(presses)])
