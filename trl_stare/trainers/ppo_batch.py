"""From trajectories to what PPO learns from: rewards, values, advantages, one row per decision."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from trl_stare.data.trajectory import Trajectory
from trl_stare.interfaces import Observation
from trl_stare.losses import gae
from trl_stare.stages import StagePlan, shaped_reward


class DecisionRewards(NamedTuple):
    """What one trajectory of `M` decisions earned.

    Attributes:
        raw (`Tensor`): `[M]`, the task's own reward, discounted to the decision within its chunk.
        shaped (`Tensor`): `[M]`, with shaping.
        discount (`Tensor`): `[M]`, `gamma ** steps of the decision`.
    """

    raw: Tensor
    shaped: Tensor
    discount: Tensor


def decision_rewards(
    trajectory: Trajectory, plan: StagePlan, *, gamma: float, weight: float, form: str
) -> DecisionRewards:
    """Rewards of the decisions of one trajectory; `weight` 0 shapes nothing.

    A decision of `n` environment steps has discount `gamma^n` and reward `sum_i gamma^i r_i` (options, Sutton et al. 1999);
    the potential is taken where the policy looks: before the decision and after its last step.
    """
    bounds = trajectory.bounds
    steps = bounds.diff()
    within = torch.arange(trajectory.num_steps) - trajectory.starts.repeat_interleave(steps)
    owner = torch.arange(len(steps)).repeat_interleave(steps)
    raw = torch.zeros(len(steps)).index_add(0, owner, trajectory.reward * gamma**within)
    discount = gamma ** steps.float()
    if not weight:
        return DecisionRewards(raw, raw, discount)
    potential = plan.potential({name: value[bounds] for name, value in trajectory.signals.items()}, form)
    terminated = torch.zeros(len(steps), dtype=torch.bool)
    terminated[-1] = trajectory.terminated
    shaped = shaped_reward(raw, potential[:-1], potential[1:], gamma=discount, weight=weight, terminated=terminated)
    return DecisionRewards(raw, shaped, discount)


def observations(trajectories: Sequence[Trajectory], final: bool = False) -> Observation:
    """All decisions' observations, one after the other; with `final`, the last observation of each trajectory instead."""
    if final:
        return Observation(
            torch.stack([trajectory.final_image for trajectory in trajectories]),
            tuple(trajectory.instruction for trajectory in trajectories),
            torch.stack([trajectory.final_state for trajectory in trajectories]),
        )
    return Observation(
        torch.cat([trajectory.images for trajectory in trajectories]),
        tuple(trajectory.instruction for trajectory in trajectories for _ in trajectory.starts),
        torch.cat([trajectory.state for trajectory in trajectories]),
    )


def executed_tokens(trajectory: Trajectory, num_tokens: int, chunk_size: int) -> Tensor:
    """`[M, L]` bool: tokens of steps that were executed before the episode ended."""
    per_step = num_tokens // chunk_size
    return (torch.arange(num_tokens) // per_step)[None] < trajectory.bounds.diff()[:, None]


def advantages_and_returns(
    trajectories: Sequence[Trajectory],
    rewards: Sequence[DecisionRewards],
    values: Tensor,
    final_values: Tensor,
    *,
    gae_lambda: float,
    bootstrap_on_truncation: bool,
) -> tuple[Tensor, Tensor]:
    """GAE over trajectories of different length.

    Args:
        values (`Tensor`): `[M]`, of all decisions one after the other. final_values (`Tensor`): `[N]`, of the last observations.

    Returns:
        `tuple[Tensor, Tensor]`: advantages and returns, `[M]`, in the order of `values`.
    """
    lengths = [len(trajectory.starts) for trajectory in trajectories]
    split = list(values.split(lengths))
    following = [torch.cat([value[1:], last[None]]) for value, last in zip(split, final_values, strict=True)]
    # [T, N]: padding lies behind each end, where nothing flows back from
    reward, value, next_value, discount = (
        pad_sequence(list(rows))
        for rows in ([r.shaped for r in rewards], split, following, [r.discount for r in rewards])
    )
    last = torch.tensor(lengths) - 1
    is_last = torch.arange(len(reward))[:, None] == last[None]
    solved = torch.tensor([trajectory.terminated for trajectory in trajectories])
    final = is_last & (solved[None] if bootstrap_on_truncation else torch.ones_like(solved)[None])
    advantages, returns = gae(reward, value, next_value, final, is_last, gamma=discount, lam=gae_lambda)
    inside = torch.arange(len(reward))[:, None] <= last[None]
    return advantages.T[inside.T], returns.T[inside.T]
