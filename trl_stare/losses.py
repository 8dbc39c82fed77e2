"""The mathematics of the trainers: one equation per function, pure torch, shapes checked first.

Shapes: `T` decisions in time, `N` environments, `B` decisions of a batch, `L` action tokens of a decision, `P` pairs.
Nothing is broadcast: tensors of different shapes are refused.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

RATIO_LEVELS = ("token", "action", "chunk")
"""Over how many action tokens one importance ratio of PPO is taken: one, one environment step's, one decision's."""

PREFERENCE_LOSSES = ("sigmoid", "hinge", "ipo", "robust")
"""The losses of TRL's `DPOTrainer` that are functions of one margin per pair."""


class PolicyLoss(NamedTuple):
    """What [`ppo_policy_loss`] returns; all scalars.

    Attributes:
        loss (`Tensor`): differentiable.
        clipfrac (`Tensor`): share of ratios outside `[1 - clip_range, 1 + clip_range]`, detached.
        approx_kl (`Tensor`): KL(old | new) per ratio in nats, detached.
    """

    loss: Tensor
    clipfrac: Tensor
    approx_kl: Tensor


def _check_shapes(shape: torch.Size, ndim: int, **tensors: Tensor) -> None:
    """Raise `ValueError` unless all tensors have `shape`, and it has `ndim` dimensions."""
    for name, value in tensors.items():
        if value.shape != shape or value.ndim != ndim:
            expected = [*shape] if len(shape) == ndim else f"{ndim} dimensions"
            raise ValueError(f"`{name}` must have shape {expected}, got {[*value.shape]}. Nothing is broadcast here.")


def _check_bool(**tensors: Tensor) -> None:
    for name, value in tensors.items():
        if value.dtype != torch.bool:
            raise ValueError(f"`{name}` must be bool, got {value.dtype}. Convert it.")


def gae(
    reward: Tensor,
    value: Tensor,
    next_value: Tensor,
    terminated: Tensor,
    ended: Tensor,
    *,
    gamma: float | Tensor,
    lam: float,
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016, eq. 16), bootstrapping through time limits.

    `delta_t = r_t + gamma_t * V(s_{t+1}) * (1 - terminated_t) - V(s_t)`,
    `A_t = delta_t + gamma_t * lam * (1 - ended_t) * A_{t+1}`, with `A_T = 0`.

    Args:
        reward (`Tensor`): `[T, N]` float. value (`Tensor`): `[T, N]`, `V(s_t)`.
        next_value (`Tensor`): `[T, N]`, `V(s_{t+1})`; where an episode ended, the value of its own final observation.
        terminated (`Tensor`): `[T, N]` bool, the task ended the episode: nothing follows, no bootstrap.
        ended (`Tensor`): `[T, N]` bool, terminated or truncated: the next row belongs to another episode.
        gamma (`float` or `Tensor`): discount per decision; `[T, N]` where decisions differ in length (semi-MDP).
        lam (`float`): in [0, 1].

    Returns:
        `tuple[Tensor, Tensor]`: advantages and returns (`advantages + value`), `[T, N]`.

    Raises:
        ValueError: if shapes differ, flags are not bool, or a terminated decision has not ended.

    Example: one environment, rewards `[0, 1]`, values 0, the second decision terminated, gamma = lam = 0.5:
    advantages `[0.25, 1]`.
    """
    given = {"value": value, "next_value": next_value, "terminated": terminated, "ended": ended}
    if isinstance(gamma, Tensor):
        given["gamma"] = gamma
    _check_shapes(reward.shape, 2, reward=reward, **given)
    _check_bool(terminated=terminated, ended=ended)
    if (terminated & ~ended).any():
        raise ValueError("`ended` must be true wherever `terminated` is. Pass `terminated | truncated`.")
    delta = reward + gamma * next_value * ~terminated - value
    carry = (gamma * lam * ~ended).to(delta.dtype)
    advantages = torch.empty_like(delta)
    following = torch.zeros_like(delta[0])
    for t in reversed(range(len(delta))):
        following = delta[t] + carry[t] * following
        advantages[t] = following
    return advantages, advantages + value


def ppo_policy_loss(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_range: float,
    level: str = "token",
    action_dim: int | None = None,
) -> PolicyLoss:
    """PPO's clipped surrogate (Schulman et al. 2017, eq. 7), `-mean min(rho * A, clip(rho, 1 - eps, 1 + eps) * A)`.

    `rho = exp(sum of (logps - old_logps))` over the unmasked tokens of one unit, and the mean is over units with any.
    With one ratio per token a chunk goes on learning where one ratio over all its tokens is clipped almost at once.

    Args:
        logps (`Tensor`): `[B, L]`, differentiable. old_logps (`Tensor`): `[B, L]`, when the action was sampled.
        advantages (`Tensor`): `[B]`. mask (`Tensor`): `[B, L]` bool, tokens whose action was executed.
        clip_range (`float`): `eps` > 0.
        level (`str`): the unit: `"token"`, `"action"` (`action_dim` tokens, one environment step) or `"chunk"` (`L`).
        action_dim (`int`, *optional*): `A`, for `level="action"`; divides `L`.

    The KL is Schulman's k3 estimate `mean(rho - 1 - log rho)`, per unit.

    Raises:
        ValueError: if shapes do not fit, nothing is unmasked, or `level`, `action_dim` or `clip_range` is invalid.

    Example: `logps - old_logps = log 2` everywhere, advantages 1, `clip_range` 0.2: loss -1.2, `clipfrac` 1.
    """
    _check_shapes(logps.shape, 2, logps=logps, old_logps=old_logps, mask=mask)
    _check_shapes(logps.shape[:1], 1, advantages=advantages)
    _check_bool(mask=mask)
    if not mask.any():
        raise ValueError("`mask` must keep at least one token, got none. Drop the batch.")
    if clip_range <= 0:
        raise ValueError(f"`clip_range` must be positive, got {clip_range}.")
    size = _unit_size(level, logps.shape[1], action_dim)
    kept = mask.unflatten(1, (-1, size)).any(dim=-1)
    # what a masked token scores plays no part, not even where it is -inf
    log_ratio = torch.where(mask, logps - old_logps, 0.0).unflatten(1, (-1, size)).sum(dim=-1)[kept]
    advantage = advantages.unsqueeze(1).expand(kept.shape)[kept]

    ratio = log_ratio.exp()
    clipped = ratio.clamp(1.0 - clip_range, 1.0 + clip_range)
    loss = -torch.minimum(ratio * advantage, clipped * advantage).mean()
    with torch.no_grad():
        clipfrac = ((ratio - 1.0).abs() > clip_range).float().mean()
        approx_kl = (ratio - 1.0 - log_ratio).mean()
    return PolicyLoss(loss, clipfrac, approx_kl)


def _unit_size(level: str, num_tokens: int, action_dim: int | None) -> int:
    """Action tokens that share one importance ratio."""
    if level not in RATIO_LEVELS:
        raise ValueError(f"`level` must be one of {RATIO_LEVELS}, got {level!r}.")
    if level == "action":
        if action_dim is None or action_dim < 1 or num_tokens % action_dim:
            raise ValueError(f"`action_dim` must divide the {num_tokens} tokens of a decision, got {action_dim}.")
        return action_dim
    return 1 if level == "token" else num_tokens


def ppo_value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    *,
    clip_range: float | None,
    huber_delta: float | None,
) -> Tensor:
    """PPO's value loss, `mean max(l(V - R), l(V_old + clip(V - V_old, -eps, eps) - R))`.

    `l(e) = e^2 / 2`, or the Huber function `d * (|e| - d / 2)` where `|e| > d`.

    Args:
        values (`Tensor`): `[B]`, differentiable. old_values (`Tensor`): `[B]`, at the rollout. returns (`Tensor`):
            `[B]`.
        clip_range (`float`, *optional*): `eps`; `None` does not clip, and the loss is `mean l(V - R)`.
        huber_delta (`float`, *optional*): `d`; `None` is the square everywhere.

    Returns:
        `Tensor`: scalar.

    Raises:
        ValueError: if shapes differ.

    Example: value 1, old value 0, return 3, `clip_range` 0.5, no Huber: max(2, 3.125) = 3.125.
    """
    _check_shapes(returns.shape, 1, returns=returns, values=values, old_values=old_values)

    def loss(prediction: Tensor) -> Tensor:
        if huber_delta is None:
            return 0.5 * (prediction - returns).square()
        return F.huber_loss(prediction, returns, reduction="none", delta=huber_delta)

    losses = loss(values)
    if clip_range is not None:
        losses = torch.maximum(losses, loss(old_values + (values - old_values).clamp(-clip_range, clip_range)))
    return losses.mean()


def reference_kl(logps: Tensor, ref_logps: Tensor, mask: Tensor) -> Tensor:
    """KL(new | reference) in nats per action token, from tokens that the policy sampled itself.

    `mean(exp(d) - 1 - d)` with `d = ref_logps - logps`: Schulman's k3 (http://joschu.net/blog/kl-approx.html), never negative, as in
    GRPO (arXiv 2402.03300, eq. 4).

    Args:
        logps (`Tensor`): `[B, L]`, differentiable. ref_logps (`Tensor`): `[B, L]`, of the same tokens.
        mask (`Tensor`): `[B, L]` bool, tokens whose action was executed.

    Returns:
        `Tensor`: scalar, the mean over unmasked tokens.

    Raises:
        ValueError: if shapes differ or nothing is unmasked.

    Example: `ref_logps - logps = log 2` everywhere: 2 - 1 - log 2 = 0.307.
    """
    _check_shapes(logps.shape, 2, logps=logps, ref_logps=ref_logps, mask=mask)
    _check_bool(mask=mask)
    if not mask.any():
        raise ValueError("`mask` must keep at least one token, got none. Drop the batch.")
    gap = (ref_logps - logps)[mask]
    return (gap.exp() - 1.0 - gap).mean()


def margin_loss(margins: Tensor, *, beta: float, loss_type: str = "sigmoid", label_smoothing: float = 0.0) -> Tensor:
    """The losses of TRL's `DPOTrainer` that are functions of one margin `m` per pair, by TRL's names.

    - `sigmoid` (DPO, arXiv 2305.18290, eq. 7): `-log sigmoid(beta * m)`
    - `hinge` (SLiC, arXiv 2305.10425): `max(0, 1 - beta * m)`
    - `ipo` (arXiv 2310.12036, eq. 17): `(m - 1 / (2 * beta))^2`; `beta` is the paper's `tau`
    - `robust` (arXiv 2403.00409): `(-(1 - e) * log sigmoid(beta * m) + e * log sigmoid(-beta * m)) / (1 - 2 * e)`,
      whose mean over labels that are flipped with probability `e` is the sigmoid loss of the true ones

    Args:
        margins (`Tensor`): `[P]`, the chosen side's score minus the rejected one's, differentiable.
        beta (`float`): > 0. loss_type (`str`): one of [`PREFERENCE_LOSSES`].
        label_smoothing (`float`): `e` in [0, 0.5), of `robust` only; 0 is `sigmoid`.

    Returns:
        `Tensor`: `[P]` losses.

    Raises:
        ValueError: if an argument is out of range, or the loss is another.

    Example: margin 1, beta 0.5: `hinge` 0.5, `ipo` 0 (its target is 1 / (2 beta) = 1), `sigmoid` log(1 + e^-0.5) = 0.474.
    """
    _check_shapes(margins.shape, 1, margins=margins)
    if not beta > 0:
        raise ValueError(f"`beta` must be positive, got {beta}.")
    if loss_type not in PREFERENCE_LOSSES:
        raise ValueError(
            f"`loss_type` must be one of {PREFERENCE_LOSSES}, got {loss_type!r}: it needs a scalar margin."
        )
    if not 0 <= label_smoothing < 0.5 or (label_smoothing and loss_type != "robust"):
        raise ValueError(f"`label_smoothing` must be in [0, 0.5), 0 except for 'robust', got {label_smoothing}.")
    if loss_type == "ipo":
        return (margins - 1 / (2 * beta)).square()
    logits = beta * margins
    if loss_type == "hinge":
        return F.relu(1 - logits)
    kept, flipped = (1 - label_smoothing) * F.logsigmoid(logits), label_smoothing * F.logsigmoid(-logits)
    return (flipped - kept) / (1 - 2 * label_smoothing)


def centered_scores(logps: Tensor, ref_logps: Tensor, trace: Tensor, mask: Tensor | None = None) -> Tensor:
    """Log-likelihood of each decision plus `KL(ref | pi)`: less the reference's score, its mean over the reference's actions is 0.

    `sum_l [log pi_l(a_l) + sum_v ref_l(v) * (log ref_l(v) - log pi_l(v))]`, so that
    `score - log ref(a) = log pi(a) / ref(a) - E_{a' ~ ref}[log pi(a') / ref(a')]`.

    Without the KL, a preference loss on long segments learns to tell *states* apart: wherever pi leaves the reference, in whatever
    direction, the log-ratio of the reference's own actions falls, so a policy that is spoilt in the states of rejected
    segments satisfies every pair. With it, only the choice among a state's actions counts. Given the prefix of `a`, it
    holds token by token, for autoregressive policies too. Ours; not in the paper.

    Args:
        logps (`Tensor`): `[S, L, V]` log-probabilities of the policy, differentiable. ref_logps (`Tensor`): `[S, L, V]`.
        trace (`Tensor`): `[S, L]` int64, the tokens taken, sampled from the reference.
        mask (`Tensor`, *optional*): `[S, L]` bool, the tokens `l` that count; default all.

    Returns:
        `Tensor`: `[S]`.

    Raises:
        ValueError: if shapes differ.

    Example: one token, reference (1/2, 1/2), policy (4/5, 1/5): KL 0.223, scores 0 and -1.386; less log 1/2, the
    reference's, 0.693 and -0.693.
    """
    _check_shapes(logps.shape, 3, logps=logps, ref_logps=ref_logps)
    _check_shapes(logps.shape[:2], 2, trace=trace)
    taken = logps.gather(-1, trace.unsqueeze(-1)).squeeze(-1)
    kl = (ref_logps.exp() * (ref_logps - logps)).sum(dim=-1)
    if mask is None:
        return (taken + kl).sum(dim=-1)
    _check_shapes(trace.shape, 2, mask=mask)
    return ((taken + kl) * mask).sum(dim=-1)


def stage_preference_loss(
    chosen_scores: Tensor,
    rejected_scores: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    chosen_costs: Tensor,
    rejected_costs: Tensor,
    *,
    beta: float,
    cost_coef: float,
    margin_sign: int = 1,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """StA-TPO (arXiv 2512.05107), `-log sigmoid(beta * (q_hat(tau+) - q_hat(tau-)))`.

    `q_hat = score - ref - s * lambda * cost` of one stage. With another `loss_type`, [`margin_loss`] of the difference.

    Args:
        chosen_scores (`Tensor`): `[P]`, mean over the stage's steps of `log pi(a_t | s_t)`, differentiable.
        rejected_scores (`Tensor`): `[P]`. ref_chosen, ref_rejected (`Tensor`): `[P]`, under the reference policy.
        chosen_costs, rejected_costs (`Tensor`): `[P]`, the stage's cost `l_k` of either side.
        beta (`float`): > 0. cost_coef (`float`): `lambda` >= 0; 0 leaves costs out.
        margin_sign (`int`): `s`. +1 as the paper states it: a pair that costs tell apart already is pushed *less*. -1
            is ODPO's (arXiv 2402.10571): it has to be told apart by a larger margin.
        loss_type (`str`), label_smoothing (`float`): see [`margin_loss`].
        weights (`Tensor`, *optional*): `[P]`, multiply the losses (weights of stages).

    Returns:
        `tuple[Tensor, Tensor]`: `[P]` losses, and `[P]` logits, `beta` times the margin, > 0 where the pair is right.

    Raises:
        ValueError: if shapes differ, or an option is invalid.

    Example: scores 2 and 1, references 0, costs 0.5 and 1.5, beta 1, lambda 0.1: logit 1.1 as stated, 0.9 with -1.
    """
    given = {
        "chosen_scores": chosen_scores,
        "rejected_scores": rejected_scores,
        "ref_chosen": ref_chosen,
        "ref_rejected": ref_rejected,
        "chosen_costs": chosen_costs,
        "rejected_costs": rejected_costs,
    }
    if weights is not None:
        given["weights"] = weights
    _check_shapes(chosen_scores.shape, 1, **given)
    if not cost_coef >= 0:
        raise ValueError(f"`cost_coef` must be >= 0, got {cost_coef}. The sign is `margin_sign`.")
    if margin_sign not in (1, -1):
        raise ValueError(f"`margin_sign` must be 1 (as stated) or -1 (ODPO), got {margin_sign}.")
    chosen = chosen_scores - ref_chosen - margin_sign * cost_coef * chosen_costs
    rejected = rejected_scores - ref_rejected - margin_sign * cost_coef * rejected_costs
    margins = chosen - rejected
    losses = margin_loss(margins, beta=beta, loss_type=loss_type, label_smoothing=label_smoothing)
    return (losses if weights is None else weights * losses), beta * margins
