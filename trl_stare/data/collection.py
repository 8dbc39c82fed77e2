"""Collecting a dataset of trajectories that may be larger than memory and may be interrupted at any time.

Every finished episode is a file of its own until the collection is complete; then the files become shards. So an interrupted
collection keeps whatever was finished, and the same call continues.
"""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trl_stare.data.actors import Actor
from trl_stare.data.rollout import stream
from trl_stare.data.schema import merge_trajectories, save_trajectories, stored_settings
from trl_stare.data.trajectory import Trajectory
from trl_stare.interfaces import VectorEnv
from trl_stare.stages import StagePlan

BLOCK_EPISODES = 256
"""Episodes that are played in one go: after an interruption the current block's randomness begins anew."""
MOST_TRIES = 20
"""Episodes played for each one kept, at most, before a collection of successes gives up."""


def collect_dataset(
    env: VectorEnv,
    make_actor: Callable[[torch.Generator], Actor],
    folder: str | Path,
    plan: StagePlan,
    *,
    episodes: int,
    first_seed: int = 0,
    seed: int = 0,
    successes_only: bool = False,
    name: str = "policy",
    settings: Mapping[str, Any] | None = None,
    on_open: Callable[[int], None] | None = None,
    on_episode: Callable[[Trajectory], None] | None = None,
) -> Path:
    """Play seeds from `first_seed` on until `folder` holds `episodes` episodes; continue what is there.

    Args:
        env (`VectorEnv`): where.
        make_actor (`Callable`): given a generator, who acts; asked once per block of episodes, so that a block depends on
            `seed` and its own seeds only.
        folder (`str` or `Path`): the dataset; while unfinished, its episodes lie beside it in `.{folder}.partial`.
        plan ([`StagePlan`]): labels the stages.
        episodes (`int`): how many; more than before extends a finished collection.
        first_seed (`int`): the first episode's seed.
        seed (`int`): of the actors' randomness.
        successes_only (`bool`): keep successful episodes only, and play as many seeds as that takes.
        name (`str`): who acted, as stored.
        settings (`Mapping`, *optional*): what else the episodes depend on; stored with them beside `env.metadata`.
        on_open (`Callable`, *optional*): told how many episodes are there already.
        on_episode (`Callable`, *optional*): told of every episode that was kept (a progress bar).

    Returns:
        `Path`: `folder`, which [`load_trajectories`] and `datasets.load_dataset` read.

    Raises:
        ValueError: if `episodes` is not positive, or what is there was collected with other settings.
        RuntimeError: if fewer than one episode in twenty succeeds with `successes_only`.
    """
    if episodes < 1:
        raise ValueError(f"`episodes` must be at least 1, got {episodes}.")
    folder = Path(folder)
    given = {"policy": name, "first_seed": first_seed, "seed": seed, "successes_only": successes_only}
    ledger = _Ledger(folder, dict(env.metadata) | {"collection": given | dict(settings or {})})

    if on_open is not None:
        on_open(ledger.num_kept)
    while (missing := episodes - ledger.num_kept) > 0:
        if ledger.num_tried >= MOST_TRIES * episodes + env.num_envs:
            raise RuntimeError(
                f"`{folder}`: only {ledger.num_kept} of {ledger.num_tried} episodes succeeded. Lower the noise, or keep all."
            )
        # where some fail, fill all environments: idle ones cost as much
        block = max(missing, env.num_envs) if successes_only else missing
        seeds = ledger.next_seeds(first_seed, min(block, BLOCK_EPISODES))
        entropy = int(np.random.SeedSequence([seed, seeds[0]]).generate_state(1)[0])
        for _, trajectory in stream(env, make_actor(torch.Generator().manual_seed(entropy)), seeds, name=name):
            kept = trajectory.success_once or not successes_only
            ledger.add(trajectory, plan, kept=kept)
            if kept and on_episode is not None:
                on_episode(trajectory)
    if ledger.single:
        ledger.merge(episodes)
    return folder


class _Ledger:
    """What a collection has so far: the finished dataset, single finished episodes, and the seeds played in vain.

    Args:
        folder (`Path`): the dataset.
        metadata (`Mapping`): what the episodes depend on.

    Raises:
        ValueError: if what is there depends on something else; names it.
    """

    def __init__(self, folder: Path, metadata: Mapping[str, Any]):
        self.folder, self.partial = folder, folder.with_name(f".{folder.name}.partial")
        # as it comes back from a file: tuples are lists
        self.metadata: dict[str, Any] = json.loads(json.dumps(dict(metadata), default=str))
        seeds, notes = stored_settings(folder) if folder.exists() else ([], [])
        settings, self._vain = self.partial / "settings.json", self.partial / "in_vain.txt"
        for note in [*notes, *([json.loads(settings.read_text())] if settings.exists() else [])]:
            self._compare(note)
        self.merged = set(seeds)
        self.single = {int(path.name) for path in self.partial.glob("[0-9]*")}
        self.in_vain = {int(line) for line in self._vain.read_text().split()} if self._vain.exists() else set()

    @property
    def num_kept(self) -> int:
        return len(self.merged | self.single)

    @property
    def num_tried(self) -> int:
        return len(self.merged | self.single | self.in_vain)

    def next_seeds(self, first_seed: int, count: int) -> list[int]:
        """The next `count` seeds that were not played."""
        tried = self.merged | self.single | self.in_vain
        return list(islice((seed for seed in itertools.count(first_seed) if seed not in tried), count))

    def add(self, trajectory: Trajectory, plan: StagePlan, *, kept: bool) -> None:
        """Write a finished episode, all or nothing, or note that its seed was played in vain."""
        if not self.partial.exists():
            self.partial.mkdir(parents=True)
            (self.partial / "settings.json").write_text(json.dumps(self.metadata))
        if kept:
            save_trajectories([trajectory], self.partial / str(trajectory.seed), plan, metadata=self.metadata)
            self.single.add(trajectory.seed)
        else:
            with open(self._vain, "a") as file:
                file.write(f"{trajectory.seed}\n")
            self.in_vain.add(trajectory.seed)

    def merge(self, episodes: int) -> None:
        """Make one dataset of the first `episodes` episodes, those merged before first, and tidy up."""
        singles = [self.partial / str(seed) for seed in sorted(self.single - self.merged)]
        merge_trajectories([self.folder, *singles], self.folder, episodes=episodes)
        shutil.rmtree(self.partial, ignore_errors=True)

    def _compare(self, note: Mapping[str, Any]) -> None:
        changed = sorted(key for key in note | self.metadata if note.get(key) != self.metadata.get(key))
        if changed:
            raise ValueError(
                f"`folder` must be new or of the same collection, got {self.folder}, collected with other {changed}. "
                "Give another folder, or the same settings to continue."
            )
