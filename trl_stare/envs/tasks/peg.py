"""ManiSkill's tasks in which the Panda handles a peg: stand it up, insert it into the side of a box."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from trl_stare.envs.experts import LiftPegUprightExpert, PegInsertionExpert
from trl_stare.envs.registry import SimulatedTask, register_simulated_task
from trl_stare.envs.tasks.hand import CONTACT_SIGNALS, PICK_SHAPES, hand_and_object_signals

UPRIGHT_SHAPES = {name: size for name, size in PICK_SHAPES.items() if name != "goal_position"}
"""Any upright place will do: there is no goal position."""
GOAL_SHAPES = {
    "goal_position": 3,
    "goal_quaternion": 4,
    "peg_head_at_hole": 3,
    "peg_center_at_hole": 3,
    "peg_half_length": 1,
}


def lift_peg_upright_signals(env: Any, info: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Signals of LiftPegUpright-v1: the peg is the object, x is its axis, and `object_lift` counts from the peg lying flat.

    See [`hand_and_object_signals`]; `is_grasped` is ManiSkill's instantaneous `agent.is_grasping`, here and below.
    """
    return hand_and_object_signals(env, env.peg, rest_height=env.peg_half_width) | {
        "is_grasped": env.agent.is_grasping(env.peg),
        "success": info["success"],
    }


def peg_insertion_signals(env: Any, info: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Signals of PegInsertionSide-v1: the peg is the object, x is its axis, the head at the positive end.

    `goal_position` `[B, 3]` and `goal_quaternion` `[B, 4]` are the peg's pose when its head is in the middle of the box
    (ManiSkill's `goal_pose`). `peg_head_at_hole` and `peg_center_at_hole` `[B, 3]` are points of the peg in the hole's frame: x
    points into the hole, 0 is the middle of the box, so a peg before the box has a negative x. `peg_half_length` `[B, 1]`: every
    episode has a peg of its own. All in metres; positions and quaternions (wxyz) in the world frame.
    """
    return hand_and_object_signals(env, env.peg, rest_height=env.peg_half_sizes[:, 2:]) | {
        "goal_position": env.goal_pose.p,
        "goal_quaternion": env.goal_pose.q,
        "peg_head_at_hole": info["peg_head_pos_at_hole"],
        "peg_center_at_hole": (env.box_hole_pose.inv() * env.peg.pose).p,
        "peg_half_length": env.peg_half_sizes[:, :1],
        "is_grasped": env.agent.is_grasping(env.peg),
        "success": info["success"],
    }


register_simulated_task(
    SimulatedTask(
        name="LiftPegUpright-v1",
        env_id="LiftPegUpright-v1",
        instruction="stand the peg upright on the table",
        signals=lift_peg_upright_signals,
        signal_shapes=UPRIGHT_SHAPES,
        contact_signals=CONTACT_SIGNALS,
        demonstrate=LiftPegUprightExpert(),
        # from the side: the stock camera looks along the peg, and the hand hides it as soon as it is raised
        camera_config={"pose": [0.45, 0.35, 0.35, 0.295, 0.1842, 0.0581, -0.9358], "fov": 1.1},
    )
)
register_simulated_task(
    SimulatedTask(
        name="PegInsertionSide-v1",
        env_id="PegInsertionSide-v1",
        instruction="insert the orange end of the peg into the hole of the box",
        signals=peg_insertion_signals,
        signal_shapes=UPRIGHT_SHAPES | GOAL_SHAPES,
        contact_signals=CONTACT_SIGNALS,
        demonstrate=PegInsertionExpert(),
        robot="panda_wristcam",
        # from beside and above: the stock camera stands amid the pegs and does not see those behind it
        camera_config={"pose": [0.35, -0.5, 0.45, 0.4631, -0.2382, 0.1307, 0.8436], "fov": 1.0},
        # parallel scenes keep the peg and the hole that they were built with, whatever the seed
        gpu_simulation=False,
    )
)
