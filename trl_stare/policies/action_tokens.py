"""Continuous actions as bins, the statistics that scale them, and the loss of imitating bins."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

SMALLEST_SCALE = 1e-3
"""In robot units: what moves less stands still."""


class ActionBins:
    """Uniform bins over `[-scale, scale]` of every action dimension.

    With an odd number of bins the middle one is exactly zero: a policy can hold still without drifting.

    Args:
        scale (`Tensor`): `[A]`, largest magnitude per dimension in robot units.
        num_bins (`int`): odd, at least 3. action_dim (`int`): `A`.

    Example: 5 bins and scale 1 stand for -1, -0.5, 0, 0.5, 1.
    """

    def __init__(self, scale: Tensor, *, num_bins: int, action_dim: int):
        if num_bins < 3 or num_bins % 2 == 0:
            raise ValueError(f"`num_bins` must be odd and at least 3, got {num_bins}.")
        if scale.shape != (action_dim,):
            raise ValueError(f"`scale` must hold {action_dim} values, one per action dimension, got {scale.tolist()}.")
        if not (torch.isfinite(scale).all() and (scale > 0).all()):
            raise ValueError(
                f"`scale` must be finite and positive, got {scale.tolist()}. Compute it from demonstrations."
            )
        self.scale, self.num_bins, self.half = scale.float(), num_bins, num_bins // 2

    def encode(self, actions: Tensor) -> Tensor:
        """`[..., A]` robot units -> `[..., A]` bins; values beyond the scale go to the outermost bin."""
        return (actions / self.scale * self.half).round().clamp(-self.half, self.half).long() + self.half

    def decode(self, bins: Tensor) -> Tensor:
        """`[..., A]` bins -> `[..., A]` robot units, the bins' centres."""
        return (bins - self.half) / self.half * self.scale


def norm_stats(actions: Tensor, state: Tensor) -> dict[str, Any]:
    """Statistics of demonstrations, as they travel in a checkpoint's config.

    Args:
        actions (`Tensor`): `[T, A]` robot units. state (`Tensor`): `[T, P]`.

    A dimension that moves in less than one step of a hundred is scaled by its largest magnitude, and one that never does (no
    rotation in the demonstrations) by 0.001, be its unit radians or a share of the controller's range: noise there must not move
    the robot.
    State values that never change keep a std of 1.

    Example: an action dimension of 0 has a scale of 0.001, one of 999 zeros and a 0.5 of 0.5, and 0 to 100 one of 99.
    """
    magnitudes = actions.abs()
    scale, largest = magnitudes.quantile(0.99, dim=0), magnitudes.amax(dim=0)
    scale = torch.where(scale < SMALLEST_SCALE, largest, scale).clamp(min=SMALLEST_SCALE)
    std = state.std(dim=0)
    std = torch.where(std < 1e-6, torch.ones_like(std), std)
    return {"action": {"scale": scale.tolist()}, "state": {"mean": state.mean(dim=0).tolist(), "std": std.tolist()}}


def imitation_loss(
    logits: Tensor, labels: Tensor, *, soft_bins: float, weight: Tensor | None = None, mask: Tensor | None = None
) -> Tensor:
    """Cross-entropy `[N, L, num_bins]` against bins `[N, L]`, smoothed over neighbouring bins.

    The mean over rows of the mean over their tokens in `mask` `[N, L]`, times `weight` `[N]`, whose mean over the dataset is 1: not
    over the batch, of which gradient accumulation and processes take further means.

    The target is `softmax(-(bin - label)^2 / (2 soft_bins^2))`: a near miss costs less than a far one.
    """
    if labels.shape != logits.shape[:2]:
        raise ValueError(f"`labels` must be {tuple(logits.shape[:2])}, got {tuple(labels.shape)}.")
    logps = F.log_softmax(logits.float(), dim=-1)
    if soft_bins:
        bins = torch.arange(logits.shape[-1], device=logits.device)
        target = torch.softmax(-((bins - labels[..., None]) ** 2) / (2 * soft_bins**2), dim=-1)
        losses = -(target * logps).sum(-1)
    else:
        losses = -logps.gather(-1, labels[..., None]).squeeze(-1)
    mask = torch.ones_like(losses) if mask is None else mask.to(losses.dtype)
    losses = (losses * mask).sum(-1) / mask.sum(-1).clamp(min=1)
    return (losses if weight is None else losses * weight).mean()
