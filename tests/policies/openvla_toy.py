"""A tiny random OpenVLA, and something for it to look at."""

import torch

from trl_stare.interfaces import Observation
from trl_stare.policies import OpenVLAPolicy, create_tiny_openvla

OPENVLA_STATS = {
    "bridge_orig": {
        "action": {
            "q01": [-0.02, -0.04, -0.03, -0.08, -0.09, -0.2, 0.0],
            "q99": [0.02, 0.04, 0.04, 0.08, 0.07, 0.2, 1.0],
            "mask": [True] * 6 + [False],
        }
    }
}


def make_openvla(norm_stats=OPENVLA_STATS, **config) -> OpenVLAPolicy:
    torch.manual_seed(0)
    return create_tiny_openvla(norm_stats, **config)


def make_obs(*instructions: str, size: int = 56, seed: int = 1) -> Observation:
    images = torch.randint(
        0, 256, (len(instructions), size, size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )
    return Observation(images, instructions, None)
