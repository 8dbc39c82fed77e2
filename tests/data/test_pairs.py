"""Which pairs are made of which episodes: tables of literal expectations on a plan of two stages."""

from dataclasses import replace

import pytest
import torch

from trl_stare.data.pairs import OUTCOMES, build_pairs, format_yield, load_yield, save_yield, yield_file
from trl_stare.data.trajectory import Trajectory
from trl_stare.stages import Stage, StagePlan, succeeded

PLAN = StagePlan(
    "Toy-v1",
    (
        Stage(
            name="Reach",
            done=lambda s: s["distance"][..., 0] <= 0.0,
            distance=lambda s: s["distance"][..., 0],
            scale=1.0,
            reads=("distance",),
        ),
        Stage(
            name="Finish",
            done=succeeded,
            distance=lambda s: s["rest"][..., 0],
            scale=1.0,
            reads=("rest", "success"),
        ),
    ),
)


def episode(
    distance, rest, success_at=None, *, seed=1, instruction="go", starts=(0, 2, 4), task="Toy-v1"
) -> Trajectory:
    """`T = len(distance) - 1` steps; the stages read nothing but these two distances and the success."""
    rows, steps = len(distance), len(distance) - 1
    success = torch.zeros(rows, dtype=torch.bool)
    if success_at is not None:
        success[success_at:] = True
    starts = torch.tensor([start for start in starts if start < steps])
    return Trajectory(
        task=task,
        instruction=instruction,
        seed=seed,
        policy="toy",
        images=torch.zeros(len(starts), 4, 4, 3, dtype=torch.uint8),
        state=torch.zeros(len(starts), 2),
        starts=starts,
        actions=torch.zeros(steps, 2),
        labels=torch.zeros(steps, 2),
        trace=torch.zeros(len(starts), 4, dtype=torch.int64),
        logps=None,
        features=None,
        final_image=torch.zeros(4, 4, 3, dtype=torch.uint8),
        final_state=torch.zeros(2),
        signals={"distance": torch.tensor(distance)[:, None], "rest": torch.tensor(rest)[:, None], "success": success},
        reward=success[1:].float(),
        terminated=success_at is not None,
        truncated=success_at is None,
    )


# Reach costs the mean of distance over the rows after the first up to its exit, Finish the same of rest.
FAST = episode(
    [1.0, 0.5, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 0.5, 0.0], success_at=4
)  # Reach [0, 2) 0.25, Finish [2, 4) 0.25
SLOW = episode(
    [1.0, 1.0, 0.5, 0.0, 0.0, 0.0], [1.0] * 4 + [0.5, 0.0], success_at=5
)  # Reach [0, 3) 0.5, Finish [3, 5) 0.25
STUCK = episode([1.0, 0.5, 0.0, 0.0, 0.0], [1.0] * 5)  # Reach [0, 2) 0.25, Finish [2, 4) failed at 1.0
LOST = episode([1.0] * 5, [1.0] * 5)  # Reach [0, 4) failed at 1.0


def table(pairs):
    """stage, chosen, rejected, chosen slice, rejected slice, reason."""
    return [
        (
            p.stage_name,
            p.chosen,
            p.rejected,
            (p.chosen_start, p.chosen_stop),
            (p.rejected_start, p.rejected_stop),
            p.reason,
        )
        for p in pairs
    ]


def counts(**given):
    return dict.fromkeys(OUTCOMES, 0) | given


CASES = {
    "passed beats failed, and the failed side takes no part in what follows": (
        [STUCK, LOST],
        [("Reach", 0, 1, (0, 2), (0, 4), "passed")],
        {"Reach": counts(made=1), "Finish": counts(not_reached=1)},
    ),
    "both passed: the lower cost, whatever the order; Finish fails in one": (
        [SLOW, STUCK],
        [("Reach", 1, 0, (0, 2), (0, 3), "cost"), ("Finish", 0, 1, (3, 5), (2, 4), "passed")],
        {"Reach": counts(made=1), "Finish": counts(made=1)},
    ),
    "success against success: a pair where costs differ, none where they do not": (
        [FAST, SLOW],
        [("Reach", 0, 1, (0, 2), (0, 3), "cost")],
        {"Reach": counts(made=1), "Finish": counts(gap_too_small=1)},
    ),
    "no success at all still gives pairs": (
        [STUCK, STUCK, LOST],
        [("Reach", 0, 2, (0, 2), (0, 4), "passed"), ("Reach", 1, 2, (0, 2), (0, 4), "passed")],
        {"Reach": counts(made=2, gap_too_small=1), "Finish": counts(not_reached=2, both_failed=1)},
    ),
    "both failed": ([LOST, LOST], [], {"Reach": counts(both_failed=1), "Finish": counts(not_reached=1)}),
    "another start": (
        [STUCK, episode([1.0] * 5, [1.0] * 5, seed=2)],
        [],
        {"Reach": counts(), "Finish": counts()},
    ),
    "another instruction": (
        [STUCK, episode([1.0] * 5, [1.0] * 5, instruction="stop")],
        [],
        {"Reach": counts(), "Finish": counts()},
    ),
    "a segment between two decisions is of the decision under way": (
        [STUCK, episode([1.0, 0.5, 0.0, 0.0], [1.0, 1.0, 1.0, 0.5], success_at=3, starts=(0,))],
        [("Finish", 1, 0, (2, 3), (2, 4), "passed")],
        {"Reach": counts(gap_too_small=1), "Finish": counts(made=1)},
    ),
    "an empty segment has nothing to learn from": (
        [LOST, episode([0.0, 0.0], [1.0, 1.0])],
        [],
        {"Reach": counts(no_decision=1), "Finish": counts(not_reached=1)},
    ),
}


@pytest.mark.parametrize(
    ("start", "stop", "decisions"),
    [(0, 5, [0, 1, 2]), (0, 2, [0]), (2, 4, [1]), (1, 3, [0, 1]), (3, 4, [1]), (4, 5, [2]), (1, 1, []), (2, 2, [])],
)
def test_every_decision_that_acts_in_a_slice_belongs_to_it(start, stop, decisions):
    """Steps 0 to 4, decisions of two steps, the last of one."""
    assert episode([1.0] * 6, [1.0] * 6).decisions_in(start, stop).tolist() == decisions


LATER_CASES = {
    "of two that passed, the one that passed more of what follows, at whatever cost; costs where that is equal": (
        [SLOW, STUCK, FAST],
        [
            ("Reach", 0, 1, (0, 3), (0, 2), "later"),
            ("Reach", 2, 0, (0, 2), (0, 3), "cost"),
            ("Reach", 2, 1, (0, 2), (0, 2), "later"),
            ("Finish", 0, 1, (3, 5), (2, 4), "passed"),
            ("Finish", 2, 1, (2, 4), (2, 4), "passed"),
        ],
        {"Reach": counts(made=3), "Finish": counts(made=2, gap_too_small=1)},
    ),
    "passing the stage itself comes first": (
        [LOST, STUCK],
        [("Reach", 1, 0, (0, 2), (0, 4), "passed")],
        {"Reach": counts(made=1), "Finish": counts(not_reached=1)},
    ),
    "as far, at equal cost": (
        [STUCK, STUCK],
        [],
        {"Reach": counts(gap_too_small=1), "Finish": counts(both_failed=1)},
    ),
}


BY_CHOICE = {"cost": CASES, "later": LATER_CASES}


@pytest.mark.parametrize(
    ("both_passed", "case"), [(choice, case) for choice in BY_CHOICE for case in BY_CHOICE[choice]]
)
def test_pairs(both_passed, case):
    trajectories, expected, yields = BY_CHOICE[both_passed][case]
    result = build_pairs(trajectories, PLAN, both_passed=both_passed, min_cost_gap=0.02)
    assert table(result.pairs) == expected
    assert result.yield_table == yields


def test_costs_and_identity_of_a_pair():
    (pair,) = build_pairs([SLOW, FAST], PLAN).pairs
    assert (pair.task, pair.instruction, pair.seed, pair.stage) == ("Toy-v1", "go", 1, 0)
    assert (pair.chosen_cost, pair.rejected_cost) == (0.25, 0.5)
    assert build_pairs([SLOW, FAST], PLAN, both_passed="cost").pairs == (pair,)  # the default


def test_the_gap_is_a_threshold():
    assert len(build_pairs([SLOW, FAST], PLAN, min_cost_gap=0.25).pairs) == 1
    assert len(build_pairs([SLOW, FAST], PLAN, min_cost_gap=0.26).pairs) == 0
    assert len(build_pairs([FAST, FAST], PLAN, min_cost_gap=0.0).pairs) == 0


def test_the_cap_holds_per_start_and_stage_and_counts_what_it_leaves_out():
    trajectories = [STUCK] * 3 + [LOST] * 3 + [episode([1.0] * 5, [1.0] * 5, seed=2), FAST]
    everything = build_pairs(trajectories, PLAN)
    capped = build_pairs(trajectories, PLAN, max_pairs_per_start=4, seed=3)
    assert everything.yield_table["Reach"]["made"] == 12
    assert (capped.yield_table["Reach"]["made"], capped.yield_table["Reach"]["capped"]) == (4, 8)
    assert set(capped.pairs) < set(everything.pairs)
    assert capped.pairs == build_pairs(trajectories, PLAN, max_pairs_per_start=4, seed=3).pairs
    assert any(build_pairs(trajectories, PLAN, max_pairs_per_start=4, seed=s).pairs != capped.pairs for s in range(5))


def test_balance_keeps_as_many_pairs_of_every_stage_as_the_rarest_has():
    trajectories = [FAST, STUCK, STUCK, LOST, LOST]
    everything = build_pairs(trajectories, PLAN)
    balanced = build_pairs(trajectories, PLAN, balance=True, seed=3)
    assert everything.yield_table == {
        "Reach": counts(made=6, gap_too_small=3, both_failed=1),
        "Finish": counts(made=2, not_reached=7, both_failed=1),
    }
    assert balanced.yield_table == {
        "Reach": counts(made=2, balanced=4, gap_too_small=3, both_failed=1),
        "Finish": counts(made=2, not_reached=7, both_failed=1),
    }
    assert [pair for pair in everything.pairs if pair in balanced.pairs] == list(balanced.pairs)
    assert [pair.stage_name for pair in balanced.pairs] == ["Reach", "Reach", "Finish", "Finish"]
    assert balanced.pairs == build_pairs(trajectories, PLAN, balance=True, seed=3).pairs
    assert any(build_pairs(trajectories, PLAN, balance=True, seed=s).pairs != balanced.pairs for s in range(5))


def test_a_stage_without_pairs_does_not_empty_the_others():
    balanced = build_pairs([STUCK, STUCK, LOST], PLAN, balance=True)
    assert [row["made"] for row in balanced.yield_table.values()] == [2, 0]
    assert build_pairs([LOST, LOST], PLAN, balance=True).pairs == ()


def test_the_balance_comes_after_the_cap():
    trajectories = [FAST, STUCK, STUCK, LOST, LOST]
    reach = build_pairs(trajectories, PLAN, max_pairs_per_start=3, balance=True).yield_table["Reach"]
    assert (reach["made"], reach["capped"], reach["balanced"]) == (2, 3, 1)


@pytest.mark.parametrize("objective", ["tpo-mean", "tpo-sum"])
def test_whole_trajectories_pair_success_with_failure(objective):
    result = build_pairs([LOST, FAST, SLOW, STUCK], PLAN, objective=objective)
    assert table(result.pairs) == [
        ("trajectory", 1, 0, (0, 4), (0, 4), "passed"),
        ("trajectory", 2, 0, (0, 5), (0, 4), "passed"),
        ("trajectory", 1, 3, (0, 4), (0, 4), "passed"),
        ("trajectory", 2, 3, (0, 5), (0, 4), "passed"),
    ]
    assert {(p.chosen_cost, p.rejected_cost) for p in result.pairs} == {(0.0, 0.0)}
    assert result.yield_table == {"trajectory": counts(made=4, both_failed=1, gap_too_small=1)}


def elsewhere(trajectory, seed, **fields):
    return replace(trajectory, seed=seed, **fields)


def test_a_stage_with_few_pairs_is_filled_from_other_starts():
    """Two starts, each with one that reaches Finish and one that does not: only across them can Finish be compared."""
    trajectories = [FAST, LOST, elsewhere(STUCK, 2), elsewhere(LOST, 2)]
    plain, filled = build_pairs(trajectories, PLAN), build_pairs(trajectories, PLAN, fill=True)
    assert table(plain.pairs) == [
        ("Reach", 0, 1, (0, 2), (0, 4), "passed"),
        ("Reach", 2, 3, (0, 2), (0, 4), "passed"),
    ]
    assert table(filled.pairs) == [*table(plain.pairs), ("Finish", 0, 2, (2, 4), (2, 4), "across")]
    assert [pair.seed for pair in filled.pairs] == [1, 2, 1], "the chosen side's"
    assert (filled.pairs[2].chosen_cost, filled.pairs[2].rejected_cost) == (0.25, 1.0)
    assert filled.yield_table == {"Reach": counts(made=2), "Finish": counts(not_reached=2, filled=1)}


def test_filling_stops_at_the_stage_with_most_and_takes_no_couple_twice():
    trajectories = [elsewhere(t, seed) for seed in range(20) for t in (FAST, STUCK, LOST, LOST)]
    result = build_pairs(trajectories, PLAN, min_cost_gap=float("inf"), fill=True, seed=3)
    # of each start two that reach and two that do not; FAST finishes and STUCK does not
    assert result.yield_table["Reach"] == counts(made=80, both_failed=20, gap_too_small=20)
    assert result.yield_table["Finish"] == counts(made=20, not_reached=100, filled=60)
    across = [pair for pair in result.pairs if pair.reason == "across"]
    assert len({(pair.chosen, pair.rejected) for pair in across}) == len(across) == 60
    for pair in across:
        assert pair.chosen % 4 == 0 and pair.rejected % 4 == 1 and pair.chosen // 4 != pair.rejected // 4
        assert pair.seed == trajectories[pair.chosen].seed
    assert len({pair.chosen for pair in across}) > 15, "spread over the episodes"
    given = {"min_cost_gap": float("inf"), "fill": True}
    assert result.pairs == build_pairs(trajectories, PLAN, **given, seed=3).pairs
    assert any(build_pairs(trajectories, PLAN, **given, seed=s).pairs != result.pairs for s in range(3))


def test_filling_goes_as_far_as_there_are_couples_of_one_instruction():
    other = elsewhere(STUCK, 3, instruction="stop")
    trajectories = [FAST, LOST, LOST, LOST, elsewhere(STUCK, 2), other]
    finish = build_pairs(trajectories, PLAN, fill=True).yield_table["Finish"]
    assert (finish["made"], finish["filled"]) == (0, 1)


@pytest.mark.parametrize("objective", ["tpo-mean", "tpo-sum"])
def test_whole_trajectories_have_nothing_to_fill(objective):
    trajectories = [FAST, LOST, elsewhere(FAST, 2), elsewhere(LOST, 2)]
    plain, filled = (build_pairs(trajectories, PLAN, objective=objective, fill=fill) for fill in (False, True))
    assert plain == filled and len(plain.pairs) == 2


def test_to_drop_pairs_and_to_add_them_is_refused():
    with pytest.raises(ValueError, match="`balance` and `fill` must not both be given"):
        build_pairs([FAST, SLOW], PLAN, balance=True, fill=True)


def test_filling_to_a_number_of_pairs():
    """Twenty starts with a success, a failure and two that do not even reach: whole trajectories are filled like any other stage."""
    trajectories = [elsewhere(t, seed) for seed in range(20) for t in (FAST, STUCK, LOST, LOST)]
    given = {"min_cost_gap": float("inf"), "fill": True}
    whole = build_pairs(trajectories, PLAN, objective="tpo-mean", fill_to=100, **given)
    assert whole.yield_table == {"trajectory": counts(made=60, both_failed=60, filled=40)}
    for pair in whole.pairs[60:]:
        assert pair.reason == "across" and pair.chosen % 4 == 0 != pair.rejected % 4
    few = build_pairs(trajectories, PLAN, fill_to=30, **given).yield_table
    assert [(row["made"], row["filled"]) for row in few.values()] == [(80, 0), (20, 10)], "none is taken away"
    for wrong in ({"fill_to": 0, "fill": True}, {"fill_to": 9}):
        with pytest.raises(ValueError, match="`fill_to` must be None or at least 1, and given with `fill`"):
            build_pairs(trajectories, PLAN, **wrong)


def test_every_comparison_is_accounted_for():
    trajectories = [FAST, SLOW, STUCK, LOST, STUCK]
    for row in build_pairs(trajectories, PLAN, max_pairs_per_start=2, balance=True).yield_table.values():
        assert sum(row.values()) == 5 * 4 // 2


def test_the_table_reads_as_text():
    lines = format_yield({"Reach": counts(made=12, both_failed=3)}).splitlines()
    assert lines[0].split() == ["stage", *OUTCOMES]
    assert lines[1].split() == ["Reach", "12", "0", "3", "0", "0", "0", "0", "0"]
    assert len(lines[0]) == len(lines[1])


def test_the_table_lies_beside_the_pairs(tmp_path):
    table = build_pairs([STUCK, LOST], PLAN).yield_table
    assert load_yield(tmp_path / "pairs") is None
    assert save_yield(table, tmp_path / "pairs") == yield_file(tmp_path / "pairs") == tmp_path / "pairs_yield.json"
    assert load_yield(tmp_path / "pairs") == table
    assert [path.name for path in tmp_path.iterdir()] == ["pairs_yield.json"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"objective": "dpo"}, "`objective`"),
        ({"both_passed": "luck"}, "`both_passed` must be one of"),
        ({"min_cost_gap": -1.0}, "`min_cost_gap`"),
        ({"max_pairs_per_start": 0}, "`max_pairs_per_start`"),
    ],
)
def test_arguments_out_of_range_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        build_pairs([FAST], PLAN, **change)


def test_episodes_of_another_task_are_refused():
    with pytest.raises(ValueError, match="'Other-v1' at 1"):
        build_pairs([FAST, episode([1.0] * 5, [1.0] * 5, task="Other-v1")], PLAN)
