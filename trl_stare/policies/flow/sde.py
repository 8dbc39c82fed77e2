"""Flow matching and its stochastic sampler: times, noisy actions, one denoising step and its density. Pure torch.

Time runs from 1 (noise) to 0 (action), as in pi0 (arXiv 2410.24164): `x_t = t * noise + (1 - t) * action`, and the velocity that
the network learns is `noise - action`. Shapes: `N` decisions, `C` environment steps of a chunk, `D` dimensions of the latent.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def noisy_actions(actions: Tensor, noise: Tensor, time: Tensor) -> Tensor:
    """`x_t` `[N, C, D]` of `actions` and `noise` `[N, C, D]` at `time` `[N]`.

    Example: action 0, noise 2, time 0.25 give 0.5.
    """
    time = time[:, None, None]
    return time * noise + (1 - time) * actions


def ode_step(x: Tensor, velocity: Tensor, num_steps: int) -> Tensor:
    """One of `num_steps` deterministic (Euler) steps towards the action, `[N, C, D]`."""
    return x - velocity / num_steps


def sde_step(
    x: Tensor, velocity: Tensor, index: Tensor, *, num_steps: int, noise_level: float
) -> tuple[Tensor, Tensor]:
    """Mean `[N, C, D]` and standard deviation `[N, 1, 1]` of the stochastic step number `index` `[N]` out of `num_steps`.

    `mean = x - d * v - d * sigma^2 / (2 t) * (x + (1 - t) * v)` and `std = sigma * sqrt(d)`, with `t = 1 - index / num_steps`,
    `d = 1 / num_steps` and `sigma = noise_level * sqrt(t / (1 - t))`. The last term of the mean is the score that keeps every
    marginal where the ODE has it. At `t = 1` sigma is infinite: as in the source, its denominator is that of the next time.

    Source: Flow-SDE of pi-RL (arXiv 2510.25889) after Flow-GRPO (arXiv 2505.05470); RLinf `openpi_action_model.py`.

    Example: x 1, velocity 0, step 1 of 2 (t = 0.5, sigma = noise_level = 1): mean 1 - 0.5 * 1 / 1 * 1 = 0.5, std 0.707.
    """
    time = 1 - index[:, None, None] / num_steps
    left = torch.where(index == 0, 1 / num_steps, index / num_steps)[:, None, None]
    variance = noise_level**2 * time / left
    mean = ode_step(x, velocity, num_steps) - variance / (2 * time * num_steps) * (x + (1 - time) * velocity)
    return mean, (variance / num_steps).sqrt()


def gaussian_logps(values: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Log-density of every value, in nats.

    Example: a value at the mean, std 1: -0.919.
    """
    return -0.5 * ((values - mean) / std).square() - std.log() - 0.5 * math.log(2 * math.pi)


def gaussian_entropy(std: Tensor) -> Tensor:
    """Differential entropy in nats, `log(std) + log(2 pi e) / 2`: negative where the noise is small.

    Example: std 1: 1.419.
    """
    return std.log() + 0.5 * math.log(2 * math.pi * math.e)
