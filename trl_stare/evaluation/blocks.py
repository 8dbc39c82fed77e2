"""Playing a task's held-out episodes so that an interruption changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from trl_stare.data.actors import Actor
from trl_stare.data.rollout import stream
from trl_stare.data.trajectory import Trajectory
from trl_stare.evaluation.played import PlayedEpisode, read_played, write_played
from trl_stare.interfaces import NOMINAL, EpisodeStart, VectorEnv, VoidEpisode
from trl_stare.stages import StagePlan


def play_in_blocks(
    env: VectorEnv,
    make_actor: Callable[[torch.Generator], Actor],
    plan: StagePlan,
    starts: Sequence[int],
    folder: str | Path,
    *,
    seed: int,
    name: str = "policy",
    on_episode: Callable[[PlayedEpisode], None] | None = None,
    on_block: Callable[[list[Trajectory]], None] | None = None,
) -> list[PlayedEpisode]:
    """Play one episode per start, each to the time limit, and keep every block of `env.num_envs` that is finished.

    Episodes of one length, played side by side, all end together: a block is what runs at a time, so keeping blocks keeps
    every finished episode. A block's randomness depends on `seed` and its first start only, so a continued evaluation gives
    the same episodes as one that was never interrupted.

    Args:
        env (`VectorEnv`): where.
        make_actor (`Callable`): given a generator, who acts; asked once per block.
        plan ([`StagePlan`]): of `env`'s task.
        starts (`Sequence[int]`): seeds of the initial states, each once.
        folder (`str` or `Path`): keeps the blocks; of this evaluation only.
        seed (`int`): of the actor's randomness.
        name (`str`): who acts, as the trajectories say.
        on_episode (`Callable`, *optional*): told of every row as it is known, those kept before included (a progress bar).
        on_block (`Callable`, *optional*): given a block's trajectories before it is kept (videos): a kill meanwhile repeats both.

    Returns:
        `list[PlayedEpisode]`, in the order of `starts`; voided ones are among them.

    Raises:
        ValueError: if there is no start, one is repeated, or `plan` is of another task.
    """
    if not len(starts) or len(set(starts)) != len(starts):
        raise ValueError(f"`starts` must hold at least one seed, each once, got {list(starts)}.")
    if plan.task != env.task:
        raise ValueError(f"`plan` must be of the environment's task {env.task!r}, got one of {plan.task!r}.")
    episodes: list[PlayedEpisode] = []
    tell = on_episode or (lambda episode: None)
    for first in range(0, len(starts), env.num_envs):
        block = list(starts[first : first + env.num_envs])
        file = Path(folder) / f"{seed}-{block[0]}.parquet"
        if file.exists():
            rows = read_played(file)
            for row in rows:
                tell(row)
        else:
            entropy = int(np.random.SeedSequence([seed, block[0]]).generate_state(1)[0])
            actor = make_actor(torch.Generator().manual_seed(entropy))
            rows, trajectories = _play(env, actor, plan, block, seed=seed, name=name, tell=tell)
            if on_block is not None:
                on_block(trajectories)
            write_played(file, rows)
        episodes += rows
    return episodes


def _play(
    env: VectorEnv,
    actor: Actor,
    plan: StagePlan,
    starts: list[int],
    *,
    seed: int,
    name: str,
    tell: Callable[[PlayedEpisode], None],
) -> tuple[list[PlayedEpisode], list[Trajectory]]:
    """Rows and trajectories of one block, in the order of `starts`."""
    rows: dict[int, PlayedEpisode] = {}
    trajectories: dict[int, Trajectory] = {}
    varied = {"variation": env.metadata.get("variation", NOMINAL)}

    def note(start: EpisodeStart, void: VoidEpisode) -> None:
        rows[start.seed] = PlayedEpisode.voided(env.task, start.seed, seed, step=void.step, what=void.what, **varied)
        tell(rows[start.seed])

    for index, trajectory in stream(env, actor, starts, name=name, ignore_terminations=True, on_void=note):
        rows[starts[index]] = PlayedEpisode.of(trajectory, plan, seed, **varied)
        trajectories[starts[index]] = trajectory
        tell(rows[starts[index]])
    return [rows[start] for start in starts], [trajectories[start] for start in starts if start in trajectories]
