"""PickCube-v1 and PlaceSphere-v1; StackCube-v1 has a file of its own."""

import pytest
import torch

from trl_stare.stages import get_plan, segment
from trl_stare.stages.tasks.pick_and_place import (
    HOLD_OFFSET,
    PICK_CUBE_RADIUS,
    PLACE_SPHERE_RADIUS,
    STACK_CUBE_RADIUS,
    pick_and_place_plan,
)

PICK, PLACE = get_plan("PickCube-v1"), get_plan("PlaceSphere-v1")
IN_THE_AIR, IN_THE_BIN = (0.2, 0.0, 0.2), (0.2, 0.0, 0.025)


def moment(goal, tcp, obj, contact=False, grasped=False, success=False):
    """One row of signals; the object rests at z = 0.02."""
    return {
        "tcp_position": torch.tensor(tcp),
        "object_position": torch.tensor(obj),
        "goal_position": torch.tensor(goal),
        "object_lift": torch.tensor([obj[2] - 0.02]),
        "is_contact": torch.tensor(contact),
        "is_grasped": torch.tensor(grasped),
        "success": torch.tensor(success),
    }


def held(goal, obj, success=False):
    return moment(goal, obj, obj, contact=True, grasped=True, success=success)


def test_names_reads_and_the_native_radii():
    for plan in (PICK, PLACE):
        assert plan.names == ("Reach", "Grasp", "Transport", "Place")
        assert set(plan.reads) == set(held(IN_THE_AIR, (0.0, 0.0, 0.1)))
    assert (PICK_CUBE_RADIUS, PLACE_SPHERE_RADIUS) == (0.025, 0.005)


@pytest.mark.parametrize(
    ("name", "row", "stage"),
    [
        ("far away", moment(IN_THE_AIR, (0.0, 0.0, 0.2), (0.0, 0.0, 0.02)), 0),
        ("contact", moment(IN_THE_AIR, (0.0, 0.0, 0.03), (0.0, 0.0, 0.02), contact=True), 1),
        ("contact beside it", moment(IN_THE_AIR, (0.03, 0.0, 0.02), (0.0, 0.0, 0.02), contact=True), 0),
        ("lifted", held(IN_THE_AIR, (0.0, 0.0, 0.05)), 2),
        ("held below the goal", held(IN_THE_AIR, (0.2, 0.0, 0.15)), 2),
        ("held just outside the margin", held(IN_THE_AIR, (0.2, 0.0, 0.1549)), 2),
        ("held just inside the margin", held(IN_THE_AIR, (0.2, 0.0, 0.1551)), 3),
        ("held at the goal, moving", held(IN_THE_AIR, IN_THE_AIR), 3),
        ("falling past the goal", moment(IN_THE_AIR, (0.2, 0.0, 0.3), IN_THE_AIR), 0),
        ("held at a goal on the table", held((0.2, 0.0, 0.02), (0.2, 0.0, 0.02)), 3),
        ("lying below a low goal", moment((0.2, 0.0, 0.05), (0.2, 0.0, 0.3), (0.2, 0.0, 0.02)), 0),
        ("still", held(IN_THE_AIR, IN_THE_AIR, success=True), 4),
    ],
)
def test_current_stage_of_pick_cube(name, row, stage):
    assert PICK.current_stage(row).item() == stage


@pytest.mark.parametrize(
    ("name", "row", "stage"),
    [
        ("far away", moment(IN_THE_BIN, (0.0, 0.0, 0.2), (0.0, 0.0, 0.02)), 0),
        ("contact beside it", moment(IN_THE_BIN, (0.0, 0.03, 0.02), (0.0, 0.0, 0.02), contact=True), 0),
        ("lifted", held(IN_THE_BIN, (0.0, 0.0, 0.05)), 2),
        ("carried low", held(IN_THE_BIN, (0.0, 0.0, 0.035)), 1),
        ("over the bin", held(IN_THE_BIN, (0.19, 0.0, 0.06)), 3),
        ("inside the margin", held(IN_THE_BIN, (0.1751, 0.0, 0.06)), 3),
        ("outside the margin", held(IN_THE_BIN, (0.1749, 0.0, 0.06)), 2),
        ("held in the bin", held(IN_THE_BIN, IN_THE_BIN), 3),
        ("let go of in the bin, rolling", moment(IN_THE_BIN, (0.2, 0.0, 0.1), IN_THE_BIN), 3),
        # 0.0444 m is as near as the bin's wall lets a sphere on the table come
        ("on the table beside the bin", moment(IN_THE_BIN, (0.15, 0.0, 0.2), (0.155, 0.0, 0.02)), 0),
        ("in place", moment(IN_THE_BIN, (0.2, 0.0, 0.1), IN_THE_BIN, success=True), 4),
    ],
)
def test_current_stage_of_place_sphere(name, row, stage):
    assert PLACE.current_stage(row).item() == stage


def test_nothing_is_to_be_let_go_of_in_pick_cube():
    row = held(IN_THE_AIR, (0.2, 0.0, 0.17))
    torch.testing.assert_close(PICK.distances(row)[2:], torch.tensor([0.03, 0.03]))
    assert PICK.potential(held(IN_THE_AIR, IN_THE_AIR)) == 1
    torch.testing.assert_close(PLACE.distances(held(IN_THE_BIN, IN_THE_BIN))[3].item(), HOLD_OFFSET)


@pytest.mark.parametrize(
    ("plan", "goal", "last"),
    [
        (PICK, IN_THE_AIR, held(IN_THE_AIR, IN_THE_AIR, success=True)),
        (PLACE, IN_THE_BIN, moment(IN_THE_BIN, (0.2, 0.0, 0.1), IN_THE_BIN, success=True)),
    ],
)
def test_a_clean_success(plan, goal, last):
    above = (0.19, 0.0, goal[2] + 0.03)
    rows = [
        moment(goal, (0.0, 0.0, 0.2), (0.0, 0.0, 0.02)),
        held(goal, (0.0, 0.0, 0.02)),
        held(goal, (0.0, 0.0, 0.06)),
        held(goal, above),
        held(goal, (0.2, 0.0, goal[2] + 0.005)),
        last,
    ]
    signals = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    assert plan.current_stage(signals).tolist() == [0, 1, 2, 3, 3, 4]
    assert (plan.potential(signals).diff() > 0).all()
    assert [(part.start, part.stop) for part in segment(plan, signals)] == [(0, 1), (1, 2), (2, 3), (3, 5)]


def test_stack_cube_is_the_plain_pick_and_place():
    row, plan = held((0.2, 0.0, 0.06), (0.15, 0.0, 0.045)), get_plan("StackCube-v1")
    same = pick_and_place_plan("StackCube-v1", radius=STACK_CUBE_RADIUS, last="Stack")
    assert same.names == plan.names and same.reads == plan.reads
    assert torch.equal(same.distances(row), plan.distances(row)) and torch.equal(same.exits(row), plan.exits(row))
