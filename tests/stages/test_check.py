"""`check` on plans with one mistake each, and on a sound one."""

import dataclasses
import math

import pytest
import torch

from trl_stare.stages import PlanReport, Stage, StagePlan, check, get_plan, succeeded
from trl_stare.stages.measures import is_over_goal

STACK_CUBE = get_plan("StackCube-v1")


def row(tcp, cube, contact=False, grasped=False, success=False):
    """One moment of StackCube-v1: the cube rests at z = 0.02, the goal is 0.2 m away and 0.04 m up."""
    return {
        "tcp_position": torch.tensor(tcp),
        "object_position": torch.tensor(cube),
        "goal_position": torch.tensor([0.2, 0.0, 0.06]),
        "object_lift": torch.tensor([cube[2] - 0.02]),
        "is_contact": torch.tensor(contact),
        "is_grasped": torch.tensor(grasped),
        "success": torch.tensor(success),
    }


FAR = row((0.0, 0.0, 0.2), (0.0, 0.0, 0.02))
NEAR = row((0.0, 0.0, 0.1), (0.0, 0.0, 0.02))
TOUCH = row((0.0, 0.0, 0.03), (0.0, 0.0, 0.02), contact=True)
HOLD = row((0.0, 0.0, 0.02), (0.0, 0.0, 0.02), contact=True, grasped=True)
LIFTED = row((0.0, 0.0, 0.08), (0.0, 0.0, 0.08), contact=True, grasped=True)
OVER = row((0.2, 0.0, 0.09), (0.2, 0.0, 0.09), contact=True, grasped=True)
LET_GO = row((0.2, 0.0, 0.12), (0.2, 0.0, 0.06))
STACKED = row((0.2, 0.0, 0.12), (0.2, 0.0, 0.06), success=True)


def episode(*rows):
    return {name: torch.stack([moment[name] for moment in rows]) for name in rows[0]}


GOOD = episode(FAR, NEAR, TOUCH, HOLD, LIFTED, OVER, LET_GO, STACKED)
MISSED = episode(FAR, NEAR, FAR, NEAR)
DROPPED = episode(FAR, TOUCH, HOLD, LIFTED, NEAR, NEAR)
EPISODES = [GOOD, GOOD, MISSED, DROPPED]


def changed(stage, **fields):
    """StackCube-v1's plan with other fields for one stage."""
    stages = [dataclasses.replace(part, **fields) if part.name == stage else part for part in STACK_CUBE.stages]
    return StagePlan(STACK_CUBE.task, tuple(stages))


def found(report: PlanReport):
    return {(finding.severity, finding.kind, finding.stage): finding.episodes for finding in report.findings}


def test_a_sound_plan_has_no_error():
    report = check(STACK_CUBE, EPISODES)
    assert report.ok and report.errors == ()
    # the goal stands still in these few rows, and that is worth a note
    assert found(report) == {("note", "dead_signal", None): (0, 1, 2, 3)}
    assert "'goal_position', read by Transport, Stack" in str(report)
    assert report.passed == ((3, 4), (3, 3), (2, 3), (2, 2)) and report.num_successes == 2
    assert str(report).startswith("StackCube-v1: 0 error(s), 1 note(s) in 4 episode(s), 2 of them successful")
    assert "Reach 3/4, Grasp 3/3, Transport 2/3, Stack 2/2" in str(report)


def test_an_unreachable_third_stage_as_grape_shipped_one():
    """GRAPE's labeller (arXiv 2411.19309) had a third stage that no episode could end. Here: Transport wants the cube over
    the goal and, at once, on the table, where the other cube stands."""

    def lies_at_goal(signals):
        over = is_over_goal(signals, radius=0.05, height=-1.0)
        return over & (signals["object_lift"][..., 0] < 0.01)

    report = check(changed("Transport", done=lies_at_goal), EPISODES)
    assert not report.ok
    kinds = found(report)
    assert kinds[("error", "never_left", "Transport")] == (0, 1)
    assert kinds[("error", "never_entered", "Stack")] == (0, 1)
    assert "error: never_left [Transport], episodes 0-1: its event never holds; 2 success(es)" in str(report)
    # errors first
    assert [finding.severity for finding in report.findings] == ["error", "error", "note"]


def test_an_unreachable_stage_shows_also_without_a_success():
    plan = changed("Grasp", done=lambda s: s["is_grasped"] & (s["object_lift"][..., 0] > 1.0))
    report = check(plan, [episode(FAR, TOUCH, LIFTED, OVER, OVER)])
    assert ("error", "never_left", "Grasp") in found(report)


def test_a_stage_that_is_merely_hard_is_a_note():
    report = check(STACK_CUBE, [MISSED, DROPPED])
    assert report.ok
    kinds = found(report)
    assert kinds[("note", "never_left", "Transport")] == (1,)
    assert kinds[("note", "never_entered", "Stack")] == (0, 1)
    assert kinds[("note", "no_success", "Stack")] == (0, 1)


def test_an_event_that_always_holds_empties_its_stage():
    kinds = found(check(changed("Reach", done=lambda s: s["is_contact"] | True), EPISODES))
    assert kinds[("error", "never_entered", "Reach")] == (0, 1, 2, 3)


def test_equal_events():
    grasp = changed("Grasp", done=STACK_CUBE.stages[0].done, reads=STACK_CUBE.stages[0].reads + ("object_lift",))
    kinds = found(check(grasp, EPISODES))
    assert kinds[("error", "equal_events", "Grasp")] == (0, 1, 3)
    assert kinds[("error", "never_entered", "Grasp")] == (0, 1, 3)


def test_events_out_of_order():
    """Reach ends only when the cube is let go at the goal: Grasp and Transport come first, and the potential falls back."""
    done = STACK_CUBE.stages[2].done
    reads = (*STACK_CUBE.stages[0].reads, *STACK_CUBE.stages[2].reads)
    plan = changed("Reach", done=lambda s: done(s) & ~s["is_grasped"], reads=reads)
    early = [finding for finding in check(plan, EPISODES).errors if finding.kind == "out_of_order"]
    assert [(finding.stage, finding.episodes) for finding in early] == [("Reach", (0, 1, 3)), ("Reach", (0, 1))]
    assert ["event of Grasp" in early[0].message, "event of Transport" in early[1].message] == [True, True]


def test_a_potential_that_falls_where_a_stage_is_passed():
    """Reach's event is first true at the only moment at which Transport's is not."""
    reach = changed("Reach", done=lambda s: s["is_contact"] & ~s["is_grasped"])
    played = episode(FAR, OVER, TOUCH, LIFTED, OVER, LET_GO, STACKED)
    kinds = found(check(reach, [played]))
    assert kinds[("error", "potential_falls", "Reach")] == (0,)


def test_the_literal_potential_falls_at_boundaries():
    report = check(STACK_CUBE, EPISODES, form="literal")
    assert ("error", "potential_falls", "Grasp") in found(report)


def test_success_without_an_event_is_what_the_plan_adds():
    short = episode(FAR, TOUCH, LIFTED, STACKED)
    late = changed("Transport", done=lambda s: STACK_CUBE.stages[2].done(s) & s["is_grasped"],
                   reads=STACK_CUBE.stages[3].reads + ("object_lift",))  # fmt: skip
    assert found(check(late, [GOOD, GOOD, short]))[("note", "skipped", "Transport")] == (2,)
    assert ("error", "skipped", "Transport") in found(check(late, [GOOD, short, short]))


def test_a_stage_mostly_passed_in_no_time():
    quick = episode(FAR, NEAR, LIFTED, OVER, LET_GO, STACKED)
    kinds = found(check(STACK_CUBE, [quick, quick, GOOD]))
    assert kinds[("note", "zero_steps", "Grasp")] == (0, 1)


def test_a_distance_that_does_not_fall():
    plan = changed("Transport", distance=lambda s: s["object_position"][..., 0].abs())
    report = check(plan, EPISODES)
    assert found(report)[("error", "distance_does_not_fall", "Transport")] == (0, 1)


def test_steps_after_the_first_success_do_not_count():
    went_on = episode(FAR, NEAR, TOUCH, HOLD, LIFTED, OVER, LET_GO, STACKED, FAR, FAR)
    assert found(check(STACK_CUBE, [went_on])) == found(check(STACK_CUBE, [GOOD]))


def test_no_dead_signal_where_one_episode_differs():
    other = GOOD | {"goal_position": GOOD["goal_position"] + 0.01}
    assert found(check(STACK_CUBE, [GOOD, other])) == {}


def bad(name, index, value):
    broken = {key: tensor.clone() for key, tensor in GOOD.items()}
    broken[name][index] = value
    return broken


@pytest.mark.parametrize(
    ("episodes", "message"),
    [
        ([], "`episodes` must hold the signals of one or more episodes, got none"),
        (
            [GOOD, {name: value for name, value in GOOD.items() if name != "is_grasped"}],
            r"`episodes\[1\]` must contain .* but \['is_grasped'\] are missing",
        ),
        (
            [GOOD, GOOD, bad("object_position", (3, 1), math.nan)],
            r"`signals\['object_position'\]` of task 'StackCube-v1' .* got nan at step 3 of episodes\[2\]",
        ),
        ([bad("object_lift", (0, 0), math.inf)], r"\['object_lift'\].* got inf at step 0 of episodes\[0\]"),
        ([FAR], r"`episodes\[0\]\['.*'\]` must be of one trajectory .*got"),
        ([episode(FAR)], r"`episodes\[0\]\['.*'\]` must be of one trajectory of one or more steps"),
        (
            [GOOD | {"object_lift": GOOD["object_lift"][1:]}],
            r"`episodes\[0\]\['object_lift'\]` must be .* got \[7, 1\]",
        ),
    ],
)
def test_bad_episodes_are_named(episodes, message):
    with pytest.raises(ValueError, match=message):
        check(STACK_CUBE, episodes)


def test_two_stages_are_enough():
    push = StagePlan(
        "Push-v0",
        (
            Stage(name="Reach", done=lambda s: s["touch"], distance=lambda s: s["gap"][..., 0], scale=0.3,
                  reads=("touch", "gap")),
            Stage(name="Push", done=succeeded, distance=lambda s: s["way"][..., 0], scale=0.3, reads=("way", "success")),
        ),
    )  # fmt: skip
    signals = {
        "touch": torch.tensor([False, False, True, True]),
        "gap": torch.tensor([[0.2], [0.1], [0.0], [0.0]]),
        "way": torch.tensor([[0.3], [0.3], [0.2], [0.0]]),
        "success": torch.tensor([False, False, False, True]),
    }
    assert check(push, [signals]).findings == ()
