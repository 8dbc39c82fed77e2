"""ManiSkill's tasks in which the Panda handles a peg: stand it up, insert it into the side of a box."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from trl_stare.envs.experts import LiftPegUprightExpert, PegInsertionExpert
from trl_stare.envs.registry import SimulatedTask, register_simulated_task

_PEG_SHAPES = {
    "tcp_position": 3,
    "tcp_quaternion": 4,
    "gripper_width": 1,
    "object_position": 3,
    "object_quaternion": 4,
    "object_lift": 1,
    "is_contact": 0,
    "is_grasped": 0,
    "success": 0,
}


def _peg_signals(env: Any, info: Mapping[str, Tensor], half_width: float | Tensor) -> dict[str, Tensor]:
    """What both tasks have: hand, peg (its x axis runs along it, origin at the centre) and success.

    Positions are `[B, 3]` in metres in the world frame, quaternions `[B, 4]` wxyz. `is_contact` is any force between a finger
    and the peg; `is_grasped` is ManiSkill's instantaneous `agent.is_grasping`.
    """
    agent, peg = env.agent, env.peg.pose
    left, right = (
        env.scene.get_pairwise_contact_forces(finger, env.peg).norm(dim=-1)
        for finger in (agent.finger1_link, agent.finger2_link)
    )
    return {
        "tcp_position": agent.tcp.pose.p,
        "tcp_quaternion": agent.tcp.pose.q,
        "gripper_width": agent.robot.qpos[:, -2:].sum(dim=-1, keepdim=True),
        "object_position": peg.p,
        "object_quaternion": peg.q,
        "object_lift": peg.p[:, 2:] - half_width,
        "is_contact": (left > 0) | (right > 0),
        "is_grasped": agent.is_grasping(env.peg),
        "success": info["success"],
    }


def lift_peg_upright_signals(env: Any, info: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Signals of LiftPegUpright-v1; `object_lift` is measured from the peg lying flat. See [`_peg_signals`]."""
    return _peg_signals(env, info, env.peg_half_width)


def peg_insertion_signals(env: Any, info: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Signals of PegInsertionSide-v1: see [`_peg_signals`], and where the peg belongs.

    `goal_position` `[B, 3]` and `goal_quaternion` `[B, 4]` are the peg's pose when its head is at the centre of the box
    (ManiSkill's `goal_pose`). `peg_head_at_hole` and `peg_center_at_hole` `[B, 3]` are points of the peg in the frame of
    the hole: origin in the middle of the box, x into the hole, so a peg in front of the box has a negative x.
    `peg_half_length` `[B, 1]`: every episode has a peg of its own, with a hole that is 3 mm wider on each side.
    """
    hole, goal = env.box_hole_pose, env.goal_pose
    return _peg_signals(env, info, env.peg_half_sizes[:, 2:]) | {
        "goal_position": goal.p,
        "goal_quaternion": goal.q,
        "peg_head_at_hole": info["peg_head_pos_at_hole"],
        "peg_center_at_hole": (hole.inv() * env.peg.pose).p,
        "peg_half_length": env.peg_half_sizes[:, :1],
    }


register_simulated_task(
    SimulatedTask(
        name="LiftPegUpright-v1",
        env_id="LiftPegUpright-v1",
        instruction="stand the peg upright on the table",
        signals=lift_peg_upright_signals,
        signal_shapes=_PEG_SHAPES,
        contact_signals=("is_contact", "is_grasped"),
        demonstrate=LiftPegUprightExpert(),
    )
)
register_simulated_task(
    SimulatedTask(
        name="PegInsertionSide-v1",
        env_id="PegInsertionSide-v1",
        instruction="insert the orange end of the peg into the hole of the box",
        signals=peg_insertion_signals,
        signal_shapes=_PEG_SHAPES
        | {
            "goal_position": 3,
            "goal_quaternion": 4,
            "peg_head_at_hole": 3,
            "peg_center_at_hole": 3,
            "peg_half_length": 1,
        },
        contact_signals=("is_contact", "is_grasped"),
        demonstrate=PegInsertionExpert(),
        robot="panda_wristcam",
    )
)
