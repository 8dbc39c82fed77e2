"""Cuts one recorded trajectory into stages, with memory: a stage once passed stays passed.

For pairs and reports. For rewards during an episode see [`StagePlan.current_stage`], which forgets.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from trl_stare.interfaces import Signals
from trl_stare.stages.spec import StagePlan


class Segment(NamedTuple):
    """The environment steps a trajectory spent in one stage.

    Attributes:
        stage (`int`): index of the stage, from 0.
        start (`int`): first environment step. stop (`int`): one past the last. Action `t` leads from row `t` of the
            signals to row `t + 1`. Empty (`start == stop`) where nothing was left to do: entry and exit fired
            together, or the entry fired with the very last step.
        passed (`bool`): whether the stage's exit fired.
        cost (`float`): mean of `distance / cost_scale` over what the segment's actions led to, the rows `start + 1 ..
            stop`, so the row at which the exit fired counts and the state before the first action does not. >= 0,
            lower is better; 0.0 for an empty segment.
    """

    stage: int
    start: int
    stop: int
    passed: bool
    cost: float


def segment(plan: StagePlan, signals: Signals) -> tuple[Segment, ...]:
    """Cut one trajectory at the first-passage times `t_k = min {t >= t_{k-1} : exit k holds at t}`, with `t_{-1} = 0`.

    Stage `k` is the half-open slice `[t_{k-1}, t_k)`, or up to `T` if its exit never fires. Only stages that were
    reached are listed; slices are contiguous from 0. Success implies all exits, so steps after the first success
    belong to no segment.

    Args:
        plan ([`StagePlan`]): the stages.
        signals (`Signals`): one trajectory, name -> `[T + 1]` or `[T + 1, D]`; row 0 is the initial state.

    Raises:
        ValueError: if the signals are not those of one trajectory of one or more steps, or invalid.

    Example: contact at row 2, a grasp with lift at row 5, then the cube falls and lies there until `T = 9`:
    Reach `[0, 2)` passed, Grasp `[2, 5)` passed, Transport `[5, 9)` not passed; Stack was not reached.
    """
    exits = plan.exits(signals)
    if exits.ndim != 2 or exits.shape[0] < 2:
        raise ValueError(
            f"`signals` must be those of one trajectory, [T + 1] with T >= 1, got {[*exits.shape[:-1]]}. "
            f"Cut each trajectory on its own."
        )
    costs, num_steps = plan.costs(signals), exits.shape[0] - 1
    segments: list[Segment] = []
    start = 0
    for stage in range(len(plan)):
        fired = torch.nonzero(exits[start:, stage]).flatten()
        passed = len(fired) > 0
        stop = start + int(fired[0]) if passed else num_steps
        cost = costs[start + 1 : stop + 1, stage].mean().item() if stop > start else 0.0
        segments.append(Segment(stage, start, stop, passed, cost))
        if not passed:
            break
        start = stop
    return tuple(segments)


def stage_per_step(segments: Sequence[Segment], num_steps: int) -> Tensor:
    """The stage that each of `num_steps` environment steps was taken in, `[T]` int64; -1 after success.

    Raises:
        ValueError: if a segment ends after `num_steps`.

    Example: `[Segment(0, 0, 2, ...), Segment(1, 2, 3, ...)]` and 5 steps give `[0, 0, 1, -1, -1]`.
    """
    stages = torch.full((num_steps,), -1, dtype=torch.int64)
    for part in segments:
        if part.stop > num_steps:
            raise ValueError(f"`num_steps` must be at least the last segment's stop, got {num_steps} for {part}.")
        stages[part.start : part.stop] = part.stage
    return stages


def stage_success(trajectories: Iterable[Sequence[Segment]], num_stages: int) -> tuple[tuple[int, int], ...]:
    """Count how many trajectories passed and reached each stage: `num_passed / num_reached` is P(stage k | stage k-1).

    Args:
        trajectories (`Iterable[Sequence[Segment]]`): one result of [`segment`] per trajectory.
        num_stages (`int`): `K`.

    Returns:
        `tuple[tuple[int, int], ...]`: `(num_passed, num_reached)` of each of the `K` stages.

    Raises:
        ValueError: if a segment's stage is not one of the `K`.

    Example: one trajectory that passed both of 2 stages and one that failed in the first: `((1, 2), (1, 1))`.
    """
    passed, reached = [0] * num_stages, [0] * num_stages
    for segments in trajectories:
        for part in segments:
            if not 0 <= part.stage < num_stages:
                raise ValueError(f"`num_stages` must cover all segments, got {num_stages} for {part}.")
            reached[part.stage] += 1
            passed[part.stage] += part.passed
    return tuple(zip(passed, reached, strict=True))
