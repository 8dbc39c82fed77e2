"""Is a stage's event in the right place? What of success is decided where each stage ends, and does the event say it?

    python -m benchmarks.stage_exits --task LiftPegUpright-v1 --rollouts ROLLOUTS --output_dir outputs/stage_exits

`ROLLOUTS` is a folder of a thousand or more episodes of a policy that succeeds now and then (`recipes/collect.py`). For each stage:

- `told by passing`: the share of the variance of success, among the episodes that reached the stage, that passing it explains;
- `left open`: the share of the variance of success, among the episodes that passed it, that their state at this moment explains to a
  small network (ten-fold cross-validation over starts, so nothing learned by heart counts);
- `decided by the start`: the share of the variance of how near to the stage's goal episodes came that lies between starts and not
  between episodes of one start. What is the same in all of them no comparison of them can teach;
- success by fifths of the stage's own distance where it ended.

A stage that everyone passes and that leaves much open ends too early, or in too many ways: what decides over the episode has been
done, and no comparison of later segments, nor any reward for passing, can tell it. `results.json` and `results.md` are the output.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from trl_stare import StagePlan, get_plan
from trl_stare.data import TrajectoryFolder
from trl_stare.data.trajectory import Trajectory
from trl_stare.envs import get_simulated_task
from trl_stare.envs.experts.motion import inverse, rotate
from trl_stare.evaluation.report import markdown_table
from trl_stare.interfaces import Signals
from trl_stare.runs import claim_folder
from trl_stare.stages import segment
from trl_stare.tasks import import_tasks

logger = logging.getLogger("stage_exits")

FOLDS = 10
MIN_PASSED = 200
"""Fewest episodes that passed a stage for which a network is asked: of fewer it learns nothing."""


class Exit(NamedTuple):
    """Where one episode left one stage.

    Attributes:
        passed (`bool`): or it did not leave it.
        distance (`float`): the stage's own, at the last row of the segment. nearest (`float`): the smallest within it.
        start (`int`): the episode's seed, or its configuration in a task that has a list of them.
        state (`Tensor`): `[F]`, see [`features`]. success (`bool`): of the whole episode, afterwards.
    """

    passed: bool
    distance: float
    nearest: float
    start: int
    state: Tensor
    success: bool


def features(signals: Signals, row: int) -> Tensor:
    """Everything the simulator says of one moment, `[F]`, and the hand in the object's own frame where both are known.

    Success is left out, the time is put in. Quaternions are wxyz.
    """
    parts = [signals[name][row].flatten().float() for name in sorted(signals) if name != "success"]
    if {"tcp_position", "object_position"} <= signals.keys():
        offset = (signals["tcp_position"] - signals["object_position"])[row]
        if "object_quaternion" in signals:
            offset = rotate(inverse(signals["object_quaternion"][row]), offset)
        # a hand on either side of an object is often as good as on the other
        parts += [offset, offset.abs(), offset.norm()[None]]
    return torch.cat([*parts, torch.tensor([float(row)])])


def exits(episodes: Sequence[Trajectory], plan: StagePlan, configurations: int = 0) -> list[list[Exit]]:
    """For each stage, one row an episode that reached it.

    Args:
        configurations (`int`): initial configurations of the task, which the seeds go round; 0 if the seed draws the start.
    """
    found: list[list[Exit]] = [[] for _ in plan.names]
    for episode in episodes:
        distances = plan.distances(episode.signals)
        start = episode.seed % configurations if configurations else episode.seed
        for part in segment(plan, episode.signals):
            state = features(episode.signals, part.stop)
            within = distances[part.start : part.stop + 1, part.stage]
            row = Exit(part.passed, within[-1].item(), within.min().item(), start, state, episode.success_once)
            found[part.stage].append(row)
    return found


def told_by_passing(rows: Sequence[Exit]) -> float:
    """Share of the variance of success between those that passed and those that did not.

    Example: of four episodes two pass, and one of these succeeds: 1/3. If all pass: 0.
    """
    success = torch.tensor([float(row.success) for row in rows])
    passed = torch.tensor([row.passed for row in rows])
    if not success.var(unbiased=False):
        return 0.0
    between = sum(
        (group.mean() - success.mean()) ** 2 * len(group)
        for group in (success[passed], success[~passed])
        if len(group)
    )
    return float(between / len(rows) / success.var(unbiased=False))


def left_open(rows: Sequence[Exit], *, seed: int = 0) -> float | None:
    """Share of the variance of success among those that passed which the state explains, cross-validated; at least 0.

    Returns:
        `float` or `None`: `None` for fewer than `MIN_PASSED`, or if all of them or none succeed.
    """
    passed = [row for row in rows if row.passed]
    success = torch.tensor([float(row.success) for row in passed])
    if len(passed) < MIN_PASSED or not success.var():
        return None
    states = torch.stack([row.state for row in passed])
    states = (states - states.mean(dim=0)) / states.std(dim=0).clamp(min=1e-6)
    generator = torch.Generator().manual_seed(seed)
    guessed = torch.empty(len(passed))
    starts = torch.tensor([row.start for row in passed])
    known = starts.unique()  # episodes of one start are in one fold: how each start ends could be learned by heart
    for fold in known[torch.randperm(len(known), generator=generator)].chunk(FOLDS):
        held_out = torch.isin(starts, fold)
        rest = ~held_out
        guessed[held_out] = guess(states[rest], success[rest], states[held_out], generator)
    return max(0.0, float(1 - ((guessed - success) ** 2).mean() / success.var(unbiased=False)))


def guess(states: Tensor, success: Tensor, asked: Tensor, generator: torch.Generator) -> Tensor:
    """Probability of success in each of the states `asked`, `[B]`, from a small network fitted to `states` `[N, F]`."""
    with torch.random.fork_rng():
        torch.manual_seed(int(torch.randint(2**31, (1,), generator=generator)))
        network = nn.Sequential(
            nn.Linear(states.shape[1], 32), nn.Tanh(), nn.Dropout(0.2), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1)
        )
        optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=0.1)
        for _ in range(30):
            for batch in torch.randperm(len(states)).split(128):
                loss = nn.functional.binary_cross_entropy_with_logits(network(states[batch])[:, 0], success[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        with torch.no_grad():
            return network.eval()(asked)[:, 0].sigmoid()


def decided_by_start(rows: Sequence[Exit]) -> float | None:
    """Intraclass correlation of `nearest` within starts, ICC(1, 1) of Shrout and Fleiss (Psychological Bulletin 86, 1979); at least 0.

    Starts with different numbers of episodes are weighed as in an analysis of variance (Donner, International Statistical Review 54, 1986).

    Returns:
        `float` or `None`: `None` if no start, or only one, has several episodes, or if nothing varies.

    Example: starts whose episodes come as near as 0.1, 0.1 and as 0.3, 0.3: 1. As 0.1, 0.3 and as 0.1, 0.3: 0.
    """
    by_start: dict[int, list[float]] = {}
    for row in rows:
        by_start.setdefault(row.start, []).append(row.nearest)
    groups = [torch.tensor(values, dtype=torch.float64) for values in by_start.values() if len(values) > 1]
    if len(groups) < 2:
        return None
    sizes, everything = torch.tensor([len(group) for group in groups], dtype=torch.float64), torch.cat(groups)
    means = torch.stack([group.mean() for group in groups])
    between = (sizes * (means - everything.mean()) ** 2).sum() / (len(groups) - 1)
    within = sum(((group - group.mean()) ** 2).sum() for group in groups) / (len(everything) - len(groups))
    size = (sizes.sum() - (sizes**2).sum() / sizes.sum()) / (len(groups) - 1)
    total = between + (size - 1) * within
    return max(0.0, float((between - within) / total)) if total > 0 else None


def by_fifths(rows: Sequence[Exit]) -> list[tuple[float, float]] | None:
    """Of those that passed, nearest first: each fifth's median distance, and its share of successes.

    Returns:
        `list` or `None`: `None` if fewer than five passed.
    """
    passed = sorted((row for row in rows if row.passed), key=lambda row: row.distance)
    if len(passed) < 5:
        return None
    groups = [passed[i * len(passed) // 5 : (i + 1) * len(passed) // 5] for i in range(5)]
    return [(group[len(group) // 2].distance, sum(row.success for row in group) / len(group)) for group in groups]


def measure(episodes: Sequence[Trajectory], plan: StagePlan, configurations: int = 0) -> dict[str, Any]:
    """The content of `results.json`: stage -> `reached`, `passed`, `told_by_passing`, `left_open`, `decided_by_start`, `by_fifths`."""
    return {
        name: {
            "reached": len(rows),
            "passed": sum(row.passed for row in rows),
            "told_by_passing": told_by_passing(rows) if rows else None,
            "left_open": left_open(rows) if name != plan.names[-1] else None,
            "decided_by_start": decided_by_start(rows),
            "by_fifths": by_fifths(rows) if name != plan.names[-1] else None,
        }
        for name, rows in zip(plan.names, exits(episodes, plan, configurations), strict=True)
    }


def markdown(results: dict[str, Any]) -> str:
    """The content of `results.md`."""

    def percent(share: float | None) -> str:
        return "-" if share is None else f"{100 * share:.0f} %"

    head = [
        "",
        "passed",
        "told by passing",
        "left open",
        "decided by the start",
        "success by fifths, nearest first (median distance)",
    ]
    rows = [
        [
            name,
            f"{row['passed']}/{row['reached']}",
            percent(row["told_by_passing"]),
            percent(row["left_open"]),
            percent(row["decided_by_start"]),
            ", ".join(f"{percent(rate)} ({distance:.3g})" for distance, rate in row["by_fifths"] or []) or "-",
        ]
        for name, row in results.items()
    ]
    return markdown_table(head, rows) + "\n"


def main(args: argparse.Namespace) -> None:
    """Read, measure, write."""
    import_tasks(args.task_module)
    given = {"task": args.task, "rollouts": [str(path) for path in args.rollouts]}
    out, plan = claim_folder(args.output_dir, given, free=()), get_plan(args.task)
    episodes = [episode for folder in args.rollouts for episode in TrajectoryFolder(folder, images=False)]
    results = measure(episodes, plan, get_simulated_task(args.task).configurations)
    (out / "results.json").write_text(
        json.dumps({"settings": given, "episodes": len(episodes), "stages": results}, indent=1) + "\n"
    )
    (out / "results.md").write_text(markdown(results))
    logger.info("%d episodes\n%s", len(episodes), markdown(results))


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", required=True, help="A registered task.")
    parser.add_argument("--task_module", help="Module, or its file, that registers tasks of your own.")
    parser.add_argument("--rollouts", type=Path, nargs="+", required=True, help="Folders of episodes.")
    parser.add_argument("--output_dir", type=Path, required=True, help="Where results go.")
    return parser.parse_args()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main(parse())
