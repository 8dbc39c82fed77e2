"""Methods by several training runs: by hand, and that the test of episodes claims more than they allow."""

import pytest

from trl_stare.evaluation import Comparison, compare_runs, runs_table


def comparison(what: str, both: int, only_a: int, only_b: int, neither: int) -> Comparison:
    a = [True] * both + [True] * only_a + [False] * only_b + [False] * neither
    b = [True] * both + [False] * only_a + [True] * only_b + [False] * neither
    return Comparison.of(what, a, b)


def runs(*counts):
    return [
        {"PushCube-v1": [comparison("success_once", *each), comparison("passed Reach", 3, 0, 1, 6)]} for each in counts
    ]


# of 100 episodes +12, -2 and +11 points
VARYING = runs((20, 5, 17, 58), (20, 10, 8, 62), (20, 5, 16, 59))


def test_training_varies_more_than_a_test_of_episodes_knows():
    """Mean 7, standard deviation sqrt(61), Student's t for three runs 4.3027: 7 +- 19.4."""
    assert VARYING[0]["PushCube-v1"][0].verdict.startswith("B is better")
    success, reach = compare_runs(VARYING)["PushCube-v1"]
    assert success.difference == pytest.approx((0.07, 0.07 - 0.19402, 0.07 + 0.19402), abs=1e-5)
    assert (
        success.verdict
        == "not distinguishable over 3 training runs, you need about 12 if the difference is as it seems"
    )
    assert reach.verdict == (
        "not distinguishable over 3 training runs: all differ by the same, which does not tell how much training varies"
    )


@pytest.mark.parametrize(
    ("counts", "verdict"),
    [
        (((20, 5, 17, 58), (20, 5, 16, 59), (20, 5, 18, 57)), "B is better over 3 training runs"),
        (((20, 17, 5, 58), (20, 16, 5, 59), (20, 18, 5, 57)), "A is better over 3 training runs"),
        (((20, 5, 10, 65), (20, 10, 5, 65)), "not distinguishable over 2 training runs, and no difference was seen"),
    ],
)
def test_verdicts(counts, verdict):
    found = compare_runs(runs(*counts))
    assert found["PushCube-v1"][0].verdict == verdict
    assert f"| {verdict} |" in runs_table(found)


def test_the_table_has_a_line_for_each_outcome():
    success, reach = runs_table(compare_runs(VARYING)).splitlines()[2:4]
    cells = [
        "PushCube-v1",
        "success_once",
        "3",
        "26.7 %",
        "33.7 %",
        "+12.0, -2.0, +11.0",
        "+7.0 points [-12.4, +26.4]",
    ]
    assert [cell.strip() for cell in success.split("|")][1:8] == cells
    assert "passed Reach" in reach and "+10.0, +10.0, +10.0" in reach


def test_what_cannot_be_put_together_is_refused():
    with pytest.raises(ValueError, match="at least two pairs of training runs, got 1. Use `compare`"):
        compare_runs(VARYING[:1])
    other = {"PullCube-v1": VARYING[0]["PushCube-v1"]}
    with pytest.raises(ValueError, match="must be of the same tasks and stages, got .*PullCube-v1"):
        compare_runs([VARYING[0], other])
