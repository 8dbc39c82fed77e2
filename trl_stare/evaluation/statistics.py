"""What a success rate of `k` out of `n` episodes says, and whether two policies differ on the same episodes.

Knows counts and booleans only: nothing of episodes, stages or files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from scipy.stats import binomtest


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
