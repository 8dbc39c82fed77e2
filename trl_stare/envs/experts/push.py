"""A demonstrator that slides an object over the table with closed fingers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from trl_stare.envs.experts.motion import METRES_PER_UNIT
from trl_stare.interfaces import Signals


@dataclass(frozen=True)
class PushExpert:
    """Puts closed fingers down on the far side of an object and slides it towards a goal: a push or a pull.

    Args:
        standoff (`float`): metres behind the object's centre, seen from the goal, at which the fingers come down.
        hover (`float`): height in metres above the object at which the hand travels.
        lane (`float`): sideways distance in metres from the line goal - object under which it slides the object.
        near (`float`): sideways distance in metres from the standoff point under which it comes down.
        share (`float`): share of the object's way to the goal that a slide asks for per step. So it slows down on the way: with
            the arm nearly stretched, inverse kinematics finds no pose a full stride ahead, and the Panda would stop short.
        speed (`float`): largest action per axis, in units of the controller.

    Example: far from the object it moves with closed fingers towards the point `hover` above the standoff point.
    """

    standoff: float = 0.05
    hover: float = 0.07
    lane: float = 0.012
    near: float = 0.015
    share: float = 0.15
    speed: float = 0.7

    def __call__(self, signals: Signals) -> Tensor:
        """`[N, 7]` actions: translation, no rotation, gripper (always -1: closed)."""
        tcp, obj = signals["tcp_position"], signals["object_position"]
        way = (signals["goal_position"] - obj)[:, :2]
        heading = normalize(way, dim=-1)
        offset = (tcp - obj)[:, :2]
        ahead = (offset * heading).sum(dim=-1, keepdim=True)
        aside = (offset - ahead * heading).norm(dim=-1)
        behind = (aside < self.lane) & (ahead[:, 0] < -self.near) & (tcp[:, 2] - obj[:, 2] < self.near)

        # along the line from the object to the goal, a stride further than the hand is now
        slide = torch.cat([obj[:, :2] + ahead * heading + self.share * way, obj[:, 2:]], dim=-1)
        target = torch.where(behind[:, None], slide, self._approach(tcp, obj, heading))
        translation = ((target - tcp) / METRES_PER_UNIT).clamp(-self.speed, self.speed)
        still_and_closed = torch.tensor([0.0, 0.0, 0.0, -1.0]).expand(len(tcp), 4)
        return torch.cat([translation, still_and_closed], dim=-1)

    def _approach(self, tcp: Tensor, obj: Tensor, heading: Tensor) -> Tensor:
        """Over the standoff point first, then down to it: the object is not swept aside."""
        spot = obj[:, :2] - self.standoff * heading
        sideways = (spot - tcp[:, :2]).norm(dim=-1, keepdim=True)
        # come down gradually while still closing in, so that no time is lost standing still
        above = ((sideways - self.near) / self.near).clamp(0.0, 1.0) * self.hover
        return torch.cat([spot, obj[:, 2:] + above], dim=-1)
