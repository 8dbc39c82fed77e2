"""From a rollout to the rows that the updates of an iteration learn from."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from trl_stare.data.trajectory import Trajectory
from trl_stare.trainers.ppo_batch import (
    advantages_and_returns,
    critic_features,
    decision_rewards,
    decision_stages,
    executed_tokens,
    normalize_advantages,
    observations,
)
from trl_stare.trainers.processes import global_moments, total
from trl_stare.trainers.reference import rollout_logps
from trl_stare.trainers.stage_ppo_metrics import explained_variance, rollout_metrics

if TYPE_CHECKING:
    from trl_stare.trainers.stage_ppo_trainer import StagePPOTrainer


@torch.no_grad()
def make_batch(trainer: StagePPOTrainer, trajectories: Sequence[Trajectory]) -> dict[str, Any]:
    """What the updates of an iteration learn from, one row per decision, all trajectories one after the other.

    Returns:
        `dict[str, Any]`: model `inputs`; `logps`, `mask` and, with a reference, `ref_logps`, `[M, L]`; `trace`; `features`
        `[M, F]`; `values`, normalised `advantages` and `returns`, `[M]`.
    """
    args, policy, plan = trainer.args, trainer.policy, trainer.plan
    rewards = [
        decision_rewards(
            trajectory,
            trainer.shaping_plan,
            gamma=args.gamma,
            weight=args.shaping_weight if args.stage_aware else 0.0,
            form=args.potential_form,
            reward=args.reward,
            final_potential=args.final_potential,
            bootstrap_on_truncation=args.bootstrap_on_truncation,
        )
        for trajectory in trajectories
    ]
    # as in the update, whose forward accelerate puts under autocast: else bfloat16 would silently be float32 here
    with trainer.accelerator.autocast():
        read = critic_features(trajectories, policy, trainer.env, plan, critic=args.critic)
        features, final_features = (part.to(args.device) for part in read)
        head = trainer.model.value_head
        head.calibrate(*global_moments(trainer.accelerator, features.float()))
        values, final_values = head(features).float().cpu(), head(final_features).float().cpu()
        scores = _score(trainer, trajectories)
    advantages, returns = advantages_and_returns(
        trajectories,
        rewards,
        values,
        final_values,
        gae_lambda=args.gae_lambda,
        bootstrap_on_truncation=args.bootstrap_on_truncation,
    )
    by_stage = args.advantage_norm == "stage"
    groups = decision_stages(trajectories, plan) if by_stage else torch.zeros(len(values), dtype=torch.int64)
    trainer.record(rollout_metrics(trajectories, rewards, plan, plays_on=args.ignore_terminations))
    trainer.record({"value/explained_variance": [explained_variance(values, returns)]})
    return scores | {
        "features": features.cpu(),
        "values": values,
        "advantages": normalize_advantages(advantages, groups, len(plan), partial(total, trainer.accelerator)),
        "returns": returns,
    }


def _score(trainer: StagePPOTrainer, trajectories: Sequence[Trajectory]) -> dict[str, Any]:
    """What was done, and how likely it was: under the policy that did it, and under the reference."""
    args, policy = trainer.args, trainer.policy
    inputs, trace = policy.prepare(observations(trajectories)), torch.cat([t.trace for t in trajectories])
    options = {"temperature": args.temperature, "batch_size": -(-len(trace) // args.num_minibatches)}
    if args.recompute_logps:
        logps = rollout_logps(policy, inputs, trace, **options)
    else:
        logps = torch.cat([t.logps for t in trajectories])
    mask = torch.cat([executed_tokens(t, logps.shape[1], policy.chunk_size) for t in trajectories])
    scores = {"inputs": inputs, "trace": trace, "logps": logps, "mask": mask}
    if trainer.reference is not None:
        scores["ref_logps"] = trainer.reference.to(args.device).logps(inputs, trace, **options)
    return scores
