import math

import pytest
import torch

from trl_stare.envs.experts import LiftPegUprightExpert
from trl_stare.stages import get_plan, segment
from trl_stare.stages.tasks.peg import (
    ALIGN_RADIUS,
    END,
    GRIP,
    GRIP_RADIUS,
    HALF_LENGTH,
    HOLD_OFFSET,
    LENGTH,
    LIFT_HEIGHT,
    UPRIGHT_ANGLE,
    end_distance,
    grip_distance,
    peg_axis,
)

LIFT, INSERT = get_plan("LiftPegUpright-v1"), get_plan("PegInsertionSide-v1")


def raised(angle: float, roll: float = math.pi / 2) -> list[float]:
    """wxyz: a peg turned by `roll` about its axis, which then rises from the table by `angle` (about world -y)."""
    c, s, cr, sr = math.cos(angle / 2), math.sin(angle / 2), math.cos(roll / 2), math.sin(roll / 2)
    return [c * cr, c * sr, -s * cr, s * sr]


def lift(tcp=(0.1, 0.0, 0.2), height=0.025, angle=0.0, roll=math.pi / 2, contact=False, grasped=False, success=False):
    """One row of LiftPegUpright-v1's signals; the peg's centre is above the origin."""
    return {
        "tcp_position": torch.tensor(tcp),
        "object_position": torch.tensor([0.0, 0.0, height]),
        "object_quaternion": torch.tensor(raised(angle, roll)),
        "is_contact": torch.tensor(contact),
        "is_grasped": torch.tensor(grasped),
        "success": torch.tensor(success),
    }


def insert(head, center, tcp=(0.0, 0.0, 0.2), height=0.02, contact=False, grasped=False, success=False):
    """One row of PegInsertionSide-v1's signals; the peg rests at z = 0.02."""
    return {
        "tcp_position": torch.tensor(tcp),
        "object_position": torch.tensor([0.0, 0.0, height]),
        "object_lift": torch.tensor([height - 0.02]),
        "peg_head_at_hole": torch.tensor(head),
        "peg_center_at_hole": torch.tensor(center),
        "is_contact": torch.tensor(contact),
        "is_grasped": torch.tensor(grasped),
        "success": torch.tensor(success),
    }


UP = math.pi / 2
HELD = {"contact": True, "grasped": True}
FAR = lift()
AT_GRIP = lift((0.1, 0.0, 0.04), contact=True)
HOLD = lift((0.1, 0.0, 0.025), **HELD)
HALFWAY = lift((0.1 * math.cos(UP / 2), 0.0, 0.08 + 0.1 * math.sin(UP / 2)), 0.08, UP / 2, **HELD)
STEEP = lift((0.02, 0.0, 0.2), 0.125, UP - 0.1, **HELD)
STANDS = lift((0.0, 0.0, 0.22), 0.12, UP, **HELD, success=True)


def test_names_and_reads():
    assert LIFT.names == ("Reach", "Grasp", "Upright", "Settle") and set(LIFT.reads) == set(FAR)
    assert INSERT.names == ("Reach", "Grasp", "Align", "Insert")
    assert set(INSERT.reads) == set(insert((-0.3, 0.0, 0.0), (-0.4, 0.0, 0.0)))


def test_thresholds():
    # method.md, and ManiSkill's `lift_peg_upright.py` and `peg_insertion_side.py`
    assert (UPRIGHT_ANGLE, LIFT_HEIGHT, HALF_LENGTH, ALIGN_RADIUS) == (0.2, 0.02, 0.12, 0.01)
    # the demonstrator's grip, and what of an imitation policy's grasps stood up (docs/tasks.md)
    assert (GRIP, GRIP_RADIUS, END) == (LiftPegUprightExpert().grip, 0.02, 0.075)


@pytest.mark.parametrize(
    ("name", "row", "stage"),
    [
        ("far away", FAR, 0),
        ("touched at a grip", AT_GRIP, 1),
        ("touched 2.1 cm over a grip", lift((0.1, 0.0, 0.046), contact=True), 0),
        ("touched at the other end's grip", lift((-0.1, 0.01, 0.025), contact=True), 1),
        ("touched in the middle", lift((0.0, 0.0, 0.025), contact=True), 0),
        ("at a grip, not touched", lift((0.1, 0.0, 0.04)), 0),
        ("held on the table by an end: no lift is asked for", HOLD, 2),
        ("held by the other end", lift((-0.1, 0.0, 0.025), **HELD), 2),
        ("held 7.4 cm from the centre", lift((0.074, 0.0, 0.025), **HELD), 0),
        ("held 7.6 cm from the centre", lift((0.076, 0.0, 0.025), **HELD), 2),
        ("held by the middle", lift((0.0, 0.0, 0.025), **HELD), 0),
        ("held by the middle, from the side", lift((0.0, 0.08, 0.025), **HELD), 0),
        ("halfway up", HALFWAY, 2),
        ("0.201 rad from upright", lift(angle=UP - 0.201, height=0.12, **HELD), 2),
        ("0.199 rad from upright", lift(angle=UP - 0.199, height=0.12, **HELD), 3),
        ("the other end up", lift(angle=-UP + 0.199, height=0.12, **HELD), 3),
        ("beyond upright", lift(angle=UP + 0.199, height=0.12, **HELD), 3),
        ("upright, whatever it was rolled by", lift(angle=UP - 0.1, roll=0.3, height=0.12, **HELD), 3),
        ("upright in the air, let go", lift(angle=UP, height=0.3), 3),
        ("rolled only", lift(roll=0.3), 0),
        ("toppled over", lift(angle=math.pi), 0),
        ("stands", STANDS, 4),
        ("success by the environment's word alone", lift(success=True), 4),
    ],
)
def test_current_stage_of_lift(name, row, stage):
    assert LIFT.current_stage(row).item() == stage


def test_distances_of_lift():
    # Reach: |tcp - grip| of the nearer end; Grasp: plus the offset until held there; Upright: 1 - |cos|; Settle: height plus arc
    torch.testing.assert_close(
        LIFT.distances(FAR), torch.tensor([0.175, 0.175 + HOLD_OFFSET, 1.0, 0.095 + 0.12 * UP]), atol=1e-6, rtol=0
    )
    torch.testing.assert_close(
        LIFT.distances(HALFWAY)[1:3], torch.tensor([0.0, 1 - math.cos(UP / 2)]), atol=1e-6, rtol=0
    )
    torch.testing.assert_close(LIFT.distances(STEEP)[3].item(), 0.005 + 0.12 * 0.1, atol=1e-4, rtol=0)
    torch.testing.assert_close(LIFT.distances(STANDS)[2:], torch.zeros(2), atol=1e-4, rtol=0)
    # Upright has no unit: its costs are its distances
    assert LIFT.costs(HALFWAY)[2] == LIFT.distances(HALFWAY)[2]
    assert LIFT.costs(FAR)[0] == LIFT.distances(FAR)[0]


@pytest.mark.parametrize(
    ("name", "row", "grip", "end"),
    [
        ("held by the end", HOLD, 0.0, 0.0),
        ("held by the middle", lift((0.0, 0.0, 0.025), **HELD), 0.1, 0.15),
        ("held 0.08 from the centre", lift((-0.08, 0.0, 0.025), **HELD), 0.02, 0.02),
        ("2 cm over the other end, fingers open", lift((-0.1, 0.0, 0.045)), 0.02, 0.07),
        ("held by the end that went up", HALFWAY, 0.0, 0.0),
    ],
)
def test_the_hand_s_way_leads_to_an_end(name, row, grip, end):
    torch.testing.assert_close(grip_distance(row, grip=0.1).item(), grip, atol=1e-6, rtol=0)
    torch.testing.assert_close(end_distance(row, grip=0.1, end=0.075, offset=0.05).item(), end, atol=1e-6, rtol=0)


def test_the_axis_is_that_of_the_pose():
    for angle in (0.0, 0.1, -0.7, 1.5):
        expected = torch.tensor([math.cos(angle), 0.0, math.sin(angle)])
        torch.testing.assert_close(peg_axis(lift(angle=angle, roll=0.4)), expected, atol=1e-6, rtol=0)


def test_a_clean_lift():
    rows = [FAR, AT_GRIP, HOLD, HALFWAY, STEEP, STANDS]
    signals = {name: torch.stack([row[name] for row in rows]) for name in FAR}
    assert LIFT.current_stage(signals).tolist() == [0, 1, 2, 2, 3, 4]
    assert (LIFT.potential(signals).diff() > 0).all()
    assert [part[:4] for part in segment(LIFT, signals)] == [
        (0, 0, 1, True),
        (1, 1, 2, True),
        (2, 2, 4, True),
        (3, 4, 5, True),
    ]


FARTHER = ((-0.3, 0.1, -0.08), (-0.4, 0.12, -0.08))  # head and centre of a peg on the table
ON_AXIS = ((-0.15, 0.0, 0.0), (-0.25, 0.0, 0.0))


@pytest.mark.parametrize(
    ("name", "row", "stage"),
    [
        ("far away", insert(*FARTHER), 0),
        ("contact", insert(*FARTHER, contact=True), 1),
        ("held, lifted to the threshold", insert(*FARTHER, height=0.0399, **HELD), 1),
        ("held, lifted past it", insert(*FARTHER, height=0.0401, **HELD), 2),
        ("lifted, not held", insert(*FARTHER, height=0.1), 0),
        ("on the hole's axis", insert(*ON_AXIS, height=0.1, **HELD), 3),
        ("head and centre 9 mm off", insert((-0.15, 0.009, 0.0), (-0.25, 0.0, 0.009), height=0.1, **HELD), 3),
        ("head 11 mm off", insert((-0.15, 0.011, 0.0), (-0.25, 0.0, 0.0), height=0.1, **HELD), 2),
        ("centre 11 mm off", insert((-0.15, 0.0, 0.0), (-0.25, 0.0, -0.011), height=0.1, **HELD), 2),
        ("8 mm off both ways", insert((-0.15, 0.008, 0.008), (-0.25, 0.0, 0.0), height=0.1, **HELD), 2),
        ("left in the hole", insert((-0.05, 0.0, 0.0), (-0.15, 0.0, 0.0), height=0.1), 3),
        ("inserted", insert((-0.014, 0.0, 0.0), (-0.11, 0.0, 0.0), height=0.1, **HELD, success=True), 4),
        ("deep inside, not by the environment's word", insert((0.0, 0.0, 0.0), (-0.1, 0.0, 0.0), height=0.1), 3),
    ],
)
def test_current_stage_of_insertion(name, row, stage):
    assert INSERT.current_stage(row).item() == stage


def test_distances_of_insertion():
    # Align: whichever of head and centre is farther from the axis; Insert: from the head to the middle of the box
    row = insert((-0.12, 0.03, 0.04), (-0.2, 0.0, 0.02), tcp=(0.0, 0.0, 0.12), height=0.03, **HELD)
    torch.testing.assert_close(INSERT.distances(row), torch.tensor([0.09, 0.01, 0.05, 0.13]))
    torch.testing.assert_close(INSERT.costs(row), torch.tensor([0.09, 0.01 / LENGTH, 0.05 / LENGTH, 0.13 / LENGTH]))
    through = insert((0.01, 0.0, 0.002), (-0.09, 0.0, 0.0), height=0.1, **HELD)
    torch.testing.assert_close(INSERT.distances(through)[2:], torch.tensor([0.002, 0.002]))


def test_a_clean_insertion():
    rows = [
        insert(*FARTHER),
        insert(*FARTHER, tcp=(0.06, 0.0, 0.02), contact=True),
        insert(*FARTHER, tcp=(0.06, 0.0, 0.02), **HELD),
        insert((-0.3, 0.08, -0.05), (-0.4, 0.1, -0.05), height=0.05, **HELD),
        insert((-0.15, 0.02, 0.0), (-0.25, 0.02, 0.0), height=0.1, **HELD),
        insert(*ON_AXIS, height=0.1, **HELD),
        insert((-0.05, 0.0, 0.0), (-0.15, 0.0, 0.0), height=0.1, **HELD),
        insert((-0.014, 0.0, 0.0), (-0.114, 0.0, 0.0), height=0.1, **HELD, success=True),
    ]
    signals = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    assert INSERT.current_stage(signals).tolist() == [0, 1, 1, 2, 2, 3, 3, 4]
    assert (INSERT.potential(signals).diff() > 0).all()
