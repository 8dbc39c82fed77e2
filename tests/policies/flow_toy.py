"""A pi0 of random weights whose every part matters: initialised a hundred times wider, noise and times included."""

from typing import Any

import torch

from trl_stare import FlowPolicy
from trl_stare.policies import create_tiny_pi0


def statistics(action_dim: int = 7, state_size: int = 8, key: str = "toy") -> dict[str, Any]:
    return {
        key: {
            "action": {"q01": [-1.0] * action_dim, "q99": [1.0] * action_dim},
            "state": {"mean": [0.0] * state_size, "std": [1.0] * state_size},
        }
    }


def make_flow(norm_stats: dict[str, Any] | None = None, spread: float = 5.0, **config: Any) -> FlowPolicy:
    torch.manual_seed(0)
    policy = create_tiny_pi0(norm_stats or statistics(), **config)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(spread)
    return policy
