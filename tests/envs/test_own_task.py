"""An environment of one's own in the real simulator: its time limit, and signals that are not what it declares."""

from contextlib import closing
from dataclasses import replace

import pytest
import torch

from trl_stare.envs import get_simulated_task
from trl_stare.envs.maniskill import time_limit
from trl_stare.envs.vector import WorkerVectorEnv

PUSH = get_simulated_task("PushCube-v1")


def make(task):
    sizes = {"num_envs": 1, "num_workers": 0, "chunk_size": 1, "image_size": 16, "visuals": "light", "device": "cpu"}
    return closing(WorkerVectorEnv(task, **sizes))


def test_the_time_limit_is_the_registrations_or_the_tasks_own():
    assert time_limit(PUSH) == 50
    with make(replace(PUSH, env_kwargs={"max_episode_steps": 3})) as env:
        env.reset([0])
        steps = [env.step(torch.zeros(1, 1, 7)) for _ in range(3)]
    assert [bool(step.truncated) for step in steps] == [False, False, True]


def test_an_environment_without_a_time_limit_is_refused():
    from mani_skill.envs.tasks.tabletop.push_cube import PushCubeEnv
    from mani_skill.utils.registration import register_env

    register_env("Endless-v1", override=True)(type("Endless", (PushCubeEnv,), {}))
    with pytest.raises(ValueError, match="task 'Endless' must have a time limit, got none. Give `max_episode_steps`"):
        make(replace(PUSH, name="Endless", env_id="Endless-v1"))


def test_signals_that_are_not_as_declared_are_refused():
    def signals(env, info):
        read = PUSH.signals(env, info)
        return {"success": read["success"], "gap": torch.tensor([0.7]), "new": torch.zeros(1, 3)}

    task = replace(PUSH, signals=signals, signal_shapes={"success": 0, "gap": 0, "gone": 2}, contact_signals=())
    found = (
        r"'gap' must be bool \[1\], got float32 \[1\]; 'gone' must be float32 \[1, 2\], got nothing; "
        r"'new' must be declared, got float32 \[1, 3\]"
    )
    with make(task) as env, pytest.raises(ValueError, match=found):
        env.reset([0])
