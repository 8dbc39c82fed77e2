"""What stages are made of: predicates and distances read off signals. Shared by the plans of all tasks.

Every function takes the signals first and keeps their leading shape: `[N]`, `[T]`, `[T, N]`, `[N, C]`... Lengths are
metres in the world frame, z points up. The signals of a pick-and-place task:

| signal | shape | meaning |
|---|---|---|
| `tcp_position` | `[..., 3]` | tool centre point, between the finger tips |
| `object_position` | `[..., 3]` | centre of the object to move |
| `goal_position` | `[..., 3]` | where that centre belongs |
| `object_lift` | `[..., 1]` | height of the object above its rest height |
| `is_contact` | `[...]` bool | a finger touches the object |
| `is_grasped` | `[...]` bool | the gripper holds it now (not latched) |
| `success` | `[...]` bool | the environment's own success |
"""

from __future__ import annotations

import torch
from torch import Tensor

from trl_stare.interfaces import Signals


def succeeded(signals: Signals) -> Tensor:
    """The environment's own success: the exit of the last stage of every plan. `[...]` bool."""
    return signals["success"]


def touched(signals: Signals) -> Tensor:
    """A finger touches the object, or the gripper holds it. `[...]` bool."""
    return signals["is_contact"] | signals["is_grasped"]


def touched_near(signals: Signals, *, radius: float) -> Tensor:
    """A finger touches the object with the TCP within `radius` metres of its centre, or the gripper holds it. `[...]` bool.

    Fingers that come down beside the object touch it too, and nothing that follows makes a grasp of that (docs/tasks.md).
    """
    return (signals["is_contact"] & (reach_distance(signals) <= radius)) | signals["is_grasped"]


def is_lifted(signals: Signals, *, height: float) -> Tensor:
    """The object is more than `height` metres above its rest height. `[...]` bool."""
    return signals["object_lift"][..., 0] > height


def is_picked(signals: Signals, *, height: float) -> Tensor:
    """The object is grasped and lifted by more than `height` metres. `[...]` bool."""
    return signals["is_grasped"] & is_lifted(signals, height=height)


def is_over_goal(signals: Signals, *, radius: float, height: float) -> Tensor:
    """The object is within `radius` metres of the goal sideways and more than `height` metres up. `[...]` bool.

    Whether it is grasped plays no part: an object let go of at the goal is past its transport.
    """
    offset = signals["object_position"] - signals["goal_position"]
    return (offset[..., :2].norm(dim=-1) <= radius) & is_lifted(signals, height=height)


def reach_distance(signals: Signals) -> Tensor:
    """`|tcp - object|`, metres, `[...]`."""
    return (signals["tcp_position"] - signals["object_position"]).norm(dim=-1)


def pick_distance(signals: Signals, *, height: float, offset: float) -> Tensor:
    """What is left of a pick, metres, `[...]`: `|tcp - object| + offset` until grasped, then the lift that is missing.

    Example: 0.01 m away and not grasped, with `offset` 0.05: 0.06. Grasped and lifted by 0.005 of 0.02: 0.015.
    """
    missing_lift = (height - signals["object_lift"][..., 0]).clamp(min=0.0)
    return torch.where(signals["is_grasped"], missing_lift, reach_distance(signals) + offset)


def transport_distance(signals: Signals, *, clearance: float) -> Tensor:
    """`|object - target|`, metres, `[...]`; the target is `clearance` metres above the goal."""
    above = signals["goal_position"].new_tensor([0.0, 0.0, clearance])
    return (signals["object_position"] - signals["goal_position"] - above).norm(dim=-1)


def place_distance(signals: Signals, *, offset: float) -> Tensor:
    """`|object - goal|`, plus `offset` while the object is still grasped, metres, `[...]`."""
    return transport_distance(signals, clearance=0.0) + offset * signals["is_grasped"]
