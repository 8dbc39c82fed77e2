"""Play held-out episodes with a policy and summarise them."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence

import torch
from tqdm.auto import tqdm

from trl_stare.data.actors import policy_actor
from trl_stare.data.rollout import stream, warn_of_void
from trl_stare.evaluation.records import EpisodeResult, PhaseResult
from trl_stare.interfaces import VectorEnv, VLAPolicy
from trl_stare.stages import StagePlan


def evaluate(
    policy: VLAPolicy,
    env: VectorEnv,
    plan: StagePlan,
    seeds: Sequence[int],
    *,
    temperature: float,
    seed: int,
    train_seeds: Collection[int] = (),
    progress: bool = True,
) -> tuple[PhaseResult, list[EpisodeResult]]:
    """Play one episode per seed, `env.num_envs` at a time, each to the time limit, so that both success rules are known.

    An episode is let go as soon as its row is known: a frame of SimplerEnv's takes 0.9 MB, and there are as many as decisions. One that the
    simulator spoiled with a value that is not finite counts neither as success nor as failure; it is left out, which is logged.

    Args:
        policy (`VLAPolicy`): who acts.
        env (`VectorEnv`): where.
        plan (`StagePlan`): how the episodes are cut into stages; of `env`'s task.
        seeds (`Sequence[int]`): held-out episodes, each once. The same seeds make two evaluations comparable in pairs.
        temperature (`float`): sampling temperature of the actions, 0 is greedy.
        seed (`int`): seeds the sampling of actions.
        train_seeds (`Collection[int]`): seeds that training has seen; none may be among `seeds`.
        progress (`bool`): show a progress bar with the success rate so far.

    Returns:
        the summary, and one row per episode in the order of `seeds`, void ones left out.

    Raises:
        ValueError: if `seeds` is empty, repeats a seed or shares one with `train_seeds`, `plan` is of another task, or all is void.
    """
    _check(env, plan, seeds, train_seeds)
    act = policy_actor(policy, temperature=temperature, generator=torch.Generator().manual_seed(seed))
    began, finished = time.perf_counter(), {}
    with tqdm(total=len(seeds), desc="evaluate", unit="episode", disable=not progress) as bar:
        for index, trajectory in stream(
            env, act, seeds, name="policy", ignore_terminations=True, on_void=warn_of_void
        ):
            finished[index] = EpisodeResult.from_trajectory(trajectory, plan)
            rate = sum(episode.success_once for episode in finished.values()) / len(finished)
            bar.set_postfix_str(f"success_once {100 * rate:.0f} %", refresh=False)
            bar.update()
    episodes = [finished[index] for index in sorted(finished)]
    result = PhaseResult.from_episodes(
        episodes,
        plan.names,
        temperature=temperature,
        max_episode_steps=env.max_episode_steps,
        wall_s=time.perf_counter() - began,
        metadata=env.metadata,
    )
    return result, episodes


def _check(env: VectorEnv, plan: StagePlan, seeds: Sequence[int], train_seeds: Collection[int]) -> None:
    """Refuse, before any simulation, what would not be a result."""
    if not len(seeds):
        raise ValueError("`seeds` must hold at least one held-out seed, got none.")
    if len(set(seeds)) != len(seeds):
        raise ValueError(f"`seeds` must hold each seed once, got {len(seeds) - len(set(seeds))} repeated.")
    if seen := set(seeds) & set(train_seeds):
        raise ValueError(
            f"`seeds` must be held out from training, got {len(seen)} that training has seen (e.g. {min(seen)}). "
            "Choose a range of their own for evaluation."
        )
    if plan.task != env.task:
        raise ValueError(f"`plan` must be of the environment's task {env.task!r}, got one of {plan.task!r}.")
