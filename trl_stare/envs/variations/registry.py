"""What a variation is, and which there are. No simulator is imported here."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from trl_stare.envs.registry import SimulatedTask
from trl_stare.interfaces import NOMINAL
from trl_stare.names import nearest_hint


@dataclass(frozen=True)
class Variation:
    """One change that any task can take. Success rule, stages and time limit stay the task's own.

    What it draws at random, it draws from the episode's seed: the same seed gives the same change, whoever acts.

    Args:
        name (`str`): `"axis/change"`, e.g. `"camera/shift"`.
        what (`str`): a line for tables: what changes, and by how much.
        keeps_physics (`bool`): the same actions lead to the same simulator states as without it.
        instruct (`Callable[[SimulatedTask], str]`, *optional*): what the policy is told instead.
        build (`Callable[[], AbstractContextManager]`, *optional*): the context in which scenes are built.
        arrange (`Callable[[BaseEnv, SimulatedTask, Generator], None]`, *optional*): changes a scene that was just reset.
        execute (`Callable[[SimulatedTask, Generator], Callable]`, *optional*): called at every reset; returns what turns the
            `[1, A]` action that the policy chose into the one that is executed, step by step.

    All four are functions of a module, as worker processes get a copy.
    """

    name: str
    what: str
    keeps_physics: bool = True
    instruct: Callable[[SimulatedTask], str] | None = None
    build: Callable[[], AbstractContextManager] | None = None
    arrange: Callable[[Any, SimulatedTask, np.random.Generator], None] | None = None
    execute: Callable[[SimulatedTask, np.random.Generator], Callable[[Tensor], Tensor]] | None = None

    @property
    def changes_scene(self) -> bool:
        """Whether it needs scenes that are built anew for every episode, which ManiSkill's GPU simulation does not do."""
        return any((self.build, self.arrange, self.execute))

    def generator(self, seed: int) -> np.random.Generator:
        """Where the change of the episode of `seed` is drawn from; another variation draws other numbers."""
        return np.random.default_rng([seed, *self.name.encode()])

    def building(self) -> AbstractContextManager:
        """The context to build a scene in."""
        return self.build() if self.build else nullcontext()


_VARIATIONS: dict[str, Variation] = {}


def register_variation(variation: Variation) -> None:
    """Make `variation` known to [`make_env`]. A second registration of a name replaces the first.

    Raises:
        ValueError: if its name is not `axis/change` in small letters.
    """
    if not re.fullmatch(r"[a-z_]+/[a-z_]+", variation.name):
        raise ValueError(f"`name` must be 'axis/change' in small letters and _, got {variation.name!r}.")
    _VARIATIONS[variation.name] = variation


def known_variations() -> tuple[str, ...]:
    """The names, in the order of their registration."""
    return tuple(_VARIATIONS)


def get_variation(name: str) -> Variation:
    """Look a variation up.

    Raises:
        ValueError: if `name` is unknown; lists the known names and the nearest one.
    """
    if name not in _VARIATIONS:
        raise ValueError(
            f"`variation` must be one of {', '.join(_VARIATIONS)}, got {name!r}.{nearest_hint(name, _VARIATIONS)}"
        )
    return _VARIATIONS[name]


def select_variations(names: str) -> tuple[str, ...]:
    """The variations of a comma list, or all of them for `"all"`.

    Raises:
        ValueError: if one is unknown or repeated.

    Example: `select_variations("camera/shift, light/dim")` is `("camera/shift", "light/dim")`.
    """
    if names.strip() == "all":
        return known_variations()
    chosen = tuple(re.split(r"\s*,\s*", names.strip()))
    if len(set(chosen)) != len(chosen) or NOMINAL in chosen:
        raise ValueError(
            f"`variations` must be different names besides {NOMINAL!r}, which is played anyway, got {names!r}."
        )
    return tuple(get_variation(name).name for name in chosen)
