"""ManiSkill's tasks in which the Panda picks an object up and puts it down."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from trl_stare.envs.experts import PickAndPlaceExpert
from trl_stare.envs.registry import SimulatedTask, register_simulated_task

CUBE_SIZE = 0.04
"""Edge of StackCube-v1's cubes in metres (`half_size=0.02` in ManiSkill's `stack_cube.py`)."""


def stack_cube_signals(env: Any, info: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Signals of StackCube-v1: the red cube is the object, the spot on top of the green cube the goal.

    Positions are `[B, 3]` in metres in the world frame, quaternions `[B, 4]` wxyz. `is_contact` is any force between a finger
    and the red cube; `is_grasped` is ManiSkill's instantaneous `agent.is_grasping`.
    """
    tcp, cube, base = env.agent.tcp.pose, env.cubeA.pose, env.cubeB.pose
    forces = [
        env.scene.get_pairwise_contact_forces(finger, env.cubeA).norm(dim=-1)
        for finger in (env.agent.finger1_link, env.agent.finger2_link)
    ]
    lift = torch.tensor([0.0, 0.0, CUBE_SIZE], device=env.device)
    return {
        "tcp_position": tcp.p,
        "tcp_quaternion": tcp.q,
        "gripper_width": env.agent.robot.qpos[:, -2:].sum(dim=-1, keepdim=True),
        "object_position": cube.p,
        "object_quaternion": cube.q,
        "object_lift": cube.p[:, 2:] - CUBE_SIZE / 2,
        "goal_position": base.p + lift,
        "is_contact": (forces[0] > 0) | (forces[1] > 0),
        "is_grasped": info["is_cubeA_grasped"],
        "success": info["success"],
    }


register_simulated_task(
    SimulatedTask(
        name="StackCube-v1",
        env_id="StackCube-v1",
        instruction="stack the red cube on the green cube",
        signals=stack_cube_signals,
        signal_shapes={
            "tcp_position": 3,
            "tcp_quaternion": 4,
            "gripper_width": 1,
            "object_position": 3,
            "object_quaternion": 4,
            "object_lift": 1,
            "goal_position": 3,
            "is_contact": 0,
            "is_grasped": 0,
            "success": 0,
        },
        contact_signals=("is_contact", "is_grasped"),
        demonstrate=PickAndPlaceExpert(),
        # the stock camera looks at 1.3 m of table (fov 1.57); the cubes appear within 0.6 m of it
        camera_config={"fov": 1.0},
    )
)
