"""A demonstrator for SimplerEnv's WidowX: it turns the fingers across the object, picks it up and puts it down at the goal."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from trl_stare.interfaces import Signals

OPEN_WIDTH = 0.074
"""`gripper_width` of open fingers, metres (`upper` of ManiSkill's `gripper_pd_joint_pos` in `bridge_dataset_eval/base_env.py`)."""


@dataclass(frozen=True)
class WidowXExpert:
    """Picks an object and puts it down at a goal, in metres and radians added to the target of the hand.

    Targets add up, and the arm follows with a delay of about half a step: steps are moderate and a share of the remaining way,
    or the hand would swing.

    Args:
        hover (`float`): height in metres above the object at which the open hand travels and turns.
        grip (`float`): height in metres of the TCP above the object's centre where the fingers close.
        clearance (`float`): height in metres above the goal at which the object is carried.
        near (`float`): sideways distance in metres under which the hand, or the object, goes down.
        aligned (`float`): angle in radians under which the hand goes down.
        reach (`float`): distance in metres at which the fingers close.
        symmetry (`float`): angle in radians by which a turned object looks the same to the fingers: pi for long ones, pi / 2 for a cube.
        stride (`float`): longest translation per step and axis, metres.
        turn (`float`): largest rotation per step, radians.
        gain (`float`): share of the remaining way asked for per step.

    Example: far from the object it moves with open fingers towards the point `hover` above the object, turning on the way.
    """

    hover: float = 0.06
    grip: float = 0.005
    clearance: float = 0.05
    near: float = 0.012
    aligned: float = 0.15
    reach: float = 0.012
    symmetry: float = math.pi
    stride: float = 0.03
    turn: float = 0.2
    gain: float = 0.6

    def __call__(self, signals: Signals) -> Tensor:
        """`[N, 7]` actions: translation (m), rotation (rad, only about the vertical), gripper (+1 opens)."""
        tcp, obj, goal = (signals[name] for name in ("tcp_position", "object_position", "goal_position"))
        grasped, angle = signals["is_grasped"], self._angle(signals)
        offset = obj - goal
        placed = (offset[:, :2].norm(dim=-1) < 2 * self.near) & (offset[:, 2] < 0.006)

        grip = obj + obj.new_tensor([0.0, 0.0, self.grip])
        sideways, down = (grip - tcp)[:, :2].norm(dim=-1), (tcp - grip)[:, 2]
        between = (sideways < 2 * self.near) & (down.abs() < self.reach)
        closing = signals["gripper_width"][:, 0] < OPEN_WIDTH - 0.004
        ready = between & (closing | (sideways < self.near) & (angle.abs() < self.aligned))

        target = self._approach(tcp, grip, sideways, angle)
        target = torch.where(ready[:, None], grip, target)  # one finger alone would push: stay in the middle
        target = torch.where(grasped[:, None], tcp + self._carry(obj, goal, signals["object_lift"][:, 0]), target)
        leave = tcp + obj.new_tensor([0.0, 0.0, self.hover])
        target = torch.where(placed[:, None], torch.where(grasped[:, None], tcp, leave), target)
        gripper = torch.where((grasped | ready) & ~placed, -1.0, 1.0)

        # the base looks along -x of the world: its x and y are turned by half a turn
        translation = ((target - tcp) * obj.new_tensor([-1.0, -1.0, 1.0]) * self.gain).clamp(-self.stride, self.stride)
        turn = (angle * self.gain).clamp(-self.turn, self.turn) * ~(grasped | ready | placed)
        rotation = torch.stack([torch.zeros_like(turn), torch.zeros_like(turn), turn], dim=-1)
        return torch.cat([translation, rotation, gripper[:, None]], dim=-1)

    def _approach(self, tcp: Tensor, grip: Tensor, sideways: Tensor, angle: Tensor) -> Tensor:
        """Above the object until the hand is over it and turned, then down to it."""
        off = torch.maximum(sideways / self.near, angle.abs() / self.aligned)
        above = self.hover * (off - 1.0).clamp(0.0, 1.0)
        return grip + torch.stack([torch.zeros_like(above), torch.zeros_like(above), above], dim=-1)

    def _carry(self, obj: Tensor, goal: Tensor, lift: Tensor) -> Tensor:
        """The way of the object, and so of the hand: up, across, down."""
        way = goal - obj
        over = way[:, :2].norm(dim=-1) < self.near
        up = torch.maximum(goal[:, 2], obj[:, 2] - lift) + self.clearance - obj[:, 2]
        across = torch.where((up < 0.02)[:, None] | over[:, None], way[:, :2], torch.zeros_like(way[:, :2]))
        return torch.cat([across, torch.where(over, way[:, 2], up)[:, None]], dim=-1)

    def _angle(self, signals: Signals) -> Tensor:
        """Radians about the vertical by which the hand must turn until the fingers close across the object's x axis."""
        along, aside = _axes(signals["object_quaternion"])
        _, fingers = _axes(signals["tcp_quaternion"])
        # an object that fell over may point up with its x axis, whose heading then means nothing
        across = torch.where(along[:, 2:].abs() < 0.7, torch.stack([-along[:, 1], along[:, 0]], dim=-1), aside[:, :2])
        error = _heading(across) - _heading(fingers)
        return torch.remainder(error + self.symmetry / 2, self.symmetry) - self.symmetry / 2


def _heading(direction: Tensor) -> Tensor:
    return torch.atan2(direction[:, 1], direction[:, 0])


def _axes(quaternion: Tensor) -> tuple[Tensor, Tensor]:
    """A body's x and y axes in the world, `[N, 3]` each, from `[N, 4]` wxyz quaternions."""
    w, x, y, z = quaternion.unbind(dim=-1)
    along = torch.stack([1 - 2 * (y * y + z * z), 2 * (x * y + w * z), 2 * (x * z - w * y)], dim=-1)
    aside = torch.stack([2 * (x * y - w * z), 1 - 2 * (x * x + z * z), 2 * (y * z + w * x)], dim=-1)
    return along, aside
