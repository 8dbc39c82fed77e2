"""Identities of the update: shaping changes no TD error, and RL4VLA's published update comes out of its settings."""

import numpy as np
import pytest
import torch
from ppo_toy import PLAN, make_trajectory

from trl_stare.interfaces import ActionEval
from trl_stare.trainers import StagePPOConfig
from trl_stare.trainers.ppo_batch import (
    advantages_and_returns,
    decision_rewards,
    decision_stages,
    normalize_advantages,
)
from trl_stare.trainers.ppo_terms import ppo_terms

STEPS, ENVS, TOKENS = 20, 3, 7


@pytest.mark.parametrize("bootstrap", [True, False])
def test_with_values_less_the_potential_shaping_changes_no_advantage(bootstrap):
    """`V' = V - Phi` and w = 1: equal TD errors over chunks of unequal length, terminations, and time limits of either kind."""
    generator = torch.Generator().manual_seed(0)
    lengths, starts = (7, 5, 9), ([0, 3, 6], [0, 3], [0, 3, 6])
    ends = (True, False, False)
    trajectories = [
        make_trajectory(torch.rand(n, generator=generator).tolist(), at, end)
        for n, at, end in zip(lengths, starts, ends, strict=True)
    ]
    values, final = torch.rand(8, generator=generator), torch.rand(3, generator=generator)
    potentials = [PLAN.potential(t.signals) for t in trajectories]
    here = torch.cat([phi[t.starts] for phi, t in zip(potentials, trajectories, strict=True)])
    there = torch.stack([phi[-1] for phi in potentials])
    advantages = {}
    for weight, v, v_final in ((0.0, values, final), (1.0, values - here, final - there)):
        options = {"gamma": 0.9, "weight": weight, "form": "staged", "bootstrap_on_truncation": bootstrap}
        rewards = [decision_rewards(t, PLAN, **options) for t in trajectories]
        advantages[weight], _ = advantages_and_returns(
            trajectories, rewards, v, v_final, gae_lambda=0.8, bootstrap_on_truncation=bootstrap
        )
    torch.testing.assert_close(advantages[1.0], advantages[0.0], atol=1e-6, rtol=1e-5)


def test_normalisation_by_hand():
    advantages, groups = torch.tensor([1.0, 3.0, 5.0, 9.0, 4.0]), torch.tensor([0, 0, 1, 1, 2])
    normal = normalize_advantages(advantages, groups, 4, lambda x: x)
    torch.testing.assert_close(normal, torch.tensor([-1.0, 1.0, -1.0, 1.0, 0.0]), atol=2e-5, rtol=0)
    whole = normalize_advantages(advantages, torch.zeros(5, dtype=torch.int64), 1, lambda x: x)
    assert whole.mean().abs() < 1e-6 and whole.std(correction=0) == pytest.approx(1.0, abs=1e-5)


def test_normalisation_is_over_the_rows_of_all_processes():
    """A twin process with the same rows doubles every sum."""
    rows, groups = torch.randn(9, generator=torch.Generator().manual_seed(0)), torch.arange(9) % 2
    alone = normalize_advantages(torch.cat([rows, rows]), torch.cat([groups, groups]), 2, lambda x: x)
    torch.testing.assert_close(normalize_advantages(rows, groups, 2, lambda x: 2 * x), alone[:9])


def test_the_stage_of_a_decision_is_that_of_the_moment_it_was_taken():
    """Distance 1 to 0 in 4 steps, near below 0.6: rows 0 and 1 are Near, rows 2 and 3 are Hit."""
    trajectory = make_trajectory([0.0] * 4, [0, 1, 3], True)
    assert decision_stages([trajectory, trajectory], PLAN).tolist() == [0, 0, 1, 0, 0, 1]


class PublishedRL4VLA:
    """RL4VLA's update as published (github.com/gen-robot/RL4VLA), restated in NumPy: `replay_buffer.py` (`compute_returns_ppo`, and
    `insert`, which copies one log-probability of an action into 7 columns) and `openvla_train.py` (`train_ppo_step`)."""

    gamma, lam, clip, huber = 0.99, 0.95, 0.2, 10.0

    def buffer(self, rewards, values, final_values, done):
        """`rewards` and `values` `[T, N]`; `masks[t + 1]` is 0 where the episode ended with step t, by a time limit too."""
        values, masks = np.concatenate([values, final_values[None]]), 1.0 - done
        returns, following = np.zeros_like(rewards), np.zeros(rewards.shape[1])
        for t in reversed(range(len(rewards))):
            delta = rewards[t] + self.gamma * values[t + 1] * masks[t] - values[t]
            following = delta + self.gamma * self.lam * masks[t] * following
            returns[t] = following + values[t]
        advantages = returns - values[:-1]
        return returns, (advantages - advantages.mean()) / (advantages.std() + 1e-5)

    def losses(self, logps, old_logps, advantages, values, old_values, returns):
        """`logps` `[B, 1]` of the whole action, `old_logps` `[B, 7]` all columns equal, the others `[B, 1]`."""
        ratio = (logps - old_logps).exp()
        first, second = ratio * advantages, ratio.clamp(1 - self.clip, 1 + self.clip) * advantages
        policy = -torch.min(first, second).sum(dim=-1, keepdim=True).mean()
        near = old_values + (values - old_values).clamp(-self.clip, self.clip)
        errors = []
        for error in (returns - values, returns - near):
            small, large = (error.abs() <= self.huber).float(), (error.abs() > self.huber).float()
            errors.append(small * error**2 / 2 + large * self.huber * (error.abs() - self.huber / 2))
        return policy, torch.max(*errors).mean()


def test_rl4vla_settings_give_rl4vlas_update_but_for_its_factor_of_seven(tmp_path):
    generator = torch.Generator().manual_seed(0)
    reward, value = torch.randn(2, ENVS, STEPS, generator=generator)
    value *= 15  # errors beyond the Huber threshold and the value clip occur
    old_logps = -torch.rand(ENVS * STEPS, TOKENS, generator=generator)
    new_logps = (old_logps + 0.1 * torch.randn(old_logps.shape, generator=generator)).requires_grad_()
    new_values = (value.flatten() + torch.randn(ENVS * STEPS, generator=generator)).requires_grad_()

    published = PublishedRL4VLA()
    done = np.zeros((STEPS, ENVS))
    done[-1] = 1.0
    returns, advantages = published.buffer(
        reward.T.double().numpy(), value.T.double().numpy(), np.full(ENVS, 99.0), done
    )
    rows = [torch.tensor(x.T.reshape(-1, 1)).float() for x in (advantages, returns)]
    # `insert` broadcasts the one log-probability of an action over the columns of the buffer
    stored = old_logps.sum(dim=-1, keepdim=True).expand(-1, TOKENS)
    policy, critic = published.losses(
        new_logps.sum(dim=-1, keepdim=True), stored, rows[0], new_values[:, None], value.reshape(-1, 1), rows[1]
    )
    expected = torch.autograd.grad(policy + critic, (new_logps, new_values))

    args = StagePPOConfig.preset(
        "rl4vla-7b", str(tmp_path), stage_aware=False, policy_coef=7.0, bf16=False, use_cpu=True
    )
    trajectories = [make_trajectory(row.tolist(), list(range(STEPS)), terminated=False) for row in reward]
    rewards = [decision_rewards(t, PLAN, gamma=args.gamma, weight=0.0, form=args.potential_form) for t in trajectories]
    advantages, returns = advantages_and_returns(
        trajectories, rewards, value.flatten(), torch.full((ENVS,), 99.0), gae_lambda=args.gae_lambda,
        bootstrap_on_truncation=False,  # as published; the preset bootstraps
    )  # fmt: skip
    normal = normalize_advantages(advantages, torch.zeros(len(advantages), dtype=torch.int64), 1, lambda x: x)
    torch.testing.assert_close(returns, rows[1][:, 0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(normal, rows[0][:, 0], rtol=1e-4, atol=1e-4)
    batch = {
        "logps": old_logps, "mask": torch.ones_like(old_logps, dtype=torch.bool), "advantages": normal,
        "values": value.flatten(), "returns": returns,
    }  # fmt: skip
    evaluation = ActionEval(new_logps, torch.zeros_like(old_logps), torch.zeros(ENVS * STEPS, 1))
    terms = ppo_terms(evaluation, new_values, batch, args, action_dim=TOKENS)
    torch.testing.assert_close(terms.policy.loss * 7, policy, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(terms.value_loss, critic, rtol=1e-4, atol=1e-4)
    assert 0.0 < terms.policy.clipfrac < 1.0
    ours = torch.autograd.grad(terms.actor_loss(args) + args.value_coef * terms.value_loss, (new_logps, new_values))
    for got, wanted in zip(ours, expected, strict=True):
        assert wanted.abs().sum() > 0
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("level", ["token", "action", "chunk"])
def test_the_loss_of_two_processes_is_that_of_one(level, tmp_path):
    """Ten whole decisions in one, ten of a single step in the other."""
    g = torch.Generator().manual_seed(0)
    args = StagePPOConfig(str(tmp_path), ratio_level=level, entropy_coef=0.1, use_cpu=True)
    mask = torch.ones(20, 8, dtype=torch.bool)
    mask[10:, 2:] = False
    values = torch.zeros(20)
    batch = {"logps": -torch.rand(20, 8, generator=g), "mask": mask, "advantages": torch.randn(20, generator=g)}
    batch |= {"values": values, "returns": values}
    evaluation = ActionEval(batch["logps"] + 0.05, torch.rand(20, 8, generator=g), torch.zeros(20, 1))

    def loss(rows, *weights):
        part = {name: value[rows] for name, value in batch.items()}
        terms = ppo_terms(ActionEval(*(x[rows] for x in evaluation)), values[rows], part, args, action_dim=2)
        return terms.actor_loss(args, *weights)

    halves = [loss(rows, 2 * mask[rows].sum() / mask.sum(), 1.0) for rows in (slice(10), slice(10, 20))]
    torch.testing.assert_close(sum(halves) / 2, loss(slice(20)))
