"""What happens between the action that a policy chooses and the one that the controller gets."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from trl_stare.envs.registry import SimulatedTask
from trl_stare.envs.variations.registry import Variation, register_variation

NOISE = 1 / 6
"""Standard deviation of the noise, in units of the task's `mistake_size`: 0.1 of the Panda's controller, i.e. 1 cm a step, and
3.3 mm for the WidowX."""
LATENCY = 2
"""Steps: 100 ms at the Panda's 20 Hz, 400 ms at the 5 Hz of the Bridge tasks."""
HOLD = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0)
"""Neither move nor close the gripper, which is open at the start of every task."""


def noisy_actions(task: SimulatedTask, rng: np.random.Generator) -> Callable[[Tensor], Tensor]:
    """Gaussian noise on the translation, of its own at every step; rotation and gripper stay."""
    std = NOISE * task.mistake_size

    def execute(action: Tensor) -> Tensor:
        noise = torch.from_numpy(rng.normal(0.0, std, (len(action), 3))).to(action)
        return torch.cat([action[:, :3] + noise, action[:, 3:]], dim=1)

    return execute


def late_actions(task: SimulatedTask, rng: np.random.Generator) -> Callable[[Tensor], Tensor]:
    """Every action is executed `LATENCY` steps after it was chosen; until the first one, the robot holds still."""
    waiting = deque([torch.tensor([HOLD])] * LATENCY)

    def execute(action: Tensor) -> Tensor:
        waiting.append(action)
        return waiting.popleft()

    return execute


register_variation(
    Variation(
        "action/noise", "noise on every translation (Panda: std 1 cm)", keeps_physics=False, execute=noisy_actions
    )
)
register_variation(
    Variation("action/latency", f"actions come {LATENCY} steps late", keeps_physics=False, execute=late_actions)
)
