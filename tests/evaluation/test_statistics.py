"""Intervals and the paired test against published and hand-computed values."""

import math

import pytest

from trl_stare.evaluation import Proportion, mcnemar_exact, mean_difference, runs_needed

Z = 1.959963984540054


def outcomes(both: int, b_only: int, a_only: int, neither: int) -> tuple[list[bool], list[bool]]:
    a = [True] * both + [False] * b_only + [True] * a_only + [False] * neither
    b = [True] * both + [True] * b_only + [False] * a_only + [False] * neither
    return a, b


@pytest.mark.parametrize(
    ("k", "n", "low", "high"),
    [(246, 256, 93.0, 97.9), (250, 256, 95.0, 98.9), (240, 256, 90.1, 96.1), (94, 96, 92.7, 99.4)],
)
def test_wilson_intervals_of_published_rates(k, n, low, high):
    interval = Proportion(k, n).wilson()
    assert [round(100 * end, 1) for end in interval] == [low, high]


@pytest.mark.parametrize(("k", "n"), [(0, 1), (0, 300), (7, 9), (150, 300), (300, 300)])
def test_wilson_is_its_closed_form(k, n):
    rate = k / n
    centre = (rate + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * math.sqrt(rate * (1 - rate) / n + Z**2 / (4 * n**2))
    assert Proportion(k, n).wilson() == pytest.approx((centre - half, centre + half), abs=1e-9)


def test_wider_confidence_gives_a_wider_interval():
    low, high = Proportion(30, 40).wilson()
    lower, higher = Proportion(30, 40).wilson(confidence=0.99)
    assert lower < low < 0.75 < high < higher


def test_a_proportion_reads_as_percentages():
    assert str(Proportion(246, 256)) == "96.1 % [93.0, 97.9]"
    assert Proportion.of([True, False, True, True]) == Proportion(3, 4)


@pytest.mark.parametrize(
    ("k", "n", "message"), [(0, 0, "`n` must be at least 1"), (-1, 4, "between"), (5, 4, "between")]
)
def test_impossible_counts_are_refused(k, n, message):
    with pytest.raises(ValueError, match=message):
        Proportion(k, n)


@pytest.mark.parametrize(
    ("b_only", "a_only", "p_value"),
    [
        (8, 1, 2 * (1 + 9) / 2**9),
        (1, 8, 2 * (1 + 9) / 2**9),
        (5, 0, 2 / 2**5),
        (3, 3, 1.0),
        (0, 0, 1.0),  # the two never differ
        (10, 2, 2 * (1 + 12 + 66) / 2**12),
    ],
)
def test_mcnemar_by_hand(b_only, a_only, p_value):
    test = mcnemar_exact(*outcomes(20, b_only, a_only, 5))
    assert (test.b_only, test.a_only) == (b_only, a_only)
    assert test.p_value == pytest.approx(p_value)


def test_agreeing_episodes_do_not_change_the_test():
    assert mcnemar_exact(*outcomes(0, 9, 2, 0)) == mcnemar_exact(*outcomes(500, 9, 2, 300))


@pytest.mark.parametrize(("a", "b", "message"), [([], [], "at least one episode"), ([True], [True, False], "1 and 2")])
def test_mcnemar_refuses_what_is_not_paired(a, b, message):
    with pytest.raises(ValueError, match=message):
        mcnemar_exact(a, b)


def test_a_mean_over_training_seeds_by_hand():
    # Student's t for three runs, 4.303; standard deviation 2, so 2 / sqrt(3) of the mean
    found = mean_difference([0.01, 0.03, 0.05])
    assert found == pytest.approx((0.03, 0.03 - 4.3027 * 0.02 / 3**0.5, 0.03 + 4.3027 * 0.02 / 3**0.5), abs=1e-5)
    assert str(mean_difference([0.12, -0.013])) == "+5.3 points [-79.1, +89.8]"
    with pytest.raises(ValueError, match="at least two training runs, got 1"):
        mean_difference([0.1])


@pytest.mark.parametrize(("effect", "runs"), [(0.5, 34), (0.8, 15), (1.0, 10), (2.0, 5), (0.01, 78_491)])
def test_runs_needed_are_those_of_a_power_table(effect, runs):
    """Paired t test, two-sided, 5 %, power 80 % (G*Power 3); for small effects the normal approximation, 7.849 / effect^2 + 2."""
    assert runs_needed(0.06, 0.06 * effect) == runs_needed(0.06, -0.06 * effect) == pytest.approx(runs, rel=1e-4)


@pytest.mark.parametrize(("spread", "difference"), [(0.0, 0.1), (0.1, 0.0)])
def test_runs_needed_of_nothing(spread, difference):
    with pytest.raises(ValueError, match="`spread` must be positive and `difference` not 0"):
        runs_needed(spread, difference)
