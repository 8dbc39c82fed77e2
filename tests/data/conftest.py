"""Synthetic episodes, for tests that need no simulator."""

import pytest
import torch

from trl_stare.data.trajectory import Trajectory


@pytest.fixture(scope="session")
def episode():
    """A function that makes an episode of a seed."""
    return make_episode


def make_episode(
    seed: int, *, num_steps: int = 6, traced: bool = True, success_at: int | None = None, chunk_size: int = 4
) -> Trajectory:
    """Noise in the shapes of StackCube-v1, with a contact at row 2."""
    g = torch.Generator().manual_seed(seed)
    rows, starts = num_steps + 1, torch.arange(0, num_steps, chunk_size)
    success = torch.zeros(rows, dtype=torch.bool)
    if success_at is not None:
        success[success_at:] = True
    noise = {
        name: torch.rand(rows, size, generator=g)
        for name, size in {
            "tcp_position": 3,
            "object_position": 3,
            "goal_position": 3,
            "object_lift": 1,
            "gripper_width": 1,
        }.items()
    }
    # at the cube from then on, and it is touched: Reach is over
    noise["tcp_position"][2:] = noise["object_position"][2:] + 0.01
    return Trajectory(
        task="StackCube-v1",
        instruction="stack the red cube",
        seed=seed,
        policy="toy",
        images=torch.randint(0, 256, (len(starts), 8, 10, 3), generator=g, dtype=torch.uint8),
        state=torch.randn(len(starts), 5, generator=g),
        starts=starts,
        actions=torch.randn(num_steps, 7, generator=g),
        labels=torch.randn(num_steps, 7, generator=g),
        trace=torch.randint(0, 33, (len(starts), 28), generator=g) if traced else None,
        logps=-torch.rand(len(starts), 28, generator=g) if traced else None,
        features=torch.zeros(len(starts), 3) if traced else None,
        final_image=torch.randint(0, 256, (8, 10, 3), generator=g, dtype=torch.uint8),
        final_state=torch.randn(5, generator=g),
        signals=noise | {"is_contact": torch.arange(rows) >= 2, "is_grasped": success, "success": success},
        reward=success[1:].float(),
        terminated=success_at is not None,
        truncated=success_at is None,
    )
