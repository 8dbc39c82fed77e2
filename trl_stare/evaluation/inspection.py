"""Looking at stages before believing a reward: what each episode went through, as numbers and as one picture."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from trl_stare.data.trajectory import Trajectory
from trl_stare.evaluation.statistics import Proportion
from trl_stare.stages import StagePlan, segment, stage_success

LINES = {"potential": ("#000000", "-"), "cost": ("#D55E00", "-"), "gripper": ("#56B4E9", "--")}
"""Colour and dash of each line; the stages' bands are pale, so that lines stay legible on them."""
GRIPPER_OPENING = 7
"""Where in the state the gripper's opening is, after position and quaternion; a task may append more."""


def inspect(trajectories: Sequence[Trajectory], plan: StagePlan) -> dict[str, Any]:
    """The content of `stages.json`: the segments of every episode, and how many episodes reached and passed each stage.

    Args:
        trajectories (`Sequence[Trajectory]`): episodes of the plan's task.
        plan ([`StagePlan`]): cuts them.

    Returns:
        `dict`: `task`, `stages` (names), `summary` (stage -> `reached`, `passed`, `rate`, `ci95`, `mean_steps`), `num_success`,
        `n_episodes`, and `episodes`: `seed`, `success` (`success_once`), `success_at_end`, `num_steps`, `segments` with
        `stage`, `start`, `stop` (half-open, environment steps), `passed`, `cost`.

    Raises:
        ValueError: if there is no episode.
    """
    if not trajectories:
        raise ValueError("`trajectories` must hold at least one episode, got none.")
    cut = [segment(plan, trajectory.signals) for trajectory in trajectories]
    summary = {}
    for index, (passed, reached) in enumerate(stage_success(cut, len(plan))):
        share = Proportion(passed, reached) if reached else None
        lengths = [part.stop - part.start for parts in cut for part in parts if part.stage == index]
        summary[plan.names[index]] = {
            "reached": reached,
            "passed": passed,
            "rate": share.rate if share else None,
            "ci95": list(share.wilson()) if share else None,
            "mean_steps": float(np.mean(lengths)) if lengths else None,
        }
    episodes = [
        {
            "seed": trajectory.seed,
            "success": trajectory.success_once,
            "success_at_end": trajectory.success_at_end,
            "num_steps": trajectory.num_steps,
            "segments": [part._asdict() | {"stage": plan.names[part.stage]} for part in parts],
        }
        for trajectory, parts in zip(trajectories, cut, strict=True)
    ]
    return {
        "task": plan.task,
        "stages": list(plan.names),
        "n_episodes": len(episodes),
        "num_success": sum(episode["success"] for episode in episodes),
        "summary": summary,
        "episodes": episodes,
    }


def plot_timelines(trajectories: Sequence[Trajectory], plan: StagePlan, path: str | os.PathLike) -> None:
    """Draw one row per episode: the latched stages as coloured bands under potential, cost and gripper over time.

    The potential follows the present state: where it falls although the band stays, something was dropped. The cost is that
    of the stage the band shows, drawn up to 1. The gripper is its opening, as a share of the largest seen.

    Args:
        trajectories (`Sequence[Trajectory]`): one row each.
        plan ([`StagePlan`]): the stages.
        path (`str`): the PNG; its folder is made.

    Raises:
        ValueError: if there is no episode.
    """
    if not trajectories:
        raise ValueError("`trajectories` must hold at least one episode, got none.")
    rows = len(trajectories)
    figure = Figure(figsize=(8, 1.0 + 1.25 * rows), layout="constrained")
    panels = figure.subplots(rows, 1, squeeze=False, sharex=True)[:, 0]
    colors = matplotlib.colormaps["Pastel1"].colors
    widest = max(float(trajectory.state[:, GRIPPER_OPENING].max()) for trajectory in trajectories) or 1.0
    for panel, trajectory in zip(panels, trajectories, strict=True):
        _plot_episode(panel, trajectory, plan, colors, widest)
    panels[-1].set_xlabel("environment step", fontsize=10)
    handles = [Patch(color=colors[k % len(colors)], label=name) for k, name in enumerate(plan.names)]
    handles += [Line2D([], [], color=color, linestyle=dash, label=name) for name, (color, dash) in LINES.items()]
    figure.legend(handles=handles, ncols=len(handles), fontsize=9, frameon=False, loc="outside lower center")
    figure.suptitle(f"{plan.task}: stages of {rows} episodes", fontsize=12, weight="bold")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _plot_episode(panel: Axes, trajectory: Trajectory, plan: StagePlan, colors: Sequence, widest: float) -> None:
    segments, costs = segment(plan, trajectory.signals), plan.costs(trajectory.signals)
    for part in segments:
        panel.axvspan(part.start, part.stop, color=colors[part.stage % len(colors)], linewidth=0)
        steps = range(part.start, part.stop + 1)
        _draw(panel.plot, steps, costs[part.start : part.stop + 1, part.stage].clamp(max=1.0), "cost")
    _draw(panel.plot, range(trajectory.num_steps + 1), plan.potential(trajectory.signals), "potential")
    _draw(
        partial(panel.step, where="post"), trajectory.starts, trajectory.state[:, GRIPPER_OPENING] / widest, "gripper"
    )
    verdict = "success" if trajectory.success_once else f"failed in {plan.names[segments[-1].stage]}"
    panel.set_title(f"seed {trajectory.seed}: {verdict}", fontsize=9, loc="left", pad=2)
    panel.set_ylim(-0.03, 1.06)
    panel.set_yticks([0, 0.5, 1])
    panel.tick_params(labelsize=8)
    panel.margins(x=0)
    if trajectory.success_once:
        panel.axvline(segments[-1].stop, color="#009E73", linewidth=2.5)
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)


def _draw(draw: Callable, x: Any, y: Any, name: str) -> None:
    color, dash = LINES[name]
    draw(x, y, dash, color=color, linewidth=1.4)
