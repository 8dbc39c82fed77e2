"""ManiSkill's tasks in which the Panda picks an object up and puts it down, or holds it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from trl_stare.envs.experts import PickAndPlaceExpert
from trl_stare.envs.registry import SimulatedTask, register_simulated_task
from trl_stare.envs.tasks.hand import CONTACT_SIGNALS, PICK_SHAPES, hand_and_object_signals

HALF_SIZE = 0.02
"""Half the edge of the cubes and the radius of the sphere in metres: how high their centres are at rest (`half_size=0.02` in
ManiSkill's `stack_cube.py`, `cube_half_size` in its `pick_cube_cfgs.py`, `radius` in its `place_sphere.py`)."""
BIN_FLOOR = 0.0025
"""From the centre of PlaceSphere-v1's bin up to its floor, metres (`short_side_half_size` in ManiSkill's `place_sphere.py`)."""


def stack_cube_signals(env: Any, info: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Signals of StackCube-v1: the red cube is the object, the spot on top of the green cube the goal.

    See [`hand_and_object_signals`]; `is_grasped` is ManiSkill's instantaneous `agent.is_grasping`, here and below.
    """
    return hand_and_object_signals(env, env.cubeA, rest_height=HALF_SIZE) | {
        "goal_position": _above(env.cubeB.pose.p, 2 * HALF_SIZE),
        "is_grasped": info["is_cubeA_grasped"],
        "success": info["success"],
    }


def pick_cube_signals(env: Any, info: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Signals of PickCube-v1: the red cube is the object, the centre of the goal sphere, which no camera sees, the goal."""
    return hand_and_object_signals(env, env.cube, rest_height=HALF_SIZE) | {
        "goal_position": env.goal_site.pose.p,
        "is_grasped": info["is_grasped"],
        "success": info["success"],
    }


def place_sphere_signals(env: Any, info: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Signals of PlaceSphere-v1: the blue sphere is the object, its place on the floor of the bin the goal."""
    return hand_and_object_signals(env, env.obj, rest_height=HALF_SIZE) | {
        "goal_position": _above(env.bin.pose.p, BIN_FLOOR + HALF_SIZE),
        "is_grasped": info["is_obj_grasped"],
        "success": info["success"],
    }


def _above(position: Tensor, height: float) -> Tensor:
    return position + position.new_tensor([0.0, 0.0, height])


register_simulated_task(
    SimulatedTask(
        name="StackCube-v1",
        env_id="StackCube-v1",
        instruction="stack the red cube on the green cube",
        signals=stack_cube_signals,
        signal_shapes=PICK_SHAPES,
        contact_signals=CONTACT_SIGNALS,
        demonstrate=PickAndPlaceExpert(),
        # the stock camera looks at 1.3 m of table (fov 1.57); the cubes appear within 0.6 m of it
        camera_config={"fov": 1.0},
    )
)
register_simulated_task(
    SimulatedTask(
        name="PickCube-v1",
        env_id="PickCube-v1",
        instruction="pick up the red cube and hold it at the goal position",
        signals=pick_cube_signals,
        signal_shapes=PICK_SHAPES,
        contact_signals=CONTACT_SIGNALS,
        # ManiSkill hides the goal from its cameras: the policy is told where it is
        state_signals=("goal_position",),
        demonstrate=PickAndPlaceExpert(release=False),
        # as above: cube and goal appear within 0.6 m
        camera_config={"fov": 1.0},
    )
)
register_simulated_task(
    SimulatedTask(
        name="PlaceSphere-v1",
        env_id="PlaceSphere-v1",
        instruction="place the blue sphere in the bin",
        signals=place_sphere_signals,
        signal_shapes=PICK_SHAPES,
        contact_signals=CONTACT_SIGNALS,
        demonstrate=PickAndPlaceExpert(),
        # the stock fov of 1.57 leaves a sphere of 3 pixels in an image of 64
        camera_config={"fov": 1.1},
    )
)
