"""What is kept of an evaluation: one row per episode, and their summary.

The rows (`episodes.jsonl`) are what later comparisons are paired from; the summary is what `results.json` shows.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import attrgetter
from pathlib import Path
from typing import Any

from trl_stare.data.trajectory import Trajectory
from trl_stare.evaluation.statistics import Proportion
from trl_stare.files import write_atomically
from trl_stare.stages import Segment, StagePlan, segment, stage_success

MOST_VOID = 0.02
"""Share of the episodes that may be missing from one of two evaluations that are compared: more were not meant to be the same."""


@dataclass(frozen=True)
class EpisodeResult:
    """How one episode went.

    Args:
        seed (`int`): the episode's seed: with the task, its initial state.
        success_once (`bool`): solved at any step. success_at_end (`bool`): solved at the last step.
        num_steps (`int`): environment steps.
        terminated (`bool`): the task ended it. truncated (`bool`): the time limit did.
        segments (`tuple[Segment, ...]`): one per reached stage, in order.
    """

    seed: int
    success_once: bool
    success_at_end: bool
    num_steps: int
    terminated: bool
    truncated: bool
    segments: tuple[Segment, ...]

    @classmethod
    def from_trajectory(cls, trajectory: Trajectory, plan: StagePlan) -> EpisodeResult:
        """Read the outcome off `trajectory` and cut it into the stages of `plan`."""
        return cls(
            seed=trajectory.seed,
            success_once=trajectory.success_once,
            success_at_end=trajectory.success_at_end,
            num_steps=trajectory.num_steps,
            terminated=trajectory.terminated,
            truncated=trajectory.truncated,
            segments=segment(plan, trajectory.signals),
        )

    def passed(self, stage: int) -> bool:
        """Whether it passed the stage of this 0-based index, which an episode that never reached it did not."""
        return any(part.stage == stage and part.passed for part in self.segments)

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> EpisodeResult:
        """The inverse of [`~EpisodeResult.to_row`]."""
        return cls(**{**row, "segments": tuple(Segment(**part) for part in row["segments"])})

    def to_row(self) -> dict[str, Any]:
        """A JSON-serialisable row; stages by their 0-based index."""
        return {
            "seed": self.seed,
            "success_once": self.success_once,
            "success_at_end": self.success_at_end,
            "num_steps": self.num_steps,
            "terminated": self.terminated,
            "truncated": self.truncated,
            "segments": [part._asdict() for part in self.segments],
        }


@dataclass(frozen=True)
class PhaseResult:
    """The evaluation of one checkpoint on held-out seeds.

    Args:
        once (`Proportion`): episodes solved at any step. at_end (`Proportion`): solved at the last step.
        stages (`dict[str, tuple[int, int]]`): stage name -> (episodes that passed it, episodes that reached it).
        eval_seeds (`tuple[int, ...]`): the episodes' seeds.
        temperature (`float`): sampling temperature, 0 is greedy. max_episode_steps (`int`): the time limit.
        eval_env_steps (`int`): environment steps of this evaluation. eval_wall_s (`float`): its seconds.
        metadata (`dict`): what the environment says about itself (backend, visuals, image size).
        checkpoint (`str` or `None`): folder of the weights.
        env_steps (`int` or `None`): environment steps that the phase itself took. wall_s (`float` or `None`): its seconds.

    `success_once` and `success_at_end` are the rates, `success_once_ci95` and `success_at_end_ci95` their Wilson intervals.
    """

    once: Proportion
    at_end: Proportion
    stages: dict[str, tuple[int, int]]
    eval_seeds: tuple[int, ...]
    temperature: float
    max_episode_steps: int
    eval_env_steps: int
    eval_wall_s: float
    metadata: dict[str, Any] = field(default_factory=dict)
    checkpoint: str | None = None
    env_steps: int | None = None
    wall_s: float | None = None

    @classmethod
    def from_episodes(
        cls,
        episodes: Sequence[EpisodeResult],
        stage_names: Sequence[str],
        *,
        temperature: float,
        max_episode_steps: int,
        wall_s: float,
        metadata: Mapping[str, Any] | None = None,
    ) -> PhaseResult:
        """Summarise `episodes`. `stage_names` are the plan's, in order; `wall_s` is the evaluation's own time.

        Raises:
            ValueError: if there are no episodes.
        """
        if not episodes:
            raise ValueError("`episodes` must hold at least one episode, got none. Give `evaluate` at least one seed.")
        counts = stage_success([episode.segments for episode in episodes], len(stage_names))
        return cls(
            once=Proportion.of([episode.success_once for episode in episodes]),
            at_end=Proportion.of([episode.success_at_end for episode in episodes]),
            stages=dict(zip(stage_names, counts, strict=True)),
            eval_seeds=tuple(episode.seed for episode in episodes),
            temperature=temperature,
            max_episode_steps=max_episode_steps,
            eval_env_steps=sum(episode.num_steps for episode in episodes),
            eval_wall_s=wall_s,
            metadata=dict(metadata or {}),
        )

    def for_phase(self, *, checkpoint: str | os.PathLike, env_steps: int, wall_s: float) -> PhaseResult:
        """The same evaluation, with what only the recipe knows: where the weights are and what the phase cost."""
        return replace(self, checkpoint=os.fspath(checkpoint), env_steps=env_steps, wall_s=wall_s)

    @property
    def n_episodes(self) -> int:
        """Episodes evaluated."""
        return self.once.n

    @property
    def success_once(self) -> float:
        """Rate in [0, 1]."""
        return self.once.rate

    @property
    def success_once_ci95(self) -> tuple[float, float]:
        """Wilson 95 % interval of `success_once`."""
        return self.once.wilson()

    @property
    def success_at_end(self) -> float:
        """Rate in [0, 1]."""
        return self.at_end.rate

    @property
    def success_at_end_ci95(self) -> tuple[float, float]:
        """Wilson 95 % interval of `success_at_end`."""
        return self.at_end.wilson()

    @property
    def stage_success(self) -> dict[str, float | None]:
        """Stage name -> P(stage | previous stage); `None` where no episode reached the stage."""
        return {name: passed / reached if reached else None for name, (passed, reached) in self.stages.items()}

    def to_dict(self) -> dict[str, Any]:
        """One phase of `results.json`: JSON-serialisable, rates in [0, 1], intervals as `[low, high]`."""
        return {
            "checkpoint": self.checkpoint,
            "n_episodes": self.n_episodes,
            "success_once": self.success_once,
            "success_once_ci95": list(self.success_once_ci95),
            "success_at_end": self.success_at_end,
            "success_at_end_ci95": list(self.success_at_end_ci95),
            "stage_success": self.stage_success,
            "eval_seeds": list(self.eval_seeds),
            "env_steps": self.env_steps,
            "wall_s": self.wall_s,
            "temperature": self.temperature,
            "max_episode_steps": self.max_episode_steps,
            "stage_counts": {name: list(counts) for name, counts in self.stages.items()},
            "eval_env_steps": self.eval_env_steps,
            "eval_wall_s": self.eval_wall_s,
            "metadata": self.metadata,
        }


def paired(
    a: Sequence[EpisodeResult],
    b: Sequence[EpisodeResult],
    outcome: Callable[[EpisodeResult], bool] = attrgetter("success_once"),
) -> tuple[list[bool], list[bool]]:
    """Outcomes of two evaluations of the same seeds, aligned by seed: what a paired test takes.

    A void episode is missing from its evaluation, and is then left out of the other one too.

    Args:
        a (`Sequence[EpisodeResult]`), b (`Sequence[EpisodeResult]`): the evaluations.
        outcome (`Callable`): what of an episode is compared, e.g. `lambda episode: episode.passed(0)`.

    Raises:
        ValueError: if a seed occurs twice, or the two did not play the same seeds, but for [`MOST_VOID`] of them, or one.
    """
    by_seed = []
    for name, episodes in (("a", a), ("b", b)):
        outcomes = {episode.seed: outcome(episode) for episode in episodes}
        if len(outcomes) != len(episodes):
            raise ValueError(f"`{name}` must hold each seed once, got {len(episodes) - len(outcomes)} repeated.")
        by_seed.append(outcomes)
    unpaired, common = (by_seed[0].keys() ^ by_seed[1].keys()), (by_seed[0].keys() & by_seed[1].keys())
    if not common or len(unpaired) > max(1, MOST_VOID * (len(common) + len(unpaired))):
        raise ValueError(
            f"`a` and `b` must have played the same seeds, got {len(unpaired)} that only one of them played "
            f"(e.g. {min(unpaired)}). Evaluate both on the same seeds."
        )
    first, second = ([outcomes[seed] for seed in by_seed[0] if seed in common] for outcomes in by_seed)
    return first, second


def write_episodes(path: str | os.PathLike, episodes: Sequence[EpisodeResult]) -> None:
    """Write one JSON row per episode to `path` (`.jsonl`), all of them or none."""
    rows = (json.dumps(episode.to_row(), allow_nan=False) for episode in episodes)
    write_atomically(path, "".join(f"{row}\n" for row in rows))


def read_episodes(path: str | os.PathLike) -> list[EpisodeResult]:
    """The inverse of [`write_episodes`].

    Raises:
        ValueError: naming the line that is not an episode.
    """
    episodes = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), start=1):
        try:
            episodes.append(EpisodeResult.from_row(json.loads(line)))
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(
                f"`{path}` must hold one episode per line as `write_episodes` writes them, got line {number}: "
                f"{line[:80]!r}. Delete the file and evaluate again."
            ) from error
    return episodes
