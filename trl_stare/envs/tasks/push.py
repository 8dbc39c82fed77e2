"""ManiSkill's tasks in which the Panda slides a cube over the table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from trl_stare.envs.experts import PushExpert
from trl_stare.envs.registry import SimulatedTask, register_simulated_task
from trl_stare.envs.tasks.hand import SLIDE_SHAPES, hand_and_object_signals
from trl_stare.envs.tasks.pick_and_place import HALF_SIZE


def slide_signals(env: Any, info: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Signals of PushCube-v1 and PullCube-v1: the blue cube is the object, the centre of the target on the table the goal.

    See [`hand_and_object_signals`] for the others.
    """
    return hand_and_object_signals(env, env.obj, rest_height=HALF_SIZE) | {
        "goal_position": env.goal_region.pose.p,
        "success": info["success"],
    }


register_simulated_task(
    SimulatedTask(
        name="PushCube-v1",
        env_id="PushCube-v1",
        instruction="push the blue cube to the red and white target",
        signals=slide_signals,
        signal_shapes=SLIDE_SHAPES,
        contact_signals=("is_contact",),
        demonstrate=PushExpert(),
        # the stock camera, turned down by 17 degrees: with the stock fov of 1.57 a cube is 2 pixels of 64 wide
        camera_config={"pose": [0.3, 0.0, 0.6, 0.0, -0.5646, 0.0, 0.8253], "fov": 1.1},
    )
)
register_simulated_task(
    SimulatedTask(
        name="PullCube-v1",
        env_id="PullCube-v1",
        instruction="pull the blue cube to the red and white target",
        signals=slide_signals,
        signal_shapes=SLIDE_SHAPES,
        contact_signals=("is_contact",),
        demonstrate=PushExpert(),
        # the stock camera, turned up by 18 degrees: it looks at the table before the robot, and at first misses the gripper
        camera_config={"pose": [-0.5, 0.0, 0.25, 0.9689, 0.0, 0.2474, 0.0], "fov": 1.2},
    )
)
