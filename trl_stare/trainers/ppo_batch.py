"""From trajectories to what PPO learns from: rewards, values, advantages, one row per decision."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from trl_stare.data.trajectory import Trajectory
from trl_stare.interfaces import Observation, VectorEnv, VLAPolicy, token_steps
from trl_stare.losses import gae
from trl_stare.stages import StagePlan, shaped_reward
from trl_stare.trainers.actor_critic import SIMULATOR_CRITICS, simulator_features
from trl_stare.trainers.rewards import task_reward


class DecisionRewards(NamedTuple):
    """What one trajectory of `M` decisions earned.

    Attributes:
        raw (`Tensor`): `[M]`, what the task pays, discounted to the decision within its chunk.
        shaped (`Tensor`): `[M]`, with shaping.
        discount (`Tensor`): `[M]`, `gamma ** steps of the decision`.
    """

    raw: Tensor
    shaped: Tensor
    discount: Tensor


def is_over(trajectory: Trajectory, bootstrap_on_truncation: bool) -> bool:
    """Whether nothing follows its last step: the task ended it, or a time limit that is not bootstrapped."""
    return trajectory.terminated or not bootstrap_on_truncation


def decision_rewards(
    trajectory: Trajectory,
    plan: StagePlan,
    *,
    gamma: float,
    weight: float,
    form: str,
    reward: str = "success",
    final_potential: str = "zero",
    bootstrap_on_truncation: bool = True,
) -> DecisionRewards:
    """Rewards of the decisions of one trajectory; `weight` 0 shapes nothing, `reward` is one of [`REWARDS`].

    A decision of `n` environment steps has discount `gamma^n` and reward `sum_i gamma^i r_i` (options, Sutton et al. 1999);
    the potential is taken where the policy looks: before the decision and after its last step. After the episode's end it is 0,
    unless `final_potential` is `"kept"`. A time limit is an end where it is not bootstrapped.
    """
    bounds = trajectory.bounds
    steps = bounds.diff()
    within = torch.arange(trajectory.num_steps) - trajectory.starts.repeat_interleave(steps)
    owner = torch.arange(len(steps)).repeat_interleave(steps)
    raw = torch.zeros(len(steps)).index_add(0, owner, task_reward(trajectory, reward) * gamma**within)
    discount = gamma ** steps.float()
    if not weight:
        return DecisionRewards(raw, raw, discount)
    potential = plan.potential({name: value[bounds] for name, value in trajectory.signals.items()}, form)
    nothing_follows = torch.zeros(len(steps), dtype=torch.bool)
    nothing_follows[-1] = final_potential == "zero" and is_over(trajectory, bootstrap_on_truncation)
    shaped = shaped_reward(
        raw, potential[:-1], potential[1:], gamma=discount, weight=weight, terminated=nothing_follows
    )
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
    return token_steps(num_tokens, chunk_size)[None] < trajectory.bounds.diff()[:, None]


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
    final = is_last & torch.tensor([is_over(trajectory, bootstrap_on_truncation) for trajectory in trajectories])[None]
    advantages, returns = gae(reward, value, next_value, final, is_last, gamma=discount, lam=gae_lambda)
    inside = torch.arange(len(reward))[:, None] <= last[None]
    return advantages.T[inside.T], returns.T[inside.T]


def num_prefix_steps(trajectory: Trajectory) -> int:
    """Environment steps that were replayed before the policy first looked."""
    return 0 if trajectory.prefix is None else len(trajectory.prefix)


def decision_stages(trajectories: Sequence[Trajectory], plan: StagePlan) -> Tensor:
    """The stage in which each decision was taken, `[M]` int64, all decisions one after the other; the last stage after success."""
    stages = [
        plan.current_stage({name: value[t.starts] for name, value in t.signals.items() if name in plan.reads})
        for t in trajectories
    ]
    return torch.cat(stages).clamp(max=len(plan) - 1)


def normalize_advantages(
    advantages: Tensor, groups: Tensor, num_groups: int, total: Callable[[Tensor], Tensor]
) -> Tensor:
    """Bring the advantages of each group to mean 0 and standard deviation 1: `(A - mean) / (std + 1e-5)`.

    The standard deviation is that of the population, as in RL4VLA (`replay_buffer.py`), so a group of one gets 0.

    Args:
        advantages (`Tensor`): `[M]`. groups (`Tensor`): `[M]` int64, in `0 .. num_groups - 1`.
        total (`Callable`): sums a tensor over all processes, of which each has its own `M`.

    Example: advantages `[1, 3, 5, 9]` in groups `[0, 0, 1, 1]` become `[-1, 1, -1, 1]`, up to the 1e-5.
    """
    belongs = F.one_hot(groups, num_groups).double()
    count = total(belongs.sum(dim=0)).clamp(min=1)
    mean = total(advantages.double() @ belongs) / count
    centred = advantages.double() - mean[groups]
    std = (total(centred.square() @ belongs) / count).sqrt()
    return (centred / (std[groups] + 1e-5)).to(advantages.dtype)


def critic_features(
    trajectories: Sequence[Trajectory], policy: VLAPolicy, env: VectorEnv, plan: StagePlan, *, critic: str
) -> tuple[Tensor, Tensor]:
    """What the critic reads at every decision `[M, F]` and at every end `[N, F]`: signals or stages and time, or the hidden state."""
    if critic not in SIMULATOR_CRITICS:
        final = policy.prepare(observations(trajectories, final=True))
        # as many at once as in the rollout; temperature and generator do not matter: only the hidden state is used
        ends = [
            policy.act(
                {name: value[rows] for name, value in final.items()},
                temperature=1.0,
                generator=torch.Generator().manual_seed(0),
            ).features
            for rows in torch.arange(len(trajectories)).split(env.num_envs)
        ]
        return torch.cat([trajectory.features for trajectory in trajectories]), torch.cat(ends)

    def features_at(chosen: list[Tensor]) -> Tensor:
        signals = {
            name: torch.cat([t.signals[name][at] for t, at in zip(trajectories, chosen, strict=True)])
            for name in env.signal_names
        }
        time = torch.cat([at + num_prefix_steps(t) for t, at in zip(trajectories, chosen, strict=True)])
        return simulator_features(critic, plan, signals, env.signal_names, time / env.max_episode_steps)

    return features_at([t.bounds[:-1] for t in trajectories]), features_at([t.bounds[-1:] for t in trajectories])
