"""LiftPegUpright-v1 and PegInsertionSide-v1 in ManiSkill: signals, determinism of scenes built anew, demonstrators."""

import math
from contextlib import closing
from dataclasses import replace

import pytest
import torch

from trl_stare.data import demonstrate
from trl_stare.envs import get_simulated_task, make_env
from trl_stare.envs.experts import LiftPegUprightExpert, PegInsertionExpert
from trl_stare.envs.experts.motion import quaternion_product, rotate, rotation_between, rotation_onto
from trl_stare.envs.experts.peg import HALF_LENGTH, HALF_WIDTH
from trl_stare.envs.maniskill import Simulator
from trl_stare.stages import get_plan, segment

TASKS = ("LiftPegUpright-v1", "PegInsertionSide-v1")
DOWN = (0.0, 1.0, 0.0, 0.0)  # wxyz: half a turn about x, fingers opening along y
FLAT = (math.sqrt(0.5), math.sqrt(0.5), 0.0, 0.0)
UPRIGHT = (0.5, 0.5, -0.5, 0.5)  # `FLAT`, then a quarter turn about world -y


def step_env(task, **kwargs):
    return closing(make_env(task, num_envs=1, num_workers=0, **{"image_size": 16} | kwargs))


@pytest.mark.parametrize("task", TASKS)
def test_signals_and_a_demonstration(task):
    plan = get_plan(task)
    with step_env(task) as env:
        plan.validate_signals(env.signal_names)
        start = env.reset([0])
        shown = demonstrate(env, get_simulated_task(task).demonstrate, range(2))
    signals = start.signals
    assert abs(signals["object_lift"][0, 0]) < 1e-3 and abs(signals["gripper_width"][0, 0] - 0.08) < 1e-3
    assert plan.current_stage(signals).tolist() == [0]
    for trajectory in shown:
        assert trajectory.success_once
        assert [part.passed for part in segment(plan, trajectory.signals)] == [True] * len(plan)


def test_the_peg_of_lift_peg_upright():
    """The expert and the plan know its size and rely on how it lies: along world x."""
    with closing_simulator("LiftPegUpright-v1") as simulator:
        env = simulator.env
        assert (env.peg_half_length, env.peg_half_width) == (HALF_LENGTH, HALF_WIDTH)
        simulator.reset([3], torch.tensor([0]))
        axis = rotate(simulator.signals()["object_quaternion"], (1.0, 0.0, 0.0))
    torch.testing.assert_close(axis, torch.tensor([[1.0, 0.0, 0.0]]), atol=1e-4, rtol=0)


def closing_simulator(task):
    return closing(Simulator(get_simulated_task(task), num_envs=1, image_size=16, visuals="light", device="cpu"))


def test_the_poses_of_peg_insertion_agree():
    with step_env("PegInsertionSide-v1") as env:
        signals = env.reset([5]).signals
    length = signals["peg_half_length"]
    assert 0.085 <= length.item() <= 0.125
    offset = signals["peg_head_at_hole"] - signals["peg_center_at_hole"]
    torch.testing.assert_close(offset.norm(dim=-1, keepdim=True), length, atol=1e-5, rtol=0)
    # the same distance, once in the hole's frame and once in the world: at the goal the head is in the middle of the box
    head = signals["object_position"] + length * rotate(signals["object_quaternion"], (1.0, 0.0, 0.0))
    hole = signals["goal_position"] + length * rotate(signals["goal_quaternion"], (1.0, 0.0, 0.0))
    torch.testing.assert_close((head - hole).norm(), signals["peg_head_at_hole"].norm(), atol=1e-5, rtol=0)


def test_a_seed_of_peg_insertion_gives_the_same_peg_box_and_episode():
    actions = torch.rand(6, 1, 1, 7, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with step_env("PegInsertionSide-v1", image_size=32) as env:
        runs = []
        for seed in (7, 8, 7):
            start = env.reset([seed])
            runs.append([start, *(env.step(action) for action in actions)])
    for first, other, again in zip(*runs, strict=True):
        assert all(torch.equal(first.signals[name], again.signals[name]) for name in first.signals)
        assert torch.equal(first.obs.images, again.obs.images)
        assert not torch.equal(first.signals["peg_half_length"], other.signals["peg_half_length"])


def test_peg_insertion_stays_on_the_cpu(monkeypatch):
    """ManiSkill builds pegs and boxes of parallel scenes once: a seed would have another peg in every scene."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with step_env(TASKS[1]) as env:
        assert env.metadata["sim_backend"] == "physx_cpu"
    with pytest.raises(ValueError, match="`device` must be 'cpu' for 'PegInsertionSide-v1'"):
        make_env(TASKS[1], device="cuda")


@pytest.mark.parametrize(("task", "colours"), [(TASKS[0], ("red", "blue")), (TASKS[1], ("orange", "wood"))])
def test_the_camera_shows_peg_and_goal(task, colours):
    def count(image, colour):
        red, green, blue = image.int().unbind(-1)
        return {
            "red": (red > 2 * green) & (red > 2 * blue),
            "blue": (blue > 1.5 * red) & (blue > 1.5 * green),
            "orange": (red > 180) & (red > 1.5 * green) & (blue > 50),
            "wood": (red > 130) & (green > 0.7 * red) & (blue < 0.75 * green),
        }[colour].sum()

    with step_env(task, image_size=64) as env:
        for seed in range(3):
            image = env.reset([seed]).obs.images[0]
            assert all(count(image, colour) >= 10 for colour in colours), (seed, [count(image, c) for c in colours])


def test_light_visuals_of_the_wrist_camera_leave_physics_alone():
    task = get_simulated_task("PegInsertionSide-v1")
    actions = torch.rand(10, 1, 7, generator=torch.Generator().manual_seed(0)) * 2 - 1
    states = []
    for visuals in ("light", "stock"):
        with closing(Simulator(task, num_envs=1, image_size=16, visuals=visuals, device="cpu")) as simulator:
            simulator.reset([0], torch.tensor([0]))
            for action in actions:
                simulator.step(action)
            states.append(simulator.env.get_state())
    assert torch.equal(*states)


def lift_signals(tcp, peg=(0.0, 0.0, HALF_WIDTH), quaternion=FLAT, grasped=False, contact=False):
    return {
        "tcp_position": torch.tensor([tcp]),
        "tcp_quaternion": torch.tensor([DOWN]),
        "object_position": torch.tensor([peg]),
        "object_quaternion": torch.tensor([quaternion]),
        "is_contact": torch.tensor([contact]),
        "is_grasped": torch.tensor([grasped]),
    }


@pytest.mark.parametrize(
    ("name", "signals", "direction", "gripper"),
    [
        ("to the far end", lift_signals((0.0, 0.0, 0.2)), (1, 0, -1), 1.0),
        ("to the near end of a far peg", lift_signals((0.0, 0.0, 0.2), (0.1, 0.0, 0.025)), (0, 0, -1), 1.0),
        ("at the grip: touch", lift_signals((0.1, 0.0, 0.025)), (0, 0, 0), 0.38),
        ("touched: hold", lift_signals((0.1, 0.0, 0.025), contact=True), (0, 0, 0), 0.2),
        ("held: up and back", lift_signals((0.1, 0.0, 0.025), grasped=True, contact=True), (-1, 0, 1), 0.2),
        ("stands: let go", lift_signals((0.0, 0.0, 0.22), (0.0, 0.0, 0.12), UPRIGHT, True, True), (0, 0, 0), 1.0),
    ],
)
def test_where_the_lifting_expert_goes(name, signals, direction, gripper):
    action = LiftPegUprightExpert()(signals)[0]
    moves = torch.where(action[:3].abs() < 1e-4, 0.0, action[:3])
    assert moves.sign().tolist() == list(direction) and action[6].item() == pytest.approx(gripper)


@pytest.mark.parametrize(
    ("name", "head", "direction"),
    [
        ("on the axis before the box: on", (-0.15, 0.0, 0.0), (1, 0, 0)),
        ("2 cm beside it, close to the box: back and sideways", (-0.11, 0.02, 0.0), (-1, -1, 0)),
        ("1 cm beside it: sideways only", (-0.15, 0.01, 0.0), (0, -1, 0)),
        ("too low, inside: up only", (-0.05, 0.0, -0.02), (0, 0, 1)),
    ],
)
def test_where_the_inserting_expert_goes(name, head, direction):
    """Hole and peg point along world x; the middle of the box is the origin."""
    length, head = 0.1, torch.tensor([head])
    center = head - torch.tensor([[length, 0.0, 0.0]])
    identity = torch.tensor([[1.0, 0.0, 0.0, 0.0]])
    signals = {
        "tcp_position": center,
        "tcp_quaternion": torch.tensor([DOWN]),
        "object_position": center,
        "object_quaternion": identity,
        "goal_position": torch.tensor([[-length, 0.0, 0.0]]),
        "goal_quaternion": identity,
        "peg_head_at_hole": head,
        "peg_center_at_hole": center,
        "peg_half_length": torch.tensor([[length]]),
        "is_grasped": torch.tensor([True]),
    }
    action = PegInsertionExpert()(signals)[0]
    moves = torch.where(action[:3].abs() < 1e-4, 0.0, action[:3])
    assert moves.sign().tolist() == list(direction)
    assert action[3:6].abs().max() < 1e-4 and action[6] == -1
    # let go of, it is grasped again: the hand opens and goes to the tail
    dropped = PegInsertionExpert()(signals | {"is_grasped": torch.tensor([False])})[0]
    assert dropped[0] < 0 and dropped[6] == 1


def test_a_positive_rotation_action_turns_negatively():
    """The peg has to turn by +0.05 rad about the vertical: the command is negative (`RADIANS_PER_UNIT`)."""
    turned = torch.tensor([[math.cos(0.025), 0.0, 0.0, math.sin(0.025)]])
    action = replace(PegInsertionExpert(), gain=1.0).action(
        torch.zeros(1, 3), rotation_between(torch.tensor([[1.0, 0.0, 0.0, 0.0]]), turned), torch.ones(1)
    )
    torch.testing.assert_close(action[0, 3:6], torch.tensor([0.0, 0.0, -0.5]), atol=1e-5, rtol=0)


def test_rotations():
    quarter = math.sqrt(0.5)
    about_z, about_x = torch.tensor([[quarter, 0, 0, quarter]]), torch.tensor([[quarter, quarter, 0, 0]])
    torch.testing.assert_close(rotate(about_z, (1.0, 0.0, 0.0)), torch.tensor([[0.0, 1.0, 0.0]]))
    # about x first, then about z: y -> z -> z
    torch.testing.assert_close(
        rotate(quaternion_product(about_z, about_x), (0.0, 1.0, 0.0)), torch.tensor([[0.0, 0.0, 1.0]])
    )
    torch.testing.assert_close(rotation_between(about_z, -about_z), torch.zeros(1, 3))
    torch.testing.assert_close(
        rotation_between(torch.tensor([[1.0, 0, 0, 0]]), -about_z), torch.tensor([[0, 0, math.pi / 2]])
    )
    x, y = torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([[0.0, 1.0, 0.0]])
    torch.testing.assert_close(rotation_onto(x, y), torch.tensor([[0, 0, math.pi / 2]]))
    torch.testing.assert_close(rotation_onto(x, x), torch.zeros(1, 3))


@pytest.mark.slow
@pytest.mark.parametrize(("task", "enough"), [("LiftPegUpright-v1", 95), ("PegInsertionSide-v1", 90)])
def test_experts_on_a_hundred_seeds(task, enough):
    with step_env(task) as env:
        shown = demonstrate(env, get_simulated_task(task).demonstrate, range(100))
    assert sum(trajectory.success_once for trajectory in shown) >= enough
