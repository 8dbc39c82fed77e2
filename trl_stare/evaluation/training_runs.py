"""Two methods by several training runs of each: what two checkpoints alone cannot say about the methods that made them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev

from trl_stare.evaluation.comparison import Comparison
from trl_stare.evaluation.report import markdown_table
from trl_stare.evaluation.statistics import Difference, mean_difference, runs_needed

ROUNDING = 1e-9
"""Differences of rates smaller than this are none."""


@dataclass(frozen=True)
class RunsComparison:
    """Outcomes of two methods, each trained several times.

    Args:
        what (`str`): what was compared, e.g. `"success_once"`.
        runs (`tuple[Comparison, ...]`): one for each training run of `a` and its counterpart of `b`; two at least.
    """

    what: str
    runs: tuple[Comparison, ...]

    @property
    def differences(self) -> list[float]:
        """`b` minus `a` of each pair of training runs."""
        return [run.difference.value for run in self.runs]

    @property
    def difference(self) -> Difference:
        """Their mean, with Student's interval."""
        return mean_difference(self.differences)

    @property
    def verdict(self) -> str:
        """A sentence. Example: `"not distinguishable over 3 training runs, you need about 14 if the difference is as it seems"`."""
        count, difference, spread = len(self.runs), self.difference, stdev(self.differences)
        none = f"not distinguishable over {count} training runs"
        if spread < ROUNDING:
            return f"{none}: all differ by the same, which does not tell how much training varies"
        if not difference.low <= 0 <= difference.high:
            return f"{'B' if difference.value > 0 else 'A'} is better over {count} training runs"
        if abs(difference.value) < ROUNDING:
            return f"{none}, and no difference was seen"
        return f"{none}, you need about {runs_needed(spread, difference.value):,} if the difference is as it seems"


def compare_runs(runs: Sequence[Mapping[str, Sequence[Comparison]]]) -> dict[str, list[RunsComparison]]:
    """Put together what [`compare`] found for each pair of training runs.

    Args:
        runs (`Sequence[Mapping]`): its answers, of the same tasks.

    Raises:
        ValueError: if there are fewer than two, or they are of other tasks or stages.

    Example: three runs with each of two methods differ by +12.0, -1.3 and +11.0 points (PushCube-v1, docs/results.md): +7.2 points
    [-11.2, +25.7], not distinguishable, although of the first two checkpoints alone (n = 300) one is better with p = 0.00009.
    """
    if len(runs) < 2:
        raise ValueError(f"`runs` must be of at least two pairs of training runs, got {len(runs)}. Use `compare`.")
    shapes = [{task: [part.what for part in parts] for task, parts in run.items()} for run in runs]
    if any(shape != shapes[0] for shape in shapes):
        raise ValueError(f"`runs` must be of the same tasks and stages, got {shapes}.")
    return {
        task: [RunsComparison(part.what, tuple(run[task][index] for run in runs)) for index, part in enumerate(parts)]
        for task, parts in runs[0].items()
    }


def runs_table(found: Mapping[str, Sequence[RunsComparison]], *, names: str = "task") -> str:
    """All comparisons as Markdown. `names` heads the first column: what those in `found` name."""
    header = (names, "what", "runs", "A", "B", "B - A of each run, points", "mean", "verdict")
    rows = [
        (
            task,
            part.what,
            len(part.runs),
            *(f"{100 * mean(getattr(run, side).rate for run in part.runs):.1f} %" for side in "ab"),
            ", ".join(f"{100 * value:+.1f}" for value in part.differences),
            part.difference,
            part.verdict,
        )
        for task, parts in found.items()
        for part in parts
    ]
    note = (
        "Each training run of B on the same starts as its counterpart of A. In brackets: Student's 95 % interval of the mean over "
        "training runs, which holds how much training itself varies, as no test of episodes does; each row by itself. Runs needed: "
        "for 80 % power."
    )
    return f"{markdown_table(header, rows)}\n\n{note}"
