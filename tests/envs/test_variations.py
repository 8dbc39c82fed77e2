"""Variations on the real simulator: one thing changes, by a sane amount, per seed, and nothing of it stays behind."""

import numpy as np
import pytest
import torch

from trl_stare.envs import Variation, get_simulated_task, get_variation, known_variations, make_env, select_variations
from trl_stare.envs.maniskill import Simulator
from trl_stare.envs.registry import _TASKS
from trl_stare.envs.variations import actions, instructions, pictures, register_variation, scene, starts

TASK = "StackCube-v1"
PICTURE_CHANGES = {
    "camera/shift": (5, 60),
    "camera/turn": (5, 60),
    "light/dim": (15, 60),
    "light/colour": (5, 40),
    "light/direction": (3, 50),
    "table/texture": (10, 90),
    "scene/distractors": (0.1, 4),
    "object/colour": (0.03, 2),
    "object/smaller": (0.02, 2),
    "object/larger": (0.01, 2),
    "start/layout": (0.2, 8),
    "start/robot": (1, 40),
    "action/noise": (0, 0),
    "action/latency": (0, 0),
}
"""Mean absolute difference to the nominal first picture, of 255, at 64 px: at least, at most."""


def simulate(name: str, image_size: int) -> Simulator:
    task = get_simulated_task(name)
    visuals = "light" if task.light_visuals else "stock"
    return Simulator(task, num_envs=1, image_size=image_size, visuals=visuals, device="cpu")


@pytest.fixture(scope="module")
def simulator():
    simulator = simulate(TASK, 64)
    yield simulator
    simulator.close()


def play(simulator: Simulator, variation: str | None, seed: int = 7, steps: int = 4) -> dict[str, torch.Tensor]:
    """First picture, and states and signals of an episode whose actions press the arm down."""
    simulator.variation = variation and get_variation(variation)
    simulator.reset([seed], torch.tensor([0]))
    states, signals = [simulator.env.get_state()[0].clone()], simulator.signals()
    image = simulator.images()[0].float()
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        simulator.step(torch.rand(1, 7, generator=generator) * 2 - 1)
        states.append(simulator.env.get_state()[0].clone())
    return {"image": image, "states": torch.stack(states), "object": signals["object_position"][0]}


def same(first: dict, second: dict) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def nominal(simulator):
    return play(simulator, None)


def test_the_table_of_this_test_is_complete():
    scenes = [name for name in known_variations() if get_variation(name).changes_scene]
    assert sorted(PICTURE_CHANGES) == sorted(scenes)
    assert len(known_variations()) == len(scenes) + 2, "those of the instruction"


@pytest.mark.parametrize("name", PICTURE_CHANGES)
def test_one_change_per_seed_and_nothing_stays_behind(simulator, nominal, name):
    variation, (least, most) = get_variation(name), PICTURE_CHANGES[name]
    varied = play(simulator, name)
    assert least <= (varied["image"] - nominal["image"]).abs().mean() <= most
    assert torch.equal(varied["states"], nominal["states"]) == variation.keeps_physics
    assert same(varied, play(simulator, name)), "the same seed, another change"
    assert same(nominal, play(simulator, None)), "something of the variation is left"


def test_the_camera_moves_as_far_as_it_says_and_the_seed_decides_where_to(simulator):
    def pose(variation: str | None, seed: int):
        play(simulator, variation, seed, steps=0)
        return simulator.env.scene.sensors["base_camera"].camera._render_cameras[0].local_pose

    stock = pose(None, 1)
    shifts = [(stock.inv() * pose("camera/shift", seed)) for seed in (1, 2)]
    turns = [(stock.inv() * pose("camera/turn", seed)) for seed in (1, 2)]
    for shift, turn in zip(shifts, turns, strict=True):
        assert np.linalg.norm(shift.p) == pytest.approx(0.05, abs=1e-5) and abs(shift.q[0]) == pytest.approx(1)
        assert np.allclose(turn.p, 0, atol=1e-6) and 2 * np.arccos(abs(turn.q[0])) == pytest.approx(
            np.radians(5), abs=1e-3
        )
    assert not np.allclose(shifts[0].p, shifts[1].p, atol=1e-3) and not np.allclose(turns[0].q, turns[1].q, atol=1e-3)


def test_the_object_has_another_size_and_stands_on_the_table(simulator):
    for name, factor in (("object/smaller", 0.85), ("object/larger", 1.1)):
        play(simulator, name, steps=0)
        cube, other = simulator.env.cubeA, simulator.env.cubeB
        (shape,), (stock,) = (actor._bodies[0].collision_shapes for actor in (cube, other))
        assert shape.half_size == pytest.approx([0.02 * factor] * 3) and stock.half_size == pytest.approx([0.02] * 3)
        mass, whole = cube._bodies[0].mass, other._bodies[0].mass
        assert mass == pytest.approx(whole * factor**3, rel=1e-4)
        assert scene.lowest_point(cube) == pytest.approx(0, abs=1e-6)
        assert cube.pose.p[0, 2] == pytest.approx(0.02 * factor, abs=1e-6)


def test_long_boxes_keep_their_length():
    from sapien.wrapper.actor_builder import CollisionShapeRecord

    peg = CollisionShapeRecord("box", scale=(0.12, 0.025, 0.025))
    assert starts.scale_factors([peg], 0.85).tolist() == [1, 0.85, 0.85]
    assert starts.scale_factors([CollisionShapeRecord("sphere", radius=0.02)], 1.1).tolist() == [1.1] * 3
    assert starts.scale_factors([CollisionShapeRecord("box", scale=(0.02, 0.03, 0.02))], 1.1).tolist() == [1.1] * 3


def test_the_layout_moves_as_a_whole(simulator):
    def places():
        return torch.stack([actor.pose.p[0] for actor in (simulator.env.cubeA, simulator.env.cubeB)])

    play(simulator, None, steps=0)
    before, joints = places(), simulator.env.agent.robot.qpos.clone()
    play(simulator, "start/layout", steps=0)
    offset = places() - before
    assert torch.allclose(offset[0], offset[1], atol=1e-6) and offset[0].norm() == pytest.approx(0.04, abs=1e-6)
    assert offset[0, 2] == 0 and torch.equal(joints, simulator.env.agent.robot.qpos)
    play(simulator, "start/robot", steps=0)
    noise = simulator.env.agent.robot.qpos - joints
    assert torch.equal(places(), before) and (noise[0, :7] != 0).all() and (noise[0, 7:] == 0).all()
    assert noise.abs().max() < 5 * starts.JOINT_NOISE


@pytest.mark.parametrize("name", ["object/smaller", "object/larger", "start/layout", "start/robot"])
def test_the_task_can_still_be_solved(simulator, name):
    """Success is the environment's own: the expert, which knows of no variation, still meets it."""
    simulator.variation = get_variation(name)
    simulator.reset([7], torch.tensor([0]))
    expert = get_simulated_task(TASK).demonstrate
    for _ in range(60):
        simulator.step(expert(simulator.signals()))
        if simulator.signals()["success"]:
            return
    raise AssertionError(f"{name}: {simulator.signals()}")


def test_late_and_noisy_actions():
    task = get_simulated_task(TASK)
    chosen = [torch.full((1, 7), float(step)) for step in range(1, 5)]
    late = actions.late_actions(task, np.random.default_rng(0))
    executed = torch.cat([late(action) for action in chosen])
    assert torch.equal(executed[:2], torch.tensor([actions.HOLD] * 2)) and torch.equal(
        executed[2:], torch.cat(chosen[:2])
    )
    noisy = actions.noisy_actions(task, np.random.default_rng(0))
    noise = torch.cat([noisy(torch.zeros(1, 7)) for _ in range(2000)])
    assert (noise[:, 3:] == 0).all() and noise[:, :3].std() == pytest.approx(task.mistake_size / 6, rel=0.05)
    assert abs(noise[:, :3].mean()) < 0.005


def test_noise_does_not_depend_on_the_chunk():
    """The noise belongs to the episode's steps, so that a recorded episode can be filmed step by step."""
    found, plays = [], torch.rand(4, 1, 7, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for chunk in (1, 2):
        env = make_env(TASK, 1, num_workers=0, chunk_size=chunk, image_size=16, variation="action/noise")
        env.reset([3])
        steps = [env.step(part.reshape(1, chunk, 7)) for part in plays.split(chunk)]
        found.append(steps[-1].signals["tcp_position"])
        env.close()
    assert torch.equal(found[0], found[1])


@pytest.mark.parametrize("name", sorted(_TASKS))
def test_other_words_for_every_task(name):
    task = get_simulated_task(name)
    paraphrase, polite = instructions.paraphrase(task), instructions.ask_politely(task)
    assert name in instructions.PARAPHRASES and len({paraphrase, polite, task.instruction}) == 3
    assert task.instruction in polite and task.instruction not in paraphrase


def test_the_policy_is_told_and_the_result_says_so():
    env = make_env(TASK, 2, num_workers=0, image_size=16, variation="instruction/paraphrase")
    assert env.instruction == "put the red block on top of the green one" == env.parts[0].instruction
    assert env.metadata["variation"] == "instruction/paraphrase"
    assert make_env(TASK, 1, num_workers=0, variation="nominal").metadata["variation"] == "nominal"


def test_names():
    with pytest.raises(ValueError, match="must be one of .*light/dim, .*, got 'light/dimm'. Did you mean 'light/dim'"):
        make_env(TASK, variation="light/dimm")
    with pytest.raises(ValueError, match="`device` must be 'cpu' for variation 'camera/shift', got 'cuda'"):
        make_env(TASK, device="cuda", variation="camera/shift")
    assert select_variations("all") == known_variations()
    assert select_variations("light/dim , camera/turn") == ("light/dim", "camera/turn")
    for wrong in ("light/dim,light/dim", "nominal", "dark"):
        with pytest.raises(ValueError, match="`variation"):
            select_variations(wrong)
    with pytest.raises(ValueError, match="`name` must be 'axis/change'"):
        register_variation(Variation("dark", "x"))


def test_a_plane_seen_from_elsewhere():
    """The homography against two pinhole cameras that look at points of the plane."""
    rng = np.random.default_rng(0)
    intrinsic = np.array([[60.0, 0, 32], [0, 60, 32], [0, 0, 1]])
    camera, delta = np.eye(4), np.eye(4)
    camera[:3, :3], camera[:3, 3] = rotation([0, 1, 0], 50), [0.3, 0.1, 0.6]
    delta[:3, :3], delta[:3, 3] = rotation(scene.unit_vector(rng), 7), [0.02, -0.03, 0.01]
    points = np.concatenate(
        [rng.uniform(-0.1, 0.1, (5, 2)) + [0.8, 0], np.full((5, 1), 0.05), np.ones((5, 1))], axis=1
    )
    before, after = project(intrinsic, camera, points), project(intrinsic, camera @ delta, points)
    moved = pictures.table_homography(intrinsic, camera, delta, 0.05) @ before
    assert np.allclose(moved / moved[2], after / after[2])
    assert not np.allclose(before / before[2], after / after[2], atol=1)


def rotation(axis, degrees) -> np.ndarray:
    import sapien

    return sapien.Pose(q=scene.turn(axis, degrees)).to_transformation_matrix()[:3, :3].astype(float)


def project(intrinsic: np.ndarray, camera: np.ndarray, points: np.ndarray) -> np.ndarray:
    x, y, z, _ = np.linalg.inv(camera) @ points.T  # ahead, left, up
    return intrinsic @ np.stack([-y, -z, x])


def test_hues():
    colours = np.array([[[1.0, 0, 0], [0.5, 0.5, 0.5], [0, 0.4, 0]]])
    assert np.allclose(scene.turn_hue(colours, 120), [[[0, 1, 0], [0.5, 0.5, 0.5], [0, 0, 0.4]]], atol=1e-6)
    for seed in range(6):
        tile = pictures.pattern(np.random.default_rng(seed), size=32)
        assert tile.shape == (32, 32, 4) and tile.dtype == np.uint8 and tile[..., :3].std() > 10


@pytest.mark.slow
@pytest.mark.parametrize("task", sorted(_TASKS))
def test_every_task_takes_every_variation(task):
    simulator = simulate(task, 64)
    start = play(simulator, None, steps=0)
    assert torch.equal(scene.manipulated_object(simulator.env).pose.p[0], start["object"])
    nominal = play(simulator, None)
    for name, (least, _) in PICTURE_CHANGES.items():
        varied = play(simulator, name)
        if least:
            assert 0.005 < (varied["image"] - nominal["image"]).abs().mean() < 90, name
        assert torch.equal(varied["states"], nominal["states"]) == get_variation(name).keeps_physics, name
        assert same(varied, play(simulator, name)) and same(nominal, play(simulator, None)), name
    simulator.close()
