"""The short grasp test agrees with ManiSkill's own."""

import torch
from mani_skill.agents.robots import Panda

from trl_stare.envs import get_simulated_task
from trl_stare.envs.grasping import speed_up_grasping
from trl_stare.envs.maniskill import Simulator


def test_every_answer_of_whole_episodes():
    """Approach, closing, lifting, carrying and letting go, with mistakes: the same answer at every step, both ways."""
    task = get_simulated_task("StackCube-v1")
    simulator = Simulator(task, num_envs=1, image_size=16, visuals="light", device="cpu")
    generator, answers = torch.Generator().manual_seed(0), []
    for seed in range(3):
        simulator.reset([seed], torch.arange(1))
        assert speed_up_grasping(simulator.env) and "is_grasping" in vars(simulator.env.agent)
        for step in range(40):
            action = task.demonstrate(simulator.signals())
            if step % 9 == 8:
                action[:, -1] = -action[:, -1]
            action[:, :3] += 0.1 * torch.randn(1, 3, generator=generator)
            simulator.step(action)
            agent, cubes = simulator.env.agent, (simulator.env.cubeA, simulator.env.cubeB)
            for options in ({}, {"min_force": 5.0}, {"max_angle": 2}):
                for cube in cubes:
                    own = Panda.is_grasping(agent, cube, **options)
                    assert torch.equal(agent.is_grasping(cube, **options), own), f"seed {seed}, step {step}, {options}"
            answers.append(bool(agent.is_grasping(cubes[0])))
    simulator.close()
    assert 10 < sum(answers) < len(answers) - 10
