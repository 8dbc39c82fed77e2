"""Potential-based reward shaping (Ng, Harada and Russell 1999): denser rewards, the same optimal policies."""

from __future__ import annotations

import torch
from torch import Tensor


def shaped_reward(
    reward: Tensor,
    potential: Tensor,
    next_potential: Tensor,
    *,
    gamma: float | Tensor,
    weight: float,
    terminated: Tensor,
) -> Tensor:
    """`r' = r + w * (gamma * Phi(s') - Phi(s))`, with `Phi(s') = 0` where the episode terminated.

    After a true end nothing follows, so its potential is 0; at a time limit the episode would have gone on, so
    `Phi(s')` stays (and the value of `s'` is bootstrapped). Along one episode `sum_t gamma^t F_t = gamma^T Phi(s_T) -
    Phi(s_0)`.

    Args:
        reward (`Tensor`): `[...]` float, the task's own sparse reward.
        potential (`Tensor`): `[...]` float, `Phi(s)`. next_potential (`Tensor`): `[...]`, `Phi(s')`, of the episode's
            final state where it ended, never of the next episode's first.
        gamma (`float` or `Tensor`): the discount from `s` to `s'`; `[...]` for decisions of unequal length.
        weight (`float`): `w`; 0 gives the reward back.
        terminated (`Tensor`): `[...]` bool, the task itself ended the episode.

    Raises:
        ValueError: if shapes differ or `terminated` is not bool.

    Example: reward 0, potential 0.25 -> 0.5, gamma 0.9, weight 2: 0 + 2 * (0.45 - 0.25) = 0.4.
    """
    given = {"potential": potential, "next_potential": next_potential, "terminated": terminated}
    if isinstance(gamma, Tensor):
        given["gamma"] = gamma
    for name, value in given.items():
        if value.shape != reward.shape:
            raise ValueError(f"`{name}` must have the shape of `reward`, {[*reward.shape]}, got {[*value.shape]}.")
    if terminated.dtype != torch.bool:
        raise ValueError(f"`terminated` must be bool, got {terminated.dtype}. Truncation is not termination.")
    return reward + weight * (gamma * next_potential * ~terminated - potential)
