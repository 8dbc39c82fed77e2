"""Who acts, by name: the task's own demonstrator, chance, or a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from trl_stare.data.actors import Actor, expert_actor, policy_actor, random_actor
from trl_stare.envs.registry import get_simulated_task


@dataclass(frozen=True)
class NamedActor:
    """An actor and what an environment must be for it.

    Args:
        name (`str`): `"expert"`, `"random"`, or the checkpoint's folder or Hub id.
        make (`Callable`): given a generator, the [`~trl_stare.data.actors.Actor`].
        chunk_size (`int`): environment steps per decision.
        image_size (`int`, *optional*): pixels of a side of the pictures that it reads; `None` where it looks at none, or does not say.
    """

    name: str
    make: Callable[[torch.Generator], Actor]
    chunk_size: int = 1
    image_size: int | None = None


def load_actor(policy: str, task: str, *, noise: float = 0.0, temperature: float = 1.0) -> NamedActor:
    """Look an actor up.

    Args:
        policy (`str`): `"expert"` is the task's scripted demonstrator, `"random"` is chance, anything else a checkpoint.
        task (`str`): a registered task.
        noise (`float`): share of an expert's steps that are mistakes.
        temperature (`float`): of a checkpoint's sampling; 0 is greedy.

    Raises:
        ValueError: if the task is unknown or has no demonstrator, or `noise` is given to another actor than an expert.
        OSError: if there is no such checkpoint.

    Example: `load_actor("expert", "StackCube-v1").chunk_size` is 1: demonstrators decide at every step.
    """
    simulated = get_simulated_task(task)
    if noise and policy != "expert":
        raise ValueError(f"`noise` must be 0 unless the expert acts, got {noise} for {policy!r}.")
    if policy == "random":
        return NamedActor("random", lambda generator: random_actor(size=simulated.mistake_size, generator=generator))
    if policy == "expert":
        expert, size = simulated.demonstrate, simulated.mistake_size
        if expert is None:
            raise ValueError(f"`task` must have a demonstrator for the expert to act, got {task!r} without.")
        expert_actor(expert, noise=noise)  # a wrong `noise` is refused now, not in the first rollout
        return NamedActor(
            "expert", lambda generator: expert_actor(expert, noise=noise, mistake_size=size, generator=generator)
        )
    from trl_stare.policies import TokenPolicy

    model = TokenPolicy.from_pretrained(policy)
    return NamedActor(
        policy,
        lambda generator: policy_actor(model, temperature=temperature, generator=generator),
        chunk_size=model.chunk_size,
        image_size=model.image_size,
    )
