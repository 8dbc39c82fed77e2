"""Preference pairs by stage: which of two episodes did better, in which stage; usually from the same start."""

from __future__ import annotations

import json
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations, islice
from pathlib import Path
from typing import NamedTuple

from trl_stare.data.trajectory import Trajectory
from trl_stare.files import write_atomically
from trl_stare.stages import Segment, StagePlan, segment

WHOLE_TRAJECTORY = "trajectory"
"""Stage name of a pair that compares whole trajectories (TPO)."""

STAGE_OBJECTIVES = ("sta-tpo", "sta-tpo-sum")
"""Objectives that compare stages, by the mean or the sum of a side's steps."""
WHOLE_OBJECTIVES = ("tpo-mean", "tpo-sum")
"""Objectives that compare whole trajectories, by the mean or the sum (GRAPE) of a side's steps."""
OBJECTIVES = (*STAGE_OBJECTIVES, *WHOLE_OBJECTIVES)

BOTH_PASSED = ("cost", "later")
"""How two are compared that both passed a stage; see [`build_pairs`]."""

ACROSS = "across"
"""Reason of a pair whose episodes are from different starts; see [`build_pairs`]'s `fill`."""
REASONS = ("passed", "later", "cost", ACROSS)
"""Why one side of a pair is preferred; see [`StagePair`]."""

OUTCOMES = ("made", "not_reached", "both_failed", "gap_too_small", "no_decision", "capped", "balanced", "filled")
"""What became of two episodes of one start in one stage: columns of the yield table. `capped` and `balanced` are pairs
that the options of these names left out; `filled` are pairs of different starts, beside those that were `made`."""


@dataclass(frozen=True)
class StagePair:
    """Two segments of one stage, from the same initial state unless `reason` is [`ACROSS`]. Slices are half-open, in environment steps.

    Args:
        task (`str`), instruction (`str`), seed (`int`): of both episodes; across starts, the seed of the chosen one.
        stage (`int`): index of the stage. stage_name (`str`): its name; [`WHOLE_TRAJECTORY`] for whole trajectories.
        chosen (`int`), rejected (`int`): the trajectories, by position in the list the pairs were built from.
        chosen_start (`int`), chosen_stop (`int`), rejected_start (`int`), rejected_stop (`int`): the segments.
        chosen_cost (`float`), rejected_cost (`float`): their costs.
        reason (`str`): `"passed"`, only the chosen side passed the stage; `"later"`, both did, and the chosen side's episode then
            passed more stages; `"cost"`, both did, the chosen at less cost; `"across"`, only the chosen side passed the stage, and
            the rejected side began elsewhere.
    """

    task: str
    instruction: str
    seed: int
    stage: int
    stage_name: str
    chosen: int
    rejected: int
    chosen_start: int
    chosen_stop: int
    rejected_start: int
    rejected_stop: int
    chosen_cost: float
    rejected_cost: float
    reason: str

    def shared(self, side: str) -> tuple[str, ...]:
        """Fields in which the episode of a side, `"chosen"` or `"rejected"`, equals the pair."""
        elsewhere = self.reason == ACROSS and side == "rejected"
        return ("task", "instruction") if elsewhere else ("task", "instruction", "seed")


class PairSet(NamedTuple):
    """Pairs, and why there are not more.

    Attributes:
        pairs (`tuple[StagePair, ...]`): in order of start, stage, trajectory; behind them those across starts, stage by stage.
        yield_table (`dict[str, dict[str, int]]`): stage name -> outcome ([`OUTCOMES`]) -> how many pairs of episodes.
    """

    pairs: tuple[StagePair, ...]
    yield_table: dict[str, dict[str, int]]


def build_pairs(
    trajectories: Sequence[Trajectory],
    plan: StagePlan,
    *,
    objective: str = "sta-tpo",
    both_passed: str = "cost",
    min_cost_gap: float = 0.02,
    max_pairs_per_start: int | None = None,
    balance: bool = False,
    fill: bool = False,
    fill_to: int | None = None,
    seed: int = 0,
) -> PairSet:
    """Compare every two episodes with the same task, seed and instruction.

    A pair of stage k is made only if both episodes reached it, i.e. passed stage k - 1. Preferred is the one that
    passed stage k; if both did, the one of lower cost, if the costs differ by the gap at least. Each side must hold a
    decision ([`Trajectory.decisions_in`]). So there are pairs even where no episode succeeds.

    Two options are ours; the paper does not say. With `both_passed="later"` the one whose episode passed more of the later
    stages is preferred of two that passed, as how a peg is grasped may decide whether it can be stood up. Few episodes of one
    start reach a late stage, so that most that passed it are in no pair of it: with `fill` they are compared with episodes of
    other starts that did not. Their states differ more: train with `centered` scores, to which states contribute nothing.

    Args:
        trajectories (`Sequence[Trajectory]`): episodes of the plan's task, several per seed.
        plan ([`StagePlan`]): the stages.
        objective (`str`): one of [`STAGE_OBJECTIVES`]: pairs of stages; or of [`WHOLE_OBJECTIVES`]: the whole trajectory as one
            segment without cost, so that a pair is a success against a failure.
        both_passed (`str`): one of [`BOTH_PASSED`]; costs decide between equals. Whole trajectories have no later stages.
        min_cost_gap (`float`): smallest difference of costs that counts, >= 0.
        max_pairs_per_start (`int`, *optional*): most pairs of one stage from one seed; a random choice is kept.
        balance (`bool`): keep as many pairs of every stage that has any as the one with the fewest, at random, after the cap.
        fill (`bool`): add pairs of different starts to every stage, at random, after the cap, until it has as many as the one
            with most, or there are no more. Whole trajectories have one stage, with nothing to fill unless `fill_to` says so.
        fill_to (`int`, *optional*): with `fill`, as many pairs of every stage as this, at least 1, where it has not more already.
        seed (`int`): of these choices.

    Raises:
        ValueError: if an episode is of another task, an argument is out of range, or both `balance` and `fill` are given.

    Example: of one seed, A passed Reach and Grasp, B passed Reach at a higher cost and failed to grasp, C failed to
    reach: Reach gets A > B (cost), A > C, B > C (passed), Grasp gets A > B; C takes no part in Grasp.
    """
    _check_arguments(objective, both_passed, min_cost_gap, max_pairs_per_start)
    _check_fill(balance, fill, fill_to)
    whole = objective in WHOLE_OBJECTIVES
    names = (WHOLE_TRAJECTORY,) if whole else plan.names
    # one pass: trajectories may be on disk
    episodes = [_cut(trajectory, index, plan, whole) for index, trajectory in enumerate(trajectories)]

    compare = partial(_compare, episodes, both_passed=both_passed, min_cost_gap=min_cost_gap)
    chooser, table = random.Random(seed), {name: Counter() for name in names}
    pairs = _within_starts(episodes, compare, table, max_pairs_per_start, chooser)
    if balance:
        pairs = _balance(pairs, table, chooser)
    if fill:
        most = max(counts["made"] for counts in table.values())
        pairs += _fill(episodes, table, most if fill_to is None else fill_to, chooser)
    return PairSet(tuple(pairs), {name: {outcome: table[name][outcome] for outcome in OUTCOMES} for name in names})


def format_yield(yield_table: Mapping[str, Mapping[str, int]]) -> str:
    """The yield table as aligned text, a line per stage."""
    width = max(len("stage"), *map(len, yield_table))
    lines = ["  ".join([f"{'stage':{width}}", *OUTCOMES])]
    for name, counts in yield_table.items():
        lines.append("  ".join([f"{name:{width}}", *(f"{counts[outcome]:>{len(outcome)}}" for outcome in OUTCOMES)]))
    return "\n".join(lines)


def yield_file(folder: str | Path) -> Path:
    """Where the yield table of the pairs in `folder` lies: beside it, as the folder holds parquet files only.

    Example: `yield_file("data/pairs")` is `data/pairs_yield.json`.
    """
    folder = Path(folder)
    return folder.with_name(f"{folder.name}_yield.json")


def save_yield(yield_table: Mapping[str, Mapping[str, int]], folder: str | Path) -> Path:
    """Write [`PairSet`]'s `yield_table` beside the folder of its pairs, all or nothing; returns the file."""
    file = yield_file(folder)
    write_atomically(file, json.dumps(yield_table, indent=1) + "\n")
    return file


def load_yield(folder: str | Path) -> dict[str, dict[str, int]] | None:
    """Read what [`save_yield`] wrote; `None` if it wrote nothing for this folder."""
    file = yield_file(folder)
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


class _Episode(NamedTuple):
    """What of a trajectory pairs are made from: where it began, and its segments."""

    task: str
    instruction: str
    seed: int
    parts: tuple[Segment, ...]


def _cut(trajectory: Trajectory, index: int, plan: StagePlan, whole: bool) -> _Episode:
    if trajectory.task != plan.task:
        raise ValueError(
            f"`trajectories` must be of the plan's task {plan.task!r}, got {trajectory.task!r} at {index}."
        )
    if whole:
        parts = (Segment(0, 0, trajectory.num_steps, trajectory.success_once, 0.0),)
    else:
        parts = segment(plan, trajectory.signals)
    return _Episode(trajectory.task, trajectory.instruction, trajectory.seed, parts)


def _by_start(episodes: Sequence[_Episode]) -> list[list[int]]:
    """Positions of the episodes that can be compared with each other, in order of their first."""
    starts: dict[tuple[int, str], list[int]] = defaultdict(list)
    for index, episode in enumerate(episodes):
        starts[episode.seed, episode.instruction].append(index)
    return list(starts.values())


def _within_starts(
    episodes: Sequence[_Episode],
    compare: Callable[..., StagePair | str],
    table: Mapping[str, Counter[str]],
    limit: int | None,
    chooser: random.Random,
) -> list[StagePair]:
    """Pairs of one start, at most `limit` of each stage; outcomes are counted in `table`, whose keys are the stages."""
    pairs = []
    for members in _by_start(episodes):
        for stage, (name, counts) in enumerate(table.items()):
            outcomes = [compare(first, second, stage, name) for first, second in combinations(members, 2)]
            made = [outcome for outcome in outcomes if isinstance(outcome, StagePair)]
            counts.update(outcome for outcome in outcomes if isinstance(outcome, str))
            kept = _cap(made, limit, chooser)
            counts.update(made=len(kept), capped=len(made) - len(kept))
            pairs.extend(kept)
    return pairs


def _cap(made: list[StagePair], limit: int | None, chooser: random.Random) -> list[StagePair]:
    """At most `limit` pairs, in their order."""
    if limit is None or len(made) <= limit:
        return made
    return [made[index] for index in sorted(chooser.sample(range(len(made)), limit))]


def _balance(pairs: Sequence[StagePair], table: Mapping[str, Counter[str]], chooser: random.Random) -> list[StagePair]:
    """As many pairs of every stage, in their order; what is left out is moved to `balanced` in `table`."""
    stages: dict[str, list[int]] = defaultdict(list)
    for index, pair in enumerate(pairs):
        stages[pair.stage_name].append(index)
    size = min(map(len, stages.values()), default=0)
    kept = sorted(index for indices in stages.values() for index in chooser.sample(indices, size))
    for name, indices in stages.items():
        table[name]["balanced"] = len(indices) - size
        table[name]["made"] = size
    return [pairs[index] for index in kept]


def _fill(
    episodes: Sequence[_Episode], table: Mapping[str, Counter[str]], size: int, chooser: random.Random
) -> list[StagePair]:
    """What every stage lacks of `size` pairs, across starts; counted as `filled` in `table`."""
    pairs = []
    for stage, (name, counts) in enumerate(table.items()):
        added = _across(episodes, stage, name, max(0, size - counts["made"]), chooser)
        counts["filled"] = len(added)
        pairs.extend(added)
    return pairs


def _across(
    episodes: Sequence[_Episode], stage: int, name: str, count: int, chooser: random.Random
) -> list[StagePair]:
    """At most `count` pairs of an episode that passed the stage and one from another start that did not, none of them twice."""
    parts = {index: episode.parts[stage] for index, episode in enumerate(episodes) if len(episode.parts) > stage}
    acted = {index: part for index, part in parts.items() if part.start < part.stop}
    passed = [index for index, part in acted.items() if part.passed]
    failed = [index for index, part in acted.items() if not part.passed]
    couples = (divmod(n, len(failed)) for n in _shuffled(len(passed) * len(failed), chooser))
    found = (
        _pair(episodes[i], stage, name, {i: acted[i], j: acted[j]}, ACROSS)
        for i, j in ((passed[a], failed[b]) for a, b in couples)
        if episodes[i].seed != episodes[j].seed and episodes[i].instruction == episodes[j].instruction
    )
    return sorted(islice(found, count), key=lambda pair: (pair.chosen, pair.rejected))


def _shuffled(n: int, chooser: random.Random) -> Iterator[int]:
    """The numbers below `n` in random order, one after the other: of many, only the first few may be wanted."""
    moved: dict[int, int] = {}
    for last in range(n - 1, -1, -1):
        drawn = chooser.randint(0, last)
        yield moved.get(drawn, drawn)
        moved[drawn] = moved.pop(last, last)


def _compare(
    episodes: Sequence[_Episode],
    first: int,
    second: int,
    stage: int,
    name: str,
    both_passed: str,
    min_cost_gap: float,
) -> StagePair | str:
    """The pair of two episodes in one stage, or the outcome that says why there is none."""
    if any(len(episodes[index].parts) <= stage for index in (first, second)):
        return "not_reached"
    parts = {index: episodes[index].parts[stage] for index in (first, second)}
    if not any(part.passed for part in parts.values()):
        return "both_failed"
    if any(part.start == part.stop for part in parts.values()):  # one step is enough: some decision acts in it
        return "no_decision"
    # passing this stage comes before passing later ones, and both before cost
    reach = {index: num_passed(episodes[index].parts) if both_passed == "later" else 0 for index in parts}
    chosen, rejected = sorted(parts, key=lambda index: (not parts[index].passed, -reach[index], parts[index].cost))
    better, worse = parts[chosen], parts[rejected]
    reason = "passed" if not worse.passed else "later" if reach[chosen] > reach[rejected] else "cost"
    gap = worse.cost - better.cost
    if reason == "cost" and (gap < min_cost_gap or gap == 0.0):
        return "gap_too_small"
    return _pair(episodes[chosen], stage, name, {chosen: better, rejected: worse}, reason)


def _pair(episode: _Episode, stage: int, name: str, sides: dict[int, Segment], reason: str) -> StagePair:
    """`sides`: chosen and rejected index -> segment, in this order; `episode` is the chosen one."""
    (chosen, better), (rejected, worse) = sides.items()
    return StagePair(
        task=episode.task,
        instruction=episode.instruction,
        seed=episode.seed,
        stage=stage,
        stage_name=name,
        chosen=chosen,
        rejected=rejected,
        chosen_start=better.start,
        chosen_stop=better.stop,
        rejected_start=worse.start,
        rejected_stop=worse.stop,
        chosen_cost=better.cost,
        rejected_cost=worse.cost,
        reason=reason,
    )


def num_passed(segments: Sequence[Segment]) -> int:
    """How many stages an episode passed.

    Example: Reach and Grasp passed, Transport not: 2.
    """
    return sum(part.passed for part in segments)


def _check_arguments(objective: str, both_passed: str, min_cost_gap: float, max_pairs_per_start: int | None) -> None:
    if objective not in OBJECTIVES:
        raise ValueError(f"`objective` must be one of {OBJECTIVES}, got {objective!r}.")
    if both_passed not in BOTH_PASSED:
        raise ValueError(f"`both_passed` must be one of {BOTH_PASSED}, got {both_passed!r}.")
    if min_cost_gap < 0:
        raise ValueError(f"`min_cost_gap` must be >= 0, got {min_cost_gap}.")
    if max_pairs_per_start is not None and max_pairs_per_start < 1:
        raise ValueError(f"`max_pairs_per_start` must be None or at least 1, got {max_pairs_per_start}.")


def _check_fill(balance: bool, fill: bool, fill_to: int | None) -> None:
    if balance and fill:
        raise ValueError("`balance` and `fill` must not both be given: one drops pairs, one adds them. Choose one.")
    if fill_to is not None and (not fill or fill_to < 1):
        raise ValueError(
            f"`fill_to` must be None or at least 1, and given with `fill`, got {fill_to} with fill={fill}."
        )
