"""Who acts in a rollout: a policy, a scripted demonstrator with or without mistakes, or chance."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from trl_stare.interfaces import ACTION_DIM, Observation, Signals, VLAPolicy

SCRIPTED = ("expert", "random")
"""Names that are no checkpoints."""


class Decision(NamedTuple):
    """What an actor answers for `N` environments.

    Attributes:
        actions (`Tensor`): `[N, C, A]`, executed.
        labels (`Tensor`): `[N, C, A]`, what should be imitated; differs from `actions` where noise was added.
        trace (`Tensor` or `None`): `[N, L]`. logps (`Tensor` or `None`): `[N, L]`.
        features (`Tensor` or `None`): `[N, F]`, for a value head.
    """

    actions: Tensor
    labels: Tensor
    trace: Tensor | None = None
    logps: Tensor | None = None
    features: Tensor | None = None


Actor = Callable[[Observation, Signals], Decision]


def policy_actor(policy: VLAPolicy, *, temperature: float, generator: torch.Generator | None) -> Actor:
    """`policy` acts on what it sees; `temperature` 0 is greedy, `generator` the only source of randomness."""

    def act(obs: Observation, signals: Signals) -> Decision:
        sample = policy.act(policy.prepare(obs), temperature=temperature, generator=generator)
        return Decision(sample.actions, sample.actions, sample.trace, sample.logps, sample.features)

    return act


def expert_actor(
    expert: Callable[[Signals], Tensor],
    *,
    noise: float = 0.0,
    mistake_size: float = 0.6,
    generator: torch.Generator | None = None,
) -> Actor:
    """A scripted expert acts on the signals, one environment step at a time, and makes mistakes now and then.

    With `noise`, that share of the steps is a mistake: a random translation and a random gripper command are executed, while
    the recorded label stays the expert's own action. Demonstrations then contain recoveries, also from fingers that closed
    beside the object (in the manner of DART, arXiv 1703.09327).

    Args:
        expert (`Callable`): signals `[N, ...]` -> `[N, A]` actions; the last value commands the gripper.
        noise (`float`): share of the steps that are mistakes, in [0, 1]; with 1 only chance acts.
        mistake_size (`float`): largest translation of a mistake per axis, controller units: 6 cm for the Panda's
            `pd_ee_delta_pose`. Every [`SimulatedTask`] names its own.

    Raises:
        ValueError: if `noise` is no share.
    """
    if not 0.0 <= noise <= 1.0:
        raise ValueError(f"`noise` must be in [0, 1], got {noise}.")

    def act(obs: Observation, signals: Signals) -> Decision:
        labels = expert(signals)[:, None]
        actions = labels.clone()
        if noise:
            mistaken = torch.rand(len(labels), generator=generator) < noise
            random = torch.rand(actions.shape, generator=generator) * 2 - 1
            actions[mistaken, :, :3] = mistake_size * random[mistaken, :, :3]
            actions[mistaken, :, -1] = random[mistaken, :, -1].sign()
        return Decision(actions, labels)

    return act


def random_actor(*, size: float, generator: torch.Generator | None) -> Actor:
    """Chance acts: translations of at most `size` per axis (controller units), no rotation, the gripper opens or closes."""

    def act(obs: Observation, signals: Signals) -> Decision:
        actions = torch.zeros(len(obs.images), 1, ACTION_DIM)
        actions[..., :3] = size * (torch.rand(actions[..., :3].shape, generator=generator) * 2 - 1)
        actions[..., -1] = torch.where(torch.rand(actions[..., -1].shape, generator=generator) < 0.5, -1.0, 1.0)
        return Decision(actions, actions)

    return act
