"""What variations ask of a scene: which bodies are the task's, where they stand, what is painted how.

Knows ManiSkill's scenes with one environment each (CPU); imported in the simulator's process only through functions.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

SURROUNDINGS = ("table-workspace", "sink", "dummy_sink_target_plane")
"""Bodies that ManiSkill could move, and that belong to the room: the table of its `TableSceneBuilder`; the sink of
PutEggplantInBasketScene-v1 and the invisible plane that stands for the basket in its photograph."""


def task_bodies(env: Any) -> list[Any]:
    """The actors that are not part of the room, in the order they were built: objects, targets, goal markers."""
    actors = env.scene.actors.values()
    return [actor for actor in actors if actor.px_body_type != "static" and actor.name not in SURROUNDINGS]


def manipulated_object(env: Any) -> Any:
    """The object to move: the first dynamic actor that the environment builds (tested for every task we ship).

    Raises:
        ValueError: if there is none.
    """
    movable = [actor for actor in task_bodies(env) if actor.px_body_type == "dynamic"]
    if not movable:
        raise ValueError(
            "`variation` needs a task with a dynamic actor, got a scene without. Choose another variation."
        )
    return movable[0]


def render_bodies(actor: Any) -> list[Any]:
    """SAPIEN's visible parts of an actor."""
    import sapien.render

    found = [entity.find_component_by_type(sapien.render.RenderBodyComponent) for entity in actor._objs]
    return [body for body in found if body is not None]


def materials(actor: Any) -> list[Any]:
    """All `RenderMaterial`s of an actor. SAPIEN gives every scene its own (tested), so that changing them harms no other."""
    return [part.material for body in render_bodies(actor) for shape in body.render_shapes for part in shape.parts]


def lowest_point(actor: Any) -> float:
    """Height of an actor's lowest visible point, metres."""
    return min(float(body.compute_global_aabb_tight()[0][2]) for body in render_bodies(actor))


def surface_height(env: Any) -> float:
    """Height of what the objects stand on, metres: where the lowest dynamic actor ends."""
    return min(lowest_point(actor) for actor in task_bodies(env) if actor.px_body_type == "dynamic")


def lights(env: Any) -> list[Any]:
    """All lights of a scene."""
    import sapien.render

    components = [component for entity in env.scene.sub_scenes[0].entities for component in entity.components]
    return [component for component in components if isinstance(component, sapien.render.RenderLightComponent)]


def photograph(env: Any, camera: str) -> np.ndarray | None:
    """`[H, W, 3]` uint8: the photograph behind a digital twin, `None` where a task has none."""
    images = getattr(env, "_rgb_overlay_images", None)
    return images[camera].cpu().numpy() if images else None


def replace_photograph(env: Any, camera: str, picture: np.ndarray) -> None:
    """Put another one there, until the next reset."""
    before = env._rgb_overlay_images[camera]
    env._rgb_overlay_images[camera] = torch.from_numpy(picture.round().clip(0, 255).astype(np.uint8)).to(before)


def turn_hue(rgb: np.ndarray, degrees: float) -> np.ndarray:
    """`[H, W, 3]` float32 in [0, 1] with every hue turned by `degrees`; greys stay.

    Example: red `[[[1, 0, 0]]]` turned by 120 is green.
    """
    import cv2

    hsv = cv2.cvtColor(np.ascontiguousarray(rgb, dtype=np.float32), cv2.COLOR_RGB2HSV)
    hsv[..., 0] = (hsv[..., 0] + degrees) % 360
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)


def unit_vector(rng: np.random.Generator, size: int = 3) -> np.ndarray:
    """A random direction, `[size]` float64."""
    vector = rng.normal(size=size)
    return vector / np.linalg.norm(vector)


def turn(axis: np.ndarray, degrees: float) -> np.ndarray:
    """Quaternion wxyz of a turn about the unit vector `axis`. Example: x by 180 is `[0, 1, 0, 0]`."""
    half = np.radians(degrees) / 2
    return np.concatenate([[np.cos(half)], np.sin(half) * np.asarray(axis)])
