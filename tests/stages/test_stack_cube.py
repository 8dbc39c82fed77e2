import math

import pytest
import torch

from trl_stare.stages import StagePlan, get_plan, register_plan, segment, stage_per_step
from trl_stare.stages.tasks.pick_and_place import (
    HOLD_OFFSET,
    LENGTH,
    LIFT_HEIGHT,
    STACK_CUBE_RADIUS,
    TRANSPORT_CLEARANCE,
    TRANSPORT_MARGIN,
)

PLAN = get_plan("StackCube-v1")
GOAL = (0.2, 0.0, 0.06)


def moment(tcp, cube, contact=False, grasped=False, success=False):
    """One row of StackCube-v1's signals; the cube rests at z = 0.02."""
    return {
        "tcp_position": torch.tensor(tcp),
        "object_position": torch.tensor(cube),
        "goal_position": torch.tensor(GOAL),
        "object_lift": torch.tensor([cube[2] - 0.02]),
        "gripper_width": torch.tensor([0.08]),
        "is_contact": torch.tensor(contact),
        "is_grasped": torch.tensor(grasped),
        "success": torch.tensor(success),
    }


def trajectory(*moments):
    return {name: torch.stack([row[name] for row in moments]) for name in moments[0]}


FAR = moment((0.0, 0.0, 0.2), (0.0, 0.0, 0.02))
TOUCH = moment((0.0, 0.0, 0.03), (0.0, 0.0, 0.02), contact=True)
HOLD = moment((0.0, 0.0, 0.02), (0.0, 0.0, 0.02), contact=True, grasped=True)
LIFTED = moment((0.0, 0.0, 0.08), (0.0, 0.0, 0.08), contact=True, grasped=True)
OVER = moment((0.2, 0.0, 0.09), (0.2, 0.0, 0.09), contact=True, grasped=True)
LET_GO = moment((0.2, 0.0, 0.12), (0.2, 0.0, 0.06))
STACKED = moment((0.2, 0.0, 0.12), (0.2, 0.0, 0.06), success=True)


def test_names_and_reads():
    assert PLAN.names == ("Reach", "Grasp", "Transport", "Stack")
    assert set(PLAN.reads) == set(FAR) - {"gripper_width"}
    PLAN.validate_signals(FAR)


def test_the_native_radius():
    # ManiSkill: norm(cube_half_size[:2]) + 0.005
    assert STACK_CUBE_RADIUS == pytest.approx(0.033284, abs=1e-6)
    assert TRANSPORT_MARGIN > 0


@pytest.mark.parametrize(
    ("name", "row", "stage"),
    [
        ("far away", FAR, 0),
        ("contact", TOUCH, 1),
        (
            "a finger that came down 2.1 cm beside the cube",
            moment((0.021, 0.0, 0.02), (0.0, 0.0, 0.02), contact=True),
            0,
        ),
        ("1.9 cm beside it", moment((0.019, 0.0, 0.02), (0.0, 0.0, 0.02), contact=True), 1),
        ("around the cube, not touched", moment((0.0, 0.0, 0.02), (0.0, 0.0, 0.02)), 0),
        ("grasped without contact force", FAR | {"is_grasped": torch.tensor(True)}, 1),
        ("grasped on the table", HOLD, 1),
        ("lifted to the threshold", moment((0, 0, 0.04), (0.0, 0.0, 0.0399), contact=True, grasped=True), 1),
        ("lifted past it", moment((0, 0, 0.04), (0.0, 0.0, 0.0401), contact=True, grasped=True), 2),
        ("in the air but not held", moment((0.0, 0.0, 0.2), (0.0, 0.0, 0.1)), 0),
        ("over the goal", OVER, 3),
        ("inside the margin", moment((0, 0, 0.1), (0.2 - 0.053, 0.0, 0.1), grasped=True), 3),
        ("outside the margin", moment((0, 0, 0.1), (0.2 - 0.054, 0.0, 0.1), grasped=True), 2),
        ("on the table beside the goal", moment((0.2, 0.0, 0.2), (0.15, 0.0, 0.02)), 0),
        ("on the goal, not yet still", LET_GO, 3),
        ("stacked", STACKED, 4),
        ("success by the environment's word alone", FAR | {"success": torch.tensor(True)}, 4),
    ],
)
def test_current_stage(name, row, stage):
    assert PLAN.current_stage(row).item() == stage


def test_distances():
    # Reach: |tcp - cube|; Grasp: the same plus the offset, or the lift that is missing; Transport; Stack
    torch.testing.assert_close(
        PLAN.distances(FAR),
        torch.tensor([0.18, 0.18 + HOLD_OFFSET, math.hypot(0.2, 0.04 + TRANSPORT_CLEARANCE), math.hypot(0.2, 0.04)]),
    )
    half_lifted = moment((0.0, 0.0, 0.03), (0.0, 0.0, 0.03), contact=True, grasped=True)
    torch.testing.assert_close(PLAN.distances(half_lifted)[1].item(), 0.01)
    assert PLAN.distances(LIFTED)[1] == 0.0
    torch.testing.assert_close(PLAN.distances(OVER)[2:], torch.tensor([0.0, 0.03 + HOLD_OFFSET]))
    torch.testing.assert_close(PLAN.distances(LET_GO)[3].item(), 0.0)


def test_reach_costs_plain_metres():
    torch.testing.assert_close(PLAN.costs(FAR)[0].item(), 0.18)
    torch.testing.assert_close(PLAN.costs(FAR)[3], PLAN.distances(FAR)[3] / LENGTH)


def test_a_clean_success():
    signals = trajectory(FAR, TOUCH, HOLD, LIFTED, OVER, LET_GO, STACKED)
    assert PLAN.current_stage(signals).tolist() == [0, 1, 1, 2, 3, 3, 4]
    potential = PLAN.potential(signals)
    # a cube that lies exactly at its goal is worth as much as the success that follows
    assert (potential[:-1].diff() > 0).all()
    assert potential[-2] == potential[-1] == 1
    assert [part[:4] for part in segment(PLAN, signals)] == [
        (0, 0, 1, True),
        (1, 1, 3, True),
        (2, 3, 4, True),
        (3, 4, 6, True),
    ]


def test_a_dropped_cube_falls_back_but_its_segments_do_not():
    dropped = moment((0.1, 0.0, 0.2), (0.1, 0.0, 0.02))
    signals = trajectory(FAR, TOUCH, LIFTED, dropped, dropped)
    assert PLAN.current_stage(signals).tolist() == [0, 1, 2, 0, 0]
    assert stage_per_step(segment(PLAN, signals), 4).tolist() == [0, 1, 2, 2]
    potential = PLAN.potential(signals)
    assert potential[3] < potential[1] < potential[2]


def test_success_without_lift_passes_every_stage():
    signals = trajectory(FAR, TOUCH, STACKED)
    segments = segment(PLAN, signals)
    assert [part[:4] for part in segments] == [(0, 0, 1, True), (1, 1, 2, True), (2, 2, 2, True), (3, 2, 2, True)]
    assert [part.cost for part in segments[2:]] == [0.0, 0.0]


def test_letting_go_at_the_goal_raises_the_potential():
    held = moment((0.2, 0.0, 0.06), (0.2, 0.0, 0.06), contact=True, grasped=True)
    assert PLAN.potential(LET_GO) > PLAN.potential(held)


def test_unrolled_labels_equal_stepwise_labels_for_batches_of_chunks():
    generator = torch.Generator().manual_seed(0)
    rows = [FAR, TOUCH, HOLD, LIFTED, OVER, LET_GO, STACKED]
    picks = torch.randint(len(rows), (5, 8), generator=generator)
    batched = {name: torch.stack([row[name] for row in rows])[picks] for name in FAR}
    assert torch.equal(PLAN.current_stage(batched), torch.tensor([0, 1, 1, 2, 3, 3, 4])[picks])
    torch.testing.assert_close(
        PLAN.potential(batched), torch.stack([PLAN.potential(row) for row in rows])[picks], rtol=0, atol=1e-6
    )


def test_unknown_task_lists_the_known_and_suggests():
    with pytest.raises(ValueError, match=r"'StackCube-v1'.*got 'StackCube-v2'.*Did you mean 'StackCube-v1'"):
        get_plan("StackCube-v2")
    with pytest.raises(ValueError, match="register_plan") as error:
        get_plan("zzz")
    assert "Did you mean" not in str(error.value)


def test_a_plan_of_ones_own(monkeypatch):
    monkeypatch.setattr("trl_stare.stages.registry._PLANS", {})
    plan = StagePlan("MyTask-v0", PLAN.stages[2:])
    register_plan(plan)
    assert get_plan("MyTask-v0") is plan


def test_lift_threshold_is_half_a_cube():
    assert LIFT_HEIGHT == 0.02
