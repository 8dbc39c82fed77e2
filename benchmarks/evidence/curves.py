"""Learning curves from an episode ledger: success in rollouts over environment steps, and when a level is reached."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from trl_stare.evaluation import Proportion

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's, which colour-blind readers tell apart (jfly.uni-koeln.de/color)."""


class Point(NamedTuple):
    """One PPO iteration, or several that follow each other.

    Attributes:
        env_steps (`int`): environment steps up to its end, those before the first iteration included.
        solved (`int`): episodes of its rollouts that succeeded. played (`int`): all that began at the beginning.
    """

    env_steps: int
    solved: int
    played: int


def learning_curve(ledger: Path, first_stage: str, *, steps_before: int = 0) -> list[Point]:
    """One point an iteration. Episodes that a curriculum began in a later stage cost steps, but are no success rate.

    Args:
        ledger (`Path`): `episodes.jsonl` of a PPO run.
        first_stage (`str`): of the task's plan.
        steps_before (`int`): environment steps that earlier phases took.

    Example: two iterations of one episode each, of 50 steps and failed, then of 30 and solved: `[(50, 0, 1), (80, 1, 1)]`.
    """
    points: dict[int, Point] = {}
    total = steps_before
    for row in sorted(map(json.loads, ledger.read_text().splitlines()), key=lambda row: row["iteration"]):
        total += row["length"]
        before = points.get(row["iteration"], Point(0, 0, 0))
        counts = row.get("start_stage") == first_stage  # a void episode has no stage
        points[row["iteration"]] = Point(total, before.solved + (counts and row["success"]), before.played + counts)
    return list(points.values())


def moving_success(curve: Sequence[Point], window: int) -> list[Point]:
    """The last `window` iterations together, from the `window`-th iteration on; where none was played there is no point.

    Whole iterations, not episodes: within one, solved episodes are shorter and end first.

    Example: `[(50, 0, 2), (80, 1, 2), (100, 2, 2)]` over 2 iterations: `[(80, 1, 4), (100, 3, 4)]`.
    """
    parts = [curve[end - window : end] for end in range(window, len(curve) + 1)]
    sums = [Point(part[-1].env_steps, sum(p.solved for p in part), sum(p.played for p in part)) for part in parts]
    return [point for point in sums if point.played]


def steps_to_reach(curve: Sequence[Point], level: float, window: int) -> int | None:
    """Environment steps after which the moving success first was `level`; `None` if it never was.

    Example: 0.5 in the example of [`moving_success`]: 100.
    """
    reached = (point for point in moving_success(curve, window) if point.solved >= level * point.played)
    return next((point.env_steps for point in reached), None)


def plot(path: Path, results: Mapping[str, Any]) -> None:
    """Learning curves, and where the evaluated checkpoints lose their episodes.

    Args:
        path (`Path`): of the picture. results (`Mapping`): the content of `results.json`.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    arms = {name: arm for name, arm in results["arms"].items() if any(arm["curves"].values())}
    for color, (name, arm) in zip(cycle(COLORS), arms.items(), strict=False):
        _plot_curves(left, name, arm, color)
    left.set(xlabel="environment steps", ylabel=f"success in the last {results['queue']['window']} rollouts, %")
    left.set_ylim(0, min(100, left.get_ylim()[1]))
    left.xaxis.set_major_formatter(lambda steps, _: f"{steps / 1000:g}k")
    left.set_title("Thin: a training seed; thick: all, 95 % interval; points: evaluation", fontsize=9, loc="left")
    if arms:
        left.legend(frameon=False, fontsize=9)
    _plot_losses(right, results)
    for panel in (left, right):
        panel.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{results['queue']['task']}", fontsize=11)
    figure.savefig(path, dpi=150, metadata={"Software": None})
    plt.close(figure)


def _plot_curves(panel: Axes, name: str, arm: Mapping[str, Any], color: str) -> None:
    curves = [[Point(*point) for point in curve] for curve in arm["curves"].values()]
    for curve in curves:
        rates = [100 * point.solved / point.played for point in curve]
        panel.plot([point.env_steps for point in curve], rates, color=color, lw=0.7, alpha=0.5)
    # by iteration: seeds differ in how many steps one takes
    steps = [sum(point.env_steps for point in points) / len(points) for points in zip(*curves)]  # noqa: B905
    shares = [Proportion(sum(p.solved for p in points), sum(p.played for p in points)) for points in zip(*curves)]  # noqa: B905
    low, high = ([100 * end for end in ends] for ends in zip(*(share.wilson() for share in shares), strict=True))
    panel.fill_between(steps, low, high, color=color, alpha=0.15, lw=0)
    panel.plot(steps, [100 * share.rate for share in shares], color=color, lw=2.2, label=name)
    rate, (low, high) = arm["success_once"], arm["success_once_ci95"]
    ends = [curve[-1].env_steps for curve in curves if curve]
    if ends:
        panel.errorbar(
            [1.02 * sum(ends) / len(ends)], [100 * rate], yerr=[[100 * (rate - low)], [100 * (high - rate)]],
            fmt="o", color=color, capsize=3, ms=5,
        )  # fmt: skip


def _plot_losses(panel: Axes, results: Mapping[str, Any]) -> None:
    rows = results["starts"] | results["arms"]
    stages = results["stages"]
    shades = plt.get_cmap("Greys")([0.25 + 0.6 * i / max(1, len(stages) - 1) for i in range(len(stages))])
    for y, row in enumerate(rows.values()):
        left = 0.0
        for stage, shade in zip(stages, shades, strict=True):
            width = 100 * row["lost"][stage]
            panel.barh(y, width, left=left, color=shade, height=0.6, label=stage if y == 0 else None)
            left += width
    panel.set_yticks(range(len(rows)), rows)
    panel.invert_yaxis()
    panel.set(xlabel="evaluated episodes, %", xlim=(0, 100))
    panel.set_title("Episodes lost, by the stage they did not pass", fontsize=9, loc="left")
    panel.legend(frameon=False, fontsize=9, ncols=len(stages), loc="upper center", bbox_to_anchor=(0.5, -0.16))
