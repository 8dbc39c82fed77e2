"""What [`StagePPOTrainer`] logs about rollouts, and about where the time goes."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_callback import TrainerControl, TrainerState

from trl_stare.data.rollout import Timing
from trl_stare.data.trajectory import Trajectory
from trl_stare.stages import Segment, StagePlan, segment, stage_per_step, stage_success
from trl_stare.trainers.ppo_batch import DecisionRewards, num_prefix_steps


def rollout_metrics(
    trajectories: Sequence[Trajectory], rewards: Sequence[DecisionRewards], plan: StagePlan, *, plays_on: bool
) -> dict[str, list[float]]:
    """One value for each episode that it is known of; what is logged is the mean.

    Only episodes from the beginning count, not those that a [`StageCurriculum`] begins later, which have one entry of their own.

    Args:
        plays_on (`bool`): whether episodes went on to the time limit after a success. Else success at the end is not known.

    Returns:
        `dict[str, list[float]]`: `rollout/success_once`, `rollout/success_at_end` (where it is known), `rollout/episode_steps`,
        `rollout/reward_raw` and `rollout/reward_shaped` (sums over an episode), and of each stage that was reached
        `stage/{name}/success` (P(stage k | stage k-1)), `/steps` (environment steps spent in it), `/return_raw` and
        `/return_shaped` (rewards of the decisions taken in it). `rollout/reset_success_once` is of the other episodes.

    Example: two episodes of which one touches the cube and drops it: `stage/Reach/success` `[1.0, 0.0]`, `stage/Grasp/success` `[0.0]`.
    """
    metrics: dict[str, list[float]] = defaultdict(list)
    for trajectory, reward in zip(trajectories, rewards, strict=True):
        if num_prefix_steps(trajectory):
            metrics["rollout/reset_success_once"].append(float(trajectory.success_once))
            continue
        metrics["rollout/success_once"].append(float(trajectory.success_once))
        if plays_on:
            metrics["rollout/success_at_end"].append(float(trajectory.success_at_end))
        metrics["rollout/episode_steps"].append(float(trajectory.num_steps))
        metrics["rollout/reward_raw"].append(reward.raw.sum().item())
        metrics["rollout/reward_shaped"].append(reward.shaped.sum().item())
        segments = segment(plan, trajectory.signals)
        taken_in = stage_per_step(segments, trajectory.num_steps)[trajectory.starts]
        for part in segments:
            for name, value in _stage_values(part, taken_in, reward).items():
                metrics[f"stage/{plan.names[part.stage]}/{name}"].append(value)
    return dict(metrics)


def _stage_values(part: Segment, taken_in: Tensor, reward: DecisionRewards) -> dict[str, float]:
    """What one episode tells of one stage; `taken_in` is `[M]`, the stage of each decision."""
    mine = taken_in == part.stage
    return {
        "success": float(part.passed),
        "steps": float(part.stop - part.start),
        "return_raw": reward.raw[mine].sum().item(),
        "return_shaped": reward.shaped[mine].sum().item(),
    }


def evaluation_counts(trajectories: Iterable[Trajectory], plan: StagePlan) -> dict[str, tuple[int, int]]:
    """What an evaluation reports, each as how many of how many episodes: `success_once`, `success_at_end`, and `{stage}_success`,
    P(stage k | stage k-1). The same names in every process, whatever it played. Goes through `trajectories` once and keeps none.

    Example: one of four episodes is solved, and two reach the cube: `{"success_once": (1, 4), ..., "Reach_success": (2, 4), ...}`.
    """
    played = [
        (episode.success_once, episode.success_at_end, segment(plan, episode.signals)) for episode in trajectories
    ]
    counts = {
        "success_once": (sum(once for once, _, _ in played), len(played)),
        "success_at_end": (sum(at_end for _, at_end, _ in played), len(played)),
    }
    passed = stage_success([segments for _, _, segments in played], len(plan))
    return counts | {f"{name}_success": pair for name, pair in zip(plan.names, passed, strict=True)}


def explained_variance(values: Tensor, returns: Tensor) -> float:
    """`1 - Var(returns - values) / Var(returns)`: 1 for a perfect critic, 0 for a constant one, negative for a worse one.

    Example: values `[0, 1]` of returns `[0, 2]`: 1 - 0.5 / 2 = 0.75.
    """
    return 1.0 - ((returns - values).var() / returns.var().clamp(min=1e-8)).item()


class IterationClock(TrainerCallback):
    """Logs at the end of each iteration where its time went, in seconds and as shares.

    `time/iteration_s` is a whole iteration, `time/rollout_s` its rollout, `time/update_s` all that follows up to its end; the
    parts of the rollout are those of [`Timing`]. `time/steps_per_s` counts environment steps of all processes over a whole
    iteration.

    Args:
        trainer ([`StagePPOTrainer`]): whose run it is.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self._began = self._rollout_ended = time.perf_counter()
        self._timing, self._num_steps = Timing(), 0

    def end_rollout(self, timing: Timing, num_steps: int) -> None:
        """The rollout is over: `num_steps` environment steps in all processes."""
        self._timing, self._num_steps, self._rollout_ended = timing, num_steps, time.perf_counter()

    def on_epoch_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """An iteration begins."""
        self._began = time.perf_counter()

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Log, in all processes."""
        if self._rollout_ended < self._began:
            return  # stopped within the rollout
        ended = time.perf_counter()
        whole = ended - self._began
        seconds = {name.removesuffix("_s"): value for name, value in asdict(self._timing).items()}
        seconds |= {"rollout": self._rollout_ended - self._began, "update": ended - self._rollout_ended}
        logs = {"time/iteration_s": whole, "time/steps_per_s": self._num_steps / whole}
        for name, value in seconds.items():
            logs[f"time/{name}_s"], logs[f"time/{name}_share"] = value, value / whole
        self.trainer.log(logs)
