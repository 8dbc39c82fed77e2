"""The stage-reset curriculum: a share of the training episodes begins where the policy fails most."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from trl_stare.data.trajectory import Trajectory
from trl_stare.interfaces import EpisodeStart
from trl_stare.stages import StagePlan, segment, stage_success

MEMORY = 0.5
"""What counts of passed stages are multiplied with from one rollout to the next: the policy they were taken from has changed."""
LATEST_ENTRY = 0.75
"""Share of the time limit after which an entry is not begun from: the replayed steps count, and too few would be left."""


class StageCurriculum:
    """Begins a share of the episodes at the entry of the stage with the lowest P(stage k | stage k-1).

    A beginning is the seed and the actions with which an earlier episode of this run, or a demonstration, entered the stage.
    Replaying them is exact; restoring a simulator's state is not (faults.md 4). For training only: an evaluation begins at
    the beginning, and so do the episodes that P is estimated from. All processes hold the same state.

    Args:
        plan ([`StagePlan`]): the stages.
        share (`float`): of the episodes, in [0, 1]; 0 switches the curriculum off.
        pool_size (`int`): how many beginnings are kept for each stage, the newest.
        seed (`int`): of the run; which episodes begin where is a function of it, the iteration and the state.
        max_episode_steps (`int`): the time limit.

    Example: 40 of 50 episodes touch the cube, 10 of these lift it, and 8 of those transport it: `target` is 1, Grasp. With
    `share` 0.25 and 128 episodes 32 of the next rollout begin with the hand at the cube.
    """

    def __init__(self, plan: StagePlan, *, share: float, pool_size: int, seed: int, max_episode_steps: int):
        self.plan, self.share, self.pool_size, self.seed = plan, share, pool_size, seed
        self._latest = int(LATEST_ENTRY * max_episode_steps)
        self.counts = [[0.0, 0.0] for _ in plan.stages]  # passed and reached, of episodes from the beginning
        self.pools: list[list[tuple[int, list[list[float]]]]] = [[] for _ in plan.stages]

    @property
    def target(self) -> int | None:
        """Index of the stage to begin at: of the later stages that have a beginning, the one that is passed most rarely."""
        known = [stage for stage in range(1, len(self.plan)) if self.pools[stage]]
        return min(known, key=lambda stage: self.counts[stage][0] / max(self.counts[stage][1], 1e-9), default=None)

    def starts(self, seeds: Sequence[int], iteration: int) -> list[int | EpisodeStart]:
        """The episode starts of one iteration, over all processes: `seeds`, of which a share is replaced."""
        starts, target, count = list(seeds), self.target, round(self.share * len(seeds))
        if target is None or not count:
            return starts
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + iteration)
        slots = torch.randperm(len(seeds), generator=generator)[:count]
        drawn = torch.randint(len(self.pools[target]), (count,), generator=generator)
        for slot, index in zip(slots.tolist(), drawn.tolist(), strict=True):
            seed, actions = self.pools[target][index]
            starts[slot] = EpisodeStart(seed, torch.tensor(actions))
        return starts

    def add(self, trajectories: Iterable[Trajectory]) -> None:
        """Begin from these as well, e.g. from demonstrations; before training, in all processes alike."""
        for trajectory in trajectories:
            self._keep(self.describe(trajectory))

    def describe(self, trajectory: Trajectory) -> dict[str, Any]:
        """What the curriculum takes from an episode, in plain values that can be sent to other processes."""
        if not self.share:
            return {}
        prefix = [] if trajectory.prefix is None else trajectory.prefix.tolist()
        segments = segment(self.plan, trajectory.signals)
        entries = [
            (part.stage, len(prefix) + part.start)
            for part in segments
            if part.stop > part.start > 0 and len(prefix) + part.start <= self._latest
        ]
        longest = max((length for _, length in entries), default=0)
        return {
            "seed": trajectory.seed,
            "is_whole": not prefix,
            "segments": segments,
            "entries": entries,
            "actions": (prefix + trajectory.actions.tolist())[:longest],
        }

    def update(self, episodes: Sequence[Mapping[str, Any]]) -> None:
        """Take in what [`describe`] made of all episodes of a rollout, of all processes."""
        if not self.share:
            return
        whole = [episode["segments"] for episode in episodes if episode["is_whole"]]
        new = stage_success(whole, len(self.plan))
        self.counts = [
            [MEMORY * old + float(now) for old, now in zip(*pair, strict=True)]
            for pair in zip(self.counts, new, strict=True)
        ]
        for episode in episodes:
            self._keep(episode)

    def _keep(self, episode: Mapping[str, Any]) -> None:
        for stage, length in episode.get("entries", ()):
            self.pools[stage].append((episode["seed"], episode["actions"][:length]))
            del self.pools[stage][: -self.pool_size]

    def state_dict(self) -> dict[str, Any]:
        """All that changes, as plain values that JSON keeps exactly."""
        return {"counts": self.counts, "pools": self.pools}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from [`state_dict`].

        Raises:
            ValueError: if it is of another number of stages.
        """
        if len(state["counts"]) != len(self.plan):
            raise ValueError(f"`state` must be of {len(self.plan)} stages, got {len(state['counts'])}.")
        self.counts = [list(pair) for pair in state["counts"]]
        self.pools = [[(seed, actions) for seed, actions in pool] for pool in state["pools"]]
