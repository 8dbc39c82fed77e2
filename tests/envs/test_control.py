"""The short way to joint targets agrees with ManiSkill's own controller."""

import numpy as np
import pytest
import torch

from trl_stare.envs import get_simulated_task
from trl_stare.envs.control import euler_to_quaternion, speed_up_control
from trl_stare.envs.maniskill import Simulator


@pytest.mark.parametrize(
    ("angles", "quaternion"),
    [
        ([0, 0, 0], [1, 0, 0, 0]),
        ([np.pi, 0, 0], [0, 1, 0, 0]),
        ([0, np.pi, 0], [0, 0, 1, 0]),
        ([0, 0, np.pi / 2], [np.sqrt(0.5), 0, 0, np.sqrt(0.5)]),
        ([np.pi / 2, np.pi / 2, 0], [0.5, 0.5, 0.5, 0.5]),
    ],
)
def test_euler_angles_by_hand(angles, quaternion):
    np.testing.assert_allclose(euler_to_quaternion(np.array(angles, float)), quaternion, atol=1e-12)


@pytest.mark.parametrize(
    ("task", "visuals", "scale"),
    [
        ("StackCube-v1", "light", [0.7] * 7),  # of the limits, and beyond them
        # metres and radians, added to the last target; in free air, as a touch of the table amplifies rounding
        pytest.param(
            "PutCarrotOnPlateInScene-v1", "stock", [0.01] * 3 + [0.05] * 3 + [1.0], marks=pytest.mark.bridge_assets
        ),
    ],
)
def test_targets_and_motion_agree_with_maniskill(task, visuals, scale):
    """Random actions: joint targets within 1e-5 rad, the hand within 1e-5 m after 30 steps."""
    fast, stock = (
        Simulator(get_simulated_task(task), num_envs=1, image_size=32, visuals=visuals, device="cpu") for _ in range(2)
    )
    generator = torch.Generator().manual_seed(0)
    for seed in range(3):
        for simulator in (fast, stock):
            simulator.reset([seed], torch.arange(1))
        arms = [simulator.env.agent.controller.controllers["arm"] for simulator in (fast, stock)]
        assert speed_up_control(fast.env) and "set_action" in vars(arms[0])
        del arms[1].set_action  # back to the class's own
        began = fast.state()
        for _ in range(30):
            action = torch.randn(1, 7, generator=generator) * torch.tensor(scale)
            for simulator in (fast, stock):
                simulator.step(action)
            difference = (arms[0]._target_qpos - arms[1]._target_qpos).abs().max()
            assert difference < 1e-5, f"seed {seed}: {difference}"
        torch.testing.assert_close(fast.state(), stock.state(), atol=1e-5, rtol=0)
        assert (fast.state() - began).abs().max() > 0.01
    for simulator in (fast, stock):
        simulator.close()
