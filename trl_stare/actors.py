"""Who acts, by name: the task's own demonstrator, chance, or a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from trl_stare.data.actors import SCRIPTED, Actor, expert_actor, policy_actor, random_actor
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


def load_actor(policy: str, task: str, *, noise: float = 0.0, temperature: float = 1.0, **loading: Any) -> NamedActor:
    """Look an actor up.

    Args:
        policy (`str`): `"expert"` is the task's scripted demonstrator, `"random"` is chance, anything else a checkpoint, which acts on
            the GPU where there is one.
        task (`str`): a registered task.
        noise (`float`): share of an expert's steps that are mistakes.
        temperature (`float`): of a checkpoint's sampling; 0 is greedy.
        loading: for a checkpoint's `from_pretrained`: `unnorm_key`, `dtype`, fields of its config.

    Raises:
        ValueError: if the task is unknown or has no demonstrator, `noise` is given to another actor than an expert, `loading` to
            another than a checkpoint, or `temperature` is negative.
        OSError: if there is no such checkpoint.

    Example: `load_actor("expert", "StackCube-v1").chunk_size` is 1: demonstrators decide at every step.
    """
    simulated = get_simulated_task(task)
    if not 0 <= temperature < math.inf:
        raise ValueError(
            f"`temperature` must be a number from 0 on, got {temperature}. Give 0 to take the likeliest action."
        )
    if noise and policy != "expert":
        raise ValueError(f"`noise` must be 0 unless the expert acts, got {noise} for {policy!r}.")
    if loading and policy in SCRIPTED:
        raise ValueError(f"{', '.join(loading)} must be left out unless a checkpoint acts, got {policy!r}.")
    if policy == "random":
        return NamedActor("random", lambda generator: random_actor(size=simulated.mistake_size, generator=generator))
    if policy == "expert":
        expert, size = simulated.demonstrate, simulated.mistake_size
        if expert is None:
            raise ValueError(
                f"`task` must have a demonstrator for the expert to act, got {task!r} without. Register one, or name a checkpoint."
            )
        expert_actor(expert, noise=noise)  # a wrong `noise` is refused now, not in the first rollout
        return NamedActor(
            "expert", lambda generator: expert_actor(expert, noise=noise, mistake_size=size, generator=generator)
        )
    from trl_stare.policies import TokenPolicy

    model = TokenPolicy.from_pretrained(policy, **loading)
    model.model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    return NamedActor(
        policy,
        lambda generator: policy_actor(model, temperature=temperature, generator=generator),
        chunk_size=model.chunk_size,
        image_size=model.image_size,
    )


def load_actors(policy: str, tasks: Sequence[str], **options: Any) -> dict[str, NamedActor]:
    """[`load_actor`] for each of several tasks. A checkpoint is loaded once, however many tasks it plays.

    Example: `load_actors("expert", ("PushCube-v1", "PullCube-v1"))` are two demonstrators.
    """
    if policy in SCRIPTED:
        return {task: load_actor(policy, task, **options) for task in tasks}
    return dict.fromkeys(tasks, load_actor(policy, tasks[0], **options))
