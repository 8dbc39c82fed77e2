"""The photograph behind a digital twin: ManiSkill renders robot and objects, all other pixels are a real scene's.

ManiSkill's `BaseDigitalTwinEnv` does this in its observations. Here pictures are taken without observations, and several
environments live in one process, which `BaseDigitalTwinEnv` does not expect: it keeps photographs and the list of objects
that stay visible on the class, where every new environment overwrites or extends them for all.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor


def forget_overlays() -> None:
    """Before an environment is made: the objects of environments that were made before are none of its own."""
    from mani_skill.envs.tasks.digital_twins.base_env import BaseDigitalTwinEnv

    BaseDigitalTwinEnv._objects_to_remove_from_greenscreen = []


def keep_overlays(env: Any) -> bool:
    """After an environment is made: give it photographs of its own, at its own image size.

    Args:
        env (`BaseEnv`): unwrapped ManiSkill environment.

    Returns:
        `bool`: whether its pictures need [`overlay`].
    """
    from mani_skill.envs.tasks.digital_twins.base_env import BaseDigitalTwinEnv

    if not isinstance(env, BaseDigitalTwinEnv) or env.rgb_overlay_paths is None or env.rgb_overlay_mode == "none":
        return False
    env._rgb_overlay_images = dict(env._rgb_overlay_images)
    return True


def overlay(env: Any, camera: str, picture: dict[str, Tensor]) -> Tensor:
    """`[B, H, W, 3]` uint8: the photograph of `camera`, with the robot and the objects of `picture` in front of it.

    Args:
        env (`BaseDigitalTwinEnv`): unwrapped ManiSkill environment that [`keep_overlays`] has seen.
        camera (`str`): name of a camera that has a photograph.
        picture (`dict[str, Tensor]`): the camera's `"rgb"` `[B, H, W, 3]` and `"segmentation"` `[B, H, W, 1]`.
    """
    photograph = env._rgb_overlay_images[camera].to(picture["rgb"].device)
    return env._green_sceen_rgb(picture["rgb"], picture["segmentation"], photograph)
