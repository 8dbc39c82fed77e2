"""Variations of what is there at the start: the size of the object, where everything stands, how the arm is bent."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

from trl_stare.envs.registry import SimulatedTask
from trl_stare.envs.variations import scene
from trl_stare.envs.variations.registry import Variation, register_variation

SMALLER, LARGER = 0.85, 1.1
"""Factors of the object's size. StackCube-v1 and PlaceSphere-v1 allow 5 mm of height to be wrong, so a radius of 20 mm may not
shrink below 0.75; the hole of PegInsertionSide-v1 leaves 3 mm around a peg of at most 25 mm, which may not grow above 1.12."""
ELONGATED = 2.0
"""An axis that is at least this many times the shortest keeps its length: success of LiftPegUpright-v1 measures it to 5 mm."""
JOINT_NOISE = 0.05
"""Standard deviation of the arm's initial joint angles, rad; the Panda's tasks have 0.02 of their own, the WidowX's none."""
LAYOUT_SHIFT = 0.04
"""Metres. The Panda's objects appear in squares of 0.2 m and more, so that most still lie where training has seen them."""

BASIN = ((-0.17, 0.155), (-0.105, 0.25))
"""Lowest and highest x and y (metres) of an eggplant that meets no wall of the sink: the basin of its collision mesh reaches from
(-0.211, 0.115) to (-0.062, 0.291) m, and the eggplant's half length is 0.039 m."""


@contextmanager
def scaled_object(factor: float) -> Iterator[None]:
    """Scenes that are built inside this context have a larger or smaller object: shape and collision shape, density kept."""
    from mani_skill.utils.building.actor_builder import ActorBuilder

    build = ActorBuilder.build

    def build_scaled(self: Any, name: str) -> Any:
        before = any(actor.px_body_type == "dynamic" for actor in self.scene.actors.values())
        if self.physx_body_type == "dynamic" and not before:  # what `scene.manipulated_object` will find
            factors = scale_factors(self.collision_records, factor)
            self.collision_records = [_scaled(record, factors, factor) for record in self.collision_records]
            self.visual_records = [_scaled(record, factors, factor) for record in self.visual_records]
        return build(self, name)

    ActorBuilder.build = build_scaled
    try:
        yield
    finally:
        ActorBuilder.build = build


def scale_factors(records: list[Any], factor: float) -> np.ndarray:
    """`[3]`: `factor`, but 1 along the long axes of a box, and `factor` everywhere for any other shape.

    Example: half sizes of 0.12, 0.025 and 0.025 m give `[1, factor, factor]`.
    """
    if not records or any(record.type != "box" for record in records):
        return np.full(3, factor)
    extent = np.max([np.abs(record.pose.p) + record.scale for record in records], axis=0)
    return np.where(extent >= ELONGATED * extent.min(), 1.0, factor)


def _scaled(record: Any, factors: np.ndarray, factor: float) -> Any:
    """A copy of a shape: boxes and meshes by axis, round shapes as a whole."""
    import sapien

    pose = sapien.Pose(record.pose.p * factors, record.pose.q)
    scale = (np.asarray(record.scale) * factors).tolist()
    return replace(record, scale=scale, radius=record.radius * factor, length=record.length * factor, pose=pose)


def put_on_table(env: Any, task: SimulatedTask, rng: np.random.Generator) -> None:
    """Let the object touch the table again (its top is at height 0); where there is no such table, objects settle by themselves."""
    if hasattr(env, "table_scene"):
        body = scene.manipulated_object(env)
        _move(body, (0.0, 0.0, -scene.lowest_point(body)))


def shift_layout(env: Any, task: SimulatedTask, rng: np.random.Generator) -> None:
    """Move all objects and goals together by `LAYOUT_SHIFT` in a random horizontal direction: their distances stay.

    In a sink only the object can move, as far as its walls allow.
    """
    offset = LAYOUT_SHIFT * scene.unit_vector(rng, 2)
    if "sink" in env.scene.actors:
        place = scene.manipulated_object(env).pose.p[0, :2].numpy()
        offset = np.clip(place + offset, *BASIN) - place
    for body in scene.task_bodies(env):
        _move(body, (*offset, 0.0))


def bend_arm(env: Any, task: SimulatedTask, rng: np.random.Generator) -> None:
    """Add noise to the initial angles of the arm's joints; the gripper stays open."""
    qpos = env.agent.robot.qpos.clone()
    noise = rng.normal(0.0, JOINT_NOISE, qpos.shape[1])
    noise[-2:] = 0.0  # the fingers
    env.agent.reset(qpos + torch.from_numpy(noise).to(qpos))
    env.agent.controller.reset()


def _move(body: Any, offset: tuple[float, ...]) -> None:
    """Move an actor by metres along the world's axes."""
    from mani_skill.utils.structs.pose import Pose

    body.set_pose(Pose.create_from_pq(body.pose.p + torch.tensor([offset], dtype=torch.float32), body.pose.q))


def _register(name: str, what: str, arrange: Callable[..., None], build: Any = None) -> None:
    register_variation(Variation(name, what, keeps_physics=False, arrange=arrange, build=build))


_register("object/smaller", f"the object {SMALLER} times as large", put_on_table, partial(scaled_object, SMALLER))
_register("object/larger", f"the object {LARGER} times as large", put_on_table, partial(scaled_object, LARGER))
_register(
    "start/layout", f"all objects and goals {100 * LAYOUT_SHIFT:.0f} cm off, in a random direction", shift_layout
)
_register("start/robot", f"initial joint angles with noise of {JOINT_NOISE} rad", bend_arm)
