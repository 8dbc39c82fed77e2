"""Evaluation of a real (untrained) policy in the real simulator."""

import dataclasses
import gc
from contextlib import closing

import pytest
import torch

from trl_stare.data import Trajectory, demonstrate
from trl_stare.envs import get_simulated_task, make_env
from trl_stare.envs.vector import WorkerVectorEnv
from trl_stare.evaluation import EpisodeResult, evaluate
from trl_stare.policies import TokenPolicy
from trl_stare.stages import get_plan

TASK = "StackCube-v1"
PLAN = get_plan(TASK)
STATS = {
    TASK: {
        "action": {"scale": [0.7, 0.7, 0.7, 1.0, 1.0, 1.0, 1.0]},
        "state": {"mean": [0.0] * 8, "std": [1.0] * 8},
    }
}


@pytest.fixture(scope="module")
def env():
    env = make_env(TASK, num_envs=2, num_workers=1, chunk_size=1, image_size=32)
    yield env
    env.close()


@pytest.fixture(scope="module")
def policy():
    torch.manual_seed(0)
    policy = TokenPolicy.create_tiny(STATS, image_size=32, chunk_size=1)
    policy.model.eval()
    return policy


def test_every_seed_is_played_to_the_time_limit_in_order(env, policy, capfd):
    seeds = [105, 101, 103]
    result, episodes = evaluate(policy, env, PLAN, seeds, temperature=1.0, seed=0)
    assert [episode.seed for episode in episodes] == seeds and result.eval_seeds == tuple(seeds)
    assert [episode.num_steps for episode in episodes] == [env.max_episode_steps] * 3
    assert result.eval_env_steps == 3 * env.max_episode_steps and result.eval_wall_s > 0
    assert list(result.stages) == ["Reach", "Grasp", "Transport", "Stack"] and result.stages["Reach"][1] == 3
    assert result.metadata["visuals"] == env.metadata["visuals"] and result.temperature == 1.0
    assert "3/3" in capfd.readouterr().err

    again, same = evaluate(policy, env, PLAN, seeds, temperature=1.0, seed=0, progress=False)
    assert same == episodes and again.stages == result.stages
    assert "evaluate" not in capfd.readouterr().err


def kept_trajectories():
    """How many finished episodes are kept, frames and all."""
    return sum(type(thing) is Trajectory for thing in gc.get_objects())


class CountingPolicy:
    """A policy that notes before every 20th decision what [`kept_trajectories`] says."""

    def __init__(self, policy):
        self.policy, self.decisions, self.kept = policy, 0, []

    def __getattr__(self, name):
        return getattr(self.policy, name)

    def act(self, *args, **kwargs):
        self.decisions += 1
        if self.decisions % 20 == 0:
            self.kept.append(kept_trajectories())
        return self.policy.act(*args, **kwargs)


def test_finished_episodes_are_let_go(env, policy):
    counting, before = CountingPolicy(policy), kept_trajectories()
    _, episodes = evaluate(counting, env, PLAN, range(6), temperature=1.0, seed=0, progress=False)
    assert len(episodes) == 6 and counting.decisions >= 3 * env.max_episode_steps
    assert max(counting.kept) - before <= env.num_envs


def test_a_solved_episode_passes_all_stages(env):
    shown = demonstrate(env, get_simulated_task(TASK).demonstrate, [0])
    episode = EpisodeResult.from_trajectory(shown[0], PLAN)
    assert episode.success_once and episode.success_at_end and episode.terminated
    assert [(part.stage, part.passed) for part in episode.segments] == [(0, True), (1, True), (2, True), (3, True)]
    assert episode.segments[-1].stop == episode.num_steps


@pytest.mark.parametrize(
    ("seeds", "train_seeds", "message"),
    [
        ([], [], "at least one held-out seed"),
        ([3, 4, 3], [], "each seed once, got 1 repeated"),
        (range(10), range(8, 20), r"got 2 that training has seen \(e.g. 8\)"),
    ],
)
def test_seeds_that_make_no_result_are_refused(env, policy, seeds, train_seeds, message):
    with pytest.raises(ValueError, match=message):
        evaluate(policy, env, PLAN, seeds, temperature=1.0, seed=0, train_seeds=train_seeds)


def test_what_the_simulator_spoils_is_left_out(policy, caplog):
    given = get_simulated_task(TASK)

    def signals(env, info):
        read, spoiled = given.signals(env, info), int(env._episode_seed[0]) == 4 and int(env._elapsed_steps[0]) == 2
        return read | ({"object_position": read["object_position"] * float("nan")} if spoiled else {})

    task = dataclasses.replace(given, signals=signals, env_kwargs={"max_episode_steps": 3})
    sizes = {"num_envs": 2, "num_workers": 0, "chunk_size": 1, "image_size": 32, "visuals": "light", "device": "cpu"}
    with closing(WorkerVectorEnv(task, **sizes)) as env:
        result, episodes = evaluate(policy, env, PLAN, [3, 4, 5], temperature=1.0, seed=0)
        with pytest.raises(ValueError, match="must hold at least one episode"):
            evaluate(policy, env, PLAN, [4], temperature=1.0, seed=0)
    assert [episode.seed for episode in episodes] == [3, 5] and result.n_episodes == 2
    assert (
        "the episode of seed 4 is left out, whose signals['object_position'] was not finite at step 2" in caplog.text
    )


def test_the_plan_of_another_task_is_refused(env, policy):
    other = dataclasses.replace(PLAN, task="PushCube-v1")
    with pytest.raises(ValueError, match="'StackCube-v1', got one of 'PushCube-v1'"):
        evaluate(policy, env, other, [0], temperature=1.0, seed=0)
