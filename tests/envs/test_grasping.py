"""The short grasp test agrees with ManiSkill's own."""

import pytest
import torch
from mani_skill.agents.robots import Panda, WidowX250S

from trl_stare.envs import get_simulated_task
from trl_stare.envs.grasping import speed_up_grasping
from trl_stare.envs.maniskill import Simulator


@pytest.mark.parametrize(
    ("task", "visuals", "robot", "noise"),
    [
        ("StackCube-v1", "light", Panda, 0.1),
        pytest.param("PutCarrotOnPlateInScene-v1", "stock", WidowX250S, 0.003, marks=pytest.mark.bridge_assets),
    ],
)
def test_every_answer_of_whole_episodes(task, visuals, robot, noise):
    """Approach, closing, lifting, carrying and letting go, with mistakes: the same answer at every step, both ways."""
    task = get_simulated_task(task)
    simulator = Simulator(task, num_envs=1, image_size=16, visuals=visuals, device="cpu")
    generator, answers = torch.Generator().manual_seed(0), []
    for seed in range(3):
        simulator.reset([seed], torch.arange(1))
        assert speed_up_grasping(simulator.env) and "is_grasping" in vars(simulator.env.agent)
        env = simulator.env
        objects = (env.cubeA, env.cubeB) if robot is Panda else tuple(env.objs.values())
        for step in range(40):
            action = task.demonstrate(simulator.signals())
            if step % 9 == 8:
                action[:, -1] = -action[:, -1]
            action[:, :3] += noise * torch.randn(1, 3, generator=generator)
            simulator.step(action)
            agent, held = env.agent, simulator.signals()["is_grasped"]
            for options in ({}, {"min_force": 5.0}, {"max_angle": 2}):
                for thing in objects:
                    own = robot.is_grasping(agent, thing, **options)
                    assert torch.equal(agent.is_grasping(thing, **options), own), (
                        f"seed {seed}, step {step}, {options}"
                    )
            answers.append(bool(held))
    simulator.close()
    assert 10 < sum(answers) < len(answers) - 10
