"""Demonstrators that handle a peg: one stands it up, one inserts it into the side of a box."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trl_stare.envs.experts.motion import (
    METRES_PER_UNIT,
    RADIANS_PER_UNIT,
    rotate,
    rotation_between,
    rotation_onto,
)
from trl_stare.interfaces import Signals

ALONG = (1.0, 0.0, 0.0)
"""The peg's axis in its own frame, towards its head (ManiSkill's `peg_insertion_side.py` and `build_twocolor_peg`)."""
HALF_LENGTH, HALF_WIDTH = 0.12, 0.025
"""LiftPegUpright-v1's peg in metres (`peg_half_length` and `peg_half_width` in ManiSkill's `lift_peg_upright.py`)."""


@dataclass(frozen=True)
class PegGrasp:
    """How a peg is taken: with the fingers pointing down and closing across it.

    Args:
        hover (`float`): height in metres above the grip at which the open hand travels and turns.
        near (`float`): sideways distance in metres under which the hand goes down.
        aligned (`float`): angle in radians under which the hand goes down.
        close (`float`): height difference in metres under which the fingers close.
        gain (`float`): share of the remaining way asked for per step: the arm covers about 0.4 of what it is asked for.
    """

    hover: float = 0.06
    near: float = 0.012
    aligned: float = 0.15
    close: float = 0.008
    gain: float = 1.5

    def approach(self, signals: Signals, grip: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """How the open hand gets to `grip` (`[N, 3]`, metres, world frame).

        Returns:
            `tuple[Tensor, Tensor, Tensor]`: the way left (`[N, 3]`, metres), the turn left (`[N, 3]` rotation vector, radians), both
                in the world frame, and whether the fingers may close (`[N]` bool).
        """
        quaternion, offset = signals["tcp_quaternion"], grip - signals["tcp_position"]
        axis, across = rotate(signals["object_quaternion"], ALONG), rotate(quaternion, ALONG)
        angle = torch.atan2(axis[:, 1], axis[:, 0]) - torch.atan2(across[:, 1], across[:, 0])
        angle = torch.remainder(angle + torch.pi / 2, torch.pi) - torch.pi / 2  # half a turn changes nothing
        turn = point_down(quaternion)
        turn = torch.cat([turn[:, :2], turn[:, 2:] + angle[:, None]], dim=-1)

        sideways, skew = offset[:, :2].norm(dim=-1), turn.norm(dim=-1)
        # down gradually while closing in, so that no time is lost standing still
        above = (sideways / self.near - 1).clamp(min=0.0) + (skew / self.aligned - 1).clamp(min=0.0)
        above = self.hover * above.clamp(max=1.0)
        ready = (sideways < self.near) & (skew < 1.3 * self.aligned) & (offset[:, 2].abs() < self.close)
        return torch.cat([offset[:, :2], offset[:, 2:] + above[:, None]], dim=-1), turn, ready

    def action(self, move: Tensor, turn: Tensor, gripper: Tensor) -> Tensor:
        """`[N, 7]` controller units from metres, a rotation vector and a gripper command (+1 opens)."""
        translation = (move * self.gain / METRES_PER_UNIT).clamp(-1.0, 1.0)
        rotation = turn * self.gain / RADIANS_PER_UNIT
        rotation = rotation / rotation.norm(dim=-1, keepdim=True).clamp(min=1.0)
        return torch.cat([translation, rotation, gripper[:, None]], dim=-1)


@dataclass(frozen=True)
class LiftPegUprightExpert(PegGrasp):
    """Stands a peg up: it holds one end so lightly that the peg turns between the fingers, and leads that end up.

    The hand itself cannot turn the peg: at 0.04 rad a step a quarter turn takes 40 of the 50 steps, and the wrist stops
    after 0.9 rad. A peg that hangs from its end turns by itself, within six steps, while its foot stays on the table.

    Args:
        grip (`float`): metres from the peg's centre to where it is held. The end has to pass under the palm, 45 mm above the TCP:
            held at 0.085 the peg gets stuck 0.17 rad from upright.
        touch (`float`): gripper command that closes the fingers until they touch the peg, with less force than holds it.
        squeeze (`float`): gripper command that holds the peg without clamping it: at 0.34 it slips, at -1 it hardly turns.
        lead (`float`): angle in radians by which the hand runs ahead of the peg.
        steep (`float`): cosine of the angle from upright above which the hand slows down, lest the peg topple over when let go.
        slow (`float`): metres that are then asked for at most.
        stable (`float`): angle in radians from upright at which the peg is let go; it comes to rest on its foot by itself.
        reach (`float`), pivot (`float`): how far from the robot the hand goes (world x, metres), and how far while it raises a
            peg. Not much beyond them inverse kinematics fails, and the arm stands still.

    Example: a peg that lies with its centre at x = 0.1 is taken at its near end: the far one is out of reach.
    """

    close: float = 0.014
    grip: float = 0.1
    touch: float = 0.38
    squeeze: float = 0.2
    lead: float = 0.5
    steep: float = 0.9
    slow: float = 0.02
    stable: float = 0.12
    reach: float = 0.12
    pivot: float = 0.03

    def __call__(self, signals: Signals) -> Tensor:
        """`[N, 7]` actions: translation, rotation, gripper (+1 opens)."""
        tcp, peg, grasped = signals["tcp_position"], signals["object_position"], signals["is_grasped"]
        axis = self._upper_end(peg, rotate(signals["object_quaternion"], ALONG))
        move, turn, ready = self.approach(signals, peg + self.grip * axis)
        move = torch.where(grasped[:, None], self._raise(tcp, peg, axis), self._within(move, tcp, self.reach))
        turn = torch.where(grasped[:, None], point_down(signals["tcp_quaternion"]), turn)

        upright = torch.atan2(axis[:, :2].norm(dim=-1), axis[:, 2]) < self.stable
        stands = upright & (peg[:, 2] < HALF_LENGTH + 0.01)
        closed = torch.where(signals["is_contact"], self.squeeze, self.touch)
        gripper = torch.where((grasped | ready) & ~stands, closed, 1.0)
        move, turn = (torch.where(stands[:, None], 0.0, vector) for vector in (move, turn))
        return self.action(move, turn, gripper)

    def _upper_end(self, peg: Tensor, axis: Tensor) -> Tensor:
        """`axis` towards the end that goes up: the higher one or, of a peg that lies, the far one if the arm reaches it."""
        outwards = torch.where(peg[:, :1] + self.grip < self.reach, 1.0, -1.0)
        return axis * torch.where(outwards * axis[:, :1] + 2 * axis[:, 2:] < 0, -1.0, 1.0)

    def _raise(self, tcp: Tensor, peg: Tensor, axis: Tensor) -> Tensor:
        """The way to a point ahead on the circle around the peg's foot."""
        foot, level = peg - HALF_LENGTH * axis, axis[:, :2].norm(dim=-1, keepdim=True)
        tilt = (torch.atan2(axis[:, 2:], level) + self.lead).clamp(max=torch.pi / 2)
        radius = HALF_LENGTH + ((tcp - peg) * axis).sum(dim=-1, keepdim=True)
        sideways = foot[:, :2] + axis[:, :2] / level.clamp(min=1e-6) * radius * tilt.cos()
        height = radius * tilt.sin() + HALF_WIDTH * tilt.cos()
        move = torch.cat([sideways, height], dim=-1) - tcp
        within = self._within(move, tcp, self.pivot)
        return torch.where(axis[:, 2:] > self.steep, move.clamp(-self.slow, self.slow), within)

    def _within(self, move: Tensor, tcp: Tensor, limit: float) -> Tensor:
        """`move`, but not to where the command would lead the hand past x = `limit`."""
        most = (limit - tcp[:, :1]).clamp(min=0.0) / self.gain
        return torch.cat([torch.minimum(move[:, :1], most), move[:, 1:]], dim=-1)


@dataclass(frozen=True)
class PegInsertionExpert(PegGrasp):
    """Takes a peg by its tail, brings it before the hole and pushes it in. The peg is steered, the hand follows it.

    Args:
        standoff (`float`): metres between box and peg head while the peg is far from the hole's axis.
        tolerance (`float`): metres from the hole's axis, of head and centre, under which the peg moves on. The hole is 3 mm wider
            than the peg on each side.
        push (`float`): metres ahead that the peg is sent at most.

    Example: a peg 2 cm beside the hole's axis is moved sideways only; on the axis it is moved along it by up to `push`.
    """

    standoff: float = 0.03
    tolerance: float = 0.004
    push: float = 0.05

    def __call__(self, signals: Signals) -> Tensor:
        """`[N, 7]` actions: translation, rotation, gripper (+1 opens)."""
        tcp, peg, grasped = signals["tcp_position"], signals["object_position"], signals["is_grasped"]
        # far enough back for the hand to stay clear of the box: the grasp of ManiSkill's motion planning solution
        tail = (signals["peg_half_length"] / 2 + 0.01).clamp(min=0.05)
        move, turn, ready = self.approach(signals, peg - tail * rotate(signals["object_quaternion"], ALONG))

        straighten = rotation_between(signals["object_quaternion"], signals["goal_quaternion"])
        now = straighten / (straighten.norm(dim=-1, keepdim=True) / abs(RADIANS_PER_UNIT)).clamp(min=1.0)
        # the hand turns about itself, which swings the peg's centre
        carry = self._way_in(signals) - torch.cross(now, peg - tcp, dim=-1)
        move = torch.where(grasped[:, None], carry, move)
        turn = torch.where(grasped[:, None], straighten, turn)
        return self.action(move, turn, torch.where(grasped | ready, -1.0, 1.0))

    def _way_in(self, signals: Signals) -> Tensor:
        """The peg's way to the hole's axis, and along it as far as its distance from the axis allows, `[N, 3]` metres."""
        head, length = signals["peg_head_at_hole"], signals["peg_half_length"]
        off = torch.maximum(head[:, 1:].norm(dim=-1), signals["peg_center_at_hole"][:, 1:].norm(dim=-1))[:, None]
        stay = (head[:, :1] > -length) | (off < 3 * self.tolerance)  # inside or nearly there: do not go back
        depth = torch.where(stay, head[:, :1], -length - self.standoff)
        depth = depth + self.push * (1 - off / self.tolerance).clamp(min=0.0)
        return (
            signals["goal_position"] + depth * rotate(signals["goal_quaternion"], ALONG) - signals["object_position"]
        )


def point_down(quaternion: Tensor) -> Tensor:
    """The shortest rotation vector (`[N, 3]`, radians, world frame) after which a hand of this `[N, 4]` wxyz quaternion points down."""
    pointing = rotate(quaternion, (0.0, 0.0, 1.0))
    return rotation_onto(pointing, pointing.new_tensor([0.0, 0.0, -1.0]).expand_as(pointing))
