"""The terms of PPO's loss on one minibatch, and what is logged of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trl_stare.interfaces import ActionEval
from trl_stare.losses import PolicyLoss, ppo_policy_loss, ppo_value_loss, reference_kl
from trl_stare.trainers.stage_ppo_config import StagePPOConfig


class PPOTerms(NamedTuple):
    """What [`ppo_terms`] returns; all scalars.

    Attributes:
        policy (`PolicyLoss`): the clipped surrogate. value_loss (`Tensor`): of the critic.
        entropy (`Tensor`): nats per token. kl (`Tensor`): to the reference, nats per token; 0 where there is none.
        largest_ratio (`Tensor`): `exp(max |new - old|)` over tokens, detached: 1 before the first update of an iteration.
    """

    policy: PolicyLoss
    value_loss: Tensor
    entropy: Tensor
    kl: Tensor
    largest_ratio: Tensor

    def actor_loss(
        self, args: StagePPOConfig, of_tokens: float | Tensor = 1.0, of_decisions: float | Tensor = 1.0
    ) -> Tensor:
        """What the policy descends, its parts weighted as configured.

        Args:
            of_tokens (`float` or `Tensor`), of_decisions (`float` or `Tensor`): what a mean over tokens and one over decisions weigh
                in this process, see [`gradient_weights`]. A ratio of a whole chunk is a decision's.
        """
        loss = (of_decisions if args.ratio_level == "chunk" else of_tokens) * args.policy_coef * self.policy.loss
        if args.entropy_coef:  # times 0 the backward would still go through it
            loss = loss - of_tokens * args.entropy_coef * self.entropy
        return loss + of_tokens * args.kl_coef * self.kl if args.kl_coef else loss

    def metrics(self) -> dict[str, list[float]]:
        """By the names they are logged under."""
        named = {
            "policy/loss": self.policy.loss,
            "policy/approx_kl": self.policy.approx_kl,
            "policy/clipfrac": self.policy.clipfrac,
            "policy/entropy": self.entropy,
            "policy/reference_kl": self.kl,
            "policy/largest_ratio": self.largest_ratio,
            "value/loss": self.value_loss,
        }
        values = torch.stack([value.detach().float() for value in named.values()]).tolist()  # one transfer for all
        return {name: [value] for name, value in zip(named, values, strict=True)}


def ppo_terms(
    evaluation: ActionEval, values: Tensor, batch: Mapping[str, Any], args: StagePPOConfig, *, action_dim: int
) -> PPOTerms:
    """PPO's terms for `B` decisions of `L` tokens.

    Args:
        evaluation ([`ActionEval`]): of the decisions by the present policy. values (`Tensor`): `[B]`, of the present critic.
        batch (`Mapping`): `logps`, `mask` `[B, L]`, `advantages`, `values`, `returns` `[B]`, and `ref_logps` `[B, L]` where
            there is a reference.
        args ([`StagePPOConfig`]): clipping and level of the ratio, clipping and Huber threshold of the value loss.
        action_dim (`int`): tokens of one environment step.
    """
    logps, mask = evaluation.logps, batch["mask"]
    policy = ppo_policy_loss(
        logps,
        batch["logps"],
        batch["advantages"],
        mask,
        clip_range=args.clip_range,
        level=args.ratio_level,
        action_dim=action_dim,
    )
    value_loss = ppo_value_loss(
        values, batch["values"], batch["returns"], clip_range=args.value_clip_range, huber_delta=args.huber_delta
    )
    kl = reference_kl(logps, batch["ref_logps"], mask) if "ref_logps" in batch else logps.new_zeros(())
    ratio = (logps.detach() - batch["logps"]).abs()[mask].max().exp()
    return PPOTerms(policy, value_loss, evaluation.entropies[mask].mean(), kl, ratio)
