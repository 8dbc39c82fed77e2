"""Collecting a dataset of trajectories that may be larger than memory and may be interrupted at any time.

Every finished episode is a file of its own until the collection is complete; then the files become shards. So an interrupted
collection keeps whatever was finished, and the same call continues.
"""

from __future__ import annotations

import json
import logging
import reprlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import count, groupby, islice, takewhile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from filelock import FileLock, Timeout
from tqdm.auto import tqdm

from trl_stare.data.actors import Actor
from trl_stare.data.labels import check_labels, relabel_folder
from trl_stare.data.parquet import check_replaceable, finish_folder, open_file, parquet_files
from trl_stare.data.rollout import stream
from trl_stare.data.schema import (
    SIGNAL_PREFIX,
    TRAJECTORY_FEATURES,
    merge_trajectories,
    save_trajectories,
    stored_settings,
)
from trl_stare.data.trajectory import Trajectory
from trl_stare.files import write_atomically
from trl_stare.interfaces import EpisodeStart, VectorEnv, VoidEpisode
from trl_stare.stages import StagePlan

logger = logging.getLogger(__name__)

BLOCK_EPISODES = 256
"""Episodes that are played in one go: after an interruption the current block's randomness begins anew."""
MOST_TRIES = 20
"""Episodes played for each one kept, at most, before a collection of successes gives up."""


class Key(NamedTuple):
    """Which episode of a collection: the `repeat`-th one, counted from 0, of the initial state that `seed` gives."""

    seed: int
    repeat: int


def collect_dataset(
    env: VectorEnv,
    make_actor: Callable[[torch.Generator], Actor],
    folder: str | Path,
    plan: StagePlan,
    *,
    episodes: int,
    episodes_per_seed: int = 1,
    first_seed: int = 0,
    seed: int = 0,
    successes_only: bool = False,
    name: str = "policy",
    settings: Mapping[str, Any] | None = None,
    progress: bool = True,
    on_episode: Callable[[Trajectory], None] | None = None,
) -> Path:
    """Play seeds from `first_seed` on until `folder` holds `episodes` episodes; continue what is there.

    The dataset holds every seed's episodes one after another: with `episodes_per_seed` 3, rows 0 to 2 are of `first_seed`,
    rows 3 to 5 of the next. Each is there exactly once, however often the collection was interrupted. Its randomness depends
    on what it was played beside (interruptions, `env.num_envs`, workers): only an uninterrupted call repeats itself exactly.
    An episode that the simulator spoils (a value is not finite) is left out, which is logged, and another is played.

    Args:
        env (`VectorEnv`): where.
        make_actor (`Callable`): given a generator, who acts; asked once per block of episodes.
        folder (`str` or `Path`): the dataset; while unfinished, its episodes lie beside it in `.{folder}.partial`. Of several
            processes one collects, the others wait for it.
        plan ([`StagePlan`]): labels the stages.
        episodes (`int`): how many; more than before extends a finished collection.
        episodes_per_seed (`int`): episodes from each initial state; preference pairs need several.
        first_seed (`int`): the first episode's seed. seed (`int`): of the actors' randomness.
        successes_only (`bool`): keep successful episodes only, and play as many seeds as that takes.
        name (`str`): who acted, as stored.
        settings (`Mapping`, *optional*): what else the episodes depend on; stored with them.
        progress (`bool`): show a progress bar, which has the folder's name.
        on_episode (`Callable`, *optional*): told of every episode that was kept.

    Returns:
        `Path`: `folder`, which [`load_trajectories`] and `datasets.load_dataset` read.

    Raises:
        ValueError: for numbers that are not positive, several episodes per seed with `successes_only`, other settings or another
            `plan` than those that `folder` was collected with, or if it holds anything but a collection.
        RuntimeError: if fewer than one episode in twenty can be kept: succeeds, with `successes_only`, or was not spoiled.
    """
    _check_counts(episodes, episodes_per_seed, successes_only)
    own = {"policy": name, "first_seed": first_seed, "seed": seed, "successes_only": successes_only}
    own |= {"episodes_per_seed": episodes_per_seed} | dict(settings or {})
    with _alone(Path(folder)):
        ledger = _Ledger(Path(folder), env, own, plan)
        there = min(len(ledger.kept), episodes)
        with tqdm(total=episodes, initial=there, desc=ledger.folder.name, unit="episode", disable=not progress) as bar:
            for trajectory in _play_missing(ledger, env, make_actor, episodes=episodes, seed=seed, name=name):
                bar.update()
                if on_episode is not None:
                    on_episode(trajectory)
        if ledger.single:
            ledger.merge(episodes)
    return ledger.folder


def relabel_dataset(folder: str | Path, plan: StagePlan) -> None:
    """Label the stages of a collection anew, finished or not, by `plan` as it is now; all else stays as it was recorded.

    Pairs of its episodes are to be made again afterwards, where stages begin and end elsewhere.

    Args:
        folder (`str` or `Path`): what [`collect_dataset`] or [`save_trajectories`] wrote. A file is in memory at a time.
        plan ([`StagePlan`]): of the episodes' task.

    Raises:
        FileNotFoundError: if there is no collection.
        ValueError: if a signal that the plan reads was not recorded.
    """
    folder = Path(folder)
    if not (parts := _parts(folder)):
        raise FileNotFoundError(
            f"`folder` must hold a collection, got {folder}. Collect episodes by recipes/collect.py."
        )
    with _alone(folder):
        for part in parts:
            relabel_folder(part, plan)


def _parts(folder: Path) -> list[Path]:
    """The folders that a collection's episodes lie in: its own, and one for each that was finished since."""
    return [*([folder] if any(folder.glob("*.parquet")) else []), *sorted(_partial(folder).glob("[0-9]*-[0-9]*"))]


def _check_definition(part: Path, env: VectorEnv) -> None:
    """Refuse to mix episodes of a task that is measured or told otherwise by now: a task is code, of which settings have the name."""
    now = {"signals": sorted(env.signal_names), "instruction": [env.instruction]}
    for file in parquet_files(part):
        with open_file(file) as source:
            names = source.schema_arrow.names
            told = source.read(["instruction"])["instruction"].unique().to_pylist()
        signals = sorted(name.removeprefix(SIGNAL_PREFIX) for name in names if name.startswith(SIGNAL_PREFIX))
        for what, before in {"signals": signals, "instruction": told or now["instruction"]}.items():
            if before != now[what]:
                raise ValueError(
                    f"`env` must be of the task that `{file}` was recorded in, got other `{what}`: {now[what]}, there {before}. "
                    "Give another folder, or restore the task."
                )


def _partial(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.partial")


def _play_missing(
    ledger: _Ledger,
    env: VectorEnv,
    make_actor: Callable[[torch.Generator], Actor],
    *,
    episodes: int,
    seed: int,
    name: str,
) -> Iterator[Trajectory]:
    """Play what `ledger` has not yet, block by block, write it down, and yield what is kept."""
    while keys := ledger.missing(episodes, at_least=env.num_envs)[:BLOCK_EPISODES]:
        actor = make_actor(_generator(seed, keys[0], sum(key > keys[0] for key in ledger.played)))
        on_void = partial(_leave_out, ledger, keys)
        for index, trajectory in stream(env, actor, [key.seed for key in keys], name=name, on_void=on_void):
            if ledger.add(keys[index], trajectory):
                yield trajectory


def _leave_out(ledger: _Ledger, keys: Sequence[Key], start: EpisodeStart, void: VoidEpisode) -> None:
    logger.warning(
        "%s: an episode of seed %d is left out, whose %s was not finite at step %d",
        ledger.folder, start.seed, void.what, void.step,
    )  # fmt: skip
    ledger.leave_out(keys[void.episode])


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Wait until no other process collects into `folder`: two would play the same seeds and tidy up under each other's feet."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.with_name(f".{folder.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.warning("another process collects into %s: waiting for it", folder)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _generator(seed: int, first: Key, later: int) -> torch.Generator:
    """The random numbers of the block of episodes that begins with `first`, `later` of which were played before an interruption.

    Those played might come again otherwise: the same random numbers, in another episode of the same seed.
    """
    entropy = int(np.random.SeedSequence([seed, *first, *([later] if later else [])]).generate_state(1)[0])
    return torch.Generator().manual_seed(entropy)


def _check_counts(episodes: int, episodes_per_seed: int, successes_only: bool) -> None:
    for argument, value in (("episodes", episodes), ("episodes_per_seed", episodes_per_seed)):
        if value < 1:
            raise ValueError(f"`{argument}` must be at least 1, got {value}.")
    if successes_only and episodes_per_seed > 1:
        raise ValueError(
            f"`episodes_per_seed` must be 1 with `successes_only`, got {episodes_per_seed}: what is compared needs failures."
        )


class _Ledger:
    """What a collection has so far: the finished dataset, single finished episodes, and those played in vain, which are not kept.

    Args:
        folder (`Path`): the dataset.
        env (`VectorEnv`): where they are played; its metadata are stored with them.
        own (`Mapping`): the collection's own settings, stored under `"collection"`.
        plan ([`StagePlan`]): labels the stages.

    Raises:
        ValueError: if what is there depends on something else, is labelled by another plan, or is of another task; names it.
    """

    def __init__(self, folder: Path, env: VectorEnv, own: Mapping[str, Any], plan: StagePlan):
        self.folder, self.partial, self.plan = folder, _partial(folder), plan
        # as it comes back from a file: tuples are lists
        self.metadata: dict[str, Any] = json.loads(json.dumps({**env.metadata, "collection": own}, default=str))
        self.first_seed, self.repeats, self.selects = (
            own[name] for name in ("first_seed", "episodes_per_seed", "successes_only")
        )
        finish_folder(folder)
        check_replaceable(folder, TRAJECTORY_FEATURES)
        seeds, notes = stored_settings(folder) if folder.exists() else ([], [])
        self._settings, self._vain = self.partial / "settings.json", self.partial / "in_vain.txt"
        for note in [*notes, *([json.loads(self._settings.read_text())] if self._settings.exists() else [])]:
            self._compare(note)
        for part in _parts(folder):
            check_labels(part, plan)
            _check_definition(part, env)
        self.single = {Key(*map(int, path.name.split("-"))) for path in self.partial.glob("[0-9]*-[0-9]*")}
        noted = self._vain.read_text().split() if self._vain.exists() else ()
        self.in_vain = {
            Key(int(seed), int(repeat or 0)) for seed, _, repeat in (note.partition("-") for note in noted)
        }
        self.merged = {
            key
            for seed, rows in groupby(seeds)
            for key, _ in zip((Key(seed, i) for i in count() if (seed, i) not in self.in_vain), rows, strict=False)
        }
        if self.merged:  # every episode before the last one in the dataset was played
            self.in_vain |= set(takewhile(max(self.merged).__gt__, self._every())) - self.merged

    @property
    def kept(self) -> set[Key]:
        """What the dataset is to hold."""
        return self.merged | self.single

    @property
    def played(self) -> set[Key]:
        """What was played to its end."""
        return self.kept | self.in_vain

    def missing(self, episodes: int, *, at_least: int) -> list[Key]:
        """What is to be played until there are `episodes`, in order.

        Of successes nobody knows how many seeds they take: seeds that were left out, and new ones for as many episodes as
        are missing, and `at_least` so many that all environments are busy, as idle ones cost as much.

        Raises:
            RuntimeError: if so many were played for so few successes that there is no hope of more.
        """
        wanted, played = episodes - len(self.kept), self.played
        if wanted > 0 and len(played) >= MOST_TRIES * episodes + at_least:
            what = "succeeded. Lower the noise, or keep all" if self.selects else "were finite. Look at the simulator"
            raise RuntimeError(f"`{self.folder}`: only {len(self.kept)} of {len(played)} episodes {what}.")
        if not self.selects:
            keys = islice((key for key in self._every() if key not in self.in_vain), episodes)
            return [key for key in keys if key not in played]
        end = max((key.seed + 1 for key in played), default=self.first_seed)
        left_out = [key for seed in range(self.first_seed, end) if (key := Key(seed, 0)) not in played]
        new = max(wanted, at_least) - len(left_out) if wanted > 0 else 0
        return left_out + [Key(seed, 0) for seed in range(end, end + new)]

    def _every(self) -> Iterator[Key]:
        """All episodes there could be, in order."""
        return (Key(self.first_seed + i // self.repeats, i % self.repeats) for i in count())

    def add(self, key: Key, trajectory: Trajectory) -> bool:
        """Write a finished episode, all or nothing, or note that it was played in vain; whether it is kept."""
        if self.selects and not trajectory.success_once:
            self.leave_out(key)
            return False
        self._begin()
        save_trajectories([trajectory], self._file_of(key), self.plan, metadata=self.metadata)
        self.single.add(key)
        return True

    def leave_out(self, key: Key) -> None:
        """Note that an episode was played in vain."""
        self._begin()
        with open(self._vain, "a") as file:
            file.write(f"{key.seed}-{key.repeat}\n")
        self.in_vain.add(key)

    def _begin(self) -> None:
        if not self._settings.exists():
            write_atomically(self._settings, json.dumps(self.metadata))

    def merge(self, episodes: int) -> None:
        """Make one dataset of the first `episodes` episodes, those merged before first, and tidy up; what is beyond them stays single."""
        new, room = sorted(self.single - self.merged), max(0, episodes - len(self.merged))
        if room and new:
            merge_trajectories([self.folder, *map(self._file_of, new[:room])], self.folder, episodes=episodes)
        if len(new) <= room:
            shutil.rmtree(self.partial, ignore_errors=True)
            return
        for key in self.single - {*new[room:]}:
            shutil.rmtree(self._file_of(key))

    def _file_of(self, key: Key) -> Path:
        return self.partial / f"{key.seed}-{key.repeat}"

    def _compare(self, note: Mapping[str, Any]) -> None:
        before, now = (settings | settings.get("collection", {}) for settings in (note, self.metadata))
        changed = [
            f"{name} {reprlib.repr(before.get(name))}, not {reprlib.repr(now.get(name))}"
            for name in sorted((before.keys() | now.keys()) - {"collection"})
            if before.get(name) != now.get(name)
        ]
        if changed:
            raise ValueError(
                f"`folder` must be new or of the same collection, got {self.folder}, collected with {'; '.join(changed)}. "
                "Give another folder, or the same settings to continue."
            )
