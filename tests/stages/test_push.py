import pytest
import torch

from trl_stare.stages import get_plan, segment
from trl_stare.stages.tasks.push import GOAL_RADIUS, LENGTH, PULL_POSE, PUSH_POSE, TOOL_RADIUS

PUSH, PULL = get_plan("PushCube-v1"), get_plan("PullCube-v1")


def moment(tcp, cube=(0.0, 0.0, 0.02), goal=(0.2, 0.0, 0.001), contact=False, success=False):
    """One row of PushCube-v1's signals; the cube rests at z = 0.02, the target lies 0.2 m ahead."""
    return {
        "tcp_position": torch.tensor(tcp),
        "object_position": torch.tensor(cube),
        "goal_position": torch.tensor(goal),
        "is_contact": torch.tensor(contact),
        "success": torch.tensor(success),
    }


FAR = moment((-0.1, 0.0, 0.22))
BEHIND = moment((-0.03, 0.0, 0.02))
PUSHED = moment((0.03, 0.0, 0.02), (0.06, 0.0, 0.02), contact=True)
INSIDE = moment((0.08, 0.0, 0.02), (0.11, 0.0, 0.02), contact=True, success=True)


def test_names_reads_and_the_native_numbers():
    assert PUSH.names == ("Reach", "Push") and PULL.names == ("Reach", "Pull")
    assert set(PUSH.reads) == set(PULL.reads) == set(FAR)
    # ManiSkill: half a cube and 5 mm behind it; half a cube and twice 5 mm before it
    assert PUSH_POSE == (-0.02 - 0.005, 0, 0) and PULL_POSE == (0.02 + 2 * 0.005, 0, 0)
    assert GOAL_RADIUS == 0.1 and TOOL_RADIUS == 0.02


@pytest.mark.parametrize(
    ("name", "plan", "row", "stage"),
    [
        ("far away", PUSH, FAR, 0),
        ("at the push pose", PUSH, BEHIND, 1),
        ("at the push pose, for a pull", PULL, BEHIND, 0),
        ("at the pull pose", PULL, moment((0.03, 0.0, 0.02)), 1),
        ("just within the radius", PUSH, moment((-0.0449, 0.0, 0.02)), 1),
        ("just outside", PUSH, moment((-0.0451, 0.0, 0.02)), 0),
        ("over the push pose", PUSH, moment((-0.025, 0.0, 0.041)), 0),
        ("contact from above", PUSH, moment((0.0, 0.0, 0.05), contact=True), 1),
        ("the cube slipped away", PUSH, moment((-0.03, 0.0, 0.02), (0.0, 0.05, 0.02)), 0),
        ("inside, by the environment's word", PUSH, INSIDE, 2),
        ("inside the disc, not by its word", PUSH, moment((0, 0, 0.2), (0.2, 0.0, 0.02)), 0),
    ],
)
def test_current_stage(name, plan, row, stage):
    assert plan.current_stage(row).item() == stage


def test_distances_and_costs():
    torch.testing.assert_close(PUSH.distances(FAR), torch.tensor([(0.1**2 + 0.2**2) ** 0.5, 0.1]))
    torch.testing.assert_close(PUSH.distances(PUSHED), torch.tensor([0.03, 0.04]))
    assert PUSH.distances(INSIDE)[1] == 0
    # Reach costs plain metres, the other stage shares of `LENGTH`
    torch.testing.assert_close(PUSH.costs(PUSHED), torch.tensor([0.03, 0.04 / LENGTH]))


def test_a_clean_success():
    rows = [FAR, BEHIND, PUSHED, INSIDE]
    signals = {name: torch.stack([row[name] for row in rows]) for name in FAR}
    assert PUSH.current_stage(signals).tolist() == [0, 1, 1, 2]
    assert [part[:4] for part in segment(PUSH, signals)] == [(0, 0, 1, True), (1, 1, 3, True)]
    potential = PUSH.potential(signals)
    assert (potential.diff() > 0).all() and potential[-1] == 1
