"""PushCube-v1, PullCube-v1, PickCube-v1 and PlaceSphere-v1 in ManiSkill: signals, what the policy is told, demonstrators."""

from contextlib import closing
from dataclasses import replace

import pytest
import torch

from trl_stare.data import demonstrate
from trl_stare.envs import get_simulated_task, make_env
from trl_stare.envs.experts import PushExpert
from trl_stare.policies import TokenPolicy, norm_stats
from trl_stare.stages import get_plan, segment

TASKS = ("PushCube-v1", "PullCube-v1", "PickCube-v1", "PlaceSphere-v1")


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
    assert abs(signals["object_position"][0, 2] - 0.02) < 1e-3 and abs(signals["object_lift"][0, 0]) < 1e-3
    assert abs(signals["gripper_width"][0, 0] - 0.08) < 1e-3 and not signals["is_contact"][0]
    assert plan.current_stage(signals).tolist() == [0]
    for trajectory in shown:
        assert trajectory.success_once
        assert [part.passed for part in segment(plan, trajectory.signals)] == [True] * len(plan)


@pytest.mark.parametrize(("task", "ahead"), [("PushCube-v1", 0.2), ("PullCube-v1", -0.2)])
def test_goals_of_push_and_pull(task, ahead):
    with step_env(task) as env:
        signals = env.reset([3]).signals
    offset = signals["goal_position"] - signals["object_position"]
    torch.testing.assert_close(offset[0, :2], torch.tensor([ahead, 0.0]), atol=1e-6, rtol=0)


def test_the_goal_of_pick_cube_is_told_and_not_shown():
    task = get_simulated_task("PickCube-v1")
    with step_env("PickCube-v1", image_size=64) as env:
        start = env.reset([1])  # the goal hangs free between camera and table
        step = env.step(torch.zeros(1, 1, 7))
    assert start.obs.state.shape == (1, 11) and task.state_signals == ("goal_position",)
    for obs, signals in ((start.obs, start.signals), (step.obs, step.signals), (step.final_obs, step.final_signals)):
        assert torch.equal(obs.state[:, 8:], signals["goal_position"])
        red, green, blue = obs.images[0].int().unbind(-1)
        assert ((red > 150) & (green < 60) & (blue < 60)).any()  # the cube
        assert not ((green > red + 30) & (green > blue + 30)).any()  # no green sphere


def test_a_new_policy_takes_the_state_as_the_task_gives_it():
    stats = {"PickCube-v1": norm_stats(torch.rand(10, 7), torch.rand(10, 11))}
    policy = TokenPolicy.create_tiny(stats, image_size=16, chunk_size=1)
    assert policy.model.config.state_size == 11


@pytest.mark.parametrize("name", ["is_grasped", "no_such_signal"])
def test_only_vectors_can_be_told(name):
    with pytest.raises(ValueError, match=rf"`state_signals`.*'PickCube-v1'.*got \['{name}'\]"):
        replace(get_simulated_task("PickCube-v1"), state_signals=(name,))


@pytest.mark.parametrize(
    ("name", "tcp", "goal", "direction"),
    [
        ("behind the cube: push", (-0.03, 0.0, 0.02), (0.2, 0.0, 0.0), (1, 0, 0)),
        ("in front of it: up and back", (0.05, 0.0, 0.02), (0.2, 0.0, 0.0), (-1, 0, 1)),
        ("in front of it: pull", (0.03, 0.0, 0.02), (-0.2, 0.0, 0.0), (-1, 0, 0)),
        ("over the standoff point: down", (-0.05, 0.0, 0.1), (0.2, 0.0, 0.0), (0, 0, -1)),
        ("beside it: up and round", (0.0, 0.05, 0.02), (0.2, 0.0, 0.0), (-1, -1, 1)),
    ],
)
def test_where_the_push_expert_goes(name, tcp, goal, direction):
    signals = {
        "tcp_position": torch.tensor([tcp]),
        "object_position": torch.tensor([[0.0, 0.0, 0.02]]),
        "goal_position": torch.tensor([goal]),
    }
    action = PushExpert()(signals)
    assert action[0, :3].sign().tolist() == list(direction)
    assert action[0, 3:].tolist() == [0, 0, 0, -1]


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_experts_on_a_hundred_seeds(task):
    with step_env(task) as env:
        shown = demonstrate(env, get_simulated_task(task).demonstrate, range(100))
    assert sum(trajectory.success_once for trajectory in shown) >= 95
