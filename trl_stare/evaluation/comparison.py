"""Two evaluations on identical starts: how far apart they are, whether that is more than chance, how many episodes it takes."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trl_stare.evaluation.played import PlayedEpisode
from trl_stare.evaluation.records import EpisodeResult
from trl_stare.evaluation.report import markdown_table
from trl_stare.evaluation.statistics import (
    Difference,
    McNemar,
    Proportion,
    episodes_needed,
    mcnemar_exact,
    paired_difference,
)
from trl_stare.interfaces import NOMINAL

CONDITIONS = (
    "tasks",
    "success_rule",
    "seeds",
    "temperature",
    "max_episode_steps",
    "sim_backend",
    "render_backend",
    "visuals",
    "variation",
    "control_mode",
    "simulator_versions",
    "stage_events",
)
"""What must be the same for a difference to be the policies'."""

LEVEL = 0.05
"""Of the test: a difference with a smaller p counts."""

FEWEST = 6
"""So many episodes, at least, only one of two policies must solve: with five, all of them one policy's, the exact p is 2 / 2^5 = 0.0625."""

INTERESTING = 0.05
"""Difference for which episodes are planned where none at all was seen: 5 points."""

Start = tuple[str, int]
"""Task and seed: what two policies have in common."""


@dataclass(frozen=True)
class Comparison:
    """Outcomes of two policies on the same starts.

    Args:
        what (`str`): what was compared, e.g. `"success_once"`.
        a (`Proportion`): of one policy. b (`Proportion`): of the other.
        difference (`Difference`): `b` minus `a`, with its interval.
        test (`McNemar`): the exact test.
    """

    what: str
    a: Proportion
    b: Proportion
    difference: Difference
    test: McNemar

    @classmethod
    def of(cls, what: str, a: Sequence[bool], b: Sequence[bool]) -> Comparison:
        """Compare outcomes on the same starts in the same order."""
        return cls(what, Proportion.of(a), Proportion.of(b), paired_difference(a, b), mcnemar_exact(a, b))

    @property
    def verdict(self) -> str:
        """A sentence. Example: `"not distinguishable at n = 24, you need about 312 episodes"`."""
        if self.test.p_value < LEVEL:
            better = "B" if self.difference.value > 0 else "A"
            return f"{better} is better (n = {self.a.n}, p = {self.test.p_value:.2g})"
        only_one = self.test.a_only + self.test.b_only
        discordant = only_one / self.a.n
        none = f"not distinguishable at n = {self.a.n}"
        if self.difference.value == 0:
            needed = episodes_needed(max(discordant, INTERESTING), INTERESTING)
            if needed <= self.a.n:
                return f"{none}, and no difference was seen; one of 5 points would most likely have been"
            return f"{none}, and no difference was seen; to find one of 5 points you need about {needed:,} episodes"
        # Connor's formula is an approximation for many episodes
        needed = max(episodes_needed(discordant, self.difference.value), math.ceil(FEWEST * self.a.n / only_one))
        if needed <= self.a.n:
            return f"{none}, though so large a difference should have been found; repeat it with other seeds"
        return f"{none}, you need about {needed:,} episodes if the difference is as it seems"


def conditions(info: Mapping[str, Any]) -> dict[str, Any]:
    """What an evaluation was done under, by the names of `CONDITIONS`.

    Args:
        info (`Mapping`): the content of `eval_info.json`.
    """
    tasks = {task["task"]: task["metrics"] for task in info["per_task"]}
    found = {name: info["settings"].get(name) for name in ("success_rule", "temperature")}
    found |= {"tasks": sorted(tasks), "seeds": {task: metrics["eval_seeds"] for task, metrics in tasks.items()}}
    for name in ("max_episode_steps", "sim_backend", "render_backend", "visuals", "control_mode"):
        found[name] = {task: metrics["environment"].get(name) for task, metrics in tasks.items()}
    # results that are older than variations were nominal
    found["variation"] = {task: metrics["environment"].get("variation", NOMINAL) for task, metrics in tasks.items()}
    found["simulator_versions"] = {task: metrics["environment"].get("versions") for task, metrics in tasks.items()}
    found["stage_events"] = {task: metrics.get("stage_events") for task, metrics in tasks.items()}
    return found


def check_comparable(
    a: Mapping[str, Any], b: Mapping[str, Any], allow: Collection[str] = (), *, free: Collection[str] = ()
) -> list[str]:
    """Refuse to compare evaluations that differ in more than the policy.

    Args:
        a (`Mapping`), b (`Mapping`): contents of two `eval_info.json`.
        allow (`Collection[str]`): of `CONDITIONS`, what may differ nevertheless.
        free (`Collection[str]`): of `CONDITIONS`, what need not be the same, and is not told.

    Returns:
        `list[str]`: what differs and was allowed, a sentence each.

    Raises:
        ValueError: if something else differs, or `allow` names something unknown; names all of it.
    """
    if unknown := set(allow) - set(CONDITIONS):
        raise ValueError(f"`allow` must be among {', '.join(CONDITIONS)}, got {', '.join(sorted(unknown))}.")
    first, second = conditions(a), conditions(b)
    different = {
        name: f"{name}: {first[name]} and {second[name]}"
        for name in CONDITIONS
        if name not in free and first[name] != second[name]
    }
    if refused := [name for name in different if name not in allow]:
        raise ValueError(
            "`A` and `B` must differ in the policy only, got other "
            + "; ".join(different[name] for name in refused)
            + f". Evaluate both alike, or say `--allow {' '.join(refused)}`."
        )
    return list(different.values())


def compare(
    a: Sequence[PlayedEpisode],
    b: Sequence[PlayedEpisode],
    stage_names: Mapping[str, Sequence[str]],
    *,
    b_stage_names: Mapping[str, Sequence[str]] | None = None,
    rules: tuple[str, str] = ("success_once", "success_once"),
) -> dict[str, list[Comparison]]:
    """Compare two evaluations on the starts that both played and that neither's simulator spoiled.

    Args:
        a (`Sequence[PlayedEpisode]`), b (`Sequence[PlayedEpisode]`): their rows, of any number of tasks.
        stage_names (`Mapping`): task -> its stages, in order.
        b_stage_names (`Mapping`, *optional*): those of `b`, where its plans were others. What only one of them has is not compared.
        rules (`tuple[str, str]`): when an episode of `a` and of `b` counts as solved.

    Returns:
        `dict`: `"all tasks"` (if there are several) and every task -> success first, then each stage: the share of **all** its
        episodes that passed it, since only what both played can be paired.

    Raises:
        ValueError: if there is no common start.
    """
    first, second = _by_start(a), _by_start(b)
    common = [start for start in first if start in second]
    if not common:
        raise ValueError("`A` and `B` must have played the same starts, got none in common. Use the same `--seed`.")
    rule = f"{rules[0]}" if rules[0] == rules[1] else f"{rules[0]} / {rules[1]}"
    found: dict[str, list[Comparison]] = {}

    def outcomes(starts: Sequence[Start]) -> Comparison:
        return Comparison.of(
            rule, [getattr(first[s], rules[0]) for s in starts], [getattr(second[s], rules[1]) for s in starts]
        )

    tasks = list(dict.fromkeys(task for task, _ in common))
    if len(tasks) > 1:
        found["all tasks"] = [outcomes(common)]
    for task in tasks:
        starts = [start for start in common if start[0] == task]
        found[task] = [outcomes(starts)]
        stages = [list(names[task]) for names in (stage_names, b_stage_names or stage_names)]
        for name in (name for name in stages[0] if name in stages[1]):
            passed = [
                [by[start].passed(names.index(name)) for start in starts]
                for by, names in zip((first, second), stages, strict=True)
            ]
            found[task].append(Comparison.of(f"passed {name}", *passed))
    return found


def comparison_table(found: Mapping[str, Sequence[Comparison]], *, names: str = "task") -> str:
    """All comparisons as Markdown. `names` heads the first column: what those in `found` name."""
    header = (names, "what", "n", "A", "B", "B - A", "only B", "only A", "p", "verdict")
    rows = [
        (task, c.what, c.a.n, c.a, c.b, c.difference, c.test.b_only, c.test.a_only, f"{c.test.p_value:.2g}", c.verdict)
        for task, comparisons in found.items()
        for c in comparisons
    ]
    note = (
        "In brackets: 95 % intervals, Wilson's of the rates and Newcombe's of the paired difference (1998, method 10). p: exact "
        "McNemar test, two-sided, of each row by itself. Episodes needed: Connor (1987), for 80 % power. All this is of two checkpoints: "
        "what a method gives varies from one training run to the next, compare several of each (`--with`)."
    )
    return f"{markdown_table(header, rows)}\n\n{note}"


def _by_start(episodes: Sequence[PlayedEpisode]) -> dict[Start, EpisodeResult]:
    return {(episode.task, episode.result.seed): episode.result for episode in episodes if not episode.void}
