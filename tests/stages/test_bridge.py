"""Plans of SimplerEnv's Bridge tasks: tables of literal moments."""

import pytest
import torch

from trl_stare.stages import get_plan, segment
from trl_stare.stages.tasks.bridge import BASKET_RADIUS, CUBE_RADIUS, PLATE_RADIUS, TOWEL_RADIUS

CARROT = get_plan("PutCarrotOnPlateInScene-v1")
SPOON = get_plan("PutSpoonOnTableClothInScene-v1")
CUBE = get_plan("StackGreenCubeOnYellowCubeBakedTexInScene-v1")
EGGPLANT = get_plan("PutEggplantInBasketScene-v1")
GOAL_LIFT = {CARROT.task: 0.004, SPOON.task: 0.012, CUBE.task: 0.03, EGGPLANT.task: 0.027}
"""How far the object is above its rest at its goal, metres, as measured in the simulator."""


def moment(plan, aside, lift, tcp_above=0.0, contact=False, grasped=False, success=False):
    """The object `aside` metres from its goal at (0, 0) and `lift` metres above its rest at z = 0.9."""
    position = torch.tensor([aside, 0.0, 0.9 + lift])
    return {
        "tcp_position": position + torch.tensor([0.0, 0.0, tcp_above]),
        "object_position": position,
        "goal_position": torch.tensor([0.0, 0.0, 0.9 + GOAL_LIFT[plan.task]]),
        "object_lift": torch.tensor([lift]),
        "is_contact": torch.tensor(contact),
        "is_grasped": torch.tensor(grasped),
        "success": torch.tensor(success),
    }


def test_names():
    for plan in (CARROT, SPOON, EGGPLANT):
        assert plan.names == ("Reach", "Grasp", "Transport", "Place")
    assert CUBE.names == ("Reach", "Grasp", "Transport", "Stack")


def test_the_native_radii():
    # ManiSkill: norm(half the target's bounding box) + 0.003
    assert PLATE_RADIUS == pytest.approx(0.080782, abs=1e-6)
    assert TOWEL_RADIUS == pytest.approx(0.073711, abs=1e-6)
    assert CUBE_RADIUS == pytest.approx(0.024213, abs=1e-6)
    assert BASKET_RADIUS == pytest.approx(0.079322, abs=1e-6)


@pytest.mark.parametrize(
    ("name", "plan", "row", "stage"),
    [
        ("far away", CARROT, {"aside": 0.15, "lift": 0.0, "tcp_above": 0.1}, 0),
        ("a finger touches", CARROT, {"aside": 0.15, "lift": 0.0, "contact": True}, 1),
        ("held, on the table", CARROT, {"aside": 0.15, "lift": 0.01, "grasped": True}, 1),
        ("held, in the air", CARROT, {"aside": 0.15, "lift": 0.03, "grasped": True}, 2),
        ("over the plate", CARROT, {"aside": 0.1, "lift": 0.03, "grasped": True}, 3),
        ("just outside the margin", CARROT, {"aside": 0.102, "lift": 0.03, "grasped": True}, 2),
        ("on its way down to the plate", CARROT, {"aside": 0.0, "lift": 0.008, "grasped": True}, 3),
        ("on the plate, let go of", CARROT, {"aside": 0.0, "lift": 0.004}, 3),
        ("on the table beside the plate", CARROT, {"aside": 0.075, "lift": 0.0005}, 0),
        ("dropped on the table", CARROT, {"aside": 0.12, "lift": 0.0, "tcp_above": 0.1}, 0),
        ("success", CARROT, {"aside": 0.0, "lift": 0.004, "success": True}, 4),
        ("over the towel", SPOON, {"aside": 0.09, "lift": 0.04, "grasped": True}, 3),
        ("outside the towel", SPOON, {"aside": 0.095, "lift": 0.04, "grasped": True}, 2),
        ("over the cube", CUBE, {"aside": 0.044, "lift": 0.06, "grasped": True}, 3),
        ("outside the cube", CUBE, {"aside": 0.045, "lift": 0.06, "grasped": True}, 2),
        ("beside the cube", CUBE, {"aside": 0.03, "lift": 0.0}, 0),
        ("over the basket", EGGPLANT, {"aside": 0.099, "lift": 0.1, "grasped": True}, 3),
        ("over the sink", EGGPLANT, {"aside": 0.1, "lift": 0.1, "grasped": True}, 2),
    ],
)
def test_current_stage(name, plan, row, stage):
    assert plan.current_stage(moment(plan, **row)).item() == stage


@pytest.mark.parametrize("plan", [CARROT, SPOON, CUBE, EGGPLANT], ids=lambda plan: plan.task)
def test_a_clean_success_passes_every_stage_in_order(plan):
    rest = GOAL_LIFT[plan.task]
    rows = [
        moment(plan, 0.15, 0.0, tcp_above=0.1),
        moment(plan, 0.15, 0.0, tcp_above=0.01, contact=True),
        moment(plan, 0.15, 0.03, contact=True, grasped=True),
        moment(plan, 0.02, 0.05, contact=True, grasped=True),
        moment(plan, 0.0, rest + 0.02, contact=True, grasped=True),
        moment(plan, 0.0, rest, success=True),
    ]
    signals = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    assert plan.current_stage(signals).tolist() == [0, 1, 2, 3, 3, 4]
    assert (plan.potential(signals).diff() > 0).all()
    assert [part.passed for part in segment(plan, signals)] == [True] * 4
