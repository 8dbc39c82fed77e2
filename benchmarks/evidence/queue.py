"""What is to be run: a file of arms, read and checked before anything runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from trl_stare.data.pairs import OBJECTIVES

METHODS = {
    "sft": (),
    "tpo": ("tpo-mean",),
    "tpo-sum": ("tpo-sum",),
    "sta-tpo": ("sta-tpo",),
    "sta-tpo-sum": ("sta-tpo-sum",),
    "ppo": ("ppo",),
    "sta-ppo": ("sta-ppo",),
    "ipi": ("sta-tpo", "sta-ppo"),
}
"""Method -> what is done to the start checkpoint, in order. `sft` is the checkpoint itself."""


@dataclass(frozen=True)
class Arm:
    """One method from one checkpoint.

    Args:
        name (`str`): in tables and folders.
        method (`str`): one of `METHODS`.
        start (`str`): name of a checkpoint that the command line gives.
        seeds (`tuple[int, ...]`): training seeds, a run each.
        preference (`Mapping`): flags of `benchmarks/preference_learning.py`. ppo (`Mapping`): flags of `recipes/ppo.py`.
        rounds (`int`): how often preference learning is done, each time on new rollouts of what the time before made.

    Raises:
        ValueError: for an unknown method, no seeds, or several rounds of what learns no preferences.
    """

    name: str
    method: str
    start: str
    seeds: tuple[int, ...]
    preference: Mapping[str, Any] = field(default_factory=dict)
    ppo: Mapping[str, Any] = field(default_factory=dict)
    rounds: int = 1

    def __post_init__(self):
        if self.method not in METHODS:
            raise ValueError(
                f"`method` of arm {self.name!r} must be one of {', '.join(METHODS)}, got {self.method!r}."
            )
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"`seeds` of arm {self.name!r} must be different training seeds, got {[*self.seeds]}.")
        if self.rounds < 1 or self.rounds > 1 and not set(METHODS[self.method]) & set(OBJECTIVES):
            raise ValueError(
                f"`rounds` of arm {self.name!r} must be at least 1, and 1 for a method without preferences, got {self.rounds}."
            )


@dataclass(frozen=True)
class Queue:
    """All arms on one task.

    Args:
        task (`str`): registered task name.
        arms (`tuple[Arm, ...]`): what is run.
        compare (`tuple[tuple[str, str], ...]`): arms to test against each other, the baseline first, on the training seeds both have.
        eval_episodes (`int`): held-out seeds 0, 1, ... on which every checkpoint is evaluated.
        temperature (`float`): sampling temperature of rollouts and evaluation.
        num_envs (`int`): environments, over all worker processes.
        window (`int`): iterations over which the success of rollouts is averaged in learning curves.
        levels (`tuple[float, ...]`): success in rollouts, in (0, 1], whose cost in environment steps is told.

    Raises:
        ValueError: if an arm is named like a checkpoint, a comparison names none or two without a training seed in common, or a level is
            no rate.
    """

    task: str
    arms: tuple[Arm, ...]
    compare: tuple[tuple[str, str], ...] = ()
    eval_episodes: int = 300
    temperature: float = 1.0
    num_envs: int = 16
    window: int = 2
    levels: tuple[float, ...] = (0.5, 0.8)

    def __post_init__(self):
        arms = {arm.name: arm for arm in self.arms}
        if both := sorted(arms.keys() & {arm.start for arm in self.arms}):
            raise ValueError(
                f"`start` must be named otherwise than the arms, got {', '.join(both)} for both. Rename it."
            )
        for pair in self.compare:
            if len(pair) != 2 or not arms.keys() >= set(pair):
                raise ValueError(f"`compare` must hold pairs of {', '.join(arms)}, got {[*pair]}.")
            if not set(arms[pair[0]].seeds) & set(arms[pair[1]].seeds):
                raise ValueError(
                    f"`compare` must hold arms with `seeds` in common, got {[*pair]}. Give both the same."
                )
        for name in ("eval_episodes", "num_envs", "window"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        if not all(0 < level <= 1 for level in self.levels):
            raise ValueError(f"`levels` must be rates in (0, 1], got {[*self.levels]}. Write 50 % as 0.5.")

    @property
    def runs(self) -> list[tuple[int, Arm]]:
        """Training seed and arm of every run: all arms of one seed, then of the next, so that pairs are complete early.

        Example: arms `ppo` and `sta-ppo` with seeds 0 and 1: `0 ppo, 0 sta-ppo, 1 ppo, 1 sta-ppo`.
        """
        seeds = dict.fromkeys(seed for arm in self.arms for seed in arm.seeds)
        return [(seed, arm) for seed in seeds for arm in self.arms if seed in arm.seeds]


def read_queue(path: Path, task: str | None = None) -> Queue:
    """A file of arms. Its `start`, `seeds`, `preference` and `ppo` hold for every arm that has no other; an arm's own
    `preference` and `ppo` are laid over them, setting by setting. `task` stands above the file's.

    Raises:
        ValueError: for what [`Queue`] and [`Arm`] refuse, for an arm's own settings of something that its method does not do, and for
            unknown names; says which.

    Example: `{task: StackCube-v1, start: weak, seeds: [0, 1], ppo: {preset: small-cpu}, arms: {ppo: {method: ppo}}}`.
    """
    given = yaml.safe_load(path.read_text()) | ({} if task is None else {"task": task})
    shared = {name: given.pop(name) for name in ("start", "seeds", "preference", "ppo") if name in given}
    arms = tuple(_arm(name, settings or {}, shared) for name, settings in given.pop("arms").items())
    _refuse_unknown(path, given, [part.name for part in fields(Queue)])
    compare = tuple(tuple(pair) for pair in given.pop("compare", ()))
    levels = tuple(given.pop("levels", Queue.levels))
    return Queue(arms=arms, compare=compare, levels=levels, **given)


def _arm(name: str, settings: Mapping[str, Any], shared: Mapping[str, Any]) -> Arm:
    given = {"method": name} | dict(shared) | dict(settings)
    steps = set(METHODS.get(given["method"], ()))
    for part, of_part in (("preference", steps & set(OBJECTIVES)), ("ppo", steps - set(OBJECTIVES))):
        if settings.get(part) and given["method"] in METHODS and not of_part:  # an unknown method is `Arm`'s to refuse
            raise ValueError(
                f"`{part}` of arm {name!r} must be left out, as {given['method']!r} does none, got {settings[part]}."
            )
        given[part] = {**shared.get(part, {}), **settings.get(part, {})}
    _refuse_unknown(f"arm {name!r}", given, [part.name for part in fields(Arm)])
    return Arm(**given | {"name": name, "seeds": tuple(given.get("seeds", ()))})


def _refuse_unknown(where: Any, given: Mapping[str, Any], known: Sequence[str]) -> None:
    if unknown := set(given) - set(known):
        raise ValueError(f"{where} must hold only {', '.join(known)}, got {', '.join(sorted(unknown))}.")
