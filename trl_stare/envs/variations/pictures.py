"""Variations that only a camera can tell: viewpoint, light, table, things lying about, the object's colour.

The simulator's states stay the same to the bit (tested). Digital twins show a photograph behind robot and objects: it is moved,
lit and coloured along.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from trl_stare.envs.registry import SimulatedTask
from trl_stare.envs.variations import scene
from trl_stare.envs.variations.registry import Variation, register_variation

SHIFT, TURN = 0.05, 5.0
"""Of the camera: metres, degrees."""
DIM, TINTS, LIGHT_TURN = 0.5, ((1.0, 0.75, 0.5), (0.5, 0.75, 1.0)), 45.0
"""Of the light: factor; warm and cold factors of red, green and blue; degrees."""
GAMMA = 2.2
"""What is seen in a picture or a photograph is about the 2.2nd root of the light."""
HUE_TURN = 20.0
"""Of the object, degrees to either side: a red object stays reddish, so that the instruction stays true."""
DISTRACTOR_COLOURS = ((0.8, 0.1, 0.6), (0.1, 0.7, 0.7), (0.15, 0.15, 0.15))
"""Magenta, cyan, nearly black: no instruction speaks of them."""
DISTRACTOR_SIZE, DISTRACTOR_REACH, CANDIDATES = 0.02, 0.16, 64
"""Half the width of a distractor; how far from the middle of the task's objects it may lie, along x and y (metres); how many
places are tried, of which it gets the one farthest from everything."""


def shift_camera(env: Any, task: SimulatedTask, rng: np.random.Generator) -> None:
    """Move the policy's camera by `SHIFT` in a random direction."""
    import sapien

    _move_camera(env, task.camera, sapien.Pose(p=SHIFT * scene.unit_vector(rng)))


def turn_camera(env: Any, task: SimulatedTask, rng: np.random.Generator) -> None:
    """Turn the policy's camera by `TURN` about a random axis through it."""
    import sapien

    _move_camera(env, task.camera, sapien.Pose(q=scene.turn(scene.unit_vector(rng), TURN)))


def _move_camera(env: Any, name: str, delta: Any) -> None:
    """Change the pose of a camera by `delta` in its own frame (x ahead, y left, z up)."""
    camera = env.scene.sensors[name].camera._render_cameras[0]
    photograph = scene.photograph(env, name)
    if photograph is not None:
        import cv2

        seen = table_homography(
            camera.get_intrinsic_matrix(),
            camera.global_pose.to_transformation_matrix(),
            delta.to_transformation_matrix(),
            scene.surface_height(env),
        )
        moved = cv2.warpPerspective(photograph, seen, photograph.shape[1::-1], borderMode=cv2.BORDER_REPLICATE)
        scene.replace_photograph(env, name, moved)
    camera.set_local_pose(camera.local_pose * delta)


def table_homography(intrinsic: np.ndarray, camera: np.ndarray, delta: np.ndarray, height: float) -> np.ndarray:
    """Where the pixels of a horizontal plane go when a camera is moved: exact for the plane, and for all pixels of a mere turn.

    `H = K C R' (I - t n'/d) C' K^-1` (R. Hartley, A. Zisserman, Multiple View Geometry, 2nd edition, eq. 13.2), `C` from SAPIEN's
    axes (x ahead, y left, z up) to a picture's (x right, y down, z ahead).

    Args:
        intrinsic (`ndarray`): `K`, `[3, 3]`.
        camera (`ndarray`): `[4, 4]`, from the frame of the camera to the world, before.
        delta (`ndarray`): `[4, 4]`, from the frame of the moved camera to that of the camera before: `R` and `t`.
        height (`float`): of the plane, metres.

    Returns:
        `[3, 3]`: homogeneous pixels before -> after.
    """
    axes = np.array([[0.0, -1.0, 0.0], [0.0, 0.0, -1.0], [1.0, 0.0, 0.0]])
    normal, distance = camera[:3, :3].T @ np.array([0.0, 0.0, 1.0]), height - camera[2, 3]
    rotation, translation = delta[:3, :3], delta[:3, 3]
    moved = rotation.T @ (np.eye(3) - np.outer(translation, normal) / distance)
    return intrinsic @ axes @ moved @ axes.T @ np.linalg.inv(intrinsic)


def dim_light(env: Any, task: SimulatedTask, rng: np.random.Generator) -> None:
    """All light is `DIM` times as strong."""
    _scale_light(env, task, (DIM,) * 3)


def tint_light(env: Any, task: SimulatedTask, rng: np.random.Generator) -> None:
    """All light is warm or cold."""
    _scale_light(env, task, TINTS[rng.integers(len(TINTS))])


def _scale_light(env: Any, task: SimulatedTask, factors: tuple[float, ...]) -> None:
    """Multiply red, green and blue of lamps, ambient light and photograph."""
    for light in scene.lights(env):
        light.set_color((np.asarray(light.color) * factors).tolist())
    system = env.scene.sub_scenes[0].render_system
    system.set_ambient_light((np.asarray(system.ambient_light) * factors).tolist())
    photograph = scene.photograph(env, task.camera)
    if photograph is not None:
        scene.replace_photograph(env, task.camera, photograph * np.power(factors, 1 / GAMMA))


def turn_light(env: Any, task: SimulatedTask, rng: np.random.Generator) -> None:
    """All lamps are tilted by `LIGHT_TURN` to a random side."""
    import sapien

    tilt = sapien.Pose(q=scene.turn(np.append(scene.unit_vector(rng, 2), 0.0), LIGHT_TURN))
    for light in scene.lights(env):
        light.set_pose(tilt * light.pose)


def change_table(env: Any, task: SimulatedTask, rng: np.random.Generator) -> None:
    """Another pattern on the table. In a photograph, which has no table apart, all hues turn by at least 60 degrees instead.

    Raises:
        ValueError: if there is neither a photograph nor the table of ManiSkill's `TableSceneBuilder`.
    """
    import sapien.render

    photograph = scene.photograph(env, task.camera)
    if photograph is not None:
        turned = scene.turn_hue(photograph / 255.0, rng.uniform(60, 300))
        scene.replace_photograph(env, task.camera, 255 * turned)
    elif hasattr(env, "table_scene"):
        texture = sapien.render.RenderTexture2D(pattern(rng), "R8G8B8A8Unorm", srgb=True)
        for material in scene.materials(env.table_scene.table):
            material.set_base_color_texture(texture)
    else:
        raise ValueError(
            f"`variation` 'table/texture' needs ManiSkill's TableSceneBuilder or a photograph, which task {task.name!r} has "
            "not. Choose another variation."
        )


def pattern(rng: np.random.Generator, size: int = 256) -> np.ndarray:
    """A picture to tile a table with, `[size, size, 4]` uint8: checks, stripes or waves of two pale random colours."""
    y, x = np.mgrid[:size, :size] / size
    period = rng.integers(2, 7)
    waves = [np.sin(2 * np.pi * period * x), np.sin(2 * np.pi * period * y)]
    kind = rng.integers(3)
    weight = ((waves[0] * waves[1] > 0), (waves[0] > 0), (waves[0] + waves[1]) / 4 + 0.5)[kind]
    # saturated colours are those of the objects
    first, second = scene.turn_hue(np.array([[[0.9, 0.6, 0.6]], [[0.5, 0.3, 0.3]]]), rng.uniform(0, 360))[:, 0]
    rgb = weight[..., None] * first + (1 - weight[..., None]) * second
    return np.round(255 * np.concatenate([rgb, np.ones((size, size, 1))], axis=2)).astype(np.uint8)


def add_distractors(env: Any, task: SimulatedTask, rng: np.random.Generator) -> None:
    """A box, a ball and a can beside the task's objects. One can see them and not touch them."""
    import sapien
    import sapien.render

    size, taken = DISTRACTOR_SIZE, [body.pose.p[0, :2].numpy() for body in scene.task_bodies(env)]
    middle, ground = np.mean(taken, axis=0), scene.surface_height(env)
    paints = [sapien.render.RenderMaterial(base_color=[*colour, 1.0]) for colour in DISTRACTOR_COLOURS]
    shapes = [
        sapien.render.RenderShapeBox([size] * 3, paints[0]),
        sapien.render.RenderShapeSphere(size, paints[1]),
        sapien.render.RenderShapeCylinder(size, size, paints[2]),
    ]
    identities = []
    for shape in shapes:
        places = middle + rng.uniform(-DISTRACTOR_REACH, DISTRACTOR_REACH, (CANDIDATES, 2))
        apart = np.linalg.norm(places[:, None] - np.array(taken), axis=2).min(axis=1)
        taken.append(places[apart.argmax()])
        entity, body = sapien.Entity(), sapien.render.RenderBodyComponent()
        body.attach(shape)
        entity.add_component(body)
        # SAPIEN's cylinders lie along x
        entity.set_pose(sapien.Pose([*taken[-1], ground + size], scene.turn([0.0, 1.0, 0.0], 90)))
        env.scene.sub_scenes[0].add_entity(entity)
        identities.append(entity.per_scene_id)
    if scene.photograph(env, task.camera) is not None:  # everything else would be covered by it
        env._segmentation_ids_to_keep = torch.cat([env._segmentation_ids_to_keep, torch.tensor(identities)])


def _turned(color: Sequence[float], degrees: float) -> list[float]:
    """A colour and its fourth value, linear, unlike what is seen and what textures hold; hue turned."""
    *rgb, last = color
    return [*np.power(scene.turn_hue(np.power([[rgb]], 1 / GAMMA), degrees)[0, 0], GAMMA).tolist(), last]


def recolour_object(env: Any, task: SimulatedTask, rng: np.random.Generator) -> None:
    """Turn the hues of the object to move by `HUE_TURN` to either side."""
    import sapien.render

    degrees = HUE_TURN * rng.choice((-1, 1))
    for material in scene.materials(scene.manipulated_object(env)):
        # SimplerEnv's cubes shine by themselves: their light is baked into what they emit, and their base colour is black
        for kind in ("base_color", "emission"):
            getattr(material, f"set_{kind}")(_turned(getattr(material, kind), degrees))
            texture = getattr(material, f"{kind}_texture")
            if texture is not None:
                pixels = texture.download()
                pixels[..., :3] = np.round(255 * scene.turn_hue(pixels[..., :3] / 255, degrees))
                levels = texture.mipmap_levels
                copy = sapien.render.RenderTexture2D(pixels, texture.format, mipmap_levels=levels, srgb=True)
                getattr(material, f"set_{kind}_texture")(copy)


for _name, _what, _arrange in (
    ("camera/shift", f"camera {100 * SHIFT:.0f} cm off, in a random direction", shift_camera),
    ("camera/turn", f"camera turned by {TURN:.0f} degrees about a random axis", turn_camera),
    ("light/dim", f"{DIM} times the light", dim_light),
    ("light/colour", "warm or cold light", tint_light),
    ("light/direction", f"lamps tilted by {LIGHT_TURN:.0f} degrees to a random side", turn_light),
    ("table/texture", "another pattern on the table (in a photograph: other hues)", change_table),
    ("scene/distractors", "a box, a ball and a can beside the objects", add_distractors),
    ("object/colour", f"hue of the object turned by {HUE_TURN:.0f} degrees to either side", recolour_object),
):
    register_variation(Variation(_name, _what, arrange=_arrange))
