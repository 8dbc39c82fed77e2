"""SimplerEnv's four Bridge tasks on ManiSkill3: a WidowX 250 S before a photograph of the real scene (arXiv 2405.05941).

Everything is as SimplerEnv sets it: camera, photograph, control mode (a translation in metres, a rotation in radians, both added
to the *target* of the hand in the robot's base frame; gripper: +1 opens), 5 decisions per second, 24 or 64 initial configurations.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from trl_stare.envs.experts import WidowXExpert
from trl_stare.envs.registry import SimulatedTask, register_simulated_task
from trl_stare.envs.tasks.hand import CONTACT_SIGNALS, PICK_SHAPES, hand_and_object_signals

INTRINSIC = ((623.588, 0.0, 319.501), (0.0, 623.588, 239.545), (0.0, 0.0, 1.0))
"""Of the camera that took the photographs, for 640 x 480 pixels (ManiSkill's `bridge_dataset_eval/base_env.py`)."""


def bridge_signals(env: Any, info: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Signals of the four Bridge tasks: the source object is the object, its place on top of the target the goal.

    Positions are `[B, 3]` in metres in the world frame, quaternions `[B, 4]` wxyz. The TCP is the link that the controller moves,
    `ee_gripper_link`, 16 mm above the finger tips. `object_lift` counts from where the object came to rest before the episode.
    The goal lies half the height of both objects above the target's centre, heights from ManiSkill's bounding boxes (of
    objects that lie as they were modelled). `is_contact` is any force between a finger and the object, and `is_grasped` is
    asked of the robot now: `info["is_src_obj_grasped"]` and `info["consecutive_grasp"]` stay true after a drop.
    """
    source, target = env.objs[env.source_obj_name], env.objs[env.target_obj_name]
    heights = [env.episode_model_bbox_sizes[name][2] for name in (env.source_obj_name, env.target_obj_name)]
    goal = target.pose.p.clone()
    goal[:, 2] += sum(heights) / 2
    rest_height = env.episode_source_obj_xyz_after_settle[:, 2:]
    tcp = env.agent.robot.links_map["ee_gripper_link"]
    return hand_and_object_signals(env, source, rest_height=rest_height, tcp=tcp) | {
        "goal_position": goal,
        "is_grasped": env.agent.is_grasping(source),
        "success": info["success"],
    }


_CARROT = SimulatedTask(
    name="PutCarrotOnPlateInScene-v1",
    env_id="PutCarrotOnPlateInScene-v1",
    instruction="put carrot on plate",
    signals=bridge_signals,
    signal_shapes=PICK_SHAPES,
    contact_signals=CONTACT_SIGNALS,
    demonstrate=WidowXExpert(),
    mistake_size=0.02,
    control_mode="arm_pd_ee_target_delta_pose_align2_gripper_pd_joint_pos",
    robot="widowx250s_bridgedataset_flat_table",
    chooses_robot=True,
    camera="3rd_view_camera",
    camera_config={"intrinsic": INTRINSIC},
    image_shape=(480, 640),
    configurations=24,
    # its black is a texture, which decimation loses; and its 11,000 triangles cost little
    light_visuals=False,
    # objects settle inside a reset, which steps the scenes of all other episodes as well
    gpu_simulation=False,
)
_SPOON = replace(
    _CARROT,
    name="PutSpoonOnTableClothInScene-v1",
    env_id="PutSpoonOnTableClothInScene-v1",
    instruction="put the spoon on the towel",
)
_CUBE = replace(
    _CARROT,
    name="StackGreenCubeOnYellowCubeBakedTexInScene-v1",
    env_id="StackGreenCubeOnYellowCubeBakedTexInScene-v1",
    instruction="stack the green block on the yellow block",
    demonstrate=WidowXExpert(symmetry=math.pi / 2),
)
_EGGPLANT = replace(
    _CARROT,
    name="PutEggplantInBasketScene-v1",
    env_id="PutEggplantInBasketScene-v1",
    instruction="put eggplant into yellow basket",
    # fingers that go lower meet the walls of the sink
    demonstrate=WidowXExpert(grip=0.01),
    robot="widowx250s_bridgedataset_sink",
    configurations=64,
)
for _task in (_CARROT, _SPOON, _CUBE, _EGGPLANT):
    register_simulated_task(_task)
