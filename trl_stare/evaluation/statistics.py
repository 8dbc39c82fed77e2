"""What a success rate of `k` out of `n` episodes says, and whether two policies differ on the same episodes.

Knows counts and booleans only: nothing of episodes, stages or files.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import NamedTuple

from scipy.stats import binomtest, nct, norm, t


@dataclass(frozen=True)
class Proportion:
    """`k` successes in `n` trials.

    Args:
        k (`int`): successes, `0 <= k <= n`.
        n (`int`): trials, at least 1: no trials have no rate.

    Example: `Proportion(246, 256).rate` is 0.961 and `.wilson()` is (0.930, 0.979).
    """

    k: int
    n: int

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError(f"`n` must be at least 1, got {self.n}. A rate needs at least one trial.")
        if not 0 <= self.k <= self.n:
            raise ValueError(f"`k` must be between 0 and n = {self.n}, got {self.k}.")

    @classmethod
    def of(cls, outcomes: Sequence[bool]) -> Proportion:
        """Count the `True` ones. Example: `Proportion.of([True, False])` is `Proportion(1, 2)`."""
        return cls(sum(map(bool, outcomes)), len(outcomes))

    @property
    def rate(self) -> float:
        """`k / n`, in [0, 1]."""
        return self.k / self.n

    def wilson(self, confidence: float = 0.95) -> tuple[float, float]:
        """Wilson's score interval (E. B. Wilson, JASA 22, 1927), without continuity correction, in [0, 1]."""
        interval = binomtest(self.k, self.n).proportion_ci(confidence_level=confidence, method="wilson")
        return float(interval.low), float(interval.high)

    def __str__(self) -> str:
        """As every table shows it. Example: `"96.1 % [93.0, 97.9]"`."""
        return format_rate(self.rate, self.wilson())


def format_rate(rate: float, interval: Sequence[float]) -> str:
    """Percentages. Example: `format_rate(0.961, (0.930, 0.979))` is `"96.1 % [93.0, 97.9]"`."""
    return f"{100 * rate:.1f} % [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"


class McNemar(NamedTuple):
    """The exact McNemar test of two policies that played the same episodes.

    Attributes:
        b_only (`int`): episodes that only `b` solved.
        a_only (`int`): episodes that only `a` solved.
        p_value (`float`): two-sided, under the null that `b_only` is Binomial(`b_only + a_only`, 1/2).
    """

    b_only: int
    a_only: int
    p_value: float


def mcnemar_exact(a: Sequence[bool], b: Sequence[bool]) -> McNemar:
    """Compare paired outcomes by the exact McNemar test (Q. McNemar, Psychometrika 12, 1947; binomial form).

    Args:
        a (`Sequence[bool]`): outcomes of one policy.
        b (`Sequence[bool]`): outcomes of the other, on the same episodes in the same order.

    Raises:
        ValueError: if there are no episodes, or not equally many.

    Example: where `b` alone solves 8 episodes and `a` alone 1, p = 2 * (1 + 9) / 2**9 = 0.0390625. Where the two never
    differ nothing speaks against equality and p = 1.
    """
    if len(a) != len(b):
        raise ValueError(f"`a` and `b` must be outcomes of the same episodes, got {len(a)} and {len(b)} of them.")
    if not len(a):
        raise ValueError("`a` and `b` must hold at least one episode, got none. Evaluate both policies first.")
    b_only = sum(bool(y) and not x for x, y in zip(a, b, strict=True))
    a_only = sum(bool(x) and not y for x, y in zip(a, b, strict=True))
    discordant = b_only + a_only
    p_value = float(binomtest(b_only, discordant, 0.5).pvalue) if discordant else 1.0
    return McNemar(b_only, a_only, p_value)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values of several tests, corrected so that one of them is below 0.05 by chance in at most 5 % of such tables.

    S. Holm, Scandinavian Journal of Statistics 6 (1979) 65-70: the i-th smallest of m is multiplied by `m - i + 1`, and none may
    become smaller than the one before it.

    Example: `holm([0.01, 0.04, 0.03])` is `[0.03, 0.06, 0.06]`.
    """
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


class Difference(NamedTuple):
    """How much more often one of two policies solved the same episodes, in [-1, 1].

    Attributes:
        value (`float`): rate of `b` minus rate of `a`.
        low (`float`): lower end of the 95 % interval. high (`float`): upper end.
    """

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        """Example: `"+12.0 points [+3.1, +20.4]"`."""
        return f"{100 * self.value:+.1f} points [{100 * self.low:+.1f}, {100 * self.high:+.1f}]"


def paired_difference(a: Sequence[bool], b: Sequence[bool], confidence: float = 0.95) -> Difference:
    """Difference of two rates on the same episodes, with Newcombe's interval for paired proportions.

    Method 10 of R. G. Newcombe, Statistics in Medicine 17 (1998) 2635-2650: the Wilson intervals of both rates, put together by squaring and adding, with their correlation phi, which is corrected
    for continuity where it is positive.

    Args:
        a (`Sequence[bool]`): outcomes of one policy.
        b (`Sequence[bool]`): outcomes of the other, on the same episodes in the same order.
        confidence (`float`): of the interval.

    Raises:
        ValueError: if there are no episodes, or not equally many.

    Example: of 21 episodes both solve 1, `a` alone 7, `b` alone 1, neither 12: -0.286 [-0.507, -0.026] (M. W. Fagerland,
    S. Lydersen, P. Laake, Statistics in Medicine 33 (2014) 2850-2875).
    """
    test, n = mcnemar_exact(a, b), len(a)
    both = sum(bool(x) and bool(y) for x, y in zip(a, b, strict=True))
    neither = n - both - test.a_only - test.b_only
    first, second = Proportion.of(a), Proportion.of(b)
    (low_a, high_a), (low_b, high_b) = first.wilson(confidence), second.wilson(confidence)
    product = first.k * (n - first.k) * second.k * (n - second.k)
    raw = both * neither - test.a_only * test.b_only
    phi = (max(raw - n / 2, 0.0) if raw > 0 else raw) / math.sqrt(product) if product else 0.0
    value = (test.b_only - test.a_only) / n

    def distance(down: float, up: float) -> float:
        return math.sqrt(max(0.0, down**2 - 2 * phi * down * up + up**2))

    low = value - distance(second.rate - low_b, high_a - first.rate)
    high = value + distance(high_b - second.rate, first.rate - low_a)
    return Difference(value, low, high)


def mean_difference(differences: Sequence[float], confidence: float = 0.95) -> Difference:
    """Mean of the differences that several training runs gave, with Student's t interval: what runs with other seeds may give.

    Episodes of one run say nothing of how much training itself varies: two runs with one and the same method may differ by more
    than any test on their episodes allows.

    Args:
        differences (`Sequence[float]`): one of each pair of training runs, in [-1, 1].
        confidence (`float`): of the interval, which does not end at 1.

    Raises:
        ValueError: if there are fewer than two.

    Example: +12.0 and -1.3 points: +5.3 [-79.1, +89.8]; two training seeds are few.
    """
    if len(differences) < 2:
        raise ValueError(f"`differences` must be of at least two training runs, got {len(differences)}.")
    value = mean(differences)
    error = stdev(differences) / math.sqrt(len(differences))
    margin = float(t.ppf((1 + confidence) / 2, len(differences) - 1)) * error
    return Difference(value, value - margin, value + margin)


def runs_needed(spread: float, difference: float, *, alpha: float = 0.05, power: float = 0.8) -> int:
    """Pairs of training runs that Student's t test needs to find a difference, two-sided, by the noncentral t distribution.

    Args:
        spread (`float`): standard deviation of the runs' differences, greater than 0.
        difference (`float`): their mean, not 0.
        alpha (`float`): level of the test. power (`float`): probability to find the difference.

    Raises:
        ValueError: if `spread` is not positive, or `difference` is 0.

    Example: differences of 5 points on average that vary by 6: 14 runs. (G*Power 3: effect size 0.5, n = 34.)
    """
    if spread <= 0 or difference == 0:
        raise ValueError(f"`spread` must be positive and `difference` not 0, got {spread} and {difference}.")
    effect = abs(difference) / spread

    def finds(n: int) -> bool:
        limit = t.ppf(1 - alpha / 2, n - 1)
        return bool(nct.sf(limit, n - 1, effect * math.sqrt(n)) >= power)

    n = 2
    while not finds(n):
        n *= 2
    return bisect_left(range(n), True, lo=max(n // 2, 2), key=finds)


def episodes_needed(discordant: float, difference: float, *, alpha: float = 0.05, power: float = 0.8) -> int:
    """Episodes that McNemar's test needs to find a difference, two-sided, were the rates as given.

    R. J. Connor, Biometrics 43 (1987) 207-211: `n = (z_alpha sqrt(p) + z_power sqrt(p - d^2))^2 / d^2`.

    Args:
        discordant (`float`): `p`, share of the episodes that only one of the two policies solves.
        difference (`float`): `d`, difference of the rates; not 0, and at most `discordant` in size.
        alpha (`float`): level of the test. power (`float`): with which probability the difference is to be found.

    Raises:
        ValueError: if such rates do not exist.

    Example: one alone solves 25 % and the other alone 15 %: `episodes_needed(0.4, 0.1)` is 312.
    """
    if not 0 < abs(difference) <= discordant <= 1:
        raise ValueError(
            f"`difference` must be in [-discordant, discordant] and not 0, got {difference} and {discordant}."
        )
    z_alpha, z_power = norm.ppf(1 - alpha / 2), norm.ppf(power)
    root = z_alpha * math.sqrt(discordant) + z_power * math.sqrt(discordant - difference**2)
    return math.ceil(root**2 / difference**2)
