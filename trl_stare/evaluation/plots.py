"""`report.png`: success, the stage funnel and the learning curves of a run on one page that a phone can show."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from trl_stare.evaluation.phases import PHASES, phase_order, phase_turn
from trl_stare.evaluation.statistics import Proportion

COLORS = {"imitation": "#0072B2", "preference": "#E69F00", "interaction": "#009E73"}
"""Okabe and Ito's palette: told apart by colour-blind eyes, and in grey."""

INK = "#444444"

History = Sequence[Mapping[str, Any]]
"""A trainer's `state.log_history`: one mapping per log call, each with `step`."""


def plot_report(
    results: Mapping[str, Any], histories: Mapping[str, History], path: str | os.PathLike, *, title: str | None = None
) -> None:
    """Draw `report.png`: success per phase, share of episodes past each stage, and one learning curve per phase, through all its rounds.

    Args:
        results (`Mapping`): the content of `results.json`.
        histories (`Mapping[str, History]`): phase -> `trainer.state.log_history`. Read are `loss` (imitation), `loss` and
            `rewards/accuracies` (preference), `rollout/success_once` over `rollout/env_steps` (interaction). A phase without a
            history gets a panel that says so.
        path (`str`): the PNG.
        title (`str`, *optional*): heading; the task and its phases by default.

    Raises:
        ValueError: if `results` holds no phase, or one that is not among `PHASES` or a later round of one.
    """
    phases = results["phases"]
    if not phases:
        raise ValueError('`results["phases"]` must hold at least one phase, got none. Evaluate a checkpoint first.')
    names = sorted(phases, key=phase_order)

    figure = Figure(figsize=(7, 11), layout="constrained")
    figure.get_layout_engine().set(hspace=0.04, wspace=0.04)
    panels = figure.subplot_mosaic([["success"] * 2, ["funnel"] * 2, ["imitation", "preference"], ["interaction"] * 2])
    figure.suptitle(title or run_title(results), fontsize=14, weight="bold")
    _plot_success(panels["success"], names, phases)
    _plot_funnel(panels["funnel"], names, phases)
    curves: dict[str, Callable[[Axes, History], None]] = {
        "imitation": _plot_imitation,
        "preference": _plot_preference,
        "interaction": _plot_interaction,
    }
    for phase, plot in curves.items():
        if history := _all_rounds(phase, histories):
            plot(panels[phase], history)
        else:
            _say(panels[phase], f"{phase}: not trained in this run")
    for panel in figure.axes:
        panel.spines["top"].set_visible(False)
        panel.tick_params(labelsize=10)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def run_title(results: Mapping[str, Any]) -> str:
    """The task and the phases of a run, whose rounds are not told apart. Example: `"StackCube-v1: imitation, preference"`."""
    kinds = dict.fromkeys(phase_turn(name)[0] for name in sorted(results["phases"], key=phase_order))
    return f"{results['task']}: {', '.join(kinds)}"


def _all_rounds(phase: str, histories: Mapping[str, History]) -> History:
    """The histories of all its rounds as one, whose steps go on where those of the round before ended."""
    rows: list[Mapping[str, Any]] = []
    for name in sorted((name for name in histories if phase_turn(name)[0] == phase), key=phase_order):
        done = max((row["step"] for row in rows), default=0)
        rows += [{**row, "step": done + row["step"]} for row in histories[name]]
    return rows


def _color(name: str) -> tuple[float, ...]:
    """That of the phase, each later round darker."""
    phase, turn = phase_turn(name)
    return tuple(0.75 ** (turn - 1) * part for part in to_rgb(COLORS[phase]))


def _plot_success(panel: Axes, names: Sequence[str], phases: Mapping[str, Any]) -> None:
    """Both success rules per phase, with Wilson bars; `success_at_end` paler."""
    for offset, rule, alpha in ((-0.2, "success_once", 1.0), (0.2, "success_at_end", 0.45)):
        for x, name in enumerate(names):
            rate, (low, high) = phases[name][rule], phases[name][f"{rule}_ci95"]
            _bar(panel, x + offset, 0.38, rate, (low, high), _color(name), alpha=alpha)
    panel.set_xticks(range(len(names)), [f"{name}\nn = {phases[name]['n_episodes']}" for name in names])
    panel.set_xlim(-0.6, len(names) - 0.4)
    _percent_axis(panel)
    panel.set_title("Success: once (full) and at the end (pale), Wilson 95 %", fontsize=11, loc="left")


def _plot_funnel(panel: Axes, names: Sequence[str], phases: Mapping[str, Any]) -> None:
    """Share of all episodes that passed each stage, per phase."""
    stages = list(phases[names[-1]]["stage_counts"])
    width = 0.84 / len(names)
    for i, name in enumerate(names):
        counts, n = phases[name]["stage_counts"], phases[name]["n_episodes"]
        for x, stage in enumerate(stages):
            share = Proportion(counts[stage][0], n)
            offset = (i - (len(names) - 1) / 2) * width
            label = name if x == 0 else None
            _bar(panel, x + offset, 0.94 * width, share.rate, share.wilson(), _color(name), label=label)
    panel.set_xticks(range(len(stages)), stages)
    _percent_axis(panel)
    panel.set_title("Stage funnel: episodes past each stage", fontsize=11, loc="left")
    # Below the axis: inside, the legend would cover a tall bar.
    panel.legend(
        fontsize=10, ncols=min(len(names), len(PHASES)), frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.1)
    )


def _plot_imitation(panel: Axes, history: History) -> None:
    """Loss over optimiser steps."""
    _curve(panel, history, "step", "loss", COLORS["imitation"])
    panel.set_title("Imitation: loss", fontsize=11, loc="left")
    panel.set_xlabel("optimiser step", fontsize=10)
    panel.spines["right"].set_visible(False)


def _plot_preference(panel: Axes, history: History) -> None:
    """Loss, and on a second axis how often the chosen segment scores higher."""
    _curve(panel, history, "step", "loss", COLORS["preference"])
    panel.set_title("Preference: loss, accuracy", fontsize=11, loc="left")
    panel.set_xlabel("optimiser step", fontsize=10)
    accuracy = panel.twinx()
    _curve(accuracy, history, "step", "rewards/accuracies", INK, linestyle="--", scale=100)
    accuracy.set_ylim(0, 105)
    accuracy.set_ylabel("accuracy, % (dashed)", fontsize=10)


def _plot_interaction(panel: Axes, history: History) -> None:
    """Success of the sampling policy over environment steps."""
    _curve(panel, history, "rollout/env_steps", "rollout/success_once", COLORS["interaction"], scale=100, marker="o")
    panel.set_ylim(0, 105)
    panel.set_title("Interaction: success_once of the training rollouts, %", fontsize=11, loc="left")
    panel.set_xlabel("environment steps", fontsize=10)
    panel.xaxis.set_major_formatter(lambda steps, _: f"{steps / 1000:g}k" if steps else "0")
    panel.grid(axis="y", alpha=0.3)
    panel.spines["right"].set_visible(False)


def _bar(
    panel: Axes,
    x: float,
    width: float,
    rate: float,
    interval: tuple[float, float],
    color: str,
    *,
    alpha: float = 1.0,
    label: str | None = None,
) -> None:
    """One bar in percent with its interval, and the rounded figure above it."""
    low, high = interval
    # Wilson's ends may miss a rate of exactly 0 or 1 by a rounding error; matplotlib refuses negative bars.
    error = [[100 * max(0.0, rate - low)], [100 * max(0.0, high - rate)]]
    panel.bar(x, 100 * rate, width, color=color, alpha=alpha, label=label)
    panel.errorbar(x, 100 * rate, error, color=INK, capsize=3, linewidth=1.2)
    panel.annotate(
        f"{100 * rate:.0f}", (x, 100 * high), xytext=(0, 3), textcoords="offset points", ha="center", fontsize=10
    )


def _curve(panel: Axes, history: History, x: str, y: str, color: str, *, scale: float = 1.0, **style: Any) -> None:
    """`scale * y` over `x` wherever both were logged in one call; says so where they never were."""
    points = [(row[x], scale * row[y]) for row in history if x in row and y in row]
    if not points:
        _say(panel, f"`{y}` over `{x}`\nwas not logged")
        return
    panel.plot(*zip(*points, strict=True), color=color, linewidth=1.8, markersize=4, **style)


def _percent_axis(panel: Axes) -> None:
    """0 to 100 %, with room for a figure above a full bar."""
    panel.set_ylim(0, 112)
    panel.set_yticks(range(0, 101, 25))
    panel.set_ylabel("% of episodes", fontsize=10)
    panel.grid(axis="y", alpha=0.3)
    panel.set_axisbelow(True)
    panel.spines["right"].set_visible(False)


def _say(panel: Axes, text: str) -> None:
    """Fill a panel that has nothing to draw."""
    panel.text(0.5, 0.5, text, ha="center", va="center", transform=panel.transAxes, color=INK, fontsize=10)
    panel.set_xticks([])
    panel.set_yticks([])
